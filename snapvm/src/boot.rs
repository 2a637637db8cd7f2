//! Boots a new guest.

use std::sync::{Arc, Mutex};

use serde_json::Value;
use vmm::{BootOptions, Console, MmioDevice, PausedVm, Payload, memory_layout};

use crate::error::BootError;
use crate::guest_memory::FileMemory;
use crate::memory::{Origin, VmMemory};
use crate::memory_map::to_regions;
use crate::vm::Vm;

/// A guest to boot.
#[derive(Debug)]
#[non_exhaustive]
pub struct BootConfig {
    /// Memory in bytes: see [`vmm::memory_layout`].
    pub memory_bytes: u64,
    /// The program or kernel that the guest runs.
    pub payload: Payload,
    /// The number of vCPUs, and whether the guest stops when it requests a snapshot.
    pub options: BootOptions,
    /// A description of the guest, as JSON, for the metadata of its snapshots.
    pub metadata: Value,
}

impl BootConfig {
    /// A guest with one vCPU.
    #[must_use]
    pub fn new(memory_bytes: u64, payload: Payload) -> Self {
        Self { memory_bytes, payload, options: BootOptions::default(), metadata: Value::Null }
    }

    /// Builds the guest with these virtio devices. It has not run yet.
    ///
    /// # Errors
    /// [`BootError`]
    pub fn boot(
        &self,
        console: impl Console + 'static,
        devices: Vec<Box<dyn MmioDevice>>,
    ) -> Result<Vm, BootError> {
        let ranges = memory_layout(self.memory_bytes)?;
        let file = FileMemory::new(&ranges)?;
        let mapped = Arc::clone(&file.mapped);
        let machine = PausedVm::boot_with(mapped, &self.payload, console, &self.options, devices)
            .map_err(BootError::Machine)?;
        let memory = VmMemory {
            protection: Mutex::default(),
            mapped: Arc::clone(&file.mapped),
            regions: to_regions(&ranges),
            origin: Origin::Booted { file, guest: self.metadata.clone() },
        };
        Ok(Vm { machine, memory: Arc::new(memory) })
    }
}
