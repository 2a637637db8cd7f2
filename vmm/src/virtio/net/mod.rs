//! The network device (virtio 1.2, 5.1): Ethernet frames between the guest and a tap of the host.
//!
//! There are no offloads and no control queue, and there is one pair of queues. So the header of each frame has no
//! content: it is skipped in frames that the guest sends, and it is zeros in frames that the guest receives.

mod tap;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::str::FromStr;

use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use vmm_sys_util::epoll::EventSet;

pub(super) use self::tap::NAME_MAX_BYTES;
pub use self::tap::{Tap, TapError};
use super::device::{Backend, HostWatcher};
use super::fault::Fault;
use super::memory::Direction;
use super::rings::Rings;
use super::state::{BackendState, NetState};

/// Network device.
pub(super) const DEVICE_ID: u32 = 1;
const TO_GUEST: usize = 0;
const FROM_GUEST: usize = 1;
/// `struct virtio_net_hdr_v1`.
const HEADER_BYTES: usize = 12;
/// The header of a complete frame: all zero except `num_buffers`.
const HEADER: [u8; HEADER_BYTES] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
/// An Ethernet header.
const FRAME_MIN_BYTES: usize = 14;
/// The longest frame of an interface: its largest MTU, Ethernet header, VLAN tag.
const FRAME_MAX_BYTES: usize = 65535 + 14 + 4;

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MacAddress(pub [u8; 6]);

#[derive(Debug)]
pub(super) struct Net {
    tap: Tap,
    mac: MacAddress,
}

impl Net {
    pub(super) fn new(tap: Tap, mac: MacAddress) -> Net {
        Net { tap, mac }
    }

    /// One frame of the guest, to the tap.
    fn send(&self, rings: &mut Rings<'_>) -> Result<bool, Fault> {
        let Some(mut request) = rings.pop(FROM_GUEST)? else { return Ok(false) };
        if request.writable.len() != 0 {
            return Err(Fault::Driver("a frame to send with room for an answer"));
        }
        if request.readable.split_front(HEADER_BYTES).is_none() {
            return Err(Fault::Driver("a frame without a header"));
        }
        // Networks lose frames. A frame that the tap does not take (because it is down, for example) is dropped,
        // and so is an invalid frame.
        if (FRAME_MIN_BYTES..=FRAME_MAX_BYTES).contains(&request.readable.len()) {
            let fd = self.tap.file.as_fd();
            let frame = request.readable.segments();
            let _sent = rings.memory.transfer(fd, None, frame, Direction::FromGuest)?;
        }
        rings.push_used(FROM_GUEST, request.head, 0)?;
        Ok(true)
    }

    /// One frame of the tap, into a buffer of the guest.
    fn receive(&self, rings: &mut Rings<'_>) -> Result<bool, Fault> {
        let Some(mut request) = rings.pop(TO_GUEST)? else { return Ok(false) };
        let memory = rings.memory;
        let front = request.writable.split_front(HEADER_BYTES);
        let Some(front) = front.filter(|_| request.readable.len() == 0) else {
            return Err(Fault::Driver("a buffer for frames that the device cannot write"));
        };
        let room = request.writable.len().min(FRAME_MAX_BYTES);
        if room < FRAME_MIN_BYTES {
            return Err(Fault::Driver("a buffer for frames that is too small"));
        }
        let buffers = request.writable.split_front(room).unwrap_or_default();
        let fd = self.tap.file.as_fd();
        // The tap truncates a frame that is longer than the buffer; the guest detects that.
        match memory.transfer(fd, None, buffers.segments(), Direction::ToGuest)? {
            Ok(len @ 1..) => {
                front.write(memory, &HEADER)?;
                rings.push_used(TO_GUEST, request.head, HEADER_BYTES + len)?;
                Ok(true)
            }
            // There is no frame, or the tap is down. The event loop reports when that changes.
            Ok(0) | Err(_) => {
                rings.unpop(TO_GUEST);
                Ok(false)
            }
        }
    }
}

impl Backend for Net {
    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256]
    }

    fn config(&self) -> &[u8] {
        &self.mac.0
    }

    fn serve(&mut self, rings: &mut Rings<'_>, queue: usize) -> Result<bool, Fault> {
        match queue {
            TO_GUEST => self.receive(rings),
            _ => self.send(rings),
        }
    }

    fn connect(&mut self, watcher: HostWatcher) -> io::Result<()> {
        watcher.watch(0, &self.tap.file)
    }

    fn host_changed(&mut self, _token: u32, _events: EventSet) -> usize {
        TO_GUEST
    }

    fn state(&self) -> BackendState {
        BackendState::Net(NetState { tap: self.tap.name().into(), mac: self.mac })
    }
}

impl MacAddress {
    /// A random address, which is most likely unique: unicast and locally administered.
    ///
    /// # Errors
    /// When the host's random numbers cannot be read.
    pub fn random() -> io::Result<MacAddress> {
        let mut bytes = [0; 6];
        io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
        bytes[0] = bytes[0] & 0xfc | 0x02;
        Ok(MacAddress(bytes))
    }

    /// Whether it is the address of one interface.
    #[must_use]
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Not an Ethernet address of one interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected six bytes like 02:00:00:00:00:01, the first of them even, not all 0")]
pub struct MacError;

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<MacAddress, MacError> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or(MacError)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| MacError)?;
        }
        let mac = MacAddress(bytes);
        if parts.next().is_none() && mac.is_unicast() { Ok(mac) } else { Err(MacError) }
    }
}
