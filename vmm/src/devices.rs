//! Devices in windows of guest physical addresses: what a device is, and where it is.
//!
//! Every device has one window of 4 KiB in the MMIO hole and one interrupt line, both given by its place in
//! the list of devices ([`device_window`]). An access inside the window calls the device on the vCPU's
//! thread. A device may also have its own threads; they do not run while the guest is paused.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{IoEventAddress, VmFd};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::arch::DEVICE_IRQS;
use crate::control::VmHandle;
use crate::discards::Discards;
use crate::error::{KvmError, NameCall};
use crate::layout::PAGE_BYTES;
use crate::state::DeviceState;
use crate::written::WriteLog;

pub use crate::arch::DEVICE_WINDOWS_GPA;

/// Length of a device's window.
pub const DEVICE_WINDOW_BYTES: u64 = PAGE_BYTES;
/// Most devices a guest may have.
pub const DEVICES_MAX: usize = DEVICE_IRQS.len();
/// Offset in its window of a virtio-mmio device's register `QueueNotify` (virtio 1.2, 4.2.2).
const QUEUE_NOTIFY_OFFSET: u64 = 0x50;
/// What a read returns where no device is: the bus floats high.
pub(crate) const NO_DEVICE: u8 = 0xff;

/// Guest physical addresses and interrupt line of the device at place `index` of the list, below
/// [`DEVICES_MAX`].
#[must_use]
pub fn device_window(index: usize) -> Option<(Range<u64>, u32)> {
    let irq = *DEVICE_IRQS.get(index)?;
    let start = DEVICE_WINDOWS_GPA + index as u64 * DEVICE_WINDOW_BYTES;
    Some((start..start + DEVICE_WINDOW_BYTES, irq))
}

/// Data of a device at one point in time: see [`MmioDevice::freeze_content`].
pub type FrozenContent = Box<dyn Fn() -> io::Result<Vec<u8>> + Send + Sync>;

/// A device in a window of guest physical addresses.
///
/// The machine calls [`attach`](MmioDevice::attach) once, before the guest runs. After that it calls
/// [`resume`](MmioDevice::resume) and [`pause`](MmioDevice::pause) alternately, beginning with `resume`. It
/// calls [`read`](MmioDevice::read) and [`write`](MmioDevice::write) only between those two, from one thread
/// at a time, and [`state`](MmioDevice::state) only while the device is paused.
pub trait MmioDevice: Send {
    /// Queues whose notifications the device takes from an eventfd: see [`DeviceContext::queue_events`].
    fn queue_count(&self) -> usize;

    /// Connects the device to the machine.
    ///
    /// # Errors
    /// Why the device cannot work.
    fn attach(&mut self, context: DeviceContext) -> io::Result<()>;

    /// A read of the guest at `offset` in the window: fills `data`.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// A write of the guest at `offset` in the window.
    fn write(&mut self, offset: u64, data: &[u8]);

    /// The guest is about to run: threads of the device may use guest memory.
    fn resume(&mut self);

    /// The guest does not run any more. The device finishes its current work. When this returns, the device uses
    /// neither guest memory nor its interrupt until [`resume`](MmioDevice::resume).
    fn pause(&mut self);

    /// What is needed to create the device again, without its back end.
    fn state(&self) -> DeviceState;

    /// Data of the device that is too large for its state, if there is any. A snapshot must contain both.
    ///
    /// # Errors
    /// Why it cannot be saved.
    fn content(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(None)
    }

    /// The same data, as it is now. It is called while the device is paused, and takes microseconds. The result is called
    /// later, while the device may be in use.
    ///
    /// # Errors
    /// Why it cannot be saved.
    fn freeze_content(&mut self) -> io::Result<Option<FrozenContent>> {
        Ok(self.content()?.map(|bytes| -> FrozenContent { Box::new(move || Ok(bytes.clone())) }))
    }

    /// Puts the device back into a former [`state`](MmioDevice::state) of it, with the [`content`](MmioDevice::content) of
    /// that time. What it is connected to stays. It is called while the device is paused.
    ///
    /// # Errors
    /// Why that is not possible. The device is not used any more then.
    fn reset(&mut self, _state: &DeviceState, _content: Option<&[u8]>) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "such a device cannot be reset"))
    }

    /// A file that the guest changes by this device and that is not part of its state, if there is one. Such a guest
    /// cannot run while it is saved, because the file would be that of a later time.
    fn outside_file(&self) -> Option<PathBuf> {
        None
    }
}

/// The parts of the machine that a device uses.
#[non_exhaustive]
pub struct DeviceContext {
    /// The guest's memory.
    pub memory: Arc<GuestMemoryMmap>,
    /// Written to raise the device's interrupt, an edge (KVM_IRQFD).
    pub interrupt: EventFd,
    /// One for each of [`MmioDevice::queue_count`]: readable after the guest has written the queue's
    /// number, as 32 bits, to offset 0x50 of the window (KVM_IOEVENTFD). Such writes do not call
    /// [`MmioDevice::write`].
    pub queue_events: Vec<EventFd>,
    /// Asked before memory is returned to the host.
    pub discards: Discards,
    /// Gets every write of the device to memory, before it is done.
    pub writes: WriteLog,
    /// Stops the guest when the device cannot continue.
    pub handle: VmHandle,
}

/// Devices that cannot be part of a machine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A KVM call failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// More than [`DEVICES_MAX`].
    #[error("{count} devices, expected at most {DEVICES_MAX}")]
    TooMany {
        /// How many were given.
        count: usize,
    },
    /// The devices given are not those of the state.
    #[error(
        "the state is of devices of kinds {expected:?}, and devices of kinds {found:?} were given"
    )]
    Mismatch {
        /// Kinds of the devices given.
        found: Vec<u32>,
        /// Kinds of the devices in the state.
        expected: Vec<u32>,
    },
    /// The device cannot work, or the system has no eventfd for it.
    #[error("device {index} cannot be connected")]
    Attach {
        /// Its place in the list.
        index: usize,
        /// The error of the device.
        #[source]
        source: io::Error,
    },
}

/// All devices of a machine, by place.
#[derive(Default)]
pub(crate) struct Devices {
    places: Vec<Mutex<Box<dyn MmioDevice>>>,
    pub(crate) discards: Discards,
    pub(crate) writes: WriteLog,
}

impl Devices {
    pub(crate) fn new(devices: Vec<Box<dyn MmioDevice>>) -> Result<Devices, DeviceError> {
        if devices.len() > DEVICES_MAX {
            return Err(DeviceError::TooMany { count: devices.len() });
        }
        let places = devices.into_iter().map(Mutex::new).collect();
        Ok(Devices { places, ..Devices::default() })
    }

    /// Refuses devices that are not of the kinds of the saved ones.
    pub(crate) fn check_kinds(&self, saved: &[DeviceState]) -> Result<(), DeviceError> {
        let found: Vec<u32> = self.all().map(|device| device.state().kind).collect();
        let expected: Vec<u32> = saved.iter().map(|device| device.kind).collect();
        if found == expected { Ok(()) } else { Err(DeviceError::Mismatch { found, expected }) }
    }

    pub(crate) fn attach(
        &self,
        vm: &VmFd,
        memory: &Arc<GuestMemoryMmap>,
        handle: &VmHandle,
    ) -> Result<(), DeviceError> {
        for (index, mut device) in self.all().enumerate() {
            let Some((window, irq)) = device_window(index) else { break };
            let failed = |source| DeviceError::Attach { index, source };
            let eventfd = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(failed);
            let interrupt = eventfd()?;
            vm.register_irqfd(&interrupt, irq).call("KVM_IRQFD")?;
            let notify = IoEventAddress::Mmio(window.start + QUEUE_NOTIFY_OFFSET);
            let mut queue_events = Vec::new();
            for queue in 0..device.queue_count() as u32 {
                let event = eventfd()?;
                vm.register_ioevent(&event, &notify, queue).call("KVM_IOEVENTFD")?;
                queue_events.push(event);
            }
            let (memory, discards) = (Arc::clone(memory), self.discards.clone());
            let writes = self.writes.clone();
            let handle = handle.clone();
            let context =
                DeviceContext { memory, interrupt, queue_events, discards, writes, handle };
            device.attach(context).map_err(failed)?;
        }
        Ok(())
    }

    /// The device that is reached at `gpa`, and the offset in its window.
    pub(crate) fn at(&self, gpa: u64) -> Option<(MutexGuard<'_, Box<dyn MmioDevice>>, u64)> {
        let from_first = gpa.checked_sub(DEVICE_WINDOWS_GPA)?;
        let index = usize::try_from(from_first / DEVICE_WINDOW_BYTES).ok()?;
        let device = self.places.get(index)?;
        Some((lock(device), from_first % DEVICE_WINDOW_BYTES))
    }

    pub(crate) fn resume(&self) {
        self.all().for_each(|mut device| device.resume());
    }

    pub(crate) fn pause(&self) {
        self.all().for_each(|mut device| device.pause());
    }

    pub(crate) fn states(&self) -> Vec<DeviceState> {
        self.all().map(|device| device.state()).collect()
    }

    pub(crate) fn contents(&self) -> io::Result<Vec<Option<Vec<u8>>>> {
        self.all().map(|device| device.content()).collect()
    }

    pub(crate) fn freeze_contents(&self) -> io::Result<Vec<Option<FrozenContent>>> {
        self.all().map(|mut device| device.freeze_content()).collect()
    }

    /// Puts all devices back. The error has the place of the device.
    pub(crate) fn reset(
        &self,
        states: &[DeviceState],
        contents: &[Option<Vec<u8>>],
    ) -> Result<(), (usize, io::Error)> {
        for (place, (mut device, state)) in self.all().zip(states).enumerate() {
            let content = contents.get(place).and_then(Option::as_deref);
            device.reset(state, content).map_err(|error| (place, error))?;
        }
        Ok(())
    }

    pub(crate) fn outside_file(&self) -> Option<PathBuf> {
        self.all().find_map(|device| device.outside_file())
    }

    fn all(&self) -> impl Iterator<Item = MutexGuard<'_, Box<dyn MmioDevice>>> {
        self.places.iter().map(lock)
    }
}

fn lock(device: &Mutex<Box<dyn MmioDevice>>) -> MutexGuard<'_, Box<dyn MmioDevice>> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}
