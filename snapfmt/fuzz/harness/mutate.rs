//! Mutations for runs without libFuzzer: from a fixed seed, so that a failure is reproducible.

/// Marsaglia's xorshift64*.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `bound`, which is not 0.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound
    }

    fn byte(&mut self) -> u8 {
        const EDGES: [u8; 8] = [0, 1, 2, 0x10, 0x40, 0x7f, 0x80, 0xff];
        match self.below(2) {
            0 => EDGES[self.below(EDGES.len())],
            _ => self.below(256) as u8,
        }
    }

    /// Changes an input in one to four places: bits, bytes, and runs that are inserted, removed or copied.
    pub(crate) fn mutate(&mut self, input: &mut Vec<u8>) {
        for _ in 0..self.below(4) + 1 {
            let at = self.below(input.len() + 1);
            let run = self.below(input.len() - at + 1).min(self.below(24));
            match self.below(6) {
                0 if at < input.len() => input[at] ^= 1 << self.below(8),
                1 if at < input.len() => input[at] = self.byte(),
                2 => drop(input.drain(at..at + run)),
                3 => {
                    let bytes: Vec<_> = (0..self.below(24)).map(|_| self.byte()).collect();
                    drop(input.splice(at..at, bytes));
                }
                4 => {
                    let to = self.below(input.len() + 1);
                    let bytes = input[at..at + run].to_vec();
                    drop(input.splice(to..to, bytes));
                }
                _ => input[at..at + run].iter_mut().for_each(|byte| *byte = 0xff),
            }
        }
    }
}
