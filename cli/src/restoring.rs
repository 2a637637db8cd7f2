//! A restore on the command line: waits, progress and messages around [`RestoreConfig`].

use std::any::Any;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Error, Result, anyhow, bail};
use snapfmt::Progress;
use snapvm::{DeviceError, Observer, RestoreConfig, RestoreError, RestoredVm, SnapshotError, Step};
use vmm::Console;
use vmm::virtio::DiskError;

use crate::awaited_source::AwaitedSource;
use crate::exit::GuestStopped;
use crate::input::{ParentArgs, open};
use crate::interrupt::Interrupt;
use crate::progress::Bar;
use crate::session::Session;
use crate::waits::Wait;
use crate::{checkpoints, leftovers, size};

/// A lazy restore of the snapshot at `file`, whose guest must have `memory_bytes` of memory if that is given.
pub(crate) fn config(
    file: &Path,
    parents: &ParentArgs,
    memory_bytes: Option<u64>,
    session: &Session,
) -> Result<RestoreConfig> {
    // Layers of the guest will have the path of the file itself.
    let checkpoint = checkpoints::resolve(file, &parents.keys)?;
    let file = checkpoint.as_deref().unwrap_or(file);
    let snapshot = open(file, parents)?;
    let found = snapshot.header().memory_bytes;
    if let Some(expected) = memory_bytes
        && expected != found
    {
        bail!(
            "{}: --memory {} expected, found {} in the snapshot; leave --memory out to use that size",
            file.display(),
            size::human(expected),
            size::human(found)
        );
    }
    let path = file.to_owned();
    let observer = Reporter {
        quiet: session.quiet,
        interrupt: session.interrupt.clone(),
        loading: Mutex::default(),
    };
    Ok(RestoreConfig::new(Arc::new(snapshot), file)
        .observer(Arc::new(observer))
        .wrap_source(move |source| Arc::new(AwaitedSource::new(source, &path))))
}

/// Restores the guest; an interrupt pauses it.
pub(crate) fn restore(
    config: &RestoreConfig,
    console: impl Console + 'static,
    session: &Session,
) -> Result<RestoredVm> {
    let restored = config.restore(console).map_err(restore_error)?;
    session.interrupt.pauses(restored.vm.handle());
    Ok(restored)
}

/// Reports the waits of a restore, and the progress of an eager one.
struct Reporter {
    quiet: bool,
    interrupt: Interrupt,
    loading: Mutex<Option<Bar>>,
}

impl Reporter {
    fn loading(&self) -> MutexGuard<'_, Option<Bar>> {
        self.loading.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for Reporter {
    fn step(&self, step: Step<'_>) -> Box<dyn Any> {
        let (what, limit) = match step {
            Step::ReadState { file } | Step::OpenImage { image: file } => {
                (format!("{} to be read", file.display()), None)
            }
            Step::AskServer { socket, timeout } => {
                (format!("the page server at {} to answer", socket.display()), Some(timeout))
            }
            // Creating it waits for nothing.
            Step::MakeSocket { .. } => return Box::new(leftovers::creating()),
            Step::BuildMachine { file } => {
                // Memory is loaded.
                *self.loading() = None;
                let what = format!("KVM, and the pages of {} that it needs", file.display());
                (what, None)
            }
            _ => return Box::new(()),
        };
        let wait = Wait::new(move || what.clone());
        Box::new(match limit {
            Some(limit) => wait.at_most(limit).begin(),
            None => wait.begin(),
        })
    }

    fn loaded(&self, progress: Progress) -> ControlFlow<()> {
        let mut loading = self.loading();
        let bar = loading.get_or_insert_with(|| Bar::new("loading", self.quiet, &self.interrupt));
        bar.update(progress)
    }

    fn made_socket(&self, path: &Path) {
        leftovers::name(path);
    }
}

/// With the options that help.
fn restore_error(error: RestoreError) -> Error {
    match error {
        RestoreError::Open(error) => error.into(),
        RestoreError::Cpu { .. } => {
            anyhow!("{error}; --force-cpu restores it anyway, but it may crash")
        }
        RestoreError::Device { file, error } => {
            device_error(error).context(file.display().to_string())
        }
        RestoreError::Pager(error) => Error::new(error)
            .context("cannot restore lazily (without --lazy, userfaultfd is not needed)"),
        RestoreError::Failed(failure) => GuestStopped(failure.to_string()).into(),
        error => error.into(),
    }
}

fn device_error(error: DeviceError) -> Error {
    match error {
        DeviceError::DiskCount { given, found } => {
            anyhow!("--disk is given {given} times, and the guest has {found} disks")
        }
        DeviceError::NetCount { given, found } => {
            anyhow!("--net is given {given} times, and the guest has {found} network interfaces")
        }
        DeviceError::NoVsock => anyhow!("--vsock is given, and the guest has no vsock"),
        DeviceError::Disk(DiskError::NotAllowed { path }) => {
            let (path, folder) = (path.display(), folder_of(&path));
            anyhow!(
                "the snapshot names the disk {path}, which is not in the snapshot's folder: if the guest is to have it, \
                 give --disk {path}, or --allow-path {folder}"
            )
        }
        DeviceError::SocketNotAllowed { path } => {
            let (path, folder) = (path.display(), folder_of(&path));
            anyhow!(
                "the snapshot names the socket {path} for its vsock, which is not in the snapshot's folder: give \
                 --vsock CID,SOCKET, or --allow-path {folder}"
            )
        }
        DeviceError::TapNotAllowed { tap } => anyhow!(
            "the snapshot names the tap {tap}: if the guest is to be connected to it, give --net tap={tap}, or \
             --allow-path /dev/net for all of its taps"
        ),
        DeviceError::Disk(error) => Error::new(error).context(
            "the guest's disk (--disk gives its new path, --force-disks accepts its content)",
        ),
        DeviceError::Net { given: true, error } => Error::new(error).context("--net"),
        DeviceError::Net { given: false, error } => {
            Error::new(error).context("the guest's network interface (--net gives it another tap)")
        }
        DeviceError::Vsock { given: true, error } => Error::new(error).context("--vsock"),
        DeviceError::Vsock { given: false, error } => {
            Error::new(error).context("the guest's vsock (--vsock gives it another socket)")
        }
        error => error.into(),
    }
}

fn folder_of(path: &Path) -> std::path::Display<'_> {
    path.parent().unwrap_or(Path::new("/")).display()
}

/// Why a guest cannot be snapshotted, for the message and the exit code.
pub(crate) fn snapshot_error(error: SnapshotError) -> Error {
    match error {
        SnapshotError::Failed(failure) => GuestStopped(failure.to_string()).into(),
        // The exit code depends on these.
        SnapshotError::Write(error) => error.into(),
        SnapshotError::Read(error) => error.into(),
        SnapshotError::NoRoom { .. } => Error::new(error).context("--threads 1 needs less"),
        error => error.into(),
    }
}

/// The failure of the pager, if there is one, instead of any other error.
pub(crate) fn check_memory(memory: &snapvm::VmMemory) -> Result<()> {
    match memory.failure() {
        Some(failure) => Err(GuestStopped(failure.to_string()).into()),
        None => Ok(()),
    }
}

/// The guest's image must be unchanged since its start.
pub(crate) fn check_image(memory: &snapvm::VmMemory) -> Result<()> {
    memory.check_image().context("the guest may have run from two images")
}
