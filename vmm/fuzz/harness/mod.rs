//! The function of the fuzz target. libFuzzer calls it on nightly; `tests/fuzz_corpus.rs` calls it on stable.

use vmm::VmState;
use vmm::state::{STATE_KIND, STATE_VERSION};

/// A released state; inputs are patches of it.
pub(crate) const TEMPLATE: &[u8] = include_bytes!("../../tests/golden/vm-state-v2.bin");

/// Input: a new length (2 bytes, 0 for the template's own), then patches of the template: an offset (2 bytes), a length
/// (1 byte, modulo 16, plus 1) and as many bytes. So inputs are a few bytes long, although the state has 15 KB, mostly
/// register contents with any value.
pub(crate) fn state_decode(input: &[u8]) {
    let [a, b, patches @ ..] = input else {
        return;
    };
    let mut state = patched(patches);
    let len = usize::from(u16::from_le_bytes([*a, *b]));
    if len != 0 {
        state.resize(len, 0);
    }
    // A decoded state encodes to the same bytes: nothing is guessed, dropped or read twice.
    if let Ok(decoded) = VmState::decode(STATE_KIND, STATE_VERSION, &state) {
        assert!(decoded.encode() == state, "decoding and encoding changed the state");
    }
}

fn patched(mut patches: &[u8]) -> Vec<u8> {
    let mut state = TEMPLATE.to_vec();
    while let [a, b, len, rest @ ..] = patches {
        let (bytes, rest) = rest.split_at((usize::from(*len) % 16 + 1).min(rest.len()));
        let start = usize::from(u16::from_le_bytes([*a, *b]));
        for (at, byte) in (start..).zip(bytes) {
            if let Some(target) = state.get_mut(at) {
                *target = *byte;
            }
        }
        patches = rest;
    }
    state
}
