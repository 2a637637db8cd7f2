//! Locks on ranges of a cache file, between processes and between open files of one process. A lock ends when its file
//! is closed, also when the process is killed.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// The kind of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Others may also have a shared lock.
    Shared,
    /// Others have no lock.
    Exclusive,
}

/// Locks a range of bytes, which may be beyond the end. Returns `false` if another open file has a lock on it.
pub(crate) fn try_lock(file: &File, bytes: Range<u64>, kind: Kind) -> io::Result<bool> {
    let l_type = match kind {
        Kind::Shared => libc_type(nix::libc::F_RDLCK),
        Kind::Exclusive => libc_type(nix::libc::F_WRLCK),
    };
    match set(file, bytes, l_type) {
        Ok(()) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Ends a lock.
pub(crate) fn unlock(file: &File, bytes: Range<u64>) {
    // Unlocking a held lock does not fail.
    let _ = set(file, bytes, libc_type(nix::libc::F_UNLCK));
}

fn libc_type(l_type: i32) -> i16 {
    l_type as i16
}

fn set(file: &File, bytes: Range<u64>, l_type: i16) -> Result<(), Errno> {
    let lock = nix::libc::flock {
        l_type,
        l_whence: nix::libc::SEEK_SET as i16,
        l_start: i64::try_from(bytes.start).map_err(|_| Errno::EOVERFLOW)?,
        l_len: i64::try_from(bytes.end - bytes.start).map_err(|_| Errno::EOVERFLOW)?,
        l_pid: 0,
    };
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_exclude_each_other_until_they_are_unlocked_or_closed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let again = || File::options().read(true).write(true).open(file.path()).unwrap();
        let (one, other) = (again(), again());
        assert!(try_lock(&one, 10..20, Kind::Exclusive).unwrap());
        assert!(!try_lock(&other, 19..25, Kind::Exclusive).unwrap());
        assert!(!try_lock(&other, 0..11, Kind::Shared).unwrap());
        assert!(try_lock(&other, 20..25, Kind::Exclusive).unwrap());
        unlock(&one, 10..15);
        assert!(try_lock(&other, 10..15, Kind::Exclusive).unwrap());
        drop(one);
        assert!(try_lock(&other, 15..20, Kind::Exclusive).unwrap());
    }
}
