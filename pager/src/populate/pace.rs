//! When a loader pauses, and how much it installs at once.

use std::time::{Duration, Instant};

use super::{Ended, Populate, lock, pause, stopped};
use crate::slice::Shared;

/// Installed under the gate at once: at most this long a fault may have to wait for it, about 20 us.
const SHORTEST_STEP_BYTES: usize = 64 << 10;
/// And after a quiet time, about 150 us.
const LONGEST_STEP_BYTES: usize = 512 << 10;
/// `Idle`, between looks while faults are being answered, and at most in the middle of a load.
const ASIDE: Duration = Duration::from_micros(50);
const LONGEST_ASIDE: Duration = Duration::from_millis(10);
/// As long nothing must have faulted for `Idle` to begin.
const QUIET: Duration = Duration::from_millis(5);
/// The first burst of `Idle`, and the pause after each burst.
const FIRST_BURST_BYTES: u64 = 256 << 10;
const LONGEST_BURST_BYTES: u64 = 32 << 20;
const BURST_PAUSE: Duration = Duration::from_millis(1);

pub(super) struct Pace {
    idle: bool,
    step_bytes: usize,
    /// Faults at the last look.
    faults: u64,
    quiet_since: Instant,
    /// Bytes of the present burst (`Idle`), and how long it may get.
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

    /// Before each load: `Idle` waits until it has been quiet.
    pub(super) fn before_load(&mut self, shared: &Shared) -> Result<(), Ended> {
        self.look(shared);
        while self.idle {
            if shared.demand() {
                self.disturbed();
            }
            if self.quiet_since.elapsed() >= QUIET {
                break;
            }
            pause(shared, BURST_PAUSE)?;
            self.look(shared);
        }
        stopped(shared)
    }

    /// Before each step of an install: how many bytes it may have. Demand threads take the gate first in any case.
    pub(super) fn step(&mut self, shared: &Shared) -> Option<usize> {
        self.look(shared);
        let began = Instant::now();
        while self.idle && shared.demand() && began.elapsed() < LONGEST_ASIDE {
            self.disturbed();
            pause(shared, ASIDE).ok()?;
        }
        stopped(shared).ok().map(|()| self.step_bytes)
    }

    fn look(&mut self, shared: &Shared) {
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

    /// After each load: the pauses that the rate and `Idle` ask for.
    pub(super) fn loaded(&mut self, shared: &Shared, bytes: u64) -> Result<(), Ended> {
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
