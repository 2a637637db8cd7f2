//! Measures how much threads wait for pages. This makes [`Populate::Auto`](crate::Populate::Auto) load ahead, or stop.
//!
//! The measure is the time from reading the message of a fault to its answer. Each demand thread adds the times of its
//! faults to a leaky bucket. A guest that waits for a small share of the time never fills the bucket.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::plan::RecentFaults;
use crate::sched::run_delay::RunDelay;

/// This part of the time in which no fault is answered leaks. Loading ahead does not help a guest that waits less than
/// an eighth of the time.
const LEAK: u32 = 8;
/// The level that starts the loading: 75 faults or more. An idle Linux guest has about 50 after its restore, 30 of them
/// in a burst.
pub(crate) const BEGIN: Duration = Duration::from_millis(8);
/// The same level after the loading has started once: this guest touches much memory.
const BEGIN_AGAIN: Duration = Duration::from_micros(500);
/// The upper limit of what one fault counts. A single read of a slow disk does not show how many will follow.
const MOST_OF_A_FAULT: Duration = Duration::from_micros(100);
/// The upper limit of what one fault counts for the time in which its demand thread had no CPU. The faulting thread then
/// waits for a CPU as well, before and after the answer: 8 such faults start the loading.
const MOST_OF_A_DELAY: Duration = Duration::from_millis(1);
/// The default of what a fault costs the faulting thread besides its answer: the message and the wake.
pub(crate) const OVERHEAD: Duration = Duration::from_micros(8);

/// The leaky bucket of one demand thread.
#[derive(Debug)]
pub(crate) struct WaitBucket {
    overhead: Duration,
    level: Duration,
    at: Option<Instant>,
    began_before: bool,
}

impl WaitBucket {
    pub(crate) fn none(overhead: Duration) -> WaitBucket {
        WaitBucket { overhead, level: Duration::ZERO, at: None, began_before: false }
    }

    /// Adds a fault that was answered at `now` after `service`. Before it read the message, the demand thread has waited
    /// for `delay` for a CPU. Returns whether loading ahead has to start.
    pub(crate) fn add(&mut self, service: Duration, delay: Duration, now: Instant) -> bool {
        let passed = self.at.replace(now).map_or(Duration::ZERO, |at| now - at);
        // Not while it waits: faults that take a millisecond would leak more than they count.
        // Where the demand thread waits for a CPU, so does the faulting thread, and does not compute meanwhile.
        let idle = passed.saturating_sub(service + delay * LEAK);
        let counted = service.min(MOST_OF_A_FAULT) + delay.min(MOST_OF_A_DELAY) + self.overhead;
        self.level = self.level.saturating_sub(idle / LEAK) + counted;
        let full = self.level >= if self.began_before { BEGIN_AGAIN } else { BEGIN };
        if full {
            self.level = Duration::ZERO;
            self.began_before = true;
        }
        full
    }
}

/// Reads of this length mean that faults wait for a disk: from the page cache, a chunk is read in 3 to 10 us. In storage
/// with longer reads, more loaders would only wait for it, too.
const DISK_READ: RangeInclusive<Duration> = Duration::from_micros(40)..=Duration::from_millis(2);

/// What demand threads report to loaders.
#[derive(Debug)]
pub(crate) struct Demand {
    waited_ns: AtomicU64,
    /// The moving average of the reads of the last eight faults with a read, more or less.
    read_ns: AtomicU64,
    overhead: Duration,
    pub(crate) recent: RecentFaults,
}

impl Demand {
    /// `overhead` is what a fault costs besides its answer.
    pub(crate) fn new(overhead: Duration) -> Demand {
        let (waited_ns, read_ns) = (AtomicU64::new(0), AtomicU64::new(0));
        Demand { waited_ns, read_ns, overhead, recent: RecentFaults::default() }
    }

    /// Called by a demand thread: a thread has waited for `service` for this page, of which `read` was the read from
    /// storage.
    pub(crate) fn add(&self, page: u64, service: Duration, read: Duration) {
        self.recent.add(page);
        if !read.is_zero() {
            // A value that is lost between two demand threads does not matter.
            let mean = self.read_ns.load(Ordering::Relaxed);
            self.read_ns.store((mean * 7 + read.as_nanos() as u64) / 8, Ordering::Relaxed);
        }
        let waited = service + self.overhead;
        self.waited_ns.fetch_add(waited.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Whether faults wait for a disk, so that the CPUs of the faulting threads are idle meanwhile.
    pub(super) fn waits_for_disk(&self) -> bool {
        DISK_READ.contains(&Duration::from_nanos(self.read_ns.load(Ordering::Relaxed)))
    }

    fn waited(&self) -> Duration {
        Duration::from_nanos(self.waited_ns.load(Ordering::Relaxed))
    }
}

/// The time between two checks of a loader whether threads still wait.
const CHECK: Duration = Duration::from_millis(2);
/// How long a loader continues after the last waiting. This doubles each time that the loading starts again, up to
/// `LONGEST_LINGER`.
const LINGER: Duration = Duration::from_millis(5);
const LONGEST_LINGER: Duration = Duration::from_millis(80);
/// Waiting for less than this part of the time does not count.
const SHARE: u32 = 32;

/// Notifies a loader when threads have stopped waiting.
pub(crate) struct QuietDetector {
    at: Instant,
    waited: Duration,
    last: Instant,
    linger: Duration,
    delay: RunDelay,
}

impl QuietDetector {
    pub(crate) fn new(demand: &Demand) -> QuietDetector {
        let now = Instant::now();
        QuietDetector {
            at: now,
            waited: demand.waited(),
            last: now,
            linger: LINGER,
            delay: RunDelay::default(),
        }
    }

    /// Called by the loader before it works.
    pub(crate) fn begin(&mut self) {
        self.delay.open();
        self.delay.begin();
    }

    /// Whether to continue loading.
    pub(crate) fn is_waiting(&mut self, demand: &Demand) -> bool {
        let now = Instant::now();
        if now - self.at < CHECK {
            return true;
        }
        // While the loader waits for a CPU, threads that would fault may wait for one, too.
        self.last = (self.last + self.delay.end()).min(now);
        self.delay.begin();
        let waited = demand.waited();
        if (waited - self.waited) * SHARE >= now - self.at {
            self.last = now;
        }
        (self.at, self.waited) = (now, waited);
        now - self.last < self.linger
    }

    /// Called when threads wait again.
    pub(crate) fn restart(&mut self, demand: &Demand) {
        let linger = (self.linger * 2).min(LONGEST_LINGER);
        let delay = std::mem::take(&mut self.delay);
        *self = QuietDetector { linger, delay, ..QuietDetector::new(demand) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Faults of 60 us, `apart` from each other: how many of them start the loading.
    fn begins_after(apart: Duration, bucket: &mut WaitBucket) -> Option<u32> {
        let mut now = bucket.at.unwrap_or_else(Instant::now);
        (1..=20_000).find(|_| {
            now += apart;
            bucket.add(Duration::from_micros(60), Duration::ZERO, now)
        })
    }

    #[test]
    fn a_guest_that_waits_most_of_the_time_starts_the_loading_soon() {
        let mut bucket = WaitBucket::none(OVERHEAD);
        let first = begins_after(Duration::from_micros(70), &mut bucket).expect("it begins");
        assert!((120..200).contains(&first), "{first} faults");
        let second = begins_after(Duration::from_micros(70), &mut bucket).expect("it begins again");
        assert!((5..15).contains(&second), "{second} faults");
    }

    #[test]
    fn a_guest_that_seldom_waits_does_not() {
        assert_eq!(begins_after(Duration::from_millis(1), &mut WaitBucket::none(OVERHEAD)), None);
    }

    #[test]
    fn a_guest_whose_faults_wait_for_a_cpu_starts_the_loading_soon() {
        let (mut bucket, mut now) = (WaitBucket::none(OVERHEAD), Instant::now());
        let first = (1..=1000).find(|_| {
            now += Duration::from_millis(20);
            bucket.add(Duration::from_micros(60), Duration::from_millis(3), now)
        });
        assert!(first.is_some_and(|first| (7..10).contains(&first)), "{first:?} faults");
    }

    #[test]
    fn one_long_delay_does_not() {
        let mut bucket = WaitBucket::none(OVERHEAD);
        assert!(!bucket.add(Duration::from_micros(60), Duration::from_secs(1), Instant::now()));
    }

    #[test]
    fn a_guest_whose_pages_come_slowly_waits_too() {
        let (mut bucket, mut now, slow) =
            (WaitBucket::none(OVERHEAD), Instant::now(), Duration::from_millis(10));
        let first = (1..=1000).find(|_| {
            now += slow + Duration::from_micros(20);
            bucket.add(slow, Duration::ZERO, now)
        });
        assert!(first.is_some_and(|first| (70..100).contains(&first)), "{first:?} faults");
        let demand = Demand::new(OVERHEAD);
        let mut quiet = QuietDetector::new(&demand);
        for _ in 0..20 {
            std::thread::sleep(CHECK);
            demand.add(1, CHECK, CHECK);
            assert!(quiet.is_waiting(&demand));
        }
    }

    #[test]
    fn faults_wait_for_a_disk_if_most_of_their_reads_are_of_its_length() {
        let demand = Demand::new(OVERHEAD);
        let after = |read_us: u64, faults: u32| {
            let read = Duration::from_micros(read_us);
            (0..faults).for_each(|_| demand.add(1, read, read));
            demand.waits_for_disk()
        };
        // Page cache, disk, faults that waited for a loader, page cache, another host.
        assert!(!after(8, 100));
        assert!(after(80, 6));
        assert!(after(0, 100));
        assert!(!after(8, 16));
        assert!(!after(20_000, 8));
    }

    #[test]
    fn one_slow_read_does_not() {
        let mut bucket = WaitBucket::none(OVERHEAD);
        assert!(!bucket.add(Duration::from_secs(1), Duration::ZERO, Instant::now()));
    }
}
