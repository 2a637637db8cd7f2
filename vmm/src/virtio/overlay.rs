//! The blocks that a guest has changed, for a disk image that itself is not changed. They are in a private file.
//!
//! The file has no name and is deleted with the guest. Each block has the same offset as on the disk, and the rest
//! is holes. A set in memory, not the holes, records which blocks the file has.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::fs::MemfdFlags;

use super::fault::Fault;
use super::memory::{DeviceMemory, Direction};
use super::rings::Buffers;
use crate::devices::FrozenContent;

/// The unit that is copied when a part of it changes.
const BLOCK_BYTES: u64 = 4096;
/// Longest encoding: a state of a snapshot has at most 64 MiB.
const CONTENT_MAX_BYTES: usize = 63 << 20;

/// The place of the blocks that a guest changes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OverlayPlace {
    /// In memory.
    Memory,
    /// In a file without a name, in this folder.
    Folder(PathBuf),
}

#[derive(Debug)]
pub(super) struct Overlay {
    file: Arc<File>,
    disk_bytes: u64,
    changed: BTreeSet<u32>,
    /// The content of an earlier time that is still needed.
    frozen: Weak<FrozenBlocks>,
}

impl Overlay {
    /// Nothing is changed.
    pub(super) fn new(place: &OverlayPlace, disk_bytes: u64) -> io::Result<Overlay> {
        if disk_bytes.div_ceil(BLOCK_BYTES) > u64::from(u32::MAX) {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let file = match place {
            OverlayPlace::Memory => {
                rustix::fs::memfd_create("snap-disk-overlay", MemfdFlags::CLOEXEC)?.into()
            }
            OverlayPlace::Folder(folder) => OpenOptions::new()
                .read(true)
                .write(true)
                .mode(0o600)
                .custom_flags(libc::O_TMPFILE)
                .open(folder)?,
        };
        file.set_len(disk_bytes)?;
        Ok(Overlay {
            file: Arc::new(file),
            disk_bytes,
            changed: BTreeSet::new(),
            frozen: Weak::new(),
        })
    }

    /// Reads from the disk with the guest's changes.
    pub(super) fn read(
        &self,
        disk: &File,
        memory: &DeviceMemory,
        start: u64,
        mut data: Buffers,
    ) -> Result<io::Result<usize>, Fault> {
        let mut at = start;
        while data.len() > 0 {
            // The part that is in the same file.
            let changed = self.has(at);
            let mut run = (BLOCK_BYTES - at % BLOCK_BYTES) as usize;
            while run < data.len() && self.has(at + run as u64) == changed {
                run += BLOCK_BYTES as usize;
            }
            let part = data.split_front(run.min(data.len())).unwrap_or_default();
            let file = if changed { &self.file } else { disk };
            match memory.transfer(file.as_fd(), Some(at), part.segments(), Direction::ToGuest)? {
                Ok(moved) if moved == part.len() => at += moved as u64,
                Ok(moved) => return Ok(Ok((at - start) as usize + moved)),
                Err(error) => return Ok(Err(error)),
            }
        }
        Ok(Ok((at - start) as usize))
    }

    /// Writes, without changing the disk.
    pub(super) fn write(
        &mut self,
        disk: &File,
        memory: &DeviceMemory,
        start: u64,
        data: &Buffers,
    ) -> Result<io::Result<usize>, Fault> {
        let end = start + data.len() as u64;
        if start == end {
            return Ok(Ok(0));
        }
        if let Some(frozen) = self.frozen.upgrade() {
            frozen.keep(block_of(start)..=block_of(end - 1));
        }
        // The blocks at both ends keep what is beside the new data.
        for edge in [start, end - 1] {
            if let Err(error) = self.copy_up(disk, edge, start, end) {
                return Ok(Err(error));
            }
        }
        let file = self.file.as_fd();
        let moved = memory.transfer(file, Some(start), data.segments(), Direction::FromGuest)?;
        if moved.as_ref().is_ok_and(|&moved| moved == data.len()) {
            self.changed.extend(block_of(start)..=block_of(end - 1));
        }
        Ok(moved)
    }

    fn has(&self, at: u64) -> bool {
        self.changed.contains(&block_of(at))
    }

    /// Makes the block at `edge` one of this file, unless all of it will be written.
    fn copy_up(&mut self, disk: &File, edge: u64, start: u64, end: u64) -> io::Result<()> {
        let block = block_of(edge);
        let first = u64::from(block) * BLOCK_BYTES;
        let last = (first + BLOCK_BYTES).min(self.disk_bytes);
        if self.changed.contains(&block) || (start <= first && last <= end) {
            return Ok(());
        }
        let mut bytes = vec![0; (last - first) as usize];
        disk.read_exact_at(&mut bytes, first)?;
        self.file.write_all_at(&bytes, first)?;
        self.changed.insert(block);
        Ok(())
    }

    pub(super) fn block_count(&self) -> u32 {
        // Their numbers have 32 bits, and there is one less of them than that: see `new`.
        self.changed.len() as u32
    }

    /// All of it: the number of blocks (4 bytes), their numbers (4 bytes each, ascending), their bytes.
    ///
    /// # Errors
    /// The error of the file, or `FileTooLarge` for more than a snapshot stores.
    pub(super) fn content(&self) -> io::Result<Vec<u8>> {
        self.frozen_now()?.content()
    }

    /// The content as it is now, to be read later, also after these blocks were written. It takes microseconds.
    ///
    /// # Errors
    /// `FileTooLarge`, as [`Overlay::content`].
    pub(super) fn freeze(&mut self) -> io::Result<FrozenContent> {
        // Two of them would need two copies of a block.
        if self.frozen.strong_count() > 0 {
            let text = "an earlier content of the disk is still being saved";
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
        }
        let frozen = Arc::new(self.frozen_now()?);
        self.frozen = Arc::downgrade(&frozen);
        Ok(Box::new(move || frozen.content()))
    }

    fn frozen_now(&self) -> io::Result<FrozenBlocks> {
        let len = 4 + self.changed.len() * (4 + BLOCK_BYTES as usize);
        if len > CONTENT_MAX_BYTES {
            let text = format!(
                "the guest has changed {} MiB of the disk: more than {} MiB cannot be stored",
                len >> 20,
                CONTENT_MAX_BYTES >> 20
            );
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
        }
        let blocks = self.changed.iter().map(|block| (*block, Block::InFile)).collect();
        let (file, disk_bytes) = (Arc::clone(&self.file), self.disk_bytes);
        Ok(FrozenBlocks { file, disk_bytes, blocks: Mutex::new(blocks) })
    }

    /// Drops all changes, and restores the content that [`Overlay::content`] returned at an earlier time.
    ///
    /// # Errors
    /// `ResourceBusy` while a frozen content exists; and those of [`Overlay::load`].
    pub(super) fn reset(&mut self, content: &[u8], block_count: u32) -> io::Result<()> {
        if self.frozen.strong_count() > 0 {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        if !self.changed.is_empty() {
            self.changed.clear();
            self.file.set_len(0)?;
            self.file.set_len(self.disk_bytes)?;
        }
        match block_count {
            0 => Ok(()),
            _ => self.load(content, block_count),
        }
    }

    /// Restores the content that [`Overlay::content`] returned, with this number of blocks.
    ///
    /// # Errors
    /// `InvalidData` when it is not the content of such a disk, or the error of the file.
    pub(super) fn load(&mut self, content: &[u8], block_count: u32) -> io::Result<()> {
        let invalid =
            || io::Error::new(io::ErrorKind::InvalidData, "these are not blocks of this disk");
        let (count, rest) = content.split_first_chunk::<4>().ok_or_else(invalid)?;
        let numbers_len = block_count as usize * 4;
        let (numbers, blocks) = rest.split_at_checked(numbers_len).ok_or_else(invalid)?;
        let (blocks, torn) = blocks.as_chunks::<{ BLOCK_BYTES as usize }>();
        let (numbers, _) = numbers.as_chunks::<4>();
        if u32::from_le_bytes(*count) != block_count
            || blocks.len() != numbers.len()
            || !torn.is_empty()
            || !numbers.is_sorted_by_key(|number| u32::from_le_bytes(*number))
        {
            return Err(invalid());
        }
        for (number, block) in numbers.iter().zip(blocks) {
            let number = u32::from_le_bytes(*number);
            let first = u64::from(number) * BLOCK_BYTES;
            let len = self.disk_bytes.checked_sub(first).filter(|&len| len > 0);
            let len = len.ok_or_else(invalid)?.min(BLOCK_BYTES) as usize;
            let (part, _) = block.split_at(len);
            self.file.write_all_at(part, first)?;
            if !self.changed.insert(number) {
                return Err(invalid());
            }
        }
        Ok(())
    }
}

/// The blocks that the guest had changed at one point in time.
#[derive(Debug)]
struct FrozenBlocks {
    file: Arc<File>,
    disk_bytes: u64,
    blocks: Mutex<BTreeMap<u32, Block>>,
}

/// The place of the bytes of a block.
#[derive(Debug)]
enum Block {
    /// It was not written since.
    InFile,
    Copied(Box<[u8; BLOCK_BYTES as usize]>),
    /// It could not be read before it was written.
    Lost(io::ErrorKind),
}

impl FrozenBlocks {
    /// Copies blocks that are about to be written.
    fn keep(&self, numbers: RangeInclusive<u32>) {
        for (number, block) in self.lock().range_mut(numbers) {
            if let Block::InFile = block {
                *block = match self.read(*number) {
                    Ok(bytes) => Block::Copied(bytes),
                    Err(error) => Block::Lost(error.kind()),
                };
            }
        }
    }

    /// See [`Overlay::content`]. A write waits for the reading of one block.
    fn content(&self) -> io::Result<Vec<u8>> {
        let numbers: Vec<u32> = self.lock().keys().copied().collect();
        let mut content = Vec::with_capacity(4 + numbers.len() * (4 + BLOCK_BYTES as usize));
        content.extend((numbers.len() as u32).to_le_bytes());
        numbers.iter().for_each(|number| content.extend(number.to_le_bytes()));
        for number in numbers {
            match self.lock().get(&number) {
                Some(Block::Copied(bytes)) => content.extend(&**bytes),
                Some(Block::Lost(kind)) => return Err((*kind).into()),
                Some(Block::InFile) | None => content.extend(&*self.read(number)?),
            }
        }
        Ok(content)
    }

    fn read(&self, number: u32) -> io::Result<Box<[u8; BLOCK_BYTES as usize]>> {
        let mut bytes = Box::new([0; BLOCK_BYTES as usize]);
        let first = u64::from(number) * BLOCK_BYTES;
        let len = BLOCK_BYTES.min(self.disk_bytes - first) as usize;
        let (part, _) = bytes.split_at_mut(len);
        self.file.read_exact_at(part, first)?;
        Ok(bytes)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Block>> {
        // The data is consistent whenever the lock is released.
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The number of the block that has this byte. `Overlay::new` makes sure that it fits.
fn block_of(at: u64) -> u32 {
    (at / BLOCK_BYTES) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frozen_content_does_not_change() {
        let mut overlay = Overlay::new(&OverlayPlace::Memory, 16 << 10).unwrap();
        for number in [0, 2] {
            overlay.file.write_all_at(&[7; 4096], u64::from(number) * 4096).unwrap();
            overlay.changed.insert(number);
        }
        let expected = overlay.content().unwrap();
        let frozen = overlay.freeze().unwrap();
        assert_eq!(overlay.freeze().err().unwrap().kind(), io::ErrorKind::ResourceBusy);
        // As a write does.
        for number in [1, 2] {
            overlay.frozen.upgrade().unwrap().keep(number..=number);
            overlay.file.write_all_at(&[9; 4096], u64::from(number) * 4096).unwrap();
            overlay.changed.insert(number);
        }
        assert!(frozen().unwrap() == expected);
        assert!(overlay.content().unwrap() != expected);
        drop(frozen);
        drop(overlay.freeze().unwrap());
    }
}
