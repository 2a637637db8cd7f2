//! Connects a restored guest's devices to this host.

use std::io;
use std::path::{Path, PathBuf};

use snapfmt::{ReadError, Snapshot};
use vmm::MmioDevice;
use vmm::state::DeviceState;
use vmm::virtio::{
    AllowedFolders, BackendState, BlockState, Disk, DiskError, EventLoop, Host, ImagePath,
    MacAddress, OverlayPlace, OverlayState, Tap, TapError, VirtioDevice, VirtioState,
    VirtioStateError, VsockError, VsockHost,
};

use crate::observer::{Observer, Step};

/// The files, sockets and taps of this host for a restored guest's devices. The default is those in the snapshot, as far
/// as they are in its own folder or in one of [`DeviceConnections::allowed_folders`].
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct DeviceConnections {
    /// The images of the guest's disks, in their order. Empty: the paths in the snapshot.
    pub disks: Vec<PathBuf>,
    /// Accept disks whose content has changed since the snapshot. The guest's file systems may break.
    pub force_disks: bool,
    /// Where the guest's writes to all disks are stored, not encrypted. The images are not changed then. By default only
    /// disks that had an overlay at the snapshot have one: in a file of the folder for temporary files, or in memory if
    /// the snapshot is sealed.
    pub disk_overlay: Option<OverlayPlace>,
    /// Another context id and socket for the guest's vsock.
    pub vsock: Option<(u64, PathBuf)>,
    /// A tap for each of the guest's network interfaces, in their order, and optionally another Ethernet address.
    /// Empty: the taps in the snapshot.
    pub nets: Vec<(String, Option<MacAddress>)>,
    /// Besides the snapshot's folder, where the paths in the snapshot may be: of disks, and of the vsock's socket. A tap
    /// has no path of its own, and counts as one in `/dev/net`.
    pub allowed_folders: Vec<PathBuf>,
}

/// A device that cannot be connected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The number of disks given is not that of the guest.
    #[error("{given} disks are given, and the guest has {found} disks")]
    DiskCount {
        /// The number in [`DeviceConnections::disks`].
        given: usize,
        /// The number in the snapshot.
        found: usize,
    },
    /// The number of taps given is not that of the guest's network interfaces.
    #[error("{given} taps are given, and the guest has {found} network interfaces")]
    NetCount {
        /// The number in [`DeviceConnections::nets`].
        given: usize,
        /// The number in the snapshot.
        found: usize,
    },
    /// A vsock is given to a guest without one.
    #[error("a vsock is given, and the guest has no vsock")]
    NoVsock,
    /// The snapshot was written by a later version.
    #[error("the snapshot has a device that this version of snap does not know")]
    Unknown(#[source] Option<VirtioStateError>),
    /// timerfd_create(2), epoll_create1(2) or pthread_create(3) failed.
    #[error("cannot start the devices' thread")]
    Thread(#[source] io::Error),
    /// eventfd(2) failed.
    #[error("cannot create a device")]
    Make(#[source] io::Error),
    /// The image of a disk cannot be used.
    #[error("the guest's disk")]
    Disk(#[source] DiskError),
    /// The tap of a network interface cannot be used.
    #[error("the guest's network interface")]
    Net {
        /// Whether the tap is from [`DeviceConnections::nets`].
        given: bool,
        /// The cause.
        #[source]
        error: TapError,
    },
    /// The socket of a vsock cannot be used.
    #[error("the guest's vsock")]
    Vsock {
        /// Whether the socket is from [`DeviceConnections::vsock`].
        given: bool,
        /// The cause.
        #[source]
        error: VsockError,
    },
    /// The snapshot names a socket in a folder that is not allowed.
    #[error(
        "the snapshot names the socket {}, which is in none of the folders that are allowed for it",
        path.display()
    )]
    SocketNotAllowed {
        /// The path in the snapshot.
        path: PathBuf,
    },
    /// The snapshot names a tap, and `/dev/net` is not allowed.
    #[error("the snapshot names the tap {tap}, which nothing allows it")]
    TapNotAllowed {
        /// The name in the snapshot.
        tap: String,
    },
    /// The content of a device cannot be read from the snapshot.
    #[error("cannot read the content of device {place}")]
    Content {
        /// The device's number.
        place: usize,
        /// The cause.
        #[source]
        error: ReadError,
    },
    /// The snapshot was written by a later version.
    #[error(
        "the content of device {place} has version {version}, which this version of snap does not know"
    )]
    ContentVersion {
        /// The device's number.
        place: usize,
        /// The version in the snapshot.
        version: u32,
    },
}

type Devices = Vec<Box<dyn MmioDevice>>;

/// All taps are opened by this device of the host.
const TUN: &str = "/dev/net/tun";

impl DeviceConnections {
    /// Restores the saved devices and connects them. `file` is the path of the snapshot.
    pub(crate) fn restore(
        &self,
        saved: &[DeviceState],
        snapshot: &Snapshot,
        file: &Path,
        observer: &dyn Observer,
    ) -> Result<Devices, DeviceError> {
        let devices = saved
            .iter()
            .map(VirtioState::decode)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| DeviceError::Unknown(Some(error)))?;
        self.check_counts(&devices)?;
        if devices.is_empty() {
            return Ok(Vec::new());
        }
        let event_loop = EventLoop::start().map_err(DeviceError::Thread)?;
        let own = match file.parent() {
            Some(folder) if folder.as_os_str().is_empty() => Some(Path::new(".")),
            folder => folder,
        };
        let folders = self.allowed_folders.iter().map(PathBuf::as_path).chain(own);
        let allowed = AllowedFolders::new(folders.map(Path::to_owned));
        let mut paths = self.disks.iter().map(PathBuf::as_path);
        let mut nets = self.nets.iter();
        let mut restored: Devices = Vec::new();
        for (place, VirtioState { transport, device, .. }) in devices.into_iter().enumerate() {
            let source = (snapshot, place);
            let host = self.host(device, &allowed, &mut paths, &mut nets, source, observer)?;
            let device = VirtioDevice::restore(&event_loop, transport, host);
            restored.push(Box::new(device.map_err(DeviceError::Make)?));
        }
        Ok(restored)
    }

    fn check_counts(&self, devices: &[VirtioState]) -> Result<(), DeviceError> {
        let count = |is: fn(&BackendState) -> bool| {
            devices.iter().filter(|device| is(&device.device)).count()
        };
        let disks =
            count(|device| matches!(device, BackendState::Block(_) | BackendState::Overlay(_)));
        if !self.disks.is_empty() && self.disks.len() != disks {
            return Err(DeviceError::DiskCount { given: self.disks.len(), found: disks });
        }
        if self.vsock.is_some() && count(|device| matches!(device, BackendState::Vsock(_))) == 0 {
            return Err(DeviceError::NoVsock);
        }
        let nets = count(|device| matches!(device, BackendState::Net(_)));
        if !self.nets.is_empty() && self.nets.len() != nets {
            return Err(DeviceError::NetCount { given: self.nets.len(), found: nets });
        }
        Ok(())
    }

    fn host<'a>(
        &self,
        saved: BackendState,
        allowed: &'a AllowedFolders,
        paths: &mut impl Iterator<Item = &'a Path>,
        nets: &mut impl Iterator<Item = &'a (String, Option<MacAddress>)>,
        (snapshot, place): (&Snapshot, usize),
        observer: &dyn Observer,
    ) -> Result<Host, DeviceError> {
        let mut image = || paths.next().map_or(ImagePath::Saved(allowed), ImagePath::Given);
        Ok(match saved {
            BackendState::Block(disk) if disk.read_only || self.disk_overlay.is_none() => {
                let opened = Disk::open_saved(&disk, image(), self.force_disks);
                Host::Disk(opened.map_err(DeviceError::Disk)?)
            }
            BackendState::Block(disk) => self.disk_below(&disk, image(), snapshot, 0, &[])?,
            BackendState::Overlay(OverlayState { disk, blocks, .. }) => {
                let content = content(snapshot, place)?;
                self.disk_below(&disk, image(), snapshot, blocks, &content)?
            }
            BackendState::Rng => Host::Entropy,
            BackendState::Balloon(balloon) => Host::Balloon(balloon),
            BackendState::Net(saved) => {
                let connected = nets.next();
                let tap = match connected {
                    Some((tap, _)) => tap,
                    None if allowed.allow_device(Path::new(TUN)) => &saved.tap,
                    None => return Err(DeviceError::TapNotAllowed { tap: saved.tap }),
                };
                let opened = Tap::open(tap);
                let given = connected.is_some();
                let mac = connected.and_then(|(_, mac)| *mac).unwrap_or(saved.mac);
                Host::Net(opened.map_err(|error| DeviceError::Net { given, error })?, mac)
            }
            BackendState::Vsock(saved) => {
                let (cid, path) = match &self.vsock {
                    Some((cid, path)) => (*cid, path),
                    None if allowed.allow_name(&saved.path) => (saved.guest_cid, &saved.path),
                    None => return Err(DeviceError::SocketNotAllowed { path: saved.path }),
                };
                let given = self.vsock.is_some();
                let step = observer.step(Step::MakeSocket { path });
                let host = VsockHost::bind(cid, path);
                let host = host.map_err(|error| DeviceError::Vsock { given, error })?;
                observer.made_socket(path);
                drop(step);
                Host::Vsock(host)
            }
            _ => return Err(DeviceError::Unknown(None)),
        })
    }

    fn disk_below(
        &self,
        saved: &BlockState,
        image: ImagePath<'_>,
        snapshot: &Snapshot,
        blocks: u32,
        content: &[u8],
    ) -> Result<Host, DeviceError> {
        let place = self.overlay_place(snapshot.keys().is_some());
        let disk = Disk::open_saved_below(saved, image, self.force_disks, &place, blocks, content);
        Ok(Host::Disk(disk.map_err(DeviceError::Disk)?))
    }

    fn overlay_place(&self, is_sealed: bool) -> OverlayPlace {
        match &self.disk_overlay {
            Some(place) => place.clone(),
            // A file would have the disk's content of the snapshot in clear.
            None if is_sealed => OverlayPlace::Memory,
            None => OverlayPlace::Folder(std::env::temp_dir()),
        }
    }
}

/// The content that the snapshot has of a device besides its state. Empty if there is no such section.
pub(crate) fn content(snapshot: &Snapshot, place: usize) -> Result<Vec<u8>, DeviceError> {
    let Some(kind) = vmm::state::device_content_kind(place) else { return Ok(Vec::new()) };
    let blob = snapshot.state(kind).map_err(|error| DeviceError::Content { place, error })?;
    let Some(blob) = blob else { return Ok(Vec::new()) };
    if blob.version != vmm::state::DEVICE_CONTENT_VERSION {
        return Err(DeviceError::ContentVersion { place, version: blob.version });
    }
    Ok(blob.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_overlay_of_a_sealed_guest_is_in_no_file_unless_one_is_given() {
        let mut connections = DeviceConnections::default();
        assert!(matches!(connections.overlay_place(true), OverlayPlace::Memory));
        assert!(matches!(connections.overlay_place(false), OverlayPlace::Folder(_)));
        connections.disk_overlay = Some(OverlayPlace::Folder("given".into()));
        let given =
            |place| matches!(place, OverlayPlace::Folder(path) if path == Path::new("given"));
        assert!(given(connections.overlay_place(true)) && given(connections.overlay_place(false)));
    }
}
