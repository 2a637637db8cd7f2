//! What readers do, and what the loader does about it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The share of time that reads take is measured over at least this time.
const WINDOW: Duration = Duration::from_millis(20);
/// Readers that wait for at least this share of a window have the rest loaded ahead: 1/8.
const BUSY_SHARE: u32 = 8;
/// After a busy window, loading ahead continues for this time.
const LOADS_FOR: Duration = Duration::from_millis(50);

/// Shared by the threads that answer reads and the one that loads ahead.
pub(crate) struct Activity {
    state: Mutex<State>,
    changed: Condvar,
    /// The loader waits for the answers to its own requests.
    answered: Condvar,
    /// The thread that loads ahead; 0 before it runs.
    loader: AtomicU32,
    /// Whether busy readers start the loader.
    ahead: bool,
}

struct State {
    window_began: Instant,
    busy: Duration,
    loads_until: Option<Instant>,
    /// The file that was read last, and the end of the read.
    last_read: Position,
    /// Ranges to load whatever readers do, in this order.
    queue: VecDeque<Position>,
    ending: bool,
}

/// A range of bytes in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    pub(crate) inode: u64,
    pub(crate) bytes: Range<u64>,
}

/// What the loader does next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// It loads this range.
    Range(Position),
    /// It loads what is missing after this read.
    After(Position),
    /// The mount has ended.
    End,
}

impl Activity {
    pub(crate) fn new(ahead: bool) -> Self {
        let state = State {
            window_began: Instant::now(),
            busy: Duration::ZERO,
            loads_until: None,
            last_read: Position { inode: 0, bytes: 0..0 },
            queue: VecDeque::new(),
            ending: false,
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            answered: Condvar::new(),
            loader: AtomicU32::new(0),
            ahead,
        }
    }

    /// Records that this thread is the loader, whose requests do not count as those of readers.
    pub(crate) fn loader_is_this_thread(&self) {
        self.loader.store(
            rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned(),
            Ordering::Relaxed,
        );
    }

    pub(crate) fn is_loader(&self, thread: u32) -> bool {
        self.loader.load(Ordering::Relaxed) == thread
    }

    /// A request of the loader was answered.
    pub(crate) fn loaded(&self) {
        self.answered.notify_all();
    }

    /// Waits for an answer to a request of the loader, for this time at most.
    pub(crate) fn wait_for_answer(&self, most: Duration) {
        let state = self.state();
        drop(self.answered.wait_timeout(state, most));
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.state().ending
    }

    /// A reader waited for these bytes from `began` to `ended`.
    pub(crate) fn read(&self, position: Position, began: Instant, ended: Instant) {
        if !self.ahead {
            return;
        }
        let mut state = self.state();
        if ended.saturating_duration_since(state.window_began) > WINDOW {
            (state.window_began, state.busy) = (began, Duration::ZERO);
        }
        state.busy += ended.saturating_duration_since(began);
        state.last_read = position;
        if state.busy >= WINDOW / BUSY_SHARE {
            let slept = state.loads_until.is_none_or(|until| until <= ended);
            state.loads_until = Some(ended + LOADS_FOR);
            drop(state);
            if slept {
                self.changed.notify_all();
            }
        }
    }

    /// Has these ranges loaded.
    pub(crate) fn enqueue(&self, ranges: impl IntoIterator<Item = Position>) {
        self.state().queue.extend(ranges);
        self.changed.notify_all();
    }

    /// Has the rest of a range loaded, before the other ranges.
    pub(crate) fn requeue(&self, rest: Position) {
        if !rest.bytes.is_empty() {
            self.state().queue.push_front(rest);
        }
    }

    pub(crate) fn end(&self) {
        self.state().ending = true;
        self.changed.notify_all();
    }

    /// Waits until there is something to load. `after_done` is a read after which nothing is missing; `before_wait` is
    /// called before each wait.
    pub(crate) fn next(
        &self,
        after_done: Option<&Position>,
        mut before_wait: impl FnMut(),
    ) -> Work {
        let mut state = self.state();
        loop {
            if state.ending {
                return Work::End;
            }
            if let Some(position) = state.queue.pop_front() {
                return Work::Range(position);
            }
            let loads = state.loads_until.is_some_and(|until| Instant::now() < until);
            if loads && after_done != Some(&state.last_read) {
                return Work::After(state.last_read.clone());
            }
            before_wait();
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(offset: u64) -> Position {
        Position { inode: 2, bytes: offset..offset + 4096 }
    }

    fn loads(activity: &Activity) -> bool {
        activity.state().loads_until.is_some_and(|until| Instant::now() < until)
    }

    #[test]
    fn only_busy_readers_have_pages_loaded_ahead() {
        let activity = Activity::new(true);
        let began = Instant::now();
        let step = Duration::from_micros(100);
        // One read of 100 us every 10 ms.
        for number in 0..100 {
            let now = began + Duration::from_millis(10) * number;
            activity.read(at(0), now, now + step);
        }
        assert!(!loads(&activity));
        // One after the other.
        for number in 0..100 {
            let now = Instant::now() + step * number;
            activity.read(at(u64::from(number)), now, now + step);
        }
        assert!(loads(&activity));
        assert_eq!(activity.next(None, || {}), Work::After(at(99)));
    }

    #[test]
    fn queued_ranges_come_first_and_the_end_before_all() {
        let activity = Activity::new(false);
        let now = Instant::now();
        activity.read(at(7), now, now + Duration::from_secs(1));
        activity.enqueue([at(1), at(2)]);
        assert_eq!(activity.next(None, || {}), Work::Range(at(1)));
        activity.end();
        assert_eq!(activity.next(None, || {}), Work::End);
    }
}
