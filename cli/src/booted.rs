//! A fresh guest, about to run.

use anyhow::{Context, Result};
use vmm::{BootOptions, Console, MemoryRange, PausedVm, memory_layout};

use crate::commands::Session;
use crate::commands::guest::GuestArgs;
use crate::guest_memory::FileMemory;
use crate::waits::Wait;

/// A guest that has not run yet.
pub(crate) struct Booted {
    pub(crate) vm: PausedVm,
    pub(crate) memory: FileMemory,
    pub(crate) ranges: Vec<MemoryRange>,
}

impl Booted {
    /// Makes the guest that `args` describe; an interrupt pauses it. `heed_requests`: whether it stops
    /// when it asks to be stored.
    pub(crate) fn new(
        args: &GuestArgs,
        console: impl Console + 'static,
        heed_requests: bool,
        session: &Session,
    ) -> Result<Self> {
        let ranges = memory_layout(args.memory).context("--memory")?;
        let memory = FileMemory::new(&ranges)?;
        let _opening = Wait::new(|| "the guest's kernel and disks to be read".into()).begin();
        let options = BootOptions::default().cpus(args.cpus).guest_snapshot_trigger(heed_requests);
        let devices = args.devices.create()?;
        let mapped = memory.mapped.clone();
        let vm = PausedVm::boot_with(mapped, &args.payload(), console, &options, devices)
            .context("cannot boot the guest")?;
        session.interrupt.pauses(vm.handle());
        Ok(Self { vm, memory, ranges })
    }
}
