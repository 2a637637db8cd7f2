//! The entropy device (virtio 1.2, 5.4): fills the driver's buffers with random bytes of the host.

use std::fs::File;
use std::os::fd::AsFd;

use super::device::Backend;
use super::fault::Fault;
use super::memory::Direction;
use super::rings::Rings;
use super::state::BackendState;

/// Entropy source.
pub(super) const DEVICE_ID: u32 = 4;
/// Most bytes for one request, so that none keeps the thread for long.
const REQUEST_MAX_BYTES: usize = 64 << 10;

pub(super) struct Rng {
    /// /dev/urandom, which never blocks once the host is up: the kernel writes into guest memory, as
    /// getrandom(2) would, but for a list of buffers.
    pub(super) source: File,
}

impl Backend for Rng {
    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn serve(&mut self, rings: &mut Rings<'_>, queue: usize) -> Result<bool, Fault> {
        let Some(mut request) = rings.pop(queue)? else { return Ok(false) };
        if !request.readable.segments().is_empty() {
            return Err(Fault::Driver("an entropy request with a buffer to read"));
        }
        let len = request.writable.len().min(REQUEST_MAX_BYTES);
        let buffers = request.writable.split_front(len).unwrap_or_default();
        let fd = self.source.as_fd();
        // A driver must expect a short answer, but not an empty one.
        let filled = rings.memory.transfer(fd, None, buffers.segments(), Direction::ToGuest)?;
        rings.push_used(queue, request.head, filled.unwrap_or(0))?;
        Ok(true)
    }

    fn state(&self) -> BackendState {
        BackendState::Rng
    }
}
