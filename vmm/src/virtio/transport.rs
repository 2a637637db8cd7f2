//! The registers of a virtio-mmio device, version 2 (virtio 1.2, 4.2): a state machine that the driver
//! writes to, without memory, threads or interrupts.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_queue::{Queue, QueueState, QueueT};

use super::memory::DeviceMemory;
use super::state::{QueueRegisters, TransportState};

/// "virt".
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// The version that is not "legacy".
const VERSION: u32 = 2;
/// "SNAP": nothing depends on it.
const VENDOR: u32 = u32::from_le_bytes(*b"SNAP");
/// First offset of the device's own configuration.
pub(super) const CONFIG_OFFSET: u64 = reg::VIRTIO_MMIO_CONFIG as u64;
/// Status bits that a driver sets.
const DRIVER_STATUS_BITS: u32 = 0x8f;

/// The action that a write requests from the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Nothing.
    None,
    /// The driver is ready: check all queues.
    Start,
    /// Check a queue. Only if no ioeventfd takes the write.
    Notify(u32),
    /// The device was reset.
    Reset,
    /// The driver violated the specification: the device reports that and waits for a reset.
    NeedsReset,
}

/// The transport of a device with fixed features and queues.
pub(super) struct Transport {
    device_id: u32,
    device_features: u64,
    queue_sizes: &'static [u16],
    registers: TransportState,
    /// The queues that are ready, made from their registers. They keep the position of the device in the rings.
    pub(super) queues: Vec<Option<Queue>>,
}

impl Transport {
    pub(super) fn new(device_id: u32, features: u64, queue_sizes: &'static [u16]) -> Transport {
        let mut transport = Transport {
            device_id,
            device_features: features | 1 << VIRTIO_F_VERSION_1,
            queue_sizes,
            registers: TransportState::default(),
            queues: Vec::new(),
        };
        transport.reset();
        transport
    }

    /// Restores a saved transport; `None` when such a device cannot have it in such memory.
    #[must_use]
    pub(super) fn restore(&mut self, saved: &TransportState, memory: &DeviceMemory) -> Option<()> {
        if saved.queues.len() != self.queue_sizes.len()
            || saved.driver_features & !self.device_features != 0
        {
            return None;
        }
        self.registers = saved.clone();
        for (index, registers) in saved.queues.iter().enumerate() {
            let queue = match registers.ready {
                true => Some(self.make_queue(index, memory)?),
                false => None,
            };
            *self.queues.get_mut(index)? = queue;
        }
        Some(())
    }

    /// The registers. The caller fills in the reasons for an interrupt.
    pub(super) fn state(&self) -> TransportState {
        let mut registers = self.registers.clone();
        for (registers, queue) in registers.queues.iter_mut().zip(&self.queues) {
            if let Some(queue) = queue {
                registers.next_available = queue.next_avail();
                registers.next_used = queue.next_used();
            }
        }
        registers
    }

    /// Whether the driver has started the device, and no error has happened since.
    pub(super) fn is_running(&self) -> bool {
        let bits = VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET;
        self.registers.status & bits == VIRTIO_CONFIG_S_DRIVER_OK
    }

    pub(super) fn set_needs_reset(&mut self) {
        self.registers.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
    }

    /// A read of a register below [`CONFIG_OFFSET`].
    pub(super) fn read(&self, offset: u64, interrupt_status: u32) -> u32 {
        let registers = &self.registers;
        match offset as u32 {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.device_id,
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => match registers.device_features_sel {
                0 => self.device_features as u32,
                1 => (self.device_features >> 32) as u32,
                _ => 0,
            },
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => {
                let size = self.queue_sizes.get(registers.queue_sel as usize);
                size.copied().unwrap_or(0).into()
            }
            reg::VIRTIO_MMIO_QUEUE_READY => {
                registers.queues.get(registers.queue_sel as usize).is_some_and(|q| q.ready).into()
            }
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => interrupt_status,
            reg::VIRTIO_MMIO_STATUS => registers.status,
            // There is no shared memory: its length is "none".
            reg::VIRTIO_MMIO_SHM_LEN_LOW | reg::VIRTIO_MMIO_SHM_LEN_HIGH => u32::MAX,
            reg::VIRTIO_MMIO_SHM_BASE_LOW | reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            reg::VIRTIO_MMIO_CONFIG_GENERATION => registers.config_generation,
            _ => 0,
        }
    }

    /// A write of a register below [`CONFIG_OFFSET`]. Writes at the wrong time are ignored.
    pub(super) fn write(&mut self, offset: u64, value: u32, memory: &DeviceMemory) -> Action {
        let features_ok = self.registers.status & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        let registers = &mut self.registers;
        match offset as u32 {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => registers.device_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => registers.driver_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES if !features_ok => {
                let features = &mut registers.driver_features;
                match registers.driver_features_sel {
                    0 => *features = *features >> 32 << 32 | u64::from(value),
                    1 => *features = *features & 0xffff_ffff | u64::from(value) << 32,
                    _ => {}
                }
            }
            reg::VIRTIO_MMIO_QUEUE_SEL => registers.queue_sel = value,
            reg::VIRTIO_MMIO_QUEUE_READY => return self.set_queue_ready(value, memory),
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => return Action::Notify(value),
            reg::VIRTIO_MMIO_STATUS => return self.set_status(value),
            _ => self.write_queue_register(offset as u32, value),
        }
        Action::None
    }

    fn write_queue_register(&mut self, offset: u32, value: u32) {
        let queue = self.registers.queues.get_mut(self.registers.queue_sel as usize);
        let Some(queue) = queue.filter(|queue| !queue.ready) else { return };
        let low = |field: &mut u64| *field = *field >> 32 << 32 | u64::from(value);
        let high = |field: &mut u64| *field = *field & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            reg::VIRTIO_MMIO_QUEUE_NUM => queue.size = value,
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => low(&mut queue.descriptors),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => high(&mut queue.descriptors),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => low(&mut queue.available),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => high(&mut queue.available),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => low(&mut queue.used),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => high(&mut queue.used),
            _ => {}
        }
    }

    fn set_queue_ready(&mut self, value: u32, memory: &DeviceMemory) -> Action {
        let index = self.registers.queue_sel as usize;
        let Some(registers) = self.registers.queues.get_mut(index) else { return Action::None };
        if value == 0 {
            registers.ready = false;
            registers.next_available = 0;
            registers.next_used = 0;
            self.queues[index] = None;
            return Action::None;
        }
        if registers.ready || self.registers.status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            return Action::None;
        }
        registers.ready = true;
        match self.make_queue(index, memory) {
            Some(queue) => {
                self.queues[index] = Some(queue);
                Action::None
            }
            None => {
                self.registers.queues[index].ready = false;
                Action::NeedsReset
            }
        }
    }

    /// The queue that the registers describe, if its size is valid and its rings are aligned and in memory.
    fn make_queue(&self, index: usize, memory: &DeviceMemory) -> Option<Queue> {
        let registers = self.registers.queues.get(index)?;
        let state = QueueState {
            max_size: *self.queue_sizes.get(index)?,
            next_avail: registers.next_available,
            next_used: registers.next_used,
            event_idx_enabled: false,
            size: u16::try_from(registers.size).ok()?,
            ready: true,
            desc_table: registers.descriptors,
            avail_ring: registers.available,
            used_ring: registers.used,
        };
        Queue::try_from(state).ok().filter(|queue| queue.is_valid(memory))
    }

    fn set_status(&mut self, value: u32) -> Action {
        if value == 0 {
            self.reset();
            return Action::Reset;
        }
        let status = &mut self.registers.status;
        // Bits are only ever added, and NEEDS_RESET is the device's.
        let mut new = *status | value & DRIVER_STATUS_BITS;
        let features = self.registers.driver_features;
        let acceptable =
            features & !self.device_features == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0;
        let features_ok = VIRTIO_CONFIG_S_FEATURES_OK;
        if new & !*status & features_ok != 0 && !acceptable {
            new &= !features_ok;
        }
        if new & features_ok == 0 {
            new &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        let starts = new & !*status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        *status = new;
        if starts { Action::Start } else { Action::None }
    }

    fn reset(&mut self) {
        let queues = self.queue_sizes.iter();
        self.registers = TransportState {
            queues: queues
                .map(|&size| QueueRegisters { size: size.into(), ..QueueRegisters::default() })
                .collect(),
            config_generation: self.registers.config_generation,
            ..TransportState::default()
        };
        self.queues = self.queue_sizes.iter().map(|_| None).collect();
    }
}
