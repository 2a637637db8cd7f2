//! The listening socket of a server. By default only the same user and root may connect. The name of a dead server is
//! taken over, that of a live one is not.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, FileType, FlockOperation, Gid, Mode, OFlags, Stat, Uid};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::error::BindError;
use super::wire::RETRY;
use crate::remote::keep::Link;

const BACKLOG: i32 = 1024;
/// How long [`Socket::bind`] waits for the lock of the folder.
pub const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// The owner and the mode of a socket's name, which decide about other users. The default: mode 0600, and the owner is
/// this process.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct SocketAccess {
    /// The permission bits, at most 0o777. Connecting takes the permission to write.
    pub mode: Option<u32>,
    /// The id of the owning user. Another user than that of this process takes `CAP_CHOWN`.
    pub uid: Option<u32>,
    /// The id of the owning group.
    pub gid: Option<u32>,
}

/// A listening unix socket. Dropping it removes its name.
#[derive(Debug)]
pub struct Socket {
    pub(super) listener: UnixListener,
    pub(super) path: PathBuf,
    /// Device and inode of the name, so that only this name is removed.
    pub(super) identity: (u64, u64),
    /// Another program has created it, and keeps using it.
    pub(super) passed: bool,
    /// The keeper that has a duplicate, or will get one.
    pub(super) keeper: Option<Arc<Link>>,
}

impl Socket {
    /// Listens at `path`, with mode 0600. The name of a dead server is taken over.
    ///
    /// # Errors
    /// [`BindError`] if the name belongs to a live server, is not a socket, or cannot be used.
    pub fn bind(path: &Path) -> Result<Socket, BindError> {
        Socket::bind_for(path, SocketAccess::default())
    }

    /// As [`Socket::bind`], with this owner and mode. Connections are possible only when it has both.
    ///
    /// # Errors
    /// As [`Socket::bind`], and [`BindError::System`] if the owner or the mode cannot be set.
    pub fn bind_for(path: &Path, access: SocketAccess) -> Result<Socket, BindError> {
        Socket::bind_kind(path, SocketType::STREAM, access)
    }

    pub(crate) fn bind_kind(
        path: &Path,
        kind: SocketType,
        access: SocketAccess,
    ) -> Result<Socket, BindError> {
        let system = |what| move |error: Errno| BindError::System { what, error: error.into() };
        let address =
            SocketAddrUnix::new(path).map_err(|_| BindError::Name { path: path.to_owned() })?;
        // Two servers that find the same dead name must not take it from each other. So a server holds the lock of the
        // folder while it checks a name and takes it.
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        let folder = fs::File::open(folder)
            .map_err(|error| BindError::System { what: "open the socket's folder", error })?;
        lock(&folder, LOCK_TIMEOUT)?;

        let socket = unix_socket(kind).map_err(system("create a socket"))?;
        // The name gets the mode that the socket has at bind(2), less the umask (unix_bind_bsd in the kernel). So at no
        // moment other users can connect.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)
            .map_err(system("set the socket's mode"))?;
        match rustix::net::bind(&socket, &address) {
            Err(Errno::ADDRINUSE) => {
                remove_if_dead(path, &address, kind)?;
                rustix::net::bind(&socket, &address).map_err(system("bind the socket"))?;
            }
            bound => bound.map_err(system("bind the socket"))?,
        }
        let listening = || {
            let name = Name::open(path).map_err(system("check the socket's name"))?;
            access.apply(&name).map_err(system("set the socket's owner and mode"))?;
            rustix::net::listen(&socket, BACKLOG).map_err(system("listen"))?;
            Ok(name.identity())
        };
        let identity = listening().inspect_err(|_| {
            // The lock of the folder is held, so the name is still the one that was just made.
            let _ = fs::remove_file(path);
        })?;
        Ok(Socket {
            listener: UnixListener::from(socket),
            path: path.to_owned(),
            identity,
            passed: false,
            keeper: None,
        })
    }

    /// The listening socket of a dead server, if it still has this name.
    pub(super) fn adopt(
        listener: OwnedFd,
        path: &Path,
        identity: (u64, u64),
        access: SocketAccess,
    ) -> Result<Option<Socket>, BindError> {
        let system = |what| move |error: Errno| BindError::System { what, error: error.into() };
        let name = match Name::open(path) {
            Ok(name) if name.identity() == identity => name,
            Ok(_) | Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(system("check the socket's name")(error)),
        };
        access.apply(&name).map_err(system("set the socket's owner and mode"))?;
        let listener = UnixListener::from(listener);
        Ok(Some(Socket { listener, path: path.to_owned(), identity, passed: false, keeper: None }))
    }

    /// Takes a listening socket that another program has created, such as a service manager, which may pass it to the
    /// next server, too. So its name, owner and mode stay as they are, also when this is dropped.
    ///
    /// # Errors
    /// [`BindError::Unnamed`]; [`BindError::System`].
    pub fn passed(listener: UnixListener) -> Result<Socket, BindError> {
        let system = |what| move |error| BindError::System { what, error };
        listener.set_nonblocking(true).map_err(system("make the socket non-blocking"))?;
        let address = listener.local_addr().map_err(system("get the socket's name"))?;
        let path = address.as_pathname().ok_or(BindError::Unnamed)?.to_owned();
        let name = Name::open(&path).map_err(|_| BindError::Unnamed)?;
        let identity = name.identity();
        Ok(Socket { listener, path, identity, passed: true, keeper: None })
    }

    /// Its name.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next connection, if one is waiting. Its process may still belong to another user: see
    /// [`check_user`](super::check_user).
    ///
    /// # Errors
    /// As accept(2), except EAGAIN.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The name of a socket. A name that is replaced by another file meanwhile does not change what this is.
struct Name {
    descriptor: OwnedFd,
    found: Stat,
}

impl Name {
    fn open(path: &Path) -> Result<Name, Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let descriptor = rustix::fs::open(path, flags, Mode::empty())?;
        let found = rustix::fs::fstat(&descriptor)?;
        Ok(Name { descriptor, found })
    }

    fn identity(&self) -> (u64, u64) {
        (self.found.st_dev, self.found.st_ino)
    }
}

impl SocketAccess {
    /// Gives the name this owner and mode.
    fn apply(self, Name { descriptor, found }: &Name) -> Result<(), Errno> {
        if FileType::from_raw_mode(found.st_mode) != FileType::Socket {
            return Err(Errno::NOTSOCK);
        }
        let mode = Mode::from_raw_mode(self.mode.unwrap_or(0o600) & 0o777);
        let is = Mode::from_raw_mode(found.st_mode & 0o777);
        // A new name has at most mode 0600, less the umask.
        if mode != is && (self.mode.is_some() || !mode.contains(is)) {
            // fchmod(2) takes no descriptor of this kind, its name in /proc does.
            let name = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
            rustix::fs::chmodat(CWD, name, mode, AtFlags::empty())?;
        }
        let uid = self.uid.map_or_else(rustix::process::geteuid, Uid::from_raw);
        let uid = (uid.as_raw() != found.st_uid).then_some(uid);
        if uid.is_some() || self.gid.is_some() {
            let gid = self.gid.map(Gid::from_raw);
            rustix::fs::chownat(descriptor, "", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Socket {
    /// Removes the name, unless it names another file by now.
    pub(super) fn remove_name(&self) {
        if !self.passed
            && fs::symlink_metadata(&self.path)
                .is_ok_and(|named| (named.dev(), named.ino()) == self.identity)
        {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.remove_name();
    }
}

fn lock(folder: &fs::File, timeout: Duration) -> Result<(), BindError> {
    let deadline = Instant::now() + timeout;
    loop {
        match rustix::fs::flock(folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => thread::sleep(RETRY),
            Err(Errno::WOULDBLOCK) => return Err(BindError::Locked { after: timeout }),
            Err(Errno::INTR) => {}
            Err(error) => {
                let what = "lock the socket's folder";
                return Err(BindError::System { what, error: error.into() });
            }
        }
    }
}

fn unix_socket(kind: SocketType) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)
}

/// Removes the name if it is a socket at which no process listens.
fn remove_if_dead(
    path: &Path,
    address: &SocketAddrUnix,
    kind: SocketType,
) -> Result<(), BindError> {
    let system = |what| move |error| BindError::System { what, error };
    let found = fs::symlink_metadata(path).map_err(system("check the socket's name"))?;
    if !found.file_type().is_socket() {
        return Err(BindError::NoSocket { path: path.to_owned() });
    }
    let probe = unix_socket(kind).map_err(|error| system("create a socket")(error.into()))?;
    match rustix::net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(system("remove the old socket")),
        // EAGAIN: a process listens, and its queue is full.
        Ok(()) | Err(Errno::AGAIN) => Err(BindError::Live { path: path.to_owned() }),
        Err(error) => Err(system("connect to the old socket")(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_name_is_private_and_removed_with_the_server() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("s");
        let socket = Socket::bind(&path).expect("it binds");
        let mode = fs::symlink_metadata(&path).expect("it has a name").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(socket.accept().expect("it listens").is_none());
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn the_name_gets_the_owner_and_the_mode() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("s");
        let own = rustix::process::getuid().as_raw();
        let mut access = SocketAccess { mode: Some(0o666), ..SocketAccess::default() };
        if own == 0 {
            (access.uid, access.gid) = (Some(4321), Some(4322));
        }
        let _socket = Socket::bind_for(&path, access).expect("it binds");
        let found = fs::symlink_metadata(&path).expect("it has a name");
        // Whatever the umask.
        assert_eq!(found.permissions().mode() & 0o777, 0o666);
        if own == 0 {
            assert_eq!((found.uid(), found.gid()), (4321, 4322));
        }
        // Another file under that name is not changed.
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).expect("it can be made");
        let name = Name::open(&link).expect("a link can be opened");
        assert_eq!(access.apply(&name), Err(Errno::NOTSOCK));
    }

    #[test]
    fn a_passed_socket_keeps_its_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("s");
        let manager = UnixListener::bind(&path).expect("it binds");
        let socket =
            Socket::passed(manager.try_clone().expect("a duplicate")).expect("it has a name");
        assert_eq!(socket.path(), path);
        assert!(socket.accept().expect("it listens").is_none());
        drop(socket);
        UnixStream::connect(&path).expect("the manager still listens");
        fs::remove_file(&path).expect("it is there");
        assert!(matches!(Socket::passed(manager), Err(BindError::Unnamed)));
    }

    #[test]
    fn a_live_server_keeps_its_name_and_a_dead_one_loses_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("s");
        let first = Socket::bind(&path).expect("it binds");
        assert!(matches!(Socket::bind(&path), Err(BindError::Live { .. })));
        // The probe of the second one was a connection without a message.
        assert!(first.accept().expect("it still listens").is_some());
        drop(first);
        drop(UnixListener::bind(&path).expect("it binds")); // Leaves its name behind.
        assert!(path.exists());
        let taken = Socket::bind(&path).expect("the dead name is taken over");
        UnixStream::connect(&path).expect("the new one listens");
        // A name that belongs to another server by now stays.
        fs::remove_file(&path).expect("it is there");
        let other = Socket::bind(&path).expect("it binds");
        drop(taken);
        assert!(path.exists());
        drop(other);
    }

    #[test]
    fn the_wait_for_a_lock_is_limited() {
        let folder = tempfile::tempdir().expect("a folder");
        let held = fs::File::open(folder.path()).expect("it opens");
        rustix::fs::flock(&held, FlockOperation::LockExclusive).expect("it is free");
        let other = fs::File::open(folder.path()).expect("it opens");
        let after = Duration::from_millis(50);
        assert!(matches!(lock(&other, after), Err(BindError::Locked { .. })));
        drop(held);
        lock(&other, after).expect("it is free");
    }

    #[test]
    fn the_wait_for_a_full_queue_is_limited() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("s");
        let _listener = {
            let socket = unix_socket(SocketType::STREAM).expect("a socket");
            rustix::net::bind(&socket, &SocketAddrUnix::new(&path).expect("a name"))
                .expect("it binds");
            rustix::net::listen(&socket, 0).expect("it listens");
            socket
        };
        let after = Duration::from_millis(50);
        // A queue of length 0 takes one.
        let _first = super::super::connect(&path, after).expect("there is room");
        let error = super::super::connect(&path, after).expect_err("there is no room");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
    }

    #[test]
    fn a_file_is_never_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("precious");
        fs::write(&path, "data").expect("it can be written");
        assert!(matches!(Socket::bind(&path), Err(BindError::NoSocket { .. })));
        assert_eq!(fs::read(&path).expect("it is there"), b"data");
        let long = folder.path().join("x".repeat(200));
        assert!(matches!(Socket::bind(&long), Err(BindError::Name { .. })));
    }
}
