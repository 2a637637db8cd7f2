//! Virtio devices in windows of guest physical addresses (virtio-mmio, version 2).
//!
//! `docs/devices.md` in the source describes each device, and how it is saved.
//!
//! From the driver inwards:
//! - `transport`: registers, features, status; which queues there are.
//! - `device`: the transport in its window, and its queues on the devices' one thread.
//! - `rings`: requests out of a queue, as lists of buffers that are whole and in memory.
//! - `memory`: the only code that touches guest memory, without the risk of a SIGBUS.
//! - `balloon`, `block`, `net`, `rng`, `vsock`: the handling of a device's requests.

mod allowed_folders;
mod balloon;
mod block;
mod device;
mod disk;
mod event_loop;
#[cfg(test)]
mod fake_driver;
mod fault;
#[cfg(any(test, fuzzing))]
mod hostile;
mod image_format;
mod memory;
mod net;
mod overlay;
mod rings;
mod rng;
mod state;
#[cfg(test)]
mod tests;
mod transport;
mod vsock;

use std::fs::File;
use std::io;
use std::sync::Arc;

pub use allowed_folders::AllowedFolders;
pub use device::VirtioDevice;
pub use disk::{Disk, DiskError, ImagePath};
pub use event_loop::EventLoop;
#[cfg(fuzzing)]
pub use hostile::any_queue;
pub use net::{MacAddress, MacError, Tap, TapError};
pub use overlay::OverlayPlace;
pub use state::{
    BackendState, BalloonState, BlockState, DEVICE_MTIME_NS, Fingerprint, NetState, OverlayState,
    QueueRegisters, TransportState, VIRTIO_STATE_VERSION, VirtioState, VirtioStateError,
    VsockState,
};
pub use vsock::{VsockError, VsockHost};

/// The host's side of a device.
#[derive(Debug)]
#[non_exhaustive]
pub enum Host {
    /// A disk image.
    Disk(Disk),
    /// The host's random numbers.
    Entropy,
    /// Unix sockets.
    Vsock(VsockHost),
    /// A network interface, and the address that the guest has at it.
    Net(Tap, MacAddress),
    /// The guest's own memory, and how much of it was given back before.
    Balloon(BalloonState),
}

impl VirtioDevice {
    /// A fresh device that works on the thread of `event_loop`.
    ///
    /// # Errors
    /// When the host's side does not open.
    pub fn create(event_loop: &Arc<EventLoop>, host: Host) -> io::Result<VirtioDevice> {
        Ok(VirtioDevice::new(event_loop, backend(host)?, None))
    }

    /// The device of a saved transport. Whether the transport is possible for such a device is
    /// checked when it is attached to a machine.
    ///
    /// # Errors
    /// When the host's side does not open.
    pub fn restore(
        event_loop: &Arc<EventLoop>,
        saved: TransportState,
        host: Host,
    ) -> io::Result<VirtioDevice> {
        Ok(VirtioDevice::new(event_loop, backend(host)?, Some(saved)))
    }
}

fn backend(host: Host) -> io::Result<Box<dyn device::Backend>> {
    Ok(match host {
        Host::Disk(disk) => Box::new(block::Block::new(disk)),
        Host::Net(tap, mac) => Box::new(net::Net::new(tap, mac)),
        Host::Balloon(state) => Box::new(balloon::Balloon::new(state)),
        Host::Vsock(host) => Box::new(vsock::Vsock::new(host)),
        Host::Entropy => Box::new(rng::Rng { source: File::open("/dev/urandom")? }),
    })
}
