//! A virtio device's state, as data that can be stored: the transport, and the state of the device itself.
//!
//! Encoded by bincode with fixed-size little-endian integers, and frozen like [`crate::state`]: version 1 is
//! fixed by a golden test.

use std::path::PathBuf;

use bincode::Options;
use serde::{Deserialize, Serialize};

use super::net::MacAddress;
use crate::state::{DEVICE_STATE_MAX_BYTES, DeviceState};

/// Version of the encoding of [`VirtioState`].
pub const VIRTIO_STATE_VERSION: u32 = 1;
/// Most queues of a device.
pub(super) const QUEUES_MAX: usize = 8;
/// Longest path of a disk (PATH_MAX).
const PATH_MAX_BYTES: usize = 4096;

/// Everything about a paused virtio device that is not in guest memory.
///
/// It has no requests in progress: a paused device has finished the requests that it has taken from a queue, and the
/// others are in guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct VirtioState {
    /// The registers of the virtio-mmio transport.
    pub transport: TransportState,
    /// The kind of device, and the state of that kind.
    pub device: BackendState,
}

/// The registers of a virtio-mmio device (virtio 1.2, 4.2.2) that the driver can change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields are the registers of the specification")]
#[non_exhaustive]
pub struct TransportState {
    pub status: u32,
    pub interrupt_status: u32,
    pub driver_features: u64,
    pub device_features_sel: u32,
    pub driver_features_sel: u32,
    pub queue_sel: u32,
    pub config_generation: u32,
    pub queues: Vec<QueueRegisters>,
}

/// One queue's registers, and how far the device has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct QueueRegisters {
    /// Entries, a power of two.
    pub size: u32,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest physical address of the available ring.
    pub available: u64,
    /// Guest physical address of the used ring.
    pub used: u64,
    /// Whether the driver has switched it on.
    pub ready: bool,
    /// The next entry of the available ring that the device takes.
    pub next_available: u16,
    /// The next entry of the used ring that the device writes.
    pub next_used: u16,
}

/// The state of one kind of device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum BackendState {
    /// A disk.
    Block(BlockState),
    /// A source of random bytes, which has no state.
    Rng,
    /// Sockets between guest and host.
    Vsock(VsockState),
    /// A network interface.
    Net(NetState),
    /// A memory balloon.
    Balloon(BalloonState),
    /// A disk that is not changed, and the blocks that the guest has changed.
    Overlay(OverlayState),
}

/// A disk with an overlay. The changed blocks are the device's content
/// ([`MmioDevice::content`](crate::MmioDevice::content)).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct OverlayState {
    /// The disk that is not changed.
    pub disk: BlockState,
    /// How many blocks of 4 KiB the content has.
    pub blocks: u32,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NetState {
    /// Name of the host's tap.
    pub tap: String,
    /// The guest's address.
    pub mac: MacAddress,
}

/// A memory balloon. Only guest memory shows which pages were given back: they are zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BalloonState {
    /// Pages of 4 KiB that are in the balloon, as the driver reports.
    pub actual_pages: u32,
    /// Bytes that the driver gave back, in the balloon or as reports of free pages, since the guest's boot.
    pub returned_bytes: u64,
}

/// The sockets between guest and host. Connections are not part of it: a snapshot ends them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct VsockState {
    /// The guest's context id.
    pub guest_cid: u64,
    /// The host's socket, absolute.
    pub path: PathBuf,
}

/// A disk at the time when the guest was saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BlockState {
    /// Where the image was found, absolute.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// Its fingerprint.
    pub fingerprint: Fingerprint,
}

/// The modification time of a block device, which has none.
pub const DEVICE_MTIME_NS: i64 = i64::MIN;

/// How a disk image is recognized.
///
/// The time of the last change detects every change through the file system. The sample detects another image whose
/// time was set to the same, by a copy from an archive for example. The inode is not part of it: a copy with its times
/// (`cp -p`) is as good as the original.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Fingerprint {
    /// Length in bytes.
    pub len: u64,
    /// Time of the last change in nanoseconds since 1970. For a block device it is [`DEVICE_MTIME_NS`]: the time of its
    /// name in /dev is not that of its content.
    pub mtime_ns: i64,
    /// CRC-32 of its first and last 64 KiB and of 64 pages in between.
    pub sample_crc32: u32,
}

/// A state that is no virtio device's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VirtioStateError {
    /// The state was written by a version that this one does not know.
    #[error("virtio device state of version {found}, expected {VIRTIO_STATE_VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
    /// The bytes do not decode.
    #[error("virtio device state of {len} bytes does not decode")]
    Malformed {
        /// Length of the state in bytes.
        len: usize,
        /// The error of the decoder.
        #[source]
        source: bincode::Error,
    },
    /// The state belongs to another kind of device than it is stored under.
    #[error("the state of a virtio device of kind {kind} is of kind {found}")]
    Kind {
        /// The kind it is stored under.
        kind: u32,
        /// The kind of its content.
        found: u32,
    },
    /// A value that no device has.
    #[error("virtio device state with impossible {what}")]
    Impossible {
        /// The value's name.
        what: &'static str,
    },
}

impl BackendState {
    /// The number of this kind of device in the specification (virtio 1.2, 5).
    #[must_use]
    pub fn kind(&self) -> u32 {
        match self {
            BackendState::Block(_) | BackendState::Overlay(_) => super::block::DEVICE_ID,
            BackendState::Rng => super::rng::DEVICE_ID,
            BackendState::Vsock(_) => super::vsock::DEVICE_ID,
            BackendState::Net(_) => super::net::DEVICE_ID,
            BackendState::Balloon(_) => super::balloon::DEVICE_ID,
        }
    }
}

impl VirtioState {
    /// Encodes the state.
    #[must_use]
    pub fn encode(&self) -> DeviceState {
        // Plain data into memory. A path that is not UTF-8 would fail: `Disk` has refused it.
        #[expect(clippy::expect_used, reason = "see above")]
        let bytes =
            bincode::options().with_fixint_encoding().serialize(self).expect("plain data encodes");
        DeviceState { kind: self.device.kind(), version: VIRTIO_STATE_VERSION, bytes }
    }

    /// Decodes a state, and checks everything that can be checked without the device.
    ///
    /// # Errors
    /// [`VirtioStateError`] when [`encode`](VirtioState::encode) never writes such a version, encoding or value.
    pub fn decode(state: &DeviceState) -> Result<VirtioState, VirtioStateError> {
        if state.version != VIRTIO_STATE_VERSION {
            return Err(VirtioStateError::Version { found: state.version });
        }
        let decoded: VirtioState = bincode::options()
            .with_fixint_encoding()
            .with_limit(DEVICE_STATE_MAX_BYTES as u64)
            .deserialize(&state.bytes)
            .map_err(|source| VirtioStateError::Malformed { len: state.bytes.len(), source })?;
        let found = decoded.device.kind();
        if found != state.kind {
            return Err(VirtioStateError::Kind { kind: state.kind, found });
        }
        if decoded.transport.queues.len() > QUEUES_MAX {
            return Err(VirtioStateError::Impossible { what: "number of queues" });
        }
        let (path, what) = match &decoded.device {
            BackendState::Block(block) => (Some(&block.path), "path of a disk"),
            BackendState::Overlay(overlay) => (Some(&overlay.disk.path), "path of a disk"),
            BackendState::Vsock(vsock) => (Some(&vsock.path), "path of a vsock"),
            BackendState::Rng | BackendState::Net(_) | BackendState::Balloon(_) => (None, "path"),
        };
        if path.is_some_and(|path| path.as_os_str().len() > PATH_MAX_BYTES || !path.is_absolute()) {
            return Err(VirtioStateError::Impossible { what });
        }
        if let BackendState::Net(net) = &decoded.device
            && (net.tap.len() > super::net::NAME_MAX_BYTES || !net.mac.is_unicast())
        {
            return Err(VirtioStateError::Impossible { what: "network interface" });
        }
        Ok(decoded)
    }
}
