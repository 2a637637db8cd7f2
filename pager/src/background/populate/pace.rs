//! Decides when a loader pauses, and how much it installs in one step.

use std::time::{Duration, Instant};

use super::population::Populate;
use super::progress::lock;
use crate::background::ended::{Ended, pause, stopped};
use crate::pager_state::PagerState;

/// The number of bytes installed each time the slice lock is held. A fault may wait about 20 us for that.
const SHORTEST_STEP_BYTES: usize = 64 << 10;
/// The same after a time without faults. A fault may then wait about 150 us.
const LONGEST_STEP_BYTES: usize = 512 << 10;
/// `Idle`: the time between two checks while faults are being answered, and the longest pause within one load.
const YIELD: Duration = Duration::from_micros(50);
const LONGEST_YIELD: Duration = Duration::from_millis(10);
/// `Idle` starts after this time without faults.
const QUIET: Duration = Duration::from_millis(5);
/// The first burst of `Idle`. Bursts double up to `LONGEST_BURST_BYTES`, with a pause after each.
const FIRST_BURST_BYTES: u64 = 256 << 10;
const LONGEST_BURST_BYTES: u64 = 32 << 20;
const BURST_PAUSE: Duration = Duration::from_millis(1);

pub(super) struct Pace {
    idle: bool,
    step_bytes: usize,
    /// The number of faults at the last check.
    faults: u64,
    quiet_since: Instant,
    /// Bytes of the present burst (`Idle`), and its limit.
    burst: u64,
    burst_bytes: u64,
}

impl Pace {
    pub(super) fn of(mode: Populate) -> Pace {
        Pace {
            idle: mode == Populate::Idle,
            step_bytes: SHORTEST_STEP_BYTES,
            faults: 0,
            quiet_since: Instant::now(),
            burst: 0,
            burst_bytes: FIRST_BURST_BYTES,
        }
    }

    /// Called before each load. `Idle` waits until no faults come.
    pub(super) fn before_load(&mut self, shared: &PagerState) -> Result<(), Ended> {
        self.check(shared);
        while self.idle {
            if shared.demand() {
                self.disturbed();
            }
            if self.quiet_since.elapsed() >= QUIET {
                break;
            }
            pause(shared, BURST_PAUSE)?;
            self.check(shared);
        }
        stopped(shared)
    }

    /// Called before each step of an install: returns how many bytes the step may have. Demand threads get the slice
    /// lock first in any case.
    pub(super) fn step(&mut self, shared: &PagerState) -> Option<usize> {
        self.check(shared);
        let began = Instant::now();
        while self.idle && shared.demand() && began.elapsed() < LONGEST_YIELD {
            self.disturbed();
            pause(shared, YIELD).ok()?;
        }
        stopped(shared).ok().map(|()| self.step_bytes)
    }

    fn check(&mut self, shared: &PagerState) {
        let faults = shared.slices.iter().map(|slice| slice.counters.faults()).sum();
        if faults == self.faults {
            self.step_bytes = (self.step_bytes * 2).min(LONGEST_STEP_BYTES);
        } else {
            self.faults = faults;
            self.disturbed();
        }
    }

    fn disturbed(&mut self) {
        self.step_bytes = SHORTEST_STEP_BYTES;
        self.quiet_since = Instant::now();
        (self.burst, self.burst_bytes) = (0, FIRST_BURST_BYTES);
    }

    /// Called after each load: pauses as the rate limit and `Idle` require.
    pub(super) fn loaded(&mut self, shared: &PagerState, bytes: u64) -> Result<(), Ended> {
        let progress = &shared.population;
        if let Some(rate) = progress.options.bytes_per_second {
            let cost = Duration::from_secs_f64(bytes as f64 / rate.get() as f64);
            let due = {
                let mut due = lock(&progress.due);
                *due = (*due).max(Instant::now()) + cost;
                *due
            };
            while let Some(wait) = due.checked_duration_since(Instant::now()) {
                pause(shared, wait)?;
            }
        }
        self.burst += bytes;
        if self.idle && self.burst >= self.burst_bytes {
            (self.burst, self.burst_bytes) = (0, (self.burst_bytes * 2).min(LONGEST_BURST_BYTES));
            pause(shared, BURST_PAUSE)?;
        }
        Ok(())
    }
}
