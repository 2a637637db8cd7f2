//! How long a request is retried, and the pauses between tries.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::time::{Duration, Instant};

/// The longest silence of a server. A busy one sends the first byte sooner, and a guest should not wait longer.
pub(crate) const SILENCE: Duration = Duration::from_secs(10);
/// The longest time that a connection may take to be made.
pub(crate) const CONNECT: Duration = Duration::from_secs(5);
/// How long a connection is kept for the next request.
pub(crate) const IDLE: Duration = Duration::from_secs(60);

/// How temporary errors are retried: a busy server, a lost connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// How long to retry without any progress, from the first failure. A thread that waits, for example a vCPU, waits
    /// as long.
    pub patience: Duration,
    /// The first pause. Each further one is twice as long; then a random part of up to a half is taken off.
    pub first_pause: Duration,
    /// The longest pause.
    pub longest_pause: Duration,
}

impl Default for Retry {
    /// 30 seconds; pauses of 50 ms to 2 s.
    fn default() -> Self {
        Self {
            patience: Duration::from_secs(30),
            first_pause: Duration::from_millis(50),
            longest_pause: Duration::from_secs(2),
        }
    }
}

/// The failures of one request in a row.
#[derive(Debug, Default)]
pub(crate) struct Attempts {
    failures: u32,
    since: Option<Instant>,
}

impl Attempts {
    /// Some bytes have arrived, so the server is reachable.
    pub(crate) fn progress(&mut self) {
        *self = Self::default();
    }

    /// How long to pause after one more failure; `None` when the patience is over.
    pub(crate) fn failed(&mut self, retry: &Retry) -> Option<Duration> {
        let since = *self.since.get_or_insert_with(Instant::now);
        let doubled = 1u32.checked_shl(self.failures).unwrap_or(u32::MAX);
        self.failures += 1;
        let pause = retry.first_pause.saturating_mul(doubled).min(retry.longest_pause);
        let pause = pause - pause.mul_f64(random() / 2.0);
        (since.elapsed() + pause < retry.patience).then_some(pause)
    }

    /// How many failures there were, and for how long.
    pub(crate) fn so_far(&self) -> (u32, Duration) {
        (self.failures, self.since.map_or(Duration::ZERO, |since| since.elapsed()))
    }
}

/// At least 0, less than 1. The keys of a hash map's state are random in each thread, and differ from call to call.
fn random() -> f64 {
    let bits = RandomState::new().hash_one(0u8) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_with_jitter_until_patience_is_over() {
        let retry = Retry {
            patience: Duration::from_secs(3),
            first_pause: Duration::from_millis(100),
            longest_pause: Duration::from_millis(400),
        };
        let mut attempts = Attempts::default();
        for longest in [100, 200, 400, 400] {
            let pause = attempts.failed(&retry).expect("patience is not over").as_millis();
            assert!((longest / 2..=longest).contains(&pause), "{pause} of {longest}");
        }
        assert_eq!(attempts.so_far().0, 4);
        attempts.progress();
        assert_eq!(attempts.so_far(), (0, Duration::ZERO));
        let none = Retry { patience: Duration::ZERO, ..retry };
        assert_eq!(attempts.failed(&none), None);
    }

    #[test]
    fn jitter_differs() {
        let numbers: Vec<_> = (0..8).map(|_| random()).collect();
        assert!(numbers.iter().all(|number| (0.0..1.0).contains(number)), "{numbers:?}");
        assert!(numbers.windows(2).any(|pair| pair[0] != pair[1]), "{numbers:?}");
    }
}
