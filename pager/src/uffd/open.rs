//! Opening a userfaultfd and agreeing on its features.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;

use super::abi;
use super::descriptor::Uffd;
use super::errno::{Errno, ioctl};
use super::features::Features;

const DEVICE: &str = "/dev/userfaultfd";

/// Why no userfaultfd could be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// This process may use neither way of opening a userfaultfd.
    #[error(
        "no userfaultfd: {DEVICE}: {device}; userfaultfd(2): {syscall}. Any one of these helps: read \
         and write permission on {DEVICE} (chown, chmod or setfacl), the capability CAP_SYS_PTRACE, or \
         `sysctl vm.unprivileged_userfaultfd=1`. In a container, pass the device in and let its seccomp \
         profile allow userfaultfd(2)"
    )]
    Unavailable {
        /// The error of opening the device.
        device: io::Error,
        /// The error of the system call.
        syscall: Errno,
    },
    /// This process, or the host, has reached its limit of open files.
    #[error("no userfaultfd: {error}. Raise the limit: {}", limit_of_files(error))]
    Files {
        /// `EMFILE`: the process. `ENFILE`: the host.
        error: io::Error,
    },
    /// The kernel lacks required features.
    #[error(
        "this kernel's userfaultfd lacks features {missing:#x} (it has {available:#x}); see UFFD_FEATURE_* in ioctl_userfaultfd(2)"
    )]
    Unsupported {
        /// Required bits that the kernel lacks.
        missing: u64,
        /// All bits of this kernel.
        available: u64,
    },
    /// The handshake failed for another reason.
    #[error("UFFDIO_API: {errno}")]
    Handshake {
        /// The error of the kernel.
        errno: Errno,
    },
}

/// The limit to raise when no more files can be opened.
fn limit_of_files(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENFILE) => "`sysctl fs.file-max`, that of the host",
        _ => "`ulimit -n`, in systemd LimitNOFILE=, that of this process",
    }
}

impl Uffd {
    /// Opens a userfaultfd by `/dev/userfaultfd` (its file permissions decide) or, if that fails, by userfaultfd(2). It
    /// gets all features of `required`, and those of `optional` that the kernel has.
    ///
    /// It also serves faults of the kernel, such as those of KVM (`UFFD_USER_MODE_ONLY` is not set).
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(required: Features, optional: Features) -> Result<Uffd, OpenError> {
        let file = open_file()?;
        // Each descriptor allows one handshake, even if that fails. So the first descriptor requests all features. If
        // they are refused, a second one finds out which exist.
        let wanted = required.with(optional);
        match handshake(&file, wanted) {
            Ok(_) => {
                return Ok(Uffd { file, features: wanted, shared: false });
            }
            Err(Errno(libc::EINVAL)) => {}
            Err(errno) => return Err(OpenError::Handshake { errno }),
        }
        let available = handshake(&open_file()?, Features::NONE)
            .map_err(|errno| OpenError::Handshake { errno })?;
        if !available.contains(required) {
            return Err(OpenError::Unsupported {
                missing: required.without(available).bits(),
                available: available.bits(),
            });
        }
        let features = wanted.common(available);
        let file = open_file()?;
        handshake(&file, features).map_err(|errno| OpenError::Handshake { errno })?;
        Ok(Uffd { file, features, shared: false })
    }
}

impl Uffd {
    /// Checks that an open userfaultfd has these features.
    pub(crate) fn with_required(self, required: Features) -> Result<Uffd, OpenError> {
        match self.features.contains(required) {
            true => Ok(self),
            false => Err(OpenError::Unsupported {
                missing: required.without(self.features).bits(),
                available: self.features.bits(),
            }),
        }
    }
}

/// The device, if it is kept open.
static KEPT_DEVICE: OnceLock<File> = OnceLock::new();

/// Opens `/dev/userfaultfd` and keeps it open, so that [`Uffd::open`] opens no file from now on. A program does that
/// before it gives up the right to open files for writing. Without the device this has no effect, and userfaultfd(2) is
/// used.
pub fn keep_device_open() {
    if let Ok(device) = open_device() {
        // A second descriptor is closed.
        let _ = KEPT_DEVICE.set(device);
    }
}

fn open_device() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(DEVICE)
}

/// A userfaultfd before its handshake.
fn open_file() -> Result<File, OpenError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let opened = match KEPT_DEVICE.get() {
        Some(device) => device.try_clone(),
        None => open_device(),
    };
    let device = match opened {
        Ok(device) => {
            // SAFETY: USERFAULTFD_IOC_NEW takes the flags as a plain number.
            let fd = unsafe {
                libc::ioctl(device.as_fd().as_raw_fd(), abi::USERFAULTFD_IOC_NEW as _, flags)
            };
            if fd >= 0 {
                // SAFETY: the kernel has just created this descriptor, so that it has no other owner.
                return Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }));
            }
            io::Error::last_os_error()
        }
        Err(error) => error,
    };
    // SAFETY: userfaultfd(2) takes only flags.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if fd < 0 {
        let syscall = Errno::last();
        // With one of these errors, permissions are not the cause.
        if let Some(errno) = [device.raw_os_error(), Some(syscall.0)]
            .into_iter()
            .flatten()
            .find(|errno| matches!(*errno, libc::EMFILE | libc::ENFILE))
        {
            return Err(OpenError::Files { error: io::Error::from_raw_os_error(errno) });
        }
        return Err(OpenError::Unavailable { device, syscall });
    }
    // SAFETY: the kernel has just created this descriptor, so that it has no other owner.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
}

/// `UFFDIO_API`: enables `features`. Returns all features of the kernel.
fn handshake(file: &File, features: Features) -> Result<Features, Errno> {
    let mut argument =
        abi::uffdio_api { api: u64::from(abi::UFFD_API), features: features.bits(), ioctls: 0 };
    // SAFETY: UFFDIO_API takes a `uffdio_api` and touches no other memory.
    unsafe { ioctl(file.as_fd(), abi::UFFDIO_API, &mut argument) }?;
    Ok(Features(argument.features))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_says_what_to_do() {
        let error = OpenError::Unavailable {
            device: io::Error::from_raw_os_error(libc::EACCES),
            syscall: Errno(libc::EPERM),
        };
        let text = error.to_string();
        for part in ["/dev/userfaultfd", "CAP_SYS_PTRACE", "vm.unprivileged_userfaultfd", "denied"]
        {
            assert!(text.contains(part), "{part} is missing in: {text}");
        }
    }

    #[test]
    fn a_limit_of_files_is_not_reported_as_a_permission() {
        for (errno, advice) in [(libc::EMFILE, "ulimit -n"), (libc::ENFILE, "fs.file-max")] {
            let text = OpenError::Files { error: io::Error::from_raw_os_error(errno) }.to_string();
            assert!(text.contains(advice) && !text.contains("permission"), "{text}");
        }
    }

    #[test]
    fn an_unknown_required_feature_is_named() {
        let unknown = Features(1 << 63);
        match Uffd::open(unknown, Features::NONE) {
            Err(OpenError::Unsupported { missing, .. }) => assert_eq!(missing, 1 << 63),
            Err(OpenError::Unavailable { .. }) => {} // No userfaultfd at all: nothing to ask.
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_unknown_optional_feature_is_left_out() {
        let unknown = Features(1 << 63);
        match Uffd::open(Features::EVENT_REMOVE, unknown.with(Features::THREAD_ID)) {
            Ok(uffd) => {
                assert_eq!(uffd.features(), Features::EVENT_REMOVE.with(Features::THREAD_ID));
            }
            Err(OpenError::Unavailable { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}
