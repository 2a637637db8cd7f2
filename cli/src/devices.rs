//! The options that describe a guest's devices, and the devices made from them or from a snapshot.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use snapvm::DeviceConnections;
use vmm::MmioDevice;
use vmm::virtio::{
    BalloonState, Disk, EventLoop, Host, MacAddress, MacError, OverlayPlace, Tap, VirtioDevice,
    VsockError, VsockHost,
};

use crate::leftovers;

/// Devices of a fresh guest.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct DeviceArgs {
    /// Give the guest this raw image, or block device, as a disk, /dev/vda and so on in the order given. `,ro`: read
    /// only. `,overlay`: the image is not changed, and the guest's writes are stored in the snapshot. A snapshot stores
    /// path and fingerprint of the image, not its content. An image in another format, such as qcow2, VMDK or VHD, is
    /// refused, unless `,raw` gives its bytes to the guest.
    #[arg(long = "disk", value_name = "IMG[,ro|,overlay][,raw]", requires = "kernel")]
    disks: Vec<DiskArg>,

    /// Where a disk's overlay is kept while the guest runs: in a file without a name in this folder, which is not
    /// encrypted, or in memory. Without it, the folder for temporary files.
    #[arg(long, value_name = "DIR|memory", requires = "disks")]
    disk_overlay: Option<OverlayArg>,

    /// Give the guest a source of random numbers (virtio-rng).
    #[arg(long, requires = "kernel")]
    rng: bool,

    /// Give the guest sockets to the host (virtio-vsock): its context id, and a unix socket to create. A program that
    /// connects there and writes `CONNECT PORT` reaches the guest's port; the guest reaches port N of the host at
    /// SOCKET_N.
    #[arg(long, value_name = "CID,SOCKET", requires = "kernel")]
    vsock: Option<VsockArg>,

    /// Give the guest a network interface (virtio-net) whose other end is this tap of the host, with this Ethernet
    /// address or a random one. More than once for several.
    #[arg(long = "net", value_name = "tap=NAME[,mac=MAC]", requires = "kernel")]
    nets: Vec<NetArg>,

    /// Let the guest give free memory back to the host (virtio-balloon with free page reporting).
    #[arg(long, requires = "kernel")]
    balloon: bool,
}

/// Devices of a restored guest.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct SavedDeviceArgs {
    /// The present path of a disk of the guest. Once for each of its disks, in their order; the default is the path in
    /// the snapshot.
    #[arg(long = "disk", value_name = "IMG")]
    disks: Vec<PathBuf>,

    /// Accept disks whose content has changed since the snapshot. The guest's file systems may break.
    #[arg(long)]
    force_disks: bool,

    /// Do not change the images of all disks: the guest's writes go to a file without a name in this folder, or to
    /// memory, and are deleted when the guest ends. So many guests can use one image. Disks that had an overlay at the
    /// snapshot always have one. The file is not encrypted; without this option, a sealed guest's overlay is in memory.
    #[arg(long, value_name = "DIR|memory")]
    disk_overlay: Option<OverlayArg>,

    /// Another context id and socket for the guest's vsock, which each of several clones needs.
    #[arg(long, value_name = "CID,SOCKET")]
    vsock: Option<VsockArg>,

    /// Another tap, and another address, for a network interface of the guest. Once for each of its
    /// interfaces, in their order.
    #[arg(long = "net", value_name = "tap=NAME[,mac=MAC]")]
    nets: Vec<NetArg>,

    /// Use the paths in the snapshot also if they are in this folder or below it. Without it, only disks and sockets in
    /// the snapshot's own folder are used; others are given by --disk, --vsock and --net. Taps count as in /dev/net. More
    /// than once for several folders.
    #[arg(long = "allow-path", value_name = "DIR")]
    allowed_folders: Vec<PathBuf>,
}

/// `tap=NAME[,mac=MAC]`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct NetArg {
    tap: String,
    mac: Option<MacAddress>,
}

impl FromStr for NetArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (mut tap, mut mac) = (None, None);
        for word in text.split(',') {
            match word.split_once('=') {
                Some(("tap", name)) if tap.is_none() => tap = Some(name.to_owned()),
                Some(("mac", address)) if mac.is_none() => {
                    mac = Some(address.parse().map_err(|error: MacError| error.to_string())?);
                }
                _ => return Err(format!("{word:?}: expected tap=NAME[,mac=MAC]")),
            }
        }
        Ok(Self { tap: tap.ok_or("expected tap=NAME[,mac=MAC]")?, mac })
    }
}

impl NetArg {
    fn open(&self, mac: MacAddress) -> Result<Host> {
        Ok(Host::Net(Tap::open(&self.tap).context("--net")?, self.mac.unwrap_or(mac)))
    }
}

/// `CID,SOCKET`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct VsockArg {
    cid: u64,
    path: PathBuf,
}

impl FromStr for VsockArg {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = text.split_once(',').filter(|(_, path)| !path.is_empty());
        let (cid, path) = parsed.ok_or("expected CID,SOCKET")?;
        let cid = cid.parse().map_err(|_| "the context id is not a number")?;
        Ok(Self { cid, path: path.into() })
    }
}

impl VsockArg {
    fn bind(&self) -> Result<Host> {
        bind_vsock(self.cid, &self.path).context("--vsock")
    }
}

/// Creates the socket, whose name is removed when this process ends for any reason.
fn bind_vsock(cid: u64, path: &Path) -> Result<Host, VsockError> {
    let _creating = leftovers::creating();
    let host = VsockHost::bind(cid, path)?;
    leftovers::name(path);
    Ok(Host::Vsock(host))
}

/// `IMG`, `IMG,ro` or `IMG,overlay`, and maybe `,raw`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct DiskArg {
    path: PathBuf,
    mode: DiskMode,
    /// Whether its bytes are used in any format.
    raw: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DiskMode {
    ReadWrite,
    ReadOnly,
    Overlay,
}

/// `memory` or a folder.
#[derive(Clone, Debug)]
struct OverlayArg(OverlayPlace);

impl FromStr for OverlayArg {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(match text {
            "memory" => OverlayPlace::Memory,
            folder => OverlayPlace::Folder(folder.into()),
        }))
    }
}

/// The given place, or the folder for temporary files.
fn overlay_place(given: Option<&OverlayArg>) -> OverlayPlace {
    match given {
        Some(OverlayArg(place)) => place.clone(),
        None => OverlayPlace::Folder(std::env::temp_dir()),
    }
}

impl FromStr for DiskArg {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (mut path, mut mode, mut raw) = (text, None, false);
        while let Some((front, word)) = path.rsplit_once(',') {
            let this = match word {
                "ro" => DiskMode::ReadOnly,
                "overlay" => DiskMode::Overlay,
                "raw" => {
                    (path, raw) = (front, true);
                    continue;
                }
                // A part of the path.
                _ => break,
            };
            if mode.replace(this).is_some_and(|other| other != this) {
                return Err("`ro` and `overlay` exclude each other");
            }
            path = front;
        }
        Ok(Self { path: path.into(), mode: mode.unwrap_or(DiskMode::ReadWrite), raw })
    }
}

/// Devices about to be part of a guest.
pub(crate) type Devices = Vec<Box<dyn MmioDevice>>;

impl DeviceArgs {
    /// Opens what the devices need.
    pub(crate) fn create(&self) -> Result<Devices> {
        let mut hosts = Vec::new();
        for disk in &self.disks {
            if !disk.raw {
                Disk::refuse_formats(&disk.path)?;
            }
            let place = overlay_place(self.disk_overlay.as_ref());
            hosts.push(Host::Disk(match disk.mode {
                DiskMode::Overlay => Disk::open_below(&disk.path, &place)?,
                mode => Disk::open(&disk.path, mode == DiskMode::ReadOnly)?,
            }));
        }
        if self.rng {
            hosts.push(Host::Entropy);
        }
        if let Some(vsock) = &self.vsock {
            hosts.push(vsock.bind()?);
        }
        for net in &self.nets {
            hosts.push(net.open(MacAddress::random()?)?);
        }
        if self.balloon {
            hosts.push(Host::Balloon(BalloonState::default()));
        }
        if hosts.is_empty() {
            return Ok(Vec::new());
        }
        let event_loop = EventLoop::start().context("cannot start the devices' thread")?;
        let device = |host| {
            let device =
                VirtioDevice::create(&event_loop, host).context("cannot create a device")?;
            Ok(Box::new(device) as Box<dyn MmioDevice>)
        };
        hosts.into_iter().map(device).collect()
    }

    /// Their description in the snapshot's metadata.
    pub(crate) fn metadata(&self) -> Vec<Value> {
        let disk = |disk: &DiskArg| {
            let read_only = disk.mode == DiskMode::ReadOnly;
            json!({ "disk": disk.path, "read_only": read_only, "overlay": disk.mode == DiskMode::Overlay })
        };
        let rng = self.rng.then(|| json!("virtio-rng"));
        let vsock = self.vsock.iter().map(|vsock| json!({ "vsock": vsock.path, "cid": vsock.cid }));
        let nets = self.nets.iter().map(|net| json!({ "net": net.tap }));
        let balloon = self.balloon.then(|| json!("virtio-balloon"));
        let disks = self.disks.iter().map(disk);
        disks.chain(rng).chain(vsock).chain(nets).chain(balloon).collect()
    }
}

impl SavedDeviceArgs {
    pub(crate) fn connections(&self) -> DeviceConnections {
        let mut connections = DeviceConnections::default();
        connections.disks = self.disks.clone();
        connections.force_disks = self.force_disks;
        connections.allowed_folders = self.allowed_folders.clone();
        connections.disk_overlay = self.disk_overlay.clone().map(|OverlayArg(place)| place);
        connections.vsock = self.vsock.clone().map(|VsockArg { cid, path }| (cid, path));
        connections.nets =
            self.nets.iter().cloned().map(|NetArg { tap, mac }| (tap, mac)).collect();
        connections
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_words_are_split_off_a_disks_path() {
        let disk = |text: &str| {
            let DiskArg { path, mode, raw } = text.parse().unwrap();
            assert_eq!(raw, text.contains("raw,") || text.ends_with(",raw"));
            (path.to_str().unwrap().to_owned(), mode)
        };
        assert_eq!(disk("a.img"), ("a.img".into(), DiskMode::ReadWrite));
        assert_eq!(disk("a.img,ro"), ("a.img".into(), DiskMode::ReadOnly));
        assert_eq!(disk("a.img,overlay"), ("a.img".into(), DiskMode::Overlay));
        assert_eq!(disk("a,b.img"), ("a,b.img".into(), DiskMode::ReadWrite));
        assert_eq!(disk("a.img,raw"), ("a.img".into(), DiskMode::ReadWrite));
        assert_eq!(disk("a,b,ro,raw"), ("a,b".into(), DiskMode::ReadOnly));
        assert_eq!(disk("a.img,raw,overlay"), ("a.img".into(), DiskMode::Overlay));
        assert!("a.img,ro,overlay".parse::<DiskArg>().is_err());
    }
}
