//! A slice of the paged memory. Each slice has its own userfaultfd, demand thread and lock.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::fault::latency::Recorder;
use crate::fault::waiting::WaitingFaults;
use crate::install::counters::Counters;
use crate::install::kernel::Filler;
use crate::install::slice_lock::SliceLock;
use crate::sched::cpus::NOWHERE;
use crate::sched::priority::DemandPriority;

/// A contiguous part of the paged memory.
#[derive(Debug)]
pub(crate) struct Slice {
    pub(crate) filler: Filler,
    pub(crate) counters: Counters,
    pub(crate) recorder: Recorder,
    pub(crate) lock: SliceLock,
    pub(crate) waiting: WaitingFaults,
    /// The demand thread has messages to answer. Background threads pause meanwhile.
    pub(crate) answering: AtomicBool,
    /// The CPU that the demand thread is bound to, or [`NOWHERE`].
    pub(crate) bound_to: AtomicUsize,
    pub(crate) priority: DemandPriority,
    /// All pages are loaded and the memory is unregistered. Set while the lock is held.
    pub(crate) released: AtomicBool,
}

impl Slice {
    pub(crate) fn new(filler: Filler, pages: u64, regions: usize) -> Slice {
        Slice {
            filler,
            counters: Counters::of(pages),
            recorder: Recorder::new(regions),
            lock: SliceLock::default(),
            waiting: WaitingFaults::none(),
            answering: AtomicBool::new(false),
            bound_to: AtomicUsize::new(NOWHERE),
            priority: DemandPriority::default(),
            released: AtomicBool::new(false),
        }
    }

    pub(crate) fn is_released(&self) -> bool {
        self.released.load(Ordering::Relaxed)
    }
}
