//! Exit codes, and error messages.

use std::process::ExitCode;

use anyhow::Error;
use hashtree::{ChainRootsError, HashError, RootsError};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use snapfmt::{KeyError, ReadError, WriteError};
use snapvm::OutputError;
use snapvm::interchange::ImportError;

use crate::{foreign_text, leftovers, private_keys, size, stderr};

/// The exit codes, for `snap --help`.
pub(crate) const HELP: &str = "\
Exit codes:
  0    done; also when a guest that is run or restored powers off
  1    failed; the message names what failed and where
  2    the command line is wrong
  3    the file is not a snapshot, or not what import takes; it is damaged, needs a newer
       snap, lacks its parent, needs another key, or was written to while it was read
  4    this host lacks something: KVM, userfaultfd, FUSE, or the permission to use them
  5    the guest stopped by itself: triple fault, reset, unreadable memory, or
       power off before it was snapshotted
  130  interrupted: Ctrl-C, SIGTERM, SIGHUP (a closed terminal), or no CPU time left
  134  out of memory during an operation; the message has the requested size
  159  a thread made a system call that the jail does not allow to it; the message names both";

/// Interrupted by Ctrl-C, SIGTERM or SIGHUP; no files are left.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub(crate) struct Interrupted;

/// The guest stopped by itself.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct GuestStopped(pub(crate) String);

/// This host lacks what `snap` needs.
#[derive(Debug, thiserror::Error)]
#[error("this host lacks {0}")]
pub(crate) struct HostLacks(pub(crate) String);

/// Another `snap` that this one has started has failed: its message, and its exit code.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct ChildFailed {
    pub(crate) message: String,
    pub(crate) code: Option<u8>,
}

/// The command line is wrong, or the file of options that it names; with all causes.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct WrongOptions(pub(crate) String);

/// Prints an error with all its causes and returns the exit code for it.
pub(crate) fn report(error: &Error) -> ExitCode {
    let code = code(error);
    let text = match code {
        INTERRUPTED => "snap: interrupted\n".into(),
        _ => format!("snap: {}\n", describe(error)),
    };
    stderr::print(&text);
    ExitCode::from(code)
}

/// Prints an error and ends the process, from any thread.
pub(crate) fn end(error: &Error) -> ! {
    leftovers::remove();
    stderr::print(&format!("snap: {}\n", describe(error)));
    std::process::exit(code(error).into())
}

/// The advice for a reached limit of this process, which is missing in the system's message.
fn about_files(error: &Error) -> &'static str {
    const TOO_MANY_FILES: i32 = rustix::io::Errno::MFILE.raw_os_error();
    let reached = error.chain().any(|cause| {
        let io = cause.downcast_ref().and_then(std::io::Error::raw_os_error);
        let ours = cause.downcast_ref().map(|errno: &rustix::io::Errno| errno.raw_os_error());
        let pagers = cause.downcast_ref().map(|errno: &pager::uffd::Errno| errno.0);
        [io, ours, pagers].contains(&Some(TOO_MANY_FILES))
    });
    // Some errors have the advice themselves.
    match reached && !format!("{error:#}").contains("ulimit -n") {
        true => "; raise the limit: `ulimit -n`, in systemd LimitNOFILE=",
        false => "",
    }
}

const GIVE_KEY: &str = match cfg!(feature = "age") {
    true => "; give --key-file FILE, --identity FILE or --key-command CMD",
    false => "; give --key-file FILE or --key-command CMD",
};

/// The option that opens a sealed file, or does not fit one that is not.
fn about_keys(error: &Error) -> Option<&'static str> {
    let read = |cause: &(dyn std::error::Error + 'static)| match cause.downcast_ref::<ReadError>() {
        Some(ReadError::KeyNeeded) => Some(GIVE_KEY),
        Some(ReadError::NotSealed) => {
            Some("; without the key it is read, and snap flatten --from-plain seals a copy")
        }
        _ => None,
    };
    let write = |cause: &(dyn std::error::Error + 'static)| match cause.downcast_ref() {
        Some(WriteError::ParentSeal { parent_is_sealed: true }) => Some(GIVE_KEY),
        Some(WriteError::ParentSeal { parent_is_sealed: false }) => {
            Some("; snap flatten --from-plain seals a copy of it")
        }
        _ => None,
    };
    error.chain().find_map(|cause| read(cause).or_else(|| write(cause)))
}

/// An error with all its causes, and the advice if a limit is one of them.
pub(crate) fn describe(error: &Error) -> String {
    let errno = |cause: &(dyn std::error::Error + 'static)| {
        let error = cause.downcast_ref::<std::io::Error>()?.raw_os_error()?;
        Some(Errno::from_raw_os_error(error))
    };
    let advice = match error.chain().find_map(errno) {
        Some(Errno::FBIG) => match getrlimit(Resource::Fsize).current {
            Some(limit) => format!(
                "; no file may be longer than {} here: raise the limit (RLIMIT_FSIZE: `ulimit -f`, \
                 LimitFSIZE= of systemd)",
                size::human(limit)
            ),
            None => "; the file system takes no file of this length".into(),
        },
        Some(Errno::NOMEM) => "; the host has no more memory, or a limit is reached: RLIMIT_AS, \
                               RLIMIT_DATA (`ulimit -v`, `ulimit -d`)"
            .into(),
        Some(Errno::AGAIN) => "; a limit of processes, threads or memory may be reached: \
                               RLIMIT_NPROC, RLIMIT_AS (`ulimit -u`, `ulimit -v`), a cgroup's \
                               pids.max"
            .into(),
        _ if error
            .chain()
            .any(|cause| matches!(cause.downcast_ref(), Some(OutputError::Exists { .. }))) =>
        {
            "; give --force to replace it".into()
        }
        _ => about_keys(error).unwrap_or_else(|| about_files(error)).into(),
    };
    let text = format!("{error:#}");
    format!("{}{advice}", foreign_text::one_line(&private_keys::hidden(&text)))
}

pub(crate) const FAILED: u8 = 1;
const WRONG_OPTIONS: u8 = 2;
const BAD_FILE: u8 = 3;
const HOST: u8 = 4;
const GUEST: u8 = 5;
pub(crate) const INTERRUPTED: u8 = 130;

fn code(error: &Error) -> u8 {
    use vmm::{BootError, FeaturesError, ProbeError, RestoreError};
    let mut code = FAILED;
    for cause in error.chain() {
        if cause.is::<Interrupted>() {
            return INTERRUPTED;
        }
        if let Some(ChildFailed { code: Some(code), .. }) = cause.downcast_ref() {
            return *code;
        }
        if cause.is::<WrongOptions>() {
            return WRONG_OPTIONS;
        }
        // The error that the guest got has precedence over its cause.
        if cause.is::<GuestStopped>() {
            return GUEST;
        }
        let host = cause.is::<ProbeError>()
            || cause.is::<HostLacks>()
            || cause.is::<jail::JailError>()
            || cause.is::<jail::SetupError>()
            || matches!(cause.downcast_ref(), Some(BootError::Host(_)))
            || matches!(cause.downcast_ref(), Some(RestoreError::Host(_)))
            || matches!(cause.downcast_ref(), Some(FeaturesError::Host(_)))
            || matches!(
                cause.downcast_ref(),
                Some(pager::StartError::Open(_) | pager::StartError::PoisonUnavailable)
            )
            || matches!(cause.downcast_ref(), Some(mount::MountError::NoFuse(_)))
            || matches!(cause.downcast_ref(), Some(pager::shared::ShareError::Open(_)));
        if host {
            code = HOST;
        }
        match cause.downcast_ref().map(ReadError::root) {
            Some(ReadError::Open { .. } | ReadError::Io { .. }) | None => {}
            // No key was had: that says nothing about the file.
            Some(ReadError::Key(KeyError::Provider(_) | KeyError::Random(_))) => {}
            Some(ReadError::Cancelled) => return INTERRUPTED,
            Some(_) => code = BAD_FILE,
        }
        if cause.is::<vmm::state::StateError>()
            || cause.downcast_ref().is_some_and(ImportError::is_bad_file)
            || cause.downcast_ref().and_then(HashError::of).is_some()
            || matches!(cause.downcast_ref(), Some(ChainRootsError::Tree { source, .. }) if source.is_mismatch())
            || cause.is::<RootsError>()
        {
            code = BAD_FILE;
        }
        if matches!(cause.downcast_ref(), Some(WriteError::Cancelled)) {
            return INTERRUPTED;
        }
    }
    code
}
