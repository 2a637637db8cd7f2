//! A tap: a network interface of the host. A process reads and writes its frames by a descriptor, one frame for
//! each call (Linux, Documentation/networking/tuntap.rst).
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

/// Longest name of an interface, without the zero behind it (IFNAMSIZ).
pub(crate) const NAME_MAX_BYTES: usize = libc::IFNAMSIZ - 1;

/// An open tap.
#[derive(Debug)]
pub struct Tap {
    pub(super) file: File,
    name: String,
}

/// A tap that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TapError {
    /// No interface has such a name.
    #[error(
        "{name:?} cannot be an interface's name: expected 1 to {NAME_MAX_BYTES} of A-Z a-z 0-9 . _ -"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// The tap does not exist. Opening it would create a tap without a configuration.
    #[error(
        "there is no interface {name}: create it first, for example with `ip tuntap add {name} mode tap`"
    )]
    Missing {
        /// The name.
        name: String,
    },
    /// A system call failed.
    #[error("cannot {what} the tap {name}")]
    Io {
        /// The operation.
        what: &'static str,
        /// The name.
        name: String,
        /// The error of the system.
        #[source]
        source: io::Error,
    },
}

impl Tap {
    /// Opens the tap that has this name. It must exist.
    ///
    /// # Errors
    /// [`TapError`], also where it is in use (EBUSY), no tap (EINVAL), or another user's (EPERM).
    pub fn open(name: &str) -> Result<Tap, TapError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if name.is_empty() || name.len() > NAME_MAX_BYTES || !name.bytes().all(plain) {
            return Err(TapError::Name { name: name.into() });
        }
        let failed = |what| move |source| TapError::Io { what, name: name.into(), source };
        if !interface_exists(name) {
            return Err(TapError::Missing { name: name.into() });
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(failed("open /dev/net/tun for"))?;

        // SAFETY: integers, an array of them and pointers: all may be zero.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        // No IFF_VNET_HDR: there are no offloads, so virtio's header has no content, and what a driver writes
        // into it does not reach the host's kernel.
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } != 0 {
            return Err(failed("attach to")(io::Error::last_os_error()));
        }
        // A persistent tap may have offloads that another program has set. Switched off, all frames are whole and have
        // their checksums. SAFETY: TUNSETOFFLOAD takes a number.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, 0) } != 0 {
            return Err(failed("switch off offloads of")(io::Error::last_os_error()));
        }
        Ok(Tap { file, name: name.into() })
    }

    /// A replacement for a tap, with a frame for each read or write, and its other end.
    #[cfg(any(test, fuzzing))]
    #[allow(clippy::unwrap_used, reason = "for tests and fuzzing only")]
    pub(in crate::virtio) fn stand_in() -> (Tap, std::os::unix::net::UnixDatagram) {
        let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let file = File::from(std::os::fd::OwnedFd::from(ours));
        (Tap { file, name: "tap0".into() }, theirs)
    }

    /// The interface's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

fn interface_exists(name: &str) -> bool {
    let Ok(name) = std::ffi::CString::new(name) else { return false };
    // SAFETY: a string that ends with a zero and lives during the call.
    unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
}
