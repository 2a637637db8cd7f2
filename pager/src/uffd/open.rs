//! Opening a userfaultfd and agreeing on its features.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use linux_raw_sys::general as kernel;

use super::{Errno, Uffd, abi, ioctl};

const DEVICE: &str = "/dev/userfaultfd";

/// A set of `UFFD_FEATURE_*` bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub(super) u64);

impl Features {
    /// No feature.
    pub const NONE: Features = Features(0);
    /// [`super::Message::Remove`] is sent.
    pub const EVENT_REMOVE: Features = Features(kernel::UFFD_FEATURE_EVENT_REMOVE as u64);
    /// [`super::Message::Unmap`] is sent.
    pub const EVENT_UNMAP: Features = Features(kernel::UFFD_FEATURE_EVENT_UNMAP as u64);
    /// [`super::Message::Fork`] is sent.
    pub const EVENT_FORK: Features = Features(kernel::UFFD_FEATURE_EVENT_FORK as u64);
    /// [`super::Message::Remap`] is sent.
    pub const EVENT_REMAP: Features = Features(kernel::UFFD_FEATURE_EVENT_REMAP as u64);
    /// Page faults name the faulting thread.
    pub const THREAD_ID: Features = Features(kernel::UFFD_FEATURE_THREAD_ID as u64);
    /// Page faults carry the exact address and not that of the page.
    pub const EXACT_ADDRESS: Features = Features(kernel::UFFD_FEATURE_EXACT_ADDRESS as u64);
    /// [`Uffd::poison`] works (Linux 6.6).
    pub const POISON: Features = Features(kernel::UFFD_FEATURE_POISON as u64);
    /// hugetlbfs memory may be registered.
    pub const MISSING_HUGETLBFS: Features = Features(kernel::UFFD_FEATURE_MISSING_HUGETLBFS as u64);
    /// Shared memory (memfd) may be registered.
    pub const MISSING_SHMEM: Features = Features(kernel::UFFD_FEATURE_MISSING_SHMEM as u64);

    /// Whether all of `other` is in this set.
    pub const fn contains(self, other: Features) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both sets.
    #[must_use]
    pub const fn with(self, other: Features) -> Features {
        Features(self.0 | other.0)
    }

    /// What is in both sets.
    #[must_use]
    pub const fn common(self, other: Features) -> Features {
        Features(self.0 & other.0)
    }

    /// What is in this set and not in `other`.
    #[must_use]
    pub const fn without(self, other: Features) -> Features {
        Features(self.0 & !other.0)
    }

    /// The kernel's bits.
    pub const fn bits(self) -> u64 {
        self.0
    }
}

/// Why no userfaultfd could be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Neither way of getting a userfaultfd is open to this process.
    #[error(
        "no userfaultfd: {DEVICE}: {device}; userfaultfd(2): {syscall}. Any one of these helps: read \
         and write permission on {DEVICE} (chown, chmod or setfacl), the capability CAP_SYS_PTRACE, or \
         `sysctl vm.unprivileged_userfaultfd=1`. In a container, pass the device in and let its seccomp \
         profile allow userfaultfd(2)"
    )]
    Unavailable {
        /// What opening the device said.
        device: io::Error,
        /// What the system call said.
        syscall: Errno,
    },
    /// This process, or the host, may not have more open files.
    #[error("no userfaultfd: {error}. Raise the limit: {}", limit_of_files(error))]
    Files {
        /// Which of the two.
        error: io::Error,
    },
    /// The kernel is too old for what is needed.
    #[error(
        "this kernel's userfaultfd lacks features {missing:#x} (it has {available:#x}); see UFFD_FEATURE_* in ioctl_userfaultfd(2)"
    )]
    Unsupported {
        /// Bits asked for and not there.
        missing: u64,
        /// All bits of this kernel.
        available: u64,
    },
    /// The handshake failed for another reason.
    #[error("UFFDIO_API: {errno}")]
    Handshake {
        /// The kernel's answer.
        errno: Errno,
    },
}

/// What to raise where no more files can be open.
fn limit_of_files(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENFILE) => "`sysctl fs.file-max`, that of the host",
        _ => "`ulimit -n`, in systemd LimitNOFILE=, that of this process",
    }
}

impl Uffd {
    /// Opens a userfaultfd, by `/dev/userfaultfd` (its file permissions decide) or else by
    /// `userfaultfd(2)`, and asks for all of `required` and what there is of `optional`.
    ///
    /// It serves faults of the kernel too (`UFFD_USER_MODE_ONLY` is not set): those of KVM are such.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(required: Features, optional: Features) -> Result<Uffd, OpenError> {
        let file = open_file()?;
        // A handshake can be done once per descriptor, and asking for too much spends it: so ask for
        // all on the first, and only when that is refused look what there is, on a second.
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

/// A userfaultfd on which nothing was asked yet.
fn open_file() -> Result<File, OpenError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let device = match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(device) => {
            // SAFETY: USERFAULTFD_IOC_NEW takes the flags as a plain number.
            let fd = unsafe {
                libc::ioctl(device.as_fd().as_raw_fd(), abi::USERFAULTFD_IOC_NEW as _, flags)
            };
            if fd >= 0 {
                // SAFETY: the kernel just made this descriptor, so nobody else owns it.
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
        // Permissions are not the cause, whatever the other way says.
        if let Some(errno) = [device.raw_os_error(), Some(syscall.0)]
            .into_iter()
            .flatten()
            .find(|errno| matches!(*errno, libc::EMFILE | libc::ENFILE))
        {
            return Err(OpenError::Files { error: io::Error::from_raw_os_error(errno) });
        }
        return Err(OpenError::Unavailable { device, syscall });
    }
    // SAFETY: the kernel just made this descriptor, so nobody else owns it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
}

/// `UFFDIO_API`: enables `features` and answers all that the kernel has.
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
    fn sets_behave_as_sets() {
        let both = Features::POISON.with(Features::THREAD_ID);
        assert!(both.contains(Features::POISON) && both.contains(Features::NONE));
        assert!(!Features::POISON.contains(both));
        assert_eq!(both.without(Features::POISON), Features::THREAD_ID);
        assert_eq!(both.common(Features::POISON), Features::POISON);
    }

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
    fn a_limit_of_files_is_not_told_as_a_permission() {
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
