//! The host's side of a vsock: unix sockets, with the protocol of Firecracker.
//!
//! A program that connects to SOCKET and writes `CONNECT PORT\n` is connected to the guest's PORT. It reads
//! `OK HOST_PORT\n` when the guest has accepted. A guest that connects to PORT of the host is connected to the
//! unix socket `SOCKET_PORT`.

use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::virtio::state::VsockState;

/// Connections that wait to be taken.
const BACKLOG: i32 = 128;
/// Longest greeting: `CONNECT 4294967295\n`.
const GREETING_MAX_BYTES: usize = 19;

/// The host's side of a guest's vsock. The socket's name goes when it is dropped.
#[derive(Debug)]
pub struct VsockHost {
    pub(super) listener: UnixListener,
    state: VsockState,
    /// Of the name in the file system, to take away only this one.
    identity: (u64, u64),
}

/// A vsock that a guest cannot have.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VsockError {
    /// 0 to 2 are reserved; 2^32 - 1 is "any".
    #[error("context id {cid}, expected 3 to 4294967294")]
    Cid {
        /// The context id.
        cid: u64,
    },
    /// The name is too long for a socket, or not UTF-8, which could not be stored.
    #[error("{} cannot be a socket's name: expected UTF-8, with the port at most 107 bytes", path.display())]
    Name {
        /// The name.
        path: PathBuf,
    },
    /// Something has this name.
    #[error("{} exists: another guest's socket, or left behind by one; remove it or choose another", path.display())]
    Exists {
        /// The name.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("cannot {what} the socket {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The name.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl VsockHost {
    /// Listens at `path`, with mode 0600, for a guest with this context id.
    ///
    /// # Errors
    /// [`VsockError`]
    pub fn bind(cid: u64, path: &Path) -> Result<VsockHost, VsockError> {
        if cid <= 2 || cid >= u64::from(u32::MAX) {
            return Err(VsockError::Cid { cid });
        }
        let failed =
            |what| move |source: io::Error| VsockError::Io { what, path: path.to_owned(), source };
        let name = || VsockError::Name { path: path.to_owned() };
        let absolute = std::path::absolute(path).map_err(failed("name"))?;
        absolute.to_str().ok_or_else(name)?;
        // The longest name that is ever used.
        SocketAddrUnix::new(port_path(&absolute, u32::MAX)).map_err(|_| name())?;
        let address = SocketAddrUnix::new(&absolute).map_err(|_| name())?;
        let socket = unix_socket().map_err(|error| failed("make")(error.into()))?;
        // The name's mode is that of the socket when it is bound, less the umask: there is no moment in
        // which others could connect.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)
            .map_err(|error| failed("protect")(error.into()))?;
        rustix::net::bind(&socket, &address).map_err(|error| match error {
            Errno::ADDRINUSE => VsockError::Exists { path: path.to_owned() },
            error => failed("bind")(error.into()),
        })?;
        let named = fs::symlink_metadata(&absolute).map_err(failed("examine"))?;
        let host = VsockHost {
            listener: UnixListener::from(socket),
            state: VsockState { guest_cid: cid, path: absolute },
            identity: (named.dev(), named.ino()),
        };
        rustix::net::listen(&host.listener, BACKLOG)
            .map_err(|error| failed("listen at")(error.into()))?;
        Ok(host)
    }

    /// The description of the socket in a snapshot.
    #[must_use]
    pub fn state(&self) -> &VsockState {
        &self.state
    }

    /// Connects to the unix socket for the guest's connections to this port.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let address = SocketAddrUnix::new(port_path(&self.state.path, port))?;
        let socket = unix_socket()?;
        // This does not block: without a listener, the connection is refused.
        rustix::net::connect(&socket, &address)?;
        Ok(UnixStream::from(socket))
    }
}

impl Drop for VsockHost {
    fn drop(&mut self) {
        let named = fs::symlink_metadata(&self.state.path);
        if named.is_ok_and(|named| (named.dev(), named.ino()) == self.identity) {
            let _ = fs::remove_file(&self.state.path);
        }
    }
}

fn unix_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn port_path(path: &Path, port: u32) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(format!("_{port}"));
    path.into()
}

/// The first line of a program of the host, as far as it has been read.
#[derive(Debug, Default)]
pub(super) struct Greeting(Vec<u8>);

impl Greeting {
    /// Continues to read, up to the end of the line and not further. Returns the port when the line is complete.
    ///
    /// # Errors
    /// When the line is not a greeting, or the program has closed the connection.
    pub(super) fn read(&mut self, mut stream: &UnixStream) -> io::Result<Option<u32>> {
        loop {
            let mut byte = [0];
            match stream.read(&mut byte) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) if byte == *b"\n" => {
                    let port = std::str::from_utf8(&self.0).ok();
                    let port = port.and_then(|line| line.strip_prefix("CONNECT ")?.parse().ok());
                    return port.map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into());
                }
                Ok(_) if self.0.len() == GREETING_MAX_BYTES => {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                Ok(_) => self.0.extend(byte),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }
}
