//! Lets background threads notice that the pager stops.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use crate::pager_state::PagerState;

/// The pager was stopped, or the process that owned the memory has ended.
pub(super) struct Ended;

pub(super) fn stopped(shared: &PagerState) -> Result<(), Ended> {
    if shared.stopping.load(Ordering::Relaxed) { Err(Ended) } else { Ok(()) }
}

/// Sleeps, unless the pager stops, which unparks the thread.
pub(super) fn pause(shared: &PagerState, how_long: Duration) -> Result<(), Ended> {
    stopped(shared)?;
    thread::park_timeout(how_long);
    stopped(shared)
}
