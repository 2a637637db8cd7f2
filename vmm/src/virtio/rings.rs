//! The queues of a device while its driver runs them: chains of buffers in, used buffers out.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::fault::Fault;
use super::memory::{DeviceMemory, Segment};

/// Most buffers of one request: what the largest queue can hold without indirect descriptors.
const SEGMENTS_MAX: usize = 256;

/// The queues of a device, by number; `None` is one that the driver has not set up.
pub(super) struct Rings<'a> {
    pub(super) queues: &'a mut [Option<Queue>],
    pub(super) memory: &'a DeviceMemory,
    /// Whether buffers were returned since this was created, so that the driver must be notified.
    pub(super) used: bool,
}

impl Rings<'_> {
    /// The next request of the queue, if there is one.
    pub(super) fn pop(&mut self, queue: usize) -> Result<Option<Request>, Fault> {
        let Some(Some(queue)) = self.queues.get_mut(queue) else { return Ok(None) };
        let memory = self.memory;
        let chain = queue.iter(memory).map(|mut chains| chains.next());
        // First: an error below may come from this.
        memory.check()?;
        let Some(chain) = chain.map_err(|_| Fault::Driver("an impossible available index"))? else {
            return Ok(None);
        };
        let head = chain.head_index();
        let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
        // `virtio-queue` ends a chain where it breaks. A whole one ends with a descriptor that names no
        // next one.
        let mut whole = false;
        for (count, descriptor) in chain.enumerate() {
            whole = !descriptor.has_next();
            let segment = Segment { gpa: descriptor.addr().0, len: descriptor.len() as usize };
            // Empty ones too: an indirect table has room for 65535 of them.
            if count == SEGMENTS_MAX {
                return Err(Fault::Driver("a chain of too many buffers"));
            }
            if segment.len == 0 {
                continue;
            }
            if !memory.is_ram(segment) {
                return Err(Fault::Driver("a buffer that is not in memory"));
            }
            match (descriptor.is_write_only(), writable.0.is_empty()) {
                (true, _) => writable.0.push(segment),
                (false, true) => readable.0.push(segment),
                (false, false) => {
                    return Err(Fault::Driver("a buffer to read after one to write"));
                }
            }
        }
        memory.check()?;
        if !whole {
            return Err(Fault::Driver("a chain that is broken, endless or longer than 4 GiB"));
        }
        Ok(Some(Request { head, readable, writable }))
    }

    /// Returns the request that was popped last to the queue.
    pub(super) fn unpop(&mut self, queue: usize) {
        if let Some(Some(queue)) = self.queues.get_mut(queue) {
            queue.go_to_previous_position();
        }
    }

    /// How many requests the driver has offered in this queue since it was set up, modulo 2^16.
    pub(super) fn offered(&self, queue: usize) -> Result<u16, Fault> {
        let Some(Some(queue)) = self.queues.get(queue) else { return Ok(0) };
        let index = queue.avail_idx(self.memory, Ordering::Acquire);
        self.memory.check()?;
        index.map(|index| index.0).map_err(|_| Fault::Driver("an impossible available index"))
    }

    /// Returns a request's buffers to the driver, with `written` bytes in them.
    pub(super) fn push_used(
        &mut self,
        queue: usize,
        head: u16,
        written: usize,
    ) -> Result<(), Fault> {
        let Some(Some(queue)) = self.queues.get_mut(queue) else { return Ok(()) };
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        let pushed = queue.add_used(self.memory, head, written);
        self.memory.check()?;
        pushed.map_err(|_| Fault::Driver("a descriptor that is not in its table"))?;
        self.used = true;
        Ok(())
    }

    /// Most requests that the queue can hold: work for one turn.
    pub(super) fn size(&self, queue: usize) -> u16 {
        self.queues.get(queue).and_then(Option::as_ref).map_or(0, QueueT::size)
    }
}

/// One request of the driver.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) head: u16,
    /// The buffers that the device reads.
    pub(super) readable: Buffers,
    /// The buffers that the device writes.
    pub(super) writable: Buffers,
}

/// Runs of guest memory that are RAM, less than 4 GiB together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Buffers(Vec<Segment>);

impl Buffers {
    pub(super) fn segments(&self) -> &[Segment] {
        &self.0
    }

    pub(super) fn len(&self) -> usize {
        self.0.iter().map(|segment| segment.len).sum()
    }

    /// Removes and returns the first `len` bytes; `None` when there are fewer.
    pub(super) fn split_front(&mut self, len: usize) -> Option<Buffers> {
        if self.len() < len {
            return None;
        }
        let mut front = Vec::new();
        let mut missing = len;
        while missing > 0 {
            let first = self.0.first_mut()?;
            let taken = first.len.min(missing);
            front.push(Segment { gpa: first.gpa, len: taken });
            missing -= taken;
            first.gpa += taken as u64;
            first.len -= taken;
            if first.len == 0 {
                self.0.remove(0);
            }
        }
        Some(Buffers(front))
    }

    /// Copies all bytes out of guest memory.
    pub(super) fn read_all(mut self, memory: &DeviceMemory) -> Result<Vec<u8>, Fault> {
        let mut bytes = vec![0; self.len()];
        self.read_front(memory, &mut bytes)?;
        Ok(bytes)
    }

    /// Removes the last byte, and returns its address.
    pub(super) fn split_last_byte(&mut self) -> Option<u64> {
        let last = self.0.last_mut()?;
        last.len -= 1;
        let gpa = last.gpa + last.len as u64;
        if last.len == 0 {
            self.0.pop();
        }
        Some(gpa)
    }

    /// Copies the first bytes out of guest memory, and takes them away; `false` when there are
    /// fewer. For headers: the pages are touched.
    pub(super) fn read_front(
        &mut self,
        memory: &DeviceMemory,
        mut bytes: &mut [u8],
    ) -> Result<bool, Fault> {
        let Some(front) = self.split_front(bytes.len()) else { return Ok(false) };
        for segment in front.0 {
            let (part, rest) = bytes.split_at_mut(segment.len);
            touch(memory, memory.read_slice(part, GuestAddress(segment.gpa)))?;
            bytes = rest;
        }
        Ok(true)
    }

    /// Copies as many of the bytes as fit into guest memory. Returns their number.
    pub(super) fn write(&self, memory: &DeviceMemory, bytes: &[u8]) -> Result<usize, Fault> {
        let mut done = 0;
        for segment in &self.0 {
            let end = bytes.len().min(done + segment.len);
            let part = bytes.get(done..end).unwrap_or_default();
            if part.is_empty() {
                break;
            }
            touch(memory, memory.write_slice(part, GuestAddress(segment.gpa)))?;
            done = end;
        }
        Ok(done)
    }
}

/// Writes one byte to guest memory.
pub(super) fn write_byte(memory: &DeviceMemory, gpa: u64, byte: u8) -> Result<(), Fault> {
    touch(memory, memory.write_slice(&[byte], GuestAddress(gpa)))
}

fn touch(
    memory: &DeviceMemory,
    result: Result<(), vm_memory::GuestMemoryError>,
) -> Result<(), Fault> {
    memory.check()?;
    result.map_err(|_| Fault::Driver("a buffer that is not in memory"))
}
