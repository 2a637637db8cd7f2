//! How a guest is booted, and how it is restored.

use std::ops::Range;

/// How to boot a guest.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BootOptions {
    /// Number of vCPUs. Programs and the demo guest use the first only.
    pub cpus: u8,
    /// Whether the guest can request a snapshot of itself: a write to
    /// [`SNAPSHOT_TRIGGER_PORT`](crate::SNAPSHOT_TRIGGER_PORT) stops it with
    /// [`Stop::SnapshotTrigger`](crate::Stop::SnapshotTrigger). Otherwise such writes do nothing.
    pub guest_snapshot_trigger: bool,
}

impl Default for BootOptions {
    fn default() -> BootOptions {
        BootOptions { cpus: 1, guest_snapshot_trigger: false }
    }
}

impl BootOptions {
    /// Sets [`BootOptions::cpus`].
    #[must_use]
    pub fn cpus(mut self, cpus: u8) -> BootOptions {
        self.cpus = cpus;
        self
    }

    /// Sets [`BootOptions::guest_snapshot_trigger`].
    #[must_use]
    pub fn guest_snapshot_trigger(mut self, on: bool) -> BootOptions {
        self.guest_snapshot_trigger = on;
        self
    }
}

/// What the guest's clocks do about the time between the save and the restore.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Clock {
    /// kvm-clock and time stamp counters advance by the host's time of day, as if the guest had slept. States of
    /// version 1 do not have the time of their save, so their clocks are kept.
    #[default]
    Advance,
    /// They continue from the moment of the pause: for the guest no time has passed.
    Keep,
}

/// How to restore a guest.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct RestoreOptions {
    /// Ranges of guest physical addresses that contain every page that is not zero, in any order; they are
    /// widened to 2 MiB. Only their memory slots are registered with KVM before the guest starts, all other
    /// slots while it runs. So the time to the first instruction does not depend on the size of memory.
    ///
    /// With `None`, all memory is registered before the guest starts.
    pub first: Option<Vec<Range<u64>>>,
    /// As in [`BootOptions::guest_snapshot_trigger`].
    pub guest_snapshot_trigger: bool,
    /// The guest's clocks.
    pub clock: Clock,
    /// Record which pages are written to, for [`PausedVm::take_written`](crate::PausedVm::take_written). The first write
    /// to each page after it was read then costs the guest one more exit to KVM, and KVM maps no large pages.
    pub record_writes: bool,
}

impl RestoreOptions {
    /// Sets [`RestoreOptions::first`].
    #[must_use]
    pub fn register_first(mut self, ranges: Vec<Range<u64>>) -> RestoreOptions {
        self.first = Some(ranges);
        self
    }

    /// Sets [`RestoreOptions::clock`].
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> RestoreOptions {
        self.clock = clock;
        self
    }

    /// Sets [`RestoreOptions::record_writes`].
    #[must_use]
    pub fn record_writes(mut self, on: bool) -> RestoreOptions {
        self.record_writes = on;
        self
    }

    /// Sets [`RestoreOptions::guest_snapshot_trigger`].
    #[must_use]
    pub fn guest_snapshot_trigger(mut self, on: bool) -> RestoreOptions {
        self.guest_snapshot_trigger = on;
        self
    }
}
