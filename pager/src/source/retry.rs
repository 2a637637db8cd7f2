//! When a failed load is retried.

use std::time::Duration;

/// How often the pager retries a load after a transient error, and how long it pauses in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// The number of attempts after the first one.
    pub retries: u32,
    /// The first pause. Each further pause is twice as long.
    pub first_pause: Duration,
    /// The upper limit of a pause.
    pub longest_pause: Duration,
}

impl Default for RetryPolicy {
    /// Five retries, after 1, 2, 4, 8 and 16 ms.
    fn default() -> RetryPolicy {
        RetryPolicy {
            retries: 5,
            first_pause: Duration::from_millis(1),
            longest_pause: Duration::from_millis(100),
        }
    }
}

impl RetryPolicy {
    pub(crate) fn pause(&self, failed_loads: u32) -> Duration {
        let factor = 1u32.checked_shl(failed_loads).unwrap_or(u32::MAX);
        self.first_pause.saturating_mul(factor).min(self.longest_pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        let policy = RetryPolicy::default();
        let pauses: Vec<_> = [0, 1, 4, 7, 40].map(|n| policy.pause(n).as_millis()).into();
        assert_eq!(pauses, [1, 2, 16, 100, 100]);
    }
}
