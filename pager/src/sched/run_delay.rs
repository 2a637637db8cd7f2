//! How long a thread has waited for a CPU.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use crate::sched::task;

/// The time for which a thread could have run and had no CPU, from its `schedstat` file in `/proc`.
#[derive(Debug, Default)]
pub(crate) struct RunDelay {
    schedstat: Option<File>,
    /// When the delay was last measured from.
    begun: Option<Instant>,
    /// All delay of the thread until then. `None` if nothing is being measured.
    before: Option<Duration>,
}

/// The time between two measurements. Each reads the file twice, which costs 1 to 2 us each time.
const PAUSE: Duration = Duration::from_millis(1);

impl RunDelay {
    /// Called by the thread before it works. Without the file, the thread counts as never delayed.
    pub(crate) fn open(&mut self) {
        self.schedstat = File::open(format!("/proc/self/task/{}/schedstat", task::own_id())).ok();
    }

    /// Measures from now on, unless that was done a moment ago.
    pub(crate) fn begin(&mut self) {
        let now = Instant::now();
        if self.begun.is_none_or(|at| now - at >= PAUSE) {
            self.begun = Some(now);
            self.before = self.total();
        }
    }

    /// The delay since `begin`. Zero if that has measured nothing.
    pub(crate) fn end(&mut self) -> Duration {
        let Some(before) = self.before.take() else { return Duration::ZERO };
        self.total().map_or(Duration::ZERO, |total| total.saturating_sub(before))
    }

    fn total(&self) -> Option<Duration> {
        let mut text = [0; 96];
        let len = self.schedstat.as_ref()?.read_at(&mut text, 0).ok()?;
        delay_ns(text.get(..len)?).map(Duration::from_nanos)
    }
}

/// The delay in a `schedstat` file: the second of the time on a CPU, the time of waiting for one, and the number of turns.
fn delay_ns(schedstat: &[u8]) -> Option<u64> {
    std::str::from_utf8(schedstat).ok()?.split_ascii_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_is_the_second_number() {
        assert_eq!(delay_ns(b"634054 17 1\n"), Some(17));
        assert_eq!(delay_ns(b""), None);
        assert_eq!(delay_ns(b"1 x 2"), None);
    }

    #[test]
    fn a_moment_after_a_measurement_nothing_is_measured() {
        let mut delay = RunDelay::default();
        delay.open();
        delay.begin();
        assert!(delay.before.is_some(), "there is /proc");
        delay.end();
        // However slow this test is.
        delay.begun = Some(Instant::now() + PAUSE * 60_000);
        delay.begin();
        assert!(delay.before.is_none());
        assert_eq!(delay.end(), Duration::ZERO);
    }

    /// On a CPU that another thread keeps busy.
    #[test]
    fn a_thread_that_has_no_cpu_is_delayed() {
        use std::sync::atomic::{AtomicBool, Ordering};

        use crate::sched::cpus::{Cpus, this_cpu};

        let busy = AtomicBool::new(true);
        let cpu = Cpus::one(this_cpu());
        let delayed = std::thread::scope(|scope| {
            scope.spawn(|| {
                cpu.bind().expect("the CPU it runs on is allowed");
                while busy.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
            let work = || {
                cpu.bind().expect("the CPU it runs on is allowed");
                let mut delay = RunDelay::default();
                delay.open();
                delay.begin();
                // Each of them has half of the CPU, or less.
                let began = Instant::now();
                while began.elapsed() < Duration::from_millis(200) {
                    std::hint::spin_loop();
                }
                delay.end()
            };
            let delayed = scope.spawn(work).join();
            busy.store(false, Ordering::Relaxed);
            delayed.expect("it does not panic")
        });
        assert!(delayed > Duration::from_millis(40), "{delayed:?}");
    }
}
