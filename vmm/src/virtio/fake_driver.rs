//! A guest's driver for the tests: sets a device up through its registers, and puts descriptors into memory.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::VirtioDevice;
use crate::control::{Control, Stop, VmHandle};
use crate::devices::{DeviceContext, MmioDevice};
use crate::written::WriteLog;

pub(super) const MEMORY_BYTES: u64 = 0x10_0000;
/// A page that has no memory behind it: touching it is SIGBUS.
pub(super) const BROKEN_GPA: u64 = MEMORY_BYTES - 0x1000;
pub(super) const DESCRIPTORS: u64 = 0x1000;
pub(super) const AVAILABLE: u64 = 0x2000;
pub(super) const USED: u64 = 0x3000;
pub(super) const QUEUE_SIZE: u32 = 16;
/// From the rings of one queue to those of the next.
const RINGS_STRIDE: u64 = 0x100;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

pub(super) const STATUS: u64 = 0x70;
pub(super) const NEEDS_RESET: u32 = 64;

/// Long enough that only a hang takes longer.
const HANG: Duration = Duration::from_secs(60);

pub(super) struct Driver {
    pub(super) device: VirtioDevice,
    pub(super) memory: Arc<GuestMemoryMmap>,
    control: Arc<Control>,
    interrupt: EventFd,
    interrupted: Epoll,
    /// What the device has written.
    pub(super) writes: WriteLog,
}

/// Memory whose last page is broken.
pub(super) fn memory() -> Arc<GuestMemoryMmap> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MEMORY_BYTES).unwrap();
    let offset = FileOffset::new(file.try_clone().unwrap(), 0);
    let range = (GuestAddress(0), MEMORY_BYTES as usize, Some(offset));
    let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
    file.set_len(BROKEN_GPA).unwrap();
    Arc::new(memory)
}

fn context(
    memory: &Arc<GuestMemoryMmap>,
    control: &Arc<Control>,
    interrupt: &EventFd,
    queues: usize,
) -> DeviceContext {
    let io_ports: Weak<Mutex<crate::arch::IoPorts>> = Weak::new();
    DeviceContext {
        memory: Arc::clone(memory),
        interrupt: interrupt.try_clone().unwrap(),
        queue_events: (0..queues).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect(),
        discards: crate::discards::Discards::default(),
        writes: WriteLog::recording(),
        handle: VmHandle::new(Arc::clone(control), io_ports),
    }
}

impl Driver {
    /// For another device in the same machine.
    pub(super) fn context(&self) -> DeviceContext {
        context(&self.memory, &self.control, &self.interrupt, 1)
    }

    pub(super) fn attach(mut device: VirtioDevice, memory: Arc<GuestMemoryMmap>) -> Driver {
        let control = Arc::new(Control::default());
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let context = context(&memory, &control, &interrupt, device.queue_count());
        let writes = context.writes.clone();
        device.attach(context).unwrap();
        device.resume();
        let interrupted = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 0);
        interrupted.ctl(ControlOperation::Add, interrupt.as_raw_fd(), event).unwrap();
        Driver { device, memory, control, interrupt, interrupted, writes }
    }

    pub(super) fn get(&mut self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(super) fn set(&mut self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    /// Sets the device up until it serves its first queue.
    pub(super) fn start(&mut self) {
        self.start_queues(1);
    }

    /// The same for as many queues; each has its rings [`RINGS_STRIDE`] behind those of the one before.
    pub(super) fn start_queues(&mut self, count: u32) {
        self.negotiate();
        for queue in (0..count).rev() {
            let at = u64::from(queue) * RINGS_STRIDE;
            self.memory.write_obj(0u32, GuestAddress(AVAILABLE + at)).unwrap();
            self.memory.write_obj(0u32, GuestAddress(USED + at)).unwrap();
            self.select_and_set(queue, QUEUE_SIZE, DESCRIPTORS + at, AVAILABLE + at, USED + at);
        }
        self.set(STATUS, 1 | 2 | 8 | 4);
        assert_eq!(self.get(STATUS), 1 | 2 | 8 | 4);
    }

    /// Offers one chain in a queue, at descriptor `head`, and notifies the device.
    pub(super) fn offer_in(&mut self, queue: u32, head: u16, buffers: &[(u64, u32, u16)]) {
        let at = u64::from(queue) * RINGS_STRIDE;
        self.chain_at(DESCRIPTORS + at, head, buffers);
        self.offer_at(AVAILABLE + at, head);
        self.set(0x50, queue);
    }

    /// How many chains of a queue were returned.
    pub(super) fn used_in(&self, queue: u32) -> u16 {
        let at = u64::from(queue) * RINGS_STRIDE;
        self.memory.read_obj(GuestAddress(USED + at + 2)).unwrap()
    }

    /// Waits until this number of chains of a queue was returned. Returns the last one's head and length.
    pub(super) fn wait_used_in(&mut self, queue: u32, count: u16) -> (u32, u32) {
        while self.used_in(queue) < count {
            assert_eq!(self.wait_for_interrupt(), 1, "status {}", self.get(STATUS));
        }
        assert_eq!(self.used_in(queue), count);
        let slot = u64::from(count - 1) % u64::from(QUEUE_SIZE);
        let at = USED + u64::from(queue) * RINGS_STRIDE + 4 + 8 * slot;
        let element: u64 = self.memory.read_obj(GuestAddress(at)).unwrap();
        (element as u32, (element >> 32) as u32)
    }

    pub(super) fn negotiate(&mut self) {
        self.set(STATUS, 0);
        self.memory.write_obj(0u32, GuestAddress(AVAILABLE)).unwrap();
        self.memory.write_obj(0u32, GuestAddress(USED)).unwrap();
        self.set(STATUS, 1 | 2);
        for half in [0, 1] {
            self.set(0x14, half);
            let features = self.get(0x10);
            self.set(0x24, half);
            self.set(0x20, features);
        }
        self.set(STATUS, 1 | 2 | 8);
        assert_eq!(self.get(STATUS), 1 | 2 | 8);
    }

    pub(super) fn set_queue(&mut self, size: u32, descriptors: u64, available: u64, used: u64) {
        self.select_and_set(0, size, descriptors, available, used);
    }

    fn select_and_set(
        &mut self,
        queue: u32,
        size: u32,
        descriptors: u64,
        available: u64,
        used: u64,
    ) {
        self.set(0x30, queue);
        self.set(0x38, size);
        for (offset, gpa) in [(0x80, descriptors), (0x90, available), (0xa0, used)] {
            self.set(offset, gpa as u32);
            self.set(offset + 4, (gpa >> 32) as u32);
        }
        self.set(0x44, 1);
    }

    pub(super) fn descriptor(&self, at: u64, gpa: u64, len: u32, flags: u16, next: u16) {
        self.memory.write_obj(gpa, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Puts a chain of (address, length, flags) at descriptor `head`.
    pub(super) fn chain(&self, head: u16, buffers: &[(u64, u32, u16)]) {
        self.chain_at(DESCRIPTORS, head, buffers);
    }

    fn chain_at(&self, descriptors: u64, head: u16, buffers: &[(u64, u32, u16)]) {
        for (index, &(gpa, len, flags)) in buffers.iter().enumerate() {
            let index = head + index as u16;
            let last = usize::from(index - head) + 1 == buffers.len();
            let flags = if last { flags } else { flags | NEXT };
            self.descriptor(descriptors + u64::from(index) * 16, gpa, len, flags, index + 1);
        }
    }

    /// Offers the chain at `head`, and notifies the device with [`Driver::notify`].
    pub(super) fn offer(&self, head: u16) {
        self.offer_at(AVAILABLE, head);
    }

    fn offer_at(&self, available: u64, head: u16) {
        let index: u16 = self.memory.read_obj(GuestAddress(available + 2)).unwrap();
        let slot = u64::from(index) % u64::from(QUEUE_SIZE);
        self.memory.write_obj(head, GuestAddress(available + 4 + 2 * slot)).unwrap();
        self.memory.write_obj(index.wrapping_add(1), GuestAddress(available + 2)).unwrap();
    }

    pub(super) fn notify(&mut self) {
        self.set(0x50, 0);
    }

    /// Waits for the interrupt, acknowledges its reasons and returns them.
    pub(super) fn wait_for_interrupt(&mut self) -> u32 {
        let mut events = [EpollEvent::default()];
        let count = self.interrupted.wait(HANG.as_millis() as i32, &mut events).unwrap();
        assert_eq!(count, 1, "the device hangs");
        self.interrupt.read().unwrap();
        let reasons = self.get(0x60);
        self.set(0x64, reasons);
        assert_eq!(self.get(0x60), 0);
        reasons
    }

    /// Takes interrupts that have come already, as an interrupt controller does that is reset with the device.
    pub(super) fn drop_interrupts(&mut self) {
        while self.interrupted.wait(0, &mut [EpollEvent::default()]).unwrap() > 0 {
            self.interrupt.read().unwrap();
        }
    }

    /// Offers one chain, and waits until it is used. Returns the length that the device reports.
    pub(super) fn run(&mut self, buffers: &[(u64, u32, u16)]) -> u32 {
        self.chain(0, buffers);
        self.offer(0);
        self.notify();
        assert_eq!(self.wait_for_interrupt(), 1, "not for the queue; status {}", self.get(STATUS));
        let used: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        let slot = u64::from(used.wrapping_sub(1)) % u64::from(QUEUE_SIZE);
        self.memory.read_obj(GuestAddress(USED + 4 + 8 * slot + 4)).unwrap()
    }

    /// The used ring's index: how many chains were returned.
    pub(super) fn used(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    pub(super) fn wait_for_stop(&self) -> Stop {
        self.control.wait(Some(HANG)).expect("the guest is not stopped")
    }

    pub(super) fn stop(&self) -> Option<Stop> {
        self.control.reason()
    }
}
