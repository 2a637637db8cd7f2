//! The words that describe a guest's devices, and the devices made from them or from a snapshot.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use vmm::MmioDevice;
use vmm::state::DeviceState;
use vmm::virtio::{
    BackendState, BalloonState, BlockState, Disk, EventLoop, Host, MacAddress, MacError,
    OverlayPlace, OverlayState, Tap, VirtioDevice, VirtioState, VsockError, VsockHost,
};

use crate::leftovers;

/// Devices of a fresh guest.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct DeviceArgs {
    /// Give the guest this raw image, or block device, as a disk, /dev/vda and so on in the order given; with `,ro`
    /// only to read; with `,overlay` the image stays as it is, and what the guest writes is stored with it.
    /// Of the image itself, path and fingerprint are stored, not its content. One that looks like qcow2, VMDK, VHD and the
    /// like is refused, unless `,raw` says that the guest is to see it as it is.
    #[arg(long = "disk", value_name = "IMG[,ro|,overlay][,raw]", requires = "kernel")]
    disks: Vec<DiskArg>,

    /// Where a disk's overlay is kept while the guest runs: in a file without a name in this folder, or in
    /// memory. Without it, the folder for temporary files.
    #[arg(long, value_name = "DIR|memory", requires = "disks")]
    disk_overlay: Option<OverlayArg>,

    /// Give the guest a source of random numbers (virtio-rng).
    #[arg(long, requires = "kernel")]
    rng: bool,

    /// Give the guest sockets to the host (virtio-vsock): its context id, and a unix socket to make. Who connects
    /// there and writes `CONNECT PORT` reaches the guest's port; the guest reaches port N of the host at
    /// SOCKET_N.
    #[arg(long, value_name = "CID,SOCKET", requires = "kernel")]
    vsock: Option<VsockArg>,

    /// Give the guest a network interface (virtio-net) whose other end is this tap of the host, with this
    /// Ethernet address or one of its own. More than once for several.
    #[arg(long = "net", value_name = "tap=NAME[,mac=MAC]", requires = "kernel")]
    nets: Vec<NetArg>,

    /// Let the guest give free memory back to the host (virtio-balloon with free page reporting).
    #[arg(long, requires = "kernel")]
    balloon: bool,
}

/// Devices of a guest that is brought back.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct SavedDeviceArgs {
    /// Where a disk of the guest is now. Once for each of its disks, in their order; without it they are
    /// where they were.
    #[arg(long = "disk", value_name = "IMG")]
    disks: Vec<PathBuf>,

    /// Take disks whose content is not what it was when the guest was saved. The guest's file systems
    /// may break.
    #[arg(long)]
    force_disks: bool,

    /// Leave the images of all disks as they are: what the guest writes from now on is kept in a file without a
    /// name in this folder, or in memory, and goes with the guest. So one image does for many guests at a
    /// time. Disks that were stored with an overlay have one in any case.
    #[arg(long, value_name = "DIR|memory")]
    disk_overlay: Option<OverlayArg>,

    /// Another context id and socket for the guest's vsock, as each of several clones needs.
    #[arg(long, value_name = "CID,SOCKET")]
    vsock: Option<VsockArg>,

    /// Another tap, and another address, for a network interface of the guest. Once for each of its
    /// interfaces, in their order.
    #[arg(long = "net", value_name = "tap=NAME[,mac=MAC]")]
    nets: Vec<NetArg>,
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
        let cid = cid.parse().map_err(|_| "the context id is no number")?;
        Ok(Self { cid, path: path.into() })
    }
}

impl VsockArg {
    fn bind(&self) -> Result<Host> {
        bind_vsock(self.cid, &self.path).context("--vsock")
    }
}

/// Makes the socket, whose name goes with this process, however that ends.
fn bind_vsock(cid: u64, path: &Path) -> Result<Host, VsockError> {
    let host = VsockHost::bind(cid, path)?;
    leftovers::name(path);
    Ok(Host::Vsock(host))
}

/// `IMG`, `IMG,ro` or `IMG,overlay`, and maybe `,raw`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct DiskArg {
    path: PathBuf,
    mode: DiskMode,
    /// Whether it is raw whatever it looks like.
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

/// The place that was given, or where temporary files are.
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
            let device = VirtioDevice::create(&event_loop, host).context("cannot make a device")?;
            Ok(Box::new(device) as Box<dyn MmioDevice>)
        };
        hosts.into_iter().map(device).collect()
    }

    /// What the snapshot's metadata says of them.
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
    /// The devices of a saved guest, with their back ends opened and checked. `content` gives what is stored of
    /// a device besides its state, by its place in the list.
    pub(crate) fn restore(
        &self,
        saved: &[DeviceState],
        content: impl Fn(usize) -> Result<Vec<u8>>,
    ) -> Result<Devices> {
        let mut paths = self.disks.iter().map(PathBuf::as_path);
        let devices = saved
            .iter()
            .map(VirtioState::decode)
            .collect::<Result<Vec<_>, _>>()
            .context("the snapshot has a device that this version of snap does not know")?;
        let is_disk = |device: &&VirtioState| {
            matches!(device.device, BackendState::Block(_) | BackendState::Overlay(_))
        };
        let (given, disks) = (self.disks.len(), devices.iter().filter(is_disk).count());
        if given != 0 && given != disks {
            bail!("--disk is given {given} times, and the guest has {disks} disks");
        }
        let is_vsock = |device: &VirtioState| matches!(device.device, BackendState::Vsock(_));
        if self.vsock.is_some() && !devices.iter().any(is_vsock) {
            bail!("--vsock is given, and the guest has no vsock");
        }
        let is_net = |device: &&VirtioState| matches!(device.device, BackendState::Net(_));
        let (given, nets) = (self.nets.len(), devices.iter().filter(is_net).count());
        if given != 0 && given != nets {
            bail!("--net is given {given} times, and the guest has {nets} network interfaces");
        }
        let mut net_args = self.nets.iter();
        if devices.is_empty() {
            return Ok(Vec::new());
        }
        let event_loop = EventLoop::start().context("cannot start the devices' thread")?;
        let mut restored: Devices = Vec::new();
        for (place, VirtioState { transport, device, .. }) in devices.into_iter().enumerate() {
            let content = || content(place);
            let host = self.host(device, &mut paths, &mut net_args, content)?;
            let device = VirtioDevice::restore(&event_loop, transport, host)
                .context("cannot make a device")?;
            restored.push(Box::new(device));
        }
        Ok(restored)
    }

    fn disk_below(
        &self,
        saved: &BlockState,
        path: Option<&Path>,
        blocks: u32,
        content: &[u8],
    ) -> Result<Host> {
        let place = overlay_place(self.disk_overlay.as_ref());
        let disk = Disk::open_saved_below(saved, path, self.force_disks, &place, blocks, content);
        Ok(Host::Disk(disk.context(WHICH_DISK)?))
    }

    fn host<'a>(
        &self,
        saved: BackendState,
        paths: &mut impl Iterator<Item = &'a Path>,
        nets: &mut impl Iterator<Item = &'a NetArg>,
        content: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<Host> {
        Ok(match saved {
            BackendState::Block(disk) if disk.read_only || self.disk_overlay.is_none() => {
                let opened = Disk::open_saved(&disk, paths.next(), self.force_disks);
                Host::Disk(opened.context(WHICH_DISK)?)
            }
            BackendState::Block(disk) => self.disk_below(&disk, paths.next(), 0, &[])?,
            BackendState::Overlay(OverlayState { disk, blocks, .. }) => {
                self.disk_below(&disk, paths.next(), blocks, &content()?)?
            }
            BackendState::Rng => Host::Entropy,
            BackendState::Balloon(balloon) => Host::Balloon(balloon),
            BackendState::Net(saved) => match nets.next() {
                Some(net) => net.open(saved.mac)?,
                None => Host::Net(
                    Tap::open(&saved.tap)
                        .context("the guest's network interface (--net gives it another tap)")?,
                    saved.mac,
                ),
            },
            BackendState::Vsock(saved) => match &self.vsock {
                Some(vsock) => vsock.bind()?,
                None => bind_vsock(saved.guest_cid, &saved.path)
                    .context("the guest's vsock (--vsock gives it another socket)")?,
            },
            _ => bail!("the snapshot has a device that this version of snap does not know"),
        })
    }
}

const WHICH_DISK: &str =
    "the guest's disk (--disk says where it is now, --force-disks takes it as it is)";

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
