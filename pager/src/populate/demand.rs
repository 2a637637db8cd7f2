//! How much threads wait for pages: what makes [`Populate::Auto`](super::Populate::Auto) load ahead, or stop.
//!
//! The measure is the time between the reading of a fault's message and its answer. Each demand thread adds that of its
//! faults to a bucket that leaks. A guest that waits for a small share of the time never fills it, however long it runs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::plan::RecentFaults;

/// Of the time that passes, this part leaks: who waits less than an eighth of the time is not helped by loading ahead.
const LEAK: u32 = 8;
/// So much waiting begins the loading: 75 faults or more. A Linux guest that does nothing has about 50 after its restore, 30 of
/// them at once.
const BEGIN: Duration = Duration::from_millis(8);
/// The same when loading has begun before: that is a guest that touches much.
const BEGIN_AGAIN: Duration = Duration::from_micros(500);
/// One fault counts for no more than this: a single read of a slow disk says little of how many will follow.
const MOST_OF_A_FAULT: Duration = Duration::from_micros(100);
/// Besides its answer, a fault costs the thread that waits so much, unless it was said: the message, and being woken.
pub(crate) const OVERHEAD: Duration = Duration::from_micros(8);

/// The bucket of one demand thread.
#[derive(Debug)]
pub(crate) struct Waiting {
    overhead: Duration,
    level: Duration,
    at: Option<Instant>,
    began_before: bool,
}

impl Waiting {
    pub(crate) fn none(overhead: Duration) -> Waiting {
        Waiting { overhead, level: Duration::ZERO, at: None, began_before: false }
    }

    /// A thread has waited for `service` until `now`. Answers whether it is time to load ahead.
    pub(crate) fn add(&mut self, service: Duration, now: Instant) -> bool {
        let passed = self.at.replace(now).map_or(Duration::ZERO, |at| now - at);
        self.level = self.level.saturating_sub(passed / LEAK) + counted(service, self.overhead);
        let full = self.level >= if self.began_before { BEGIN_AGAIN } else { BEGIN };
        if full {
            self.level = Duration::ZERO;
            self.began_before = true;
        }
        full
    }
}

/// What a fault counts for whose answer took `service`.
fn counted(service: Duration, overhead: Duration) -> Duration {
    service.min(MOST_OF_A_FAULT) + overhead
}

/// What demand threads tell those that load ahead.
#[derive(Debug)]
pub(crate) struct Demand {
    waited_ns: AtomicU64,
    overhead: Duration,
    pub(crate) recent: RecentFaults,
}

impl Demand {
    /// `overhead` is what a fault costs besides its answer.
    pub(crate) fn new(overhead: Duration) -> Demand {
        Demand { waited_ns: AtomicU64::new(0), overhead, recent: RecentFaults::default() }
    }

    /// In a demand thread: a thread has waited for `service` for this page.
    pub(crate) fn add(&self, page: u64, service: Duration) {
        self.recent.add(page);
        let counted = counted(service, self.overhead).as_nanos() as u64;
        self.waited_ns.fetch_add(counted, Ordering::Relaxed);
    }

    fn waited(&self) -> Duration {
        Duration::from_nanos(self.waited_ns.load(Ordering::Relaxed))
    }
}

/// While it loads, a loader looks so often whether threads still wait.
const LOOK: Duration = Duration::from_millis(2);
/// It goes on for so long after they did, at first; each time that it has to begin again, twice as long.
const LINGER: Duration = Duration::from_millis(5);
const LONGEST_LINGER: Duration = Duration::from_millis(80);
/// Waiting for less than this part of the time is none.
const SHARE: u32 = 32;

/// What a loader knows of the waiting.
pub(crate) struct Look {
    at: Instant,
    waited: Duration,
    last: Instant,
    linger: Duration,
}

impl Look {
    pub(crate) fn new(demand: &Demand) -> Look {
        let now = Instant::now();
        Look { at: now, waited: demand.waited(), last: now, linger: LINGER }
    }

    /// Whether to load on.
    pub(crate) fn still(&mut self, demand: &Demand) -> bool {
        let now = Instant::now();
        if now - self.at < LOOK {
            return true;
        }
        let waited = demand.waited();
        if (waited - self.waited) * SHARE >= now - self.at {
            self.last = now;
        }
        (self.at, self.waited) = (now, waited);
        now - self.last < self.linger
    }

    /// Threads wait again.
    pub(crate) fn begin_again(&mut self, demand: &Demand) {
        let linger = (self.linger * 2).min(LONGEST_LINGER);
        *self = Look { linger, ..Look::new(demand) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Faults of 60 us, one after each `apart`: how many until the loading begins.
    fn begins_after(apart: Duration, waiting: &mut Waiting) -> Option<u32> {
        let mut now = waiting.at.unwrap_or_else(Instant::now);
        (1..=20_000).find(|_| {
            now += apart;
            waiting.add(Duration::from_micros(60), now)
        })
    }

    #[test]
    fn those_who_wait_most_of_the_time_are_helped_soon() {
        let mut waiting = Waiting::none(OVERHEAD);
        let first = begins_after(Duration::from_micros(70), &mut waiting).expect("it begins");
        assert!((120..200).contains(&first), "{first} faults");
        let second =
            begins_after(Duration::from_micros(70), &mut waiting).expect("it begins again");
        assert!((5..15).contains(&second), "{second} faults");
    }

    #[test]
    fn those_who_seldom_wait_are_left_alone() {
        assert_eq!(begins_after(Duration::from_millis(1), &mut Waiting::none(OVERHEAD)), None);
    }

    #[test]
    fn one_slow_read_begins_nothing() {
        let mut waiting = Waiting::none(OVERHEAD);
        assert!(!waiting.add(Duration::from_secs(1), Instant::now()));
    }
}
