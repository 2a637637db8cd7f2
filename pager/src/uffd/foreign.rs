//! A userfaultfd that was not opened here: of this process, or of another one that has created it for its own memory.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::descriptor::Uffd;
use super::features::Features;

/// A userfaultfd of another process. Its ioctls fill the memory of that process, never that of this one.
#[derive(Debug)]
pub struct ForeignUffd(Uffd);

/// Why a descriptor cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForeignUffdError {
    /// The descriptor is not a userfaultfd.
    #[error("the descriptor is not a userfaultfd but {found:?}")]
    NoUserfaultfd {
        /// Its kind, from `/proc/self/fd`.
        found: String,
    },
    /// Its `/proc/self/fdinfo` could not be parsed.
    #[error("cannot read the userfaultfd's features in {info:?}")]
    Features {
        /// The content of that file.
        info: String,
    },
    /// A system call failed.
    #[error("cannot {what} the descriptor")]
    System {
        /// The operation.
        what: &'static str,
        /// The error of the operation.
        #[source]
        error: io::Error,
    },
}

impl ForeignUffd {
    /// Takes a received descriptor: see [`Uffd::from_fd`]. The other process can make it blocking again; reads do not rely
    /// on that.
    ///
    /// # Errors
    /// [`ForeignUffdError`].
    ///
    /// # Safety
    /// Another process has created the userfaultfd, so that it serves no memory of this process. This holds for a
    /// descriptor from a socket if this process never sends a userfaultfd that it has created itself.
    pub unsafe fn new(fd: OwnedFd) -> Result<ForeignUffd, ForeignUffdError> {
        Uffd::adopt(fd, true).map(ForeignUffd)
    }

    /// The features that the other process has enabled.
    pub fn features(&self) -> Features {
        self.0.features()
    }

    #[cfg(feature = "serve")]
    pub(crate) fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }

    pub(crate) fn into_uffd(self) -> Uffd {
        self.0
    }
}

impl Uffd {
    /// Takes a userfaultfd of this process after its handshake: checks that it is one, makes it non-blocking, and reads the
    /// features that it has. This needs `/proc`.
    ///
    /// # Errors
    /// [`ForeignUffdError`].
    pub fn from_fd(fd: OwnedFd) -> Result<Uffd, ForeignUffdError> {
        Uffd::adopt(fd, false)
    }

    /// `shared`: another process has the same open file.
    fn adopt(fd: OwnedFd, shared: bool) -> Result<Uffd, ForeignUffdError> {
        let system = |what| move |error| ForeignUffdError::System { what, error };
        let number = fd.as_fd().as_raw_fd();
        let target =
            fs::read_link(format!("/proc/self/fd/{number}")).map_err(system("see the kind of"))?;
        if target.as_os_str() != "anon_inode:[userfaultfd]" {
            return Err(ForeignUffdError::NoUserfaultfd { found: target.display().to_string() });
        }
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}"))
            .map_err(system("read the state of"))?;
        let Some(features) = features_in(&info) else {
            return Err(ForeignUffdError::Features { info });
        };
        // SAFETY: F_GETFL takes nothing more.
        let flags = unsafe { libc::fcntl(number, libc::F_GETFL) };
        // SAFETY: F_SETFL takes flags.
        if flags < 0 || unsafe { libc::fcntl(number, libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0
        {
            return Err(system("set the flags of")(io::Error::last_os_error()));
        }
        Ok(Uffd { file: fd.into(), features, shared })
    }
}

/// The features in `API: aa:features:ioctls`.
fn features_in(info: &str) -> Option<Features> {
    let api = info.lines().find_map(|line| line.strip_prefix("API:"))?;
    let mut fields = api.trim().split(':');
    (fields.next()? == "aa").then_some(())?;
    u64::from_str_radix(fields.next()?, 16).ok().map(Features)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_read_from_fdinfo() {
        let info = "pos:\t0\nflags:\t02004000\npending:\t0\nAPI:\taa:80000008:80000000000001ff\n";
        let features = features_in(info).expect("they are there");
        assert!(features.contains(Features::EVENT_REMOVE));
        assert!(!features.contains(Features::EVENT_UNMAP));
        assert_eq!(features_in("pos:\t0\n"), None);
        assert_eq!(features_in("API:\tab:8:0\n"), None);
    }

    #[test]
    fn other_descriptors_are_refused() {
        let file = fs::File::open("/dev/null").expect("there is one");
        // SAFETY: the file serves no memory at all.
        match unsafe { ForeignUffd::new(file.into()) } {
            Err(ForeignUffdError::NoUserfaultfd { found }) => assert_eq!(found, "/dev/null"),
            other => panic!("{other:?}"),
        }
    }
}
