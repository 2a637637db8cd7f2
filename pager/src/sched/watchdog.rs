//! The watchdog of a pager, as its other threads see it. Its thread: [`super::watchdog_thread`].

use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::sched::priority::{DemandPriority, lock};

/// A thread that restores the normal priority of demand threads. It starts when a demand thread first wants to lower
/// its priority.
#[derive(Debug, Default)]
pub(crate) struct Watchdog {
    pub(super) started: OnceLock<()>,
    pub(super) thread: Mutex<Option<JoinHandle<()>>>,
    /// The thread is watching. Before that, no priority is lowered.
    pub(super) ready: AtomicBool,
}

impl Watchdog {
    /// Ends the watchdog after `stopping` was set. Afterwards all demand threads have the normal policy.
    pub(crate) fn stop<'a>(&self, priorities: impl Iterator<Item = &'a DemandPriority>) {
        // From now on the watchdog cannot start.
        self.started.get_or_init(|| ());
        // This wakes it immediately.
        for priority in priorities {
            priority.arm_timer(Duration::from_nanos(1));
        }
        if let Some(thread) = lock(&self.thread).take() {
            // The thread runs no code of others, and does not panic.
            let _ = thread.join();
        }
    }
}
