//! The block device (virtio 1.2, 5.2): reads, writes, flushes a disk image, one request at a time.

use std::io;
use std::path::PathBuf;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

use super::device::Backend;
use super::disk::{Disk, SECTOR_BYTES};
use super::fault::Fault;
use super::memory::{DeviceMemory, Direction};
use super::overlay::Overlay;
use super::rings::{Buffers, Rings, write_byte};
use super::state::{BackendState, OverlayState};
use crate::devices::FrozenContent;

/// Block device.
pub(super) const DEVICE_ID: u32 = 2;
const QUEUE_SIZE: u16 = 128;
/// Buffers of data in a request: the queue's size without header and status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of one such buffer, so that one request does not keep the thread for long.
const SEGMENT_MAX_BYTES: u32 = 64 << 10;
/// The limit of a request that follows from both.
const REQUEST_MAX_BYTES: usize = SEGMENTS_MAX as usize * SEGMENT_MAX_BYTES as usize;
/// Type, reserved, sector: `struct virtio_blk_req`.
const HEADER_BYTES: usize = 16;

pub(super) struct Block {
    disk: Disk,
    config: [u8; 16],
}

/// The result of a request: the status byte, and the number of bytes that were written for the driver.
type Outcome = Result<usize, u32>;

impl Block {
    pub(super) fn new(disk: Disk) -> Block {
        // `struct virtio_blk_config`: capacity in sectors, size_max, seg_max.
        let mut config = [0; 16];
        config[..8].copy_from_slice(&(disk.capacity_bytes() / SECTOR_BYTES).to_le_bytes());
        config[8..12].copy_from_slice(&SEGMENT_MAX_BYTES.to_le_bytes());
        config[12..].copy_from_slice(&SEGMENTS_MAX.to_le_bytes());
        Block { disk, config }
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn disk(&self) -> &Disk {
        &self.disk
    }

    fn read(
        &mut self,
        memory: &DeviceMemory,
        sector: u64,
        data: &Buffers,
    ) -> Result<Outcome, Fault> {
        self.transfer(memory, sector, data, Direction::ToGuest)
    }

    fn write(
        &mut self,
        memory: &DeviceMemory,
        sector: u64,
        data: &Buffers,
    ) -> Result<Outcome, Fault> {
        if self.disk.state().read_only {
            return Ok(Err(VIRTIO_BLK_S_IOERR));
        }
        Ok(self.transfer(memory, sector, data, Direction::FromGuest)?.map(|_| 0))
    }

    fn transfer(
        &mut self,
        memory: &DeviceMemory,
        sector: u64,
        data: &Buffers,
        direction: Direction,
    ) -> Result<Outcome, Fault> {
        let len = data.len();
        let capacity = self.disk.capacity_bytes();
        let start = sector.checked_mul(SECTOR_BYTES).filter(|&start| start <= capacity);
        let Some(start) = start.filter(|start| len as u64 <= capacity - start) else {
            return Ok(Err(VIRTIO_BLK_S_IOERR));
        };
        if len > REQUEST_MAX_BYTES || !(len as u64).is_multiple_of(SECTOR_BYTES) {
            return Ok(Err(VIRTIO_BLK_S_IOERR));
        }
        let moved = self.disk.transfer(memory, start, data, direction)?;
        // Less than all: the image was truncated meanwhile, or its file system is full.
        Ok(moved.ok().filter(|&moved| moved == len).ok_or(VIRTIO_BLK_S_IOERR))
    }

    fn flush(&self) -> Outcome {
        self.disk.flush().map(|()| 0).map_err(|_| VIRTIO_BLK_S_IOERR)
    }

    /// A name that the driver shows to its user: the CRC of the image's path.
    fn id(&self, memory: &DeviceMemory, data: &Buffers) -> Result<Outcome, Fault> {
        let path = self.disk.state().path.as_os_str().as_encoded_bytes();
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        let name = format!("snap-{:08x}", crc32fast::hash(path));
        id[..name.len()].copy_from_slice(name.as_bytes());
        Ok(Ok(data.write(memory, &id)?))
    }
}

impl Backend for Block {
    fn features(&self) -> u64 {
        let read_only = u64::from(self.disk.state().read_only) << VIRTIO_BLK_F_RO;
        1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | read_only
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn serve(&mut self, rings: &mut Rings<'_>, queue: usize) -> Result<bool, Fault> {
        let Some(mut request) = rings.pop(queue)? else { return Ok(false) };
        let memory = rings.memory;
        let mut header = [0; HEADER_BYTES];
        if !request.readable.read_front(memory, &mut header)? {
            return Err(Fault::Driver("a block request without a header"));
        }
        let Some(status_gpa) = request.writable.split_last_byte() else {
            return Err(Fault::Driver("a block request without a status"));
        };
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let outcome = match u32::from_le_bytes([k0, k1, k2, k3]) {
            VIRTIO_BLK_T_IN => self.read(memory, sector, &request.writable)?,
            VIRTIO_BLK_T_OUT => self.write(memory, sector, &request.readable)?,
            VIRTIO_BLK_T_FLUSH => self.flush(),
            VIRTIO_BLK_T_GET_ID => self.id(memory, &request.writable)?,
            _ => Err(VIRTIO_BLK_S_UNSUPP),
        };
        let (status, data_bytes) = match outcome {
            Ok(data_bytes) => (VIRTIO_BLK_S_OK, data_bytes),
            Err(status) => (status, 0),
        };
        write_byte(memory, status_gpa, status as u8)?;
        rings.push_used(queue, request.head, data_bytes + 1)?;
        Ok(true)
    }

    fn pause(&mut self) -> Result<(), String> {
        self.disk.settle().map_err(|error| match std::error::Error::source(&error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        })
    }

    fn state(&self) -> BackendState {
        let disk = self.disk.state().clone();
        match self.disk.overlay() {
            None => BackendState::Block(disk),
            Some(overlay) => {
                BackendState::Overlay(OverlayState { disk, blocks: overlay.block_count() })
            }
        }
    }

    fn content(&self) -> io::Result<Option<Vec<u8>>> {
        self.disk.overlay().map(|overlay| overlay.content()).transpose()
    }

    fn freeze_content(&mut self) -> io::Result<Option<FrozenContent>> {
        self.disk.overlay_mut().map(Overlay::freeze).transpose()
    }

    fn put_back(&mut self, saved: &BackendState, content: Option<&[u8]>) -> io::Result<()> {
        let blocks = match saved {
            BackendState::Overlay(overlay) => overlay.blocks,
            _ => 0,
        };
        match self.disk.overlay_mut() {
            Some(overlay) => overlay.reset(content.unwrap_or_default(), blocks),
            None => Ok(()),
        }
    }

    fn outside_file(&self) -> Option<PathBuf> {
        let state = self.disk.state();
        (!state.read_only && self.disk.overlay().is_none()).then(|| state.path.clone())
    }
}
