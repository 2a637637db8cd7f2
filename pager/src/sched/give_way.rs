//! Yields of a CPU, which stop where many threads wait for one.

use std::cell::Cell;
use std::thread;
use std::time::{Duration, Instant};

/// A yield that takes longer than this has waited for the turns of several threads: a turn takes about 3 ms.
const LONG: Duration = Duration::from_millis(6);
/// After a long yield, the thread does not yield for this many times as long.
const REST: u32 = 8;

thread_local! {
    /// Until when this thread does not yield.
    static RESTS_UNTIL: Cell<Option<Instant>> = const { Cell::new(None) };
    static NEVER: Cell<bool> = const { Cell::new(false) };
}

/// Lets the other threads of this CPU run, if there are few of them.
///
/// A thread that was woken on this CPU would otherwise wait for the next tick. But a thread that yields gives away the
/// rest of its turn. Where 30 threads wait for a CPU, a thread that yields after each 20 us of work waits for 30 turns
/// each time, and gets a hundredth of the CPU time that it is due.
pub(crate) fn give_way() {
    if NEVER.get() {
        return;
    }
    let began = Instant::now();
    if RESTS_UNTIL.get().is_some_and(|until| began < until) {
        return;
    }
    thread::yield_now();
    RESTS_UNTIL.set(rest_until(began, Instant::now()));
}

/// From now on, `give_way` does nothing in this thread.
pub(crate) fn never_give_way() {
    NEVER.set(true);
}

/// Until when a thread rests from yields after one that took this time.
fn rest_until(began: Instant, ended: Instant) -> Option<Instant> {
    let took = ended.saturating_duration_since(began);
    (took > LONG).then(|| ended + took * REST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_long_yields_are_followed_by_a_rest() {
        let began = Instant::now();
        assert_eq!(rest_until(began, began + LONG), None);
        let ended = began + LONG * 2;
        assert_eq!(rest_until(began, ended), Some(ended + LONG * 2 * REST));
    }

    /// On one CPU, beside threads that compute: the thread works for 30 ms in steps of 20 us, and gives way after each.
    #[test]
    fn a_thread_that_gives_way_gets_its_share_of_a_busy_cpu() {
        use std::sync::atomic::{AtomicBool, Ordering};

        use crate::sched::cpus::{Cpus, this_cpu};

        const OTHERS: u32 = 7;
        let busy = AtomicBool::new(true);
        let cpu = Cpus::one(this_cpu());
        let took = thread::scope(|scope| {
            for _ in 0..OTHERS {
                scope.spawn(|| {
                    cpu.bind().expect("the CPU it runs on is allowed");
                    while busy.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                });
            }
            let work = || {
                cpu.bind().expect("the CPU it runs on is allowed");
                let began = Instant::now();
                for _ in 0..1500 {
                    let step = Instant::now();
                    while step.elapsed() < Duration::from_micros(20) {
                        std::hint::spin_loop();
                    }
                    give_way();
                }
                began.elapsed()
            };
            let took = scope.spawn(work).join();
            busy.store(false, Ordering::Relaxed);
            took.expect("it does not panic")
        });
        // Its share is an eighth: 240 ms. With a yield after each step it takes 1500 rounds of seven turns, 30 s.
        assert!(took < Duration::from_secs(4), "{took:?}");
    }
}
