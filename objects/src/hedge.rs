//! When a request that a thread waits for is sent a second time, because the first is late.
//!
//! A store answers some requests many times later than usual. A second request is sent after the greater of the 95th
//! percentile and 1.5 times the median of the recent times, for at most 5 % of the requests: a store that is slow as a whole
//! does not get twice the load. With twice the median a fault whose first request is late would take more than three
//! round trips.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The number of recent times that are kept.
const RECENT: usize = 128;
/// Before this number of times is known, no second request is sent.
const LEAST: usize = 16;
/// One second request for this many requests.
const REQUESTS_OF_ONE: u64 = 20;

/// The requests of one object that threads have waited for.
#[derive(Debug, Default)]
pub(crate) struct Hedges(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    recent: Vec<Duration>,
    /// Where the next time is kept.
    at: usize,
    requests: u64,
    hedged: u64,
}

impl Hedges {
    /// A request was answered after this time.
    pub(crate) fn answered(&self, after: Duration) {
        let mut state = self.state();
        state.requests += 1;
        if state.recent.len() < RECENT {
            state.recent.push(after);
        } else {
            let at = state.at;
            state.recent[at] = after;
        }
        state.at = (state.at + 1) % RECENT;
    }

    /// How long to wait before a second request. `None`: too few times are known.
    pub(crate) fn delay(&self) -> Option<Duration> {
        let mut sorted = self.state().recent.clone();
        if sorted.len() < LEAST {
            return None;
        }
        sorted.sort_unstable();
        let percentile = |of: usize| sorted[(sorted.len() * of / 100).min(sorted.len() - 1)];
        Some(percentile(95).max(percentile(50) * 3 / 2))
    }

    /// Whether a second request may be sent now. It is counted.
    pub(crate) fn take(&self) -> bool {
        let mut state = self.state();
        let may = (state.hedged + 1) * REQUESTS_OF_ONE <= state.requests;
        state.hedged += u64::from(may);
        may
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_delay_follows_the_recent_times() {
        let hedges = Hedges::default();
        (1..LEAST).for_each(|_| hedges.answered(20 * MS));
        assert_eq!(hedges.delay(), None);
        hedges.answered(20 * MS);
        assert_eq!(hedges.delay(), Some(30 * MS));
        // A tenth of the requests is slow: that is usual here.
        (0..RECENT).for_each(|at| hedges.answered(if at % 10 == 0 { 90 * MS } else { 20 * MS }));
        assert_eq!(hedges.delay(), Some(90 * MS));
        (0..RECENT).for_each(|_| hedges.answered(5 * MS));
        assert_eq!(hedges.delay(), Some(15 * MS / 2));
    }

    #[test]
    fn one_request_in_twenty_is_sent_twice() {
        let hedges = Hedges::default();
        let mut second = 0;
        for _ in 0..1000 {
            second += u32::from(hedges.take());
            hedges.answered(MS);
        }
        assert_eq!(second, 49);
        assert!(hedges.take() && !hedges.take());
    }
}
