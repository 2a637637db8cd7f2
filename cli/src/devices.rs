//! The words that describe a guest's devices, and the devices made from them or from a snapshot.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use vmm::MmioDevice;
use vmm::state::DeviceState;
use vmm::virtio::{BackendState, Disk, EventLoop, Host, VirtioDevice, VirtioState, VsockHost};

/// Devices of a fresh guest.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct DeviceArgs {
    /// Give the guest this raw image as a disk, /dev/vda and so on in the order given; with `,ro` only
    /// to read. Its path and fingerprint are stored, not its content.
    #[arg(long = "disk", value_name = "IMG[,ro]", requires = "kernel")]
    disks: Vec<DiskArg>,

    /// Give the guest a source of random numbers (virtio-rng).
    #[arg(long, requires = "kernel")]
    rng: bool,

    /// Give the guest sockets to the host (virtio-vsock): its context id, and a unix socket to make. Who connects
    /// there and writes `CONNECT PORT` reaches the guest's port; the guest reaches port N of the host at
    /// SOCKET_N.
    #[arg(long, value_name = "CID,SOCKET", requires = "kernel")]
    vsock: Option<VsockArg>,
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

    /// Another context id and socket for the guest's vsock, as each of several clones needs.
    #[arg(long, value_name = "CID,SOCKET")]
    vsock: Option<VsockArg>,
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
        Ok(Host::Vsock(VsockHost::bind(self.cid, &self.path).context("--vsock")?))
    }
}

/// `IMG` or `IMG,ro`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct DiskArg {
    path: PathBuf,
    read_only: bool,
}

impl FromStr for DiskArg {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (path, read_only) = match text.strip_suffix(",ro") {
            Some(path) => (path, true),
            None => (text, false),
        };
        Ok(Self { path: path.into(), read_only })
    }
}

/// Devices about to be part of a guest.
pub(crate) type Devices = Vec<Box<dyn MmioDevice>>;

impl DeviceArgs {
    /// Opens what the devices need.
    pub(crate) fn create(&self) -> Result<Devices> {
        let mut hosts = Vec::new();
        for disk in &self.disks {
            hosts.push(Host::Disk(Disk::open(&disk.path, disk.read_only)?));
        }
        if self.rng {
            hosts.push(Host::Entropy);
        }
        if let Some(vsock) = &self.vsock {
            hosts.push(vsock.bind()?);
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
        let disk = |disk: &DiskArg| json!({ "disk": disk.path, "read_only": disk.read_only });
        let rng = self.rng.then(|| json!("virtio-rng"));
        let vsock = self.vsock.iter().map(|vsock| json!({ "vsock": vsock.path, "cid": vsock.cid }));
        self.disks.iter().map(disk).chain(rng).chain(vsock).collect()
    }
}

impl SavedDeviceArgs {
    /// The devices of a saved guest, with their back ends opened and checked.
    pub(crate) fn restore(&self, saved: &[DeviceState]) -> Result<Devices> {
        let mut paths = self.disks.iter().map(PathBuf::as_path);
        let devices = saved
            .iter()
            .map(VirtioState::decode)
            .collect::<Result<Vec<_>, _>>()
            .context("the snapshot has a device that this version of snap does not know")?;
        let is_disk = |device: &&VirtioState| matches!(device.device, BackendState::Block(_));
        let (given, disks) = (self.disks.len(), devices.iter().filter(is_disk).count());
        if given != 0 && given != disks {
            bail!("--disk is given {given} times, and the guest has {disks} disks");
        }
        let is_vsock = |device: &VirtioState| matches!(device.device, BackendState::Vsock(_));
        if self.vsock.is_some() && !devices.iter().any(is_vsock) {
            bail!("--vsock is given, and the guest has no vsock");
        }
        if devices.is_empty() {
            return Ok(Vec::new());
        }
        let event_loop = EventLoop::start().context("cannot start the devices' thread")?;
        let mut restored: Devices = Vec::new();
        for VirtioState { transport, device } in devices {
            let host = self.host(device, &mut paths)?;
            let device = VirtioDevice::restore(&event_loop, transport, host)
                .context("cannot make a device")?;
            restored.push(Box::new(device));
        }
        Ok(restored)
    }

    fn host<'a>(
        &self,
        saved: BackendState,
        paths: &mut impl Iterator<Item = &'a Path>,
    ) -> Result<Host> {
        Ok(match saved {
            BackendState::Block(disk) => {
                let opened = Disk::open_saved(&disk, paths.next(), self.force_disks);
                Host::Disk(opened.context(
                    "the guest's disk (--disk says where it is now, --force-disks takes it as it is)",
                )?)
            }
            BackendState::Rng => Host::Entropy,
            BackendState::Vsock(saved) => match &self.vsock {
                Some(vsock) => vsock.bind()?,
                None => Host::Vsock(
                    VsockHost::bind(saved.guest_cid, &saved.path)
                        .context("the guest's vsock (--vsock gives it another socket)")?,
                ),
            },
            _ => bail!("the snapshot has a device that this version of snap does not know"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_word_ro_makes_a_disk_read_only() {
        let disk = |text: &str| {
            let DiskArg { path, read_only } = text.parse().unwrap();
            (path.to_str().unwrap().to_owned(), read_only)
        };
        assert_eq!(disk("a.img"), ("a.img".into(), false));
        assert_eq!(disk("a.img,ro"), ("a.img".into(), true));
        assert_eq!(disk("a,b.img"), ("a,b.img".into(), false));
    }
}
