//! A disk image: a regular file, or a block device, that one guest writes, or that many read.

use std::fs::{File, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use super::allowed_folders::{AllowedFolders, is_outside};
use super::fault::Fault;
use super::image_format;
use super::memory::{DeviceMemory, Direction};
use super::overlay::{Overlay, OverlayPlace};
use super::rings::Buffers;
use super::state::{BlockState, DEVICE_MTIME_NS, Fingerprint};

/// The unit of virtio for disks.
pub(super) const SECTOR_BYTES: u64 = 512;
/// The ends of an image that belong to its fingerprint: labels and partition tables are there.
const SAMPLE_END_BYTES: u64 = 64 << 10;
/// Pages in between that belong to it,
const SAMPLE_PAGES: u64 = 64;
/// of this length.
const SAMPLE_PAGE_BYTES: u64 = 4096;
/// The number of attempts to lock a block device, a moment apart: udev locks it for a moment whenever it was written
/// to.
const DEVICE_LOCK_TRIES: u32 = 20;

/// An open disk image. While it is open for writing, it cannot be opened as a [`Disk`] again.
#[derive(Debug)]
pub struct Disk {
    pub(super) file: File,
    state: BlockState,
    /// Where the guest's writes go instead of the image.
    overlay: Option<Overlay>,
}

/// Where the image of a saved disk is.
#[derive(Clone, Copy, Debug)]
pub enum ImagePath<'a> {
    /// At this path.
    Given(&'a Path),
    /// At the path in the snapshot, which must be in one of these folders.
    Saved(&'a AllowedFolders),
}

/// A disk that a guest cannot have.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// A system call failed.
    #[error("cannot {what} the disk {}", path.display())]
    Io {
        /// The operation.
        what: &'static str,
        /// The image.
        path: PathBuf,
        /// The error of the system.
        #[source]
        source: io::Error,
    },
    /// A folder, a terminal, a socket.
    #[error("the disk {} is neither a regular file nor a block device", path.display())]
    NotAFile {
        /// The image.
        path: PathBuf,
    },
    /// Disks come in sectors.
    #[error("the disk {} has {len} bytes, expected a multiple of {SECTOR_BYTES}, not 0", path.display())]
    Size {
        /// The image.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
    },
    /// The snapshot names an image that it must not choose.
    #[error("the snapshot names the disk {}, which is in none of the folders that are allowed for it", path.display())]
    NotAllowed {
        /// The path in the snapshot.
        path: PathBuf,
    },
    /// The path could not be stored.
    #[error("the path of the disk {} is not UTF-8", path.display())]
    Path {
        /// The image.
        path: PathBuf,
    },
    /// It is open already, and one of the two opens it for writing.
    #[error(
        "the disk {} is in use: one guest writes a disk, or many read it", path.display()
    )]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// A block device that the host itself uses, or that another guest writes.
    #[error(
        "the disk {} is in use: it is mounted, has a volume on it, or belongs to another guest", path.display()
    )]
    DeviceInUse {
        /// The device.
        path: PathBuf,
    },
    /// It is an image, but not a raw one.
    #[error(
        "the disk {} is not a raw image but one in the format {format}: convert it to a raw one (`qemu-img convert -O raw`, or \
         unpack it), or say `,raw` behind its name if the guest is to see these very bytes", path.display()
    )]
    Format {
        /// The image.
        path: PathBuf,
        /// The format's name.
        format: &'static str,
    },
    /// The guest was saved with a file and is to have a block device, or the other way round.
    #[error(
        "the disk {} is {found}, and was {expected} when the guest was saved: without the time of its last change it \
         is not known whether the content is the same", path.display()
    )]
    OtherKind {
        /// The image.
        path: PathBuf,
        /// Its value now.
        found: &'static str,
        /// Its saved value.
        expected: &'static str,
    },
    /// There is no space for the guest's writes.
    #[error("cannot make the overlay of the disk {}", path.display())]
    Overlay {
        /// The image.
        path: PathBuf,
        /// The error of the system, or of a content that does not belong to such a disk.
        #[source]
        source: io::Error,
    },
    /// It has changed since the guest was saved.
    #[error(
        "the disk {} has changed since the guest was saved: its {what} {found}, expected {expected}",
        path.display()
    )]
    Changed {
        /// The image.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// Its value now.
        found: i128,
        /// Its saved value.
        expected: i128,
    },
}

impl Disk {
    /// Refuses an image in the format of another program, which would reach the guest as raw bytes. For images that are
    /// new: later the guest may have written such bytes itself.
    ///
    /// # Errors
    /// [`DiskError::Format`]; [`DiskError`] when it does not exist, or is not an image.
    pub fn refuse_formats(path: &Path) -> Result<(), DiskError> {
        let failed = |what| move |source| DiskError::Io { what, path: path.to_owned(), source };
        let (file, _) = open_image(path, true, None)?;
        let len = len_bytes(&file).map_err(failed("examine"))?;
        match image_format::foreign(&file, len).map_err(failed("read"))? {
            Some(format) => Err(DiskError::Format { path: path.to_owned(), format }),
            None => Ok(()),
        }
    }

    /// Opens an image, or a block device.
    ///
    /// # Errors
    /// [`DiskError`] when it does not exist, is neither a regular file nor a block device of whole sectors, or is in
    /// use.
    pub fn open(path: &Path, read_only: bool) -> Result<Disk, DiskError> {
        Self::open_within(path, read_only, None)
    }

    fn open_within(
        path: &Path,
        read_only: bool,
        within: Option<&AllowedFolders>,
    ) -> Result<Disk, DiskError> {
        let failed = |what| move |source| DiskError::Io { what, path: path.to_owned(), source };
        let (file, is_device) = open_image(path, read_only, within)?;
        let len = len_bytes(&file).map_err(failed("examine"))?;
        if len == 0 || !len.is_multiple_of(SECTOR_BYTES) {
            return Err(DiskError::Size { path: path.to_owned(), len });
        }
        let mut tries = if is_device { DEVICE_LOCK_TRIES } else { 1 };
        loop {
            let locked = if read_only { file.try_lock_shared() } else { file.try_lock() };
            tries -= 1;
            match locked {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if tries > 0 => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(DiskError::InUse { path: path.to_owned() });
                }
                Err(TryLockError::Error(source)) => return Err(failed("lock")(source)),
            }
        }
        // A device's name may be a link whose target changes: /dev/mapper, /dev/disk/by-id.
        let absolute = if is_device { std::path::absolute(path) } else { path.canonicalize() };
        let absolute = absolute.map_err(failed("find"))?;
        if absolute.to_str().is_none() {
            return Err(DiskError::Path { path: absolute });
        }
        let fingerprint = Fingerprint::of(&file).map_err(failed("read"))?;
        let state = BlockState { path: absolute, read_only, fingerprint };
        Ok(Disk { file, state, overlay: None })
    }

    /// Opens an image that is not changed: the guest's writes go to `place`. Many guests may use it at the same time.
    ///
    /// # Errors
    /// Those of [`Disk::open`], and [`DiskError::Overlay`].
    pub fn open_below(path: &Path, place: &OverlayPlace) -> Result<Disk, DiskError> {
        Disk::open(path, true)?.put_below(place)
    }

    fn put_below(mut self, place: &OverlayPlace) -> Result<Disk, DiskError> {
        let path = self.state.path.clone();
        let overlay = Overlay::new(place, self.capacity_bytes());
        self.overlay = Some(overlay.map_err(|source| DiskError::Overlay { path, source })?);
        self.state.read_only = false;
        Ok(self)
    }

    /// As [`Disk::open_saved`], for a disk with an overlay, or one that gets an overlay now. `content` is the result of
    /// [`MmioDevice::content`](crate::MmioDevice::content), with `blocks` blocks.
    ///
    /// # Errors
    /// Those of [`Disk::open_saved`], and [`DiskError::Overlay`].
    pub fn open_saved_below(
        saved: &BlockState,
        image: ImagePath<'_>,
        force: bool,
        place: &OverlayPlace,
        blocks: u32,
        content: &[u8],
    ) -> Result<Disk, DiskError> {
        let opened = Disk::at(image, saved, true)?;
        let mut disk = opened.check(saved, force)?.put_below(place)?;
        let path = disk.state.path.clone();
        if let Some(overlay) = &mut disk.overlay
            && blocks > 0
        {
            let loaded = overlay.load(content, blocks);
            loaded.map_err(|source| DiskError::Overlay { path, source })?;
        }
        Ok(disk)
    }

    /// Opens the disk of a saved guest.
    ///
    /// # Errors
    /// Those of [`Disk::open`], [`DiskError::NotAllowed`] for a saved path, and [`DiskError::Changed`] when the image
    /// has changed. With `force` only its length, which the guest knows, must be the same.
    pub fn open_saved(
        saved: &BlockState,
        image: ImagePath<'_>,
        force: bool,
    ) -> Result<Disk, DiskError> {
        Disk::at(image, saved, saved.read_only)?.check(saved, force)
    }

    fn at(image: ImagePath<'_>, saved: &BlockState, read_only: bool) -> Result<Disk, DiskError> {
        match image {
            ImagePath::Given(path) => Disk::open(path, read_only),
            ImagePath::Saved(allowed) => Disk::open_within(&saved.path, read_only, Some(allowed)),
        }
    }

    /// Checks that it is the saved one.
    fn check(self, saved: &BlockState, force: bool) -> Result<Disk, DiskError> {
        let (found, expected) = (self.state.fingerprint, saved.fingerprint);
        if found.is_of_device() != expected.is_of_device() && found.len == expected.len && !force {
            let kind = |is_device| if is_device { "a block device" } else { "a file" };
            return Err(DiskError::OtherKind {
                path: self.state.path,
                found: kind(found.is_of_device()),
                expected: kind(expected.is_of_device()),
            });
        }
        let values: [(&'static str, i128, i128); 3] = [
            ("length in bytes is", found.len.into(), expected.len.into()),
            ("change time, in ns since 1970, is", found.mtime_ns.into(), expected.mtime_ns.into()),
            ("sample's CRC-32 is", found.sample_crc32.into(), expected.sample_crc32.into()),
        ];
        let checked = if force { &values[..1] } else { &values[..] };
        match checked.iter().find(|(_, found, expected)| found != expected) {
            None => Ok(self),
            Some(&(what, found, expected)) => {
                Err(DiskError::Changed { path: self.state.path, what, found, expected })
            }
        }
    }

    /// The description of the disk in a snapshot.
    #[must_use]
    pub fn state(&self) -> &BlockState {
        &self.state
    }

    /// The overlay's blocks, if it has one.
    pub(super) fn overlay(&self) -> Option<&Overlay> {
        self.overlay.as_ref()
    }

    pub(super) fn overlay_mut(&mut self) -> Option<&mut Overlay> {
        self.overlay.as_mut()
    }

    /// Moves data of the guest, all inside the disk.
    pub(super) fn transfer(
        &mut self,
        memory: &DeviceMemory,
        start: u64,
        data: &Buffers,
        direction: Direction,
    ) -> Result<io::Result<usize>, Fault> {
        match (&mut self.overlay, direction) {
            (None, _) => {
                memory.transfer(self.file.as_fd(), Some(start), data.segments(), direction)
            }
            (Some(overlay), Direction::ToGuest) => {
                overlay.read(&self.file, memory, start, data.clone())
            }
            (Some(overlay), Direction::FromGuest) => overlay.write(&self.file, memory, start, data),
        }
    }

    /// Syncs written data to the image. An overlay is not synced, because it ends with its guest.
    pub(super) fn flush(&self) -> io::Result<()> {
        match self.state.read_only || self.overlay.is_some() {
            true => Ok(()),
            false => self.file.sync_data(),
        }
    }

    pub(super) fn capacity_bytes(&self) -> u64 {
        self.state.fingerprint.len
    }

    /// Syncs everything that was written to the disk, and takes its fingerprint.
    pub(super) fn settle(&mut self) -> Result<(), DiskError> {
        if self.state.read_only || self.overlay.is_some() {
            return Ok(());
        }
        let path = &self.state.path;
        let failed = |what| move |source| DiskError::Io { what, path: path.clone(), source };
        self.file.sync_data().map_err(failed("sync"))?;
        let fingerprint = Fingerprint::of(&self.file).map_err(failed("read"))?;
        self.state.fingerprint = fingerprint;
        Ok(())
    }
}

/// Opens a regular file or a block device, below some folders or anywhere. The second value is true for a block device.
fn open_image(
    path: &Path,
    read_only: bool,
    within: Option<&AllowedFolders>,
) -> Result<(File, bool), DiskError> {
    let failed = |what| move |source| DiskError::Io { what, path: path.to_owned(), source };
    let open = |flags: OFlags| match within {
        Some(allowed) => allowed.open(path, flags),
        None => {
            let opened = rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty());
            opened.map(File::from).map_err(io::Error::from)
        }
    };
    let refused = |what| {
        move |error| match is_outside(&error) {
            true => DiskError::NotAllowed { path: path.to_owned() },
            false => failed(what)(error),
        }
    };
    // A descriptor that only stands for the file: opening a device or a pipe by its name may have effects.
    let found = open(OFlags::PATH).and_then(|file| file.metadata()).map_err(refused("open"))?;
    let is_device = found.file_type().is_block_device();
    let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    // O_EXCL, for a block device: it cannot be mounted or get a volume meanwhile, and it is refused if it is mounted or
    // has one already (open(2)). O_NONBLOCK: a pipe in the place of the image is refused below, not waited for.
    let exclusive = if is_device && !read_only { OFlags::EXCL } else { OFlags::empty() };
    let file = match open(access | OFlags::NONBLOCK | exclusive) {
        Err(error) if is_device && error.raw_os_error() == Some(libc::EBUSY) => {
            return Err(DiskError::DeviceInUse { path: path.to_owned() });
        }
        opened => opened.map_err(refused("open"))?,
    };
    let kind = file.metadata().map_err(failed("examine"))?.file_type();
    match (kind.is_file(), kind.is_block_device()) {
        (true, _) if !is_device => Ok((file, false)),
        (_, true) if is_device => Ok((file, true)),
        _ => Err(DiskError::NotAFile { path: path.to_owned() }),
    }
}

/// Length of a file or of a block device. The metadata of a block device does not have its length.
fn len_bytes(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

impl Fingerprint {
    fn is_of_device(&self) -> bool {
        self.mtime_ns == DEVICE_MTIME_NS
    }

    fn of(file: &File) -> io::Result<Fingerprint> {
        let metadata = file.metadata()?;
        let len = len_bytes(file)?;
        let mut crc = crc32fast::Hasher::new();
        let mut bytes = vec![0; SAMPLE_END_BYTES as usize];
        let mut sample = |start: u64, wanted: u64| {
            let part = &mut bytes[..wanted.min(len - start) as usize];
            file.read_exact_at(part, start)?;
            crc.update(part);
            io::Result::Ok(())
        };
        sample(0, SAMPLE_END_BYTES)?;
        sample(len.saturating_sub(SAMPLE_END_BYTES), SAMPLE_END_BYTES)?;
        let pages = len / SAMPLE_PAGE_BYTES;
        for index in 0..SAMPLE_PAGES.min(pages) {
            let page = u128::from(index) * u128::from(pages) / u128::from(SAMPLE_PAGES.min(pages));
            sample(page as u64 * SAMPLE_PAGE_BYTES, SAMPLE_PAGE_BYTES)?;
        }
        let mtime_ns = metadata.mtime().saturating_mul(1_000_000_000);
        let mtime_ns = match metadata.file_type().is_block_device() {
            true => DEVICE_MTIME_NS,
            false => mtime_ns.saturating_add(metadata.mtime_nsec()).max(DEVICE_MTIME_NS + 1),
        };
        Ok(Fingerprint { len, mtime_ns, sample_crc32: crc.finalize() })
    }
}
