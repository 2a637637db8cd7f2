//! The options that describe a fresh guest.

use std::path::PathBuf;

use anyhow::{Error, Result};
use serde_json::{Value, json};
use snapvm::{BootConfig, BootError, Vm};
use vmm::boot::LinuxConfig;
use vmm::demo::DemoConfig;
use vmm::{BootOptions, Console, Payload};

use crate::devices::DeviceArgs;
use crate::session::Session;
use crate::size;
use crate::waits::Wait;

/// The options of a fresh guest that need no other one, for the options that conflict with them.
pub(crate) const WORDS: [&str; 3] = ["memory", "work", "kernel"];

/// A guest to boot: the demo guest, or Linux.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct GuestArgs {
    /// Memory of the guest.
    #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = size::parse)]
    pub(crate) memory: u64,

    /// How much of it the demo guest fills and works on.
    #[arg(long, value_name = "SIZE", default_value = "32M", value_parser = size::parse, conflicts_with = "kernel")]
    pub(crate) work: u64,

    /// How much of the filled memory the demo guest reads in each beat, in percent.
    #[arg(long, value_name = "PERCENT", default_value_t = 25, conflicts_with = "kernel",
          value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(crate) walk: u8,

    /// Boot this Linux kernel: a bzImage (vmlinuz) or an uncompressed ELF vmlinux.
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,

    /// The kernel's initial RAM disk.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub(crate) initrd: Option<PathBuf>,

    /// The kernel's command line.
    #[arg(
        long,
        value_name = "WORDS",
        requires = "kernel",
        default_value_if("kernel", clap::builder::ArgPredicate::IsPresent, Some(DEFAULT_CMDLINE))
    )]
    pub(crate) cmdline: Option<String>,

    /// vCPUs of a Linux guest.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        requires = "kernel",
        value_parser = clap::value_parser!(u8).range(1..=vmm::state::VCPUS_MAX as i64)
    )]
    pub(crate) cpus: u8,

    #[command(flatten)]
    pub(crate) devices: DeviceArgs,
}

/// The console where `snap` shows it, and a panic that ends the guest.
const DEFAULT_CMDLINE: &str = "console=ttyS0 panic=1";

impl GuestArgs {
    /// The demo guest.
    pub(crate) fn demo(memory: u64, work: u64) -> Self {
        Self {
            memory,
            work,
            walk: 25,
            kernel: None,
            initrd: None,
            cmdline: None,
            cpus: 1,
            devices: DeviceArgs::default(),
        }
    }

    pub(crate) fn is_linux(&self) -> bool {
        self.kernel.is_some()
    }

    pub(crate) fn payload(&self) -> Payload {
        match &self.kernel {
            None => Payload::Demo(DemoConfig::new(self.work).walked_of_256(self.walked_of_256())),
            Some(kernel) => Payload::Linux(
                LinuxConfig::new(kernel.clone())
                    .initrd(self.initrd.clone())
                    .cmdline(self.cmdline.clone().unwrap_or_default()),
            ),
        }
    }

    /// The percentage in pages, rounded up.
    fn walked_of_256(&self) -> u32 {
        (u32::from(self.walk) * 256).div_ceil(100)
    }

    /// The description of the guest in the snapshot's metadata.
    pub(crate) fn metadata(&self) -> Value {
        match &self.kernel {
            None => json!({
                "kind": "demo",
                "work_bytes": self.work,
                "walked_of_256": self.walked_of_256(),
            }),
            Some(kernel) => json!({
                "kind": "linux",
                "kernel": kernel,
                "initrd": self.initrd,
                "cmdline": self.cmdline,
                "cpus": self.cpus,
                "devices": self.devices.metadata(),
            }),
        }
    }
}

/// Boots the guest that `args` describe, which has not run yet; an interrupt pauses it. `trigger`: whether it stops
/// when it requests a snapshot.
pub(crate) fn boot(
    args: &GuestArgs,
    console: impl Console + 'static,
    trigger: bool,
    session: &Session,
) -> Result<Vm> {
    let _opening = Wait::new(|| "the guest's kernel and disks to be read".into()).begin();
    let mut config = BootConfig::new(args.memory, args.payload());
    config.options = BootOptions::default().cpus(args.cpus).guest_snapshot_trigger(trigger);
    config.metadata = args.metadata();
    let vm = config.boot(console, args.devices.create()?).map_err(|error| match error {
        BootError::Layout(error) => Error::new(error).context("--memory"),
        error => error.into(),
    })?;
    session.interrupt.pauses(vm.handle());
    Ok(vm)
}
