//! A virtio device in its window: the transport's registers on the vCPUs' threads, the queues on the thread
//! of the devices.

use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INTERRUPT_ACK,
    VIRTIO_MMIO_INTERRUPT_STATUS,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::event_loop::{EventLoop, Listener, Watcher};
use super::fault::Fault;
use super::memory::DeviceMemory;
use super::rings::Rings;
use super::state::{BackendState, QUEUES_MAX, TransportState, VirtioState};
use super::transport::{Action, CONFIG_OFFSET, Transport};
use crate::control::VmHandle;
use crate::devices::{DeviceContext, FrozenContent, MmioDevice};
use crate::state::DeviceState;

/// The functions of one kind of device, without transport and threads.
pub(super) trait Backend: Send {
    /// Feature bits of this kind of device (virtio 1.2, 6 and 5.x.3).
    fn features(&self) -> u64;

    /// Largest sizes of the queues.
    fn queue_sizes(&self) -> &'static [u16];

    /// The configuration that the driver reads.
    fn config(&self) -> &[u8];

    /// Does one request of the queue from beginning to end; `false` when there is none.
    ///
    /// # Errors
    /// A [`Fault`], after which no queue is served until the driver resets the device.
    fn serve(&mut self, rings: &mut Rings<'_>, queue: usize) -> Result<bool, Fault>;

    /// The device is part of a machine: from here on the host's side may call.
    ///
    /// # Errors
    /// When the host's descriptors cannot be watched.
    fn connect(&mut self, _watcher: HostWatcher) -> io::Result<()> {
        Ok(())
    }

    /// A descriptor of the host has changed. This is called also while the guest is paused or has no driver, so
    /// it only records the change and does not touch guest memory. Returns the queue for [`Backend::serve`].
    fn host_changed(&mut self, _token: u32, _events: EventSet) -> usize {
        0
    }

    /// The driver has reset the device, or is another one.
    fn reset(&mut self) {}

    /// The driver has used the device before the guest was saved.
    fn restored(&mut self) {}

    /// The guest is put back to the time of `saved`, and the transport already is. Requests and connections of later are
    /// forgotten: [`Backend::reset`]. What the device is connected to stays.
    ///
    /// # Errors
    /// Why that is not possible.
    fn put_back(&mut self, _saved: &BackendState, _content: Option<&[u8]>) -> io::Result<()> {
        Ok(())
    }

    /// The driver writes to the configuration.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// No request is in progress: writes data that the host has cached to the place where the restored guest reads it.
    ///
    /// # Errors
    /// Why the guest cannot be saved. It is stopped permanently then.
    fn pause(&mut self) -> Result<(), String> {
        Ok(())
    }

    /// The state of this kind of device.
    fn state(&self) -> BackendState;

    /// Its data that is too large for the state.
    ///
    /// # Errors
    /// Why it cannot be saved.
    fn content(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(None)
    }

    /// As [`MmioDevice::freeze_content`].
    fn freeze_content(&mut self) -> io::Result<Option<FrozenContent>> {
        Ok(None)
    }

    /// As [`MmioDevice::outside_file`].
    fn outside_file(&self) -> Option<PathBuf> {
        None
    }
}

/// The watcher of a device for descriptors of the host.
#[derive(Clone)]
pub(super) struct HostWatcher(Watcher);

impl HostWatcher {
    /// Calls [`Backend::host_changed`] when `fd` changes, until it is closed.
    pub(super) fn watch(&self, token: u32, fd: &impl AsRawFd) -> io::Result<()> {
        // Tokens belong to the device. They are reused after 2^32 of them.
        self.0.watch_changes(HOST_SOURCES.saturating_add(token), fd)
    }
}

#[cfg(any(test, fuzzing))]
impl HostWatcher {
    /// For a device that is in no machine.
    pub(super) fn without_machine(event_loop: &EventLoop) -> HostWatcher {
        HostWatcher(event_loop.watcher(u32::MAX - 1))
    }
}

/// Sources below this are queues.
const HOST_SOURCES: u32 = QUEUES_MAX as u32;

/// A virtio device, as a machine takes it.
pub struct VirtioDevice {
    core: Arc<Core>,
    event_loop: Arc<EventLoop>,
    listener_id: u32,
    queue_count: usize,
    /// The transport to restore, until it can be checked with the memory.
    saved: Option<TransportState>,
}

/// The state that the vCPUs' threads and the devices' thread share.
struct Core {
    inner: Mutex<Inner>,
    /// Reasons for the interrupt. Outside of the lock: the driver's interrupt handler reads and
    /// clears it while the devices' thread may be waiting for a disk.
    interrupt_status: AtomicU32,
    /// A thread waits for the lock to pause the device: leave the rest of the queue for later.
    pausing: AtomicBool,
}

struct Inner {
    transport: Transport,
    backend: Box<dyn Backend>,
    wired: Option<Wired>,
    /// Between `resume` and `pause`.
    resumed: bool,
}

struct Wired {
    memory: DeviceMemory,
    interrupt: EventFd,
    queue_events: Vec<EventFd>,
    handle: VmHandle,
}

impl VirtioDevice {
    pub(super) fn new(
        event_loop: &Arc<EventLoop>,
        backend: Box<dyn Backend>,
        saved: Option<TransportState>,
    ) -> VirtioDevice {
        let device_id = backend.state().kind();
        let queue_sizes = backend.queue_sizes();
        let transport = Transport::new(device_id, backend.features(), queue_sizes);
        let inner = Inner { transport, backend, wired: None, resumed: false };
        let core = Arc::new(Core {
            inner: Mutex::new(inner),
            interrupt_status: AtomicU32::new(0),
            pausing: AtomicBool::new(false),
        });
        let listener: Weak<dyn Listener> = Arc::<Core>::downgrade(&core) as Weak<dyn Listener>;
        VirtioDevice {
            core,
            event_loop: Arc::clone(event_loop),
            listener_id: event_loop.add_listener(listener),
            queue_count: queue_sizes.len(),
            saved,
        }
    }
}

impl MmioDevice for VirtioDevice {
    fn queue_count(&self) -> usize {
        self.queue_count
    }

    fn attach(&mut self, context: DeviceContext) -> io::Result<()> {
        let memory = DeviceMemory::new(context.memory)
            .with_discards(context.discards)
            .with_writes(context.writes);
        let mut inner = self.core.lock();
        if let Some(saved) = self.saved.take() {
            self.core.restore_transport(&mut inner, &saved, &memory)?;
        }
        let watcher = self.event_loop.watcher(self.listener_id);
        for (source, event) in (0..).zip(&context.queue_events) {
            watcher.watch_readable(source, event)?;
        }
        inner.backend.connect(HostWatcher(watcher))?;
        let DeviceContext { interrupt, queue_events, handle, .. } = context;
        inner.wired = Some(Wired { memory, interrupt, queue_events, handle });
        Ok(())
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(CONFIG_OFFSET) {
            let inner = self.core.lock();
            let config = usize::try_from(at).ok().and_then(|at| inner.backend.config().get(at..));
            for (byte, value) in data.iter_mut().zip(config.unwrap_or_default()) {
                *byte = *value;
            }
        } else if data.len() == size_of::<u32>() && offset.is_multiple_of(4) {
            let interrupt_status = self.core.interrupt_status.load(Ordering::SeqCst);
            let value = match offset == u64::from(VIRTIO_MMIO_INTERRUPT_STATUS) {
                true => interrupt_status,
                false => self.core.lock().transport.read(offset, interrupt_status),
            };
            data.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(at) = offset.checked_sub(CONFIG_OFFSET) {
            let Ok(at) = usize::try_from(at) else { return };
            return self.core.lock().backend.write_config(at, data);
        }
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else { return };
        if !offset.is_multiple_of(4) {
            return;
        }
        if offset == u64::from(VIRTIO_MMIO_INTERRUPT_ACK) {
            self.core.interrupt_status.fetch_and(!value, Ordering::SeqCst);
            return;
        }
        let mut inner = self.core.lock();
        let Inner { transport, backend, wired: Some(wired), .. } = &mut *inner else { return };
        match transport.write(offset, value, &wired.memory) {
            Action::None => {}
            Action::Start => wired.kick_all(),
            Action::Notify(queue) => wired.kick(queue),
            Action::Reset => {
                self.core.interrupt_status.store(0, Ordering::SeqCst);
                backend.reset();
            }
            Action::NeedsReset => self.core.break_down(transport, wired),
        }
    }

    fn resume(&mut self) {
        let mut inner = self.core.lock();
        inner.resumed = true;
        let Some(wired) = &inner.wired else { return };
        // Notifications that arrived while the device was paused were dropped, and notifications that were
        // pending when the guest was saved are not part of its state.
        wired.kick_all();
        // The same applies to an interrupt that KVM had not delivered yet. An additional interrupt is harmless.
        if self.core.interrupt_status.load(Ordering::SeqCst) != 0 {
            wired.interrupt();
        }
    }

    fn pause(&mut self) {
        self.core.pausing.store(true, Ordering::SeqCst);
        // A request in progress ends first.
        let mut inner = self.core.lock();
        inner.resumed = false;
        self.core.pausing.store(false, Ordering::SeqCst);
        let Inner { backend, wired: Some(wired), .. } = &mut *inner else { return };
        if let Err(reason) = backend.pause() {
            wired.handle.fail(reason);
        }
    }

    fn state(&self) -> DeviceState {
        let inner = self.core.lock();
        let mut transport = inner.transport.state();
        transport.interrupt_status = self.core.interrupt_status.load(Ordering::SeqCst);
        VirtioState { transport, device: inner.backend.state() }.encode()
    }

    fn content(&self) -> io::Result<Option<Vec<u8>>> {
        self.core.lock().backend.content()
    }

    fn reset(&mut self, state: &DeviceState, content: Option<&[u8]>) -> io::Result<()> {
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        let VirtioState { transport, device, .. } = VirtioState::decode(state).map_err(invalid)?;
        let mut inner = self.core.lock();
        let Some(wired) = inner.wired.take() else { return Ok(()) };
        inner.backend.reset();
        let put_back = inner.backend.put_back(&device, content);
        let restored = self.core.restore_transport(&mut inner, &transport, &wired.memory);
        inner.wired = Some(wired);
        put_back.and(restored)
    }

    fn freeze_content(&mut self) -> io::Result<Option<FrozenContent>> {
        self.core.lock().backend.freeze_content()
    }

    fn outside_file(&self) -> Option<PathBuf> {
        self.core.lock().backend.outside_file()
    }
}

/// Why a saved transport is refused.
const NOT_THIS_DEVICE: &str =
    "the saved state has features, queues or addresses that such a device cannot have";

impl Drop for VirtioDevice {
    fn drop(&mut self) {
        // Under the lock: from here on the devices' thread does not touch guest memory. Its missing pages may
        // not be supplied any more.
        if let Some(wired) = self.core.lock().wired.take() {
            for event in &wired.queue_events {
                self.event_loop.unwatch(event);
            }
        }
        self.event_loop.remove_listener(self.listener_id);
    }
}

impl Listener for Core {
    fn ready(&self, source: u32, events: EventSet) {
        let mut inner = self.lock();
        let Inner { transport, backend, wired: Some(wired), resumed } = &mut *inner else { return };
        let _stop_guest = StopOnPanic(&wired.handle);
        let queue = match source.checked_sub(HOST_SOURCES) {
            Some(token) => backend.host_changed(token, events),
            None => {
                let Some(event) = wired.queue_events.get(source as usize) else { return };
                let _ = event.read();
                source as usize
            }
        };
        if !*resumed || !transport.is_running() {
            return;
        }
        let memory = &wired.memory;
        let mut rings = Rings { queues: &mut transport.queues, memory, used: false };
        // One turn is at most the length of one queue, so that a driver that never stops does not starve the other
        // devices. A queue that is not set up has length 0, and must not be served again and again.
        let mut turns = rings.size(queue).max(1);
        let outcome = loop {
            if turns == 0 || self.pausing.load(Ordering::SeqCst) {
                wired.kick(queue as u32);
                break Ok(());
            }
            turns -= 1;
            match backend.serve(&mut rings, queue) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(fault) => break Err(fault),
            }
        };
        if rings.used {
            self.interrupt_status.fetch_or(VIRTIO_MMIO_INT_VRING, Ordering::SeqCst);
            wired.interrupt();
        }
        match outcome {
            Ok(()) => {}
            Err(Fault::Unreadable { gpa }) => wired.handle.memory_error(gpa),
            Err(Fault::Driver(_)) => self.break_down(transport, wired),
        }
    }
}

impl Core {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // After a panic the guest is stopped permanently, so the data is not used any more.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn restore_transport(
        &self,
        inner: &mut Inner,
        saved: &TransportState,
        memory: &DeviceMemory,
    ) -> io::Result<()> {
        let impossible = || io::Error::new(io::ErrorKind::InvalidData, NOT_THIS_DEVICE);
        inner.transport.restore(saved, memory).ok_or_else(impossible)?;
        self.interrupt_status.store(saved.interrupt_status, Ordering::SeqCst);
        if inner.transport.is_running() {
            inner.backend.restored();
        }
        Ok(())
    }

    /// The driver violated the specification: reports that to it, and waits for a reset (virtio 1.2, 2.1.2).
    fn break_down(&self, transport: &mut Transport, wired: &Wired) {
        transport.set_needs_reset();
        self.interrupt_status.fetch_or(VIRTIO_MMIO_INT_CONFIG, Ordering::SeqCst);
        wired.interrupt();
    }
}

impl Wired {
    fn interrupt(&self) {
        // A full counter means that an interrupt is already pending.
        let _ = self.interrupt.write(1);
    }

    fn kick_all(&self) {
        self.queue_events.iter().for_each(|event| drop(event.write(1)));
    }

    fn kick(&self, queue: u32) {
        if let Some(event) = self.queue_events.get(queue as usize) {
            let _ = event.write(1);
        }
    }
}

/// A device that panics stops the guest.
struct StopOnPanic<'a>(&'a VmHandle);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail("a device's thread panicked");
        }
    }
}
