//! The socket of a server with a keeper. The keeper has a duplicate of it, so that no client finds it closed between two
//! servers.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::BindError;
use super::options::ServeOptions;
use super::socket::{Socket, SocketAccess};
use crate::remote::keep::{Link, Orphan};

/// The connection to a keeper, for a server that is going to listen at a path.
#[derive(Debug)]
pub struct KeeperLink {
    link: Arc<Link>,
    path: PathBuf,
    /// The socket of a dead server at this path.
    orphan: Option<(OwnedFd, Orphan)>,
}

impl KeeperLink {
    /// Connects to the keeper of these options. `None` if they have none. It waits for an answer, at most
    /// [`keep::ANSWER_TIMEOUT`](crate::keep::ANSWER_TIMEOUT).
    ///
    /// # Errors
    /// [`BindError::Keep`]; [`BindError::System`] if the working folder is unknown.
    pub fn connect(options: &ServeOptions, path: &Path) -> Result<Option<KeeperLink>, BindError> {
        let Some(keep) = &options.keep else {
            return Ok(None);
        };
        let (link, orphan) =
            Link::connect(keep, options.on_error, &options.allow, &absolute(path)?)
                .map_err(BindError::Keep)?;
        Ok(Some(KeeperLink { link: Arc::new(link), path: path.to_owned(), orphan }))
    }

    /// The socket of a dead server at this path, with the connections that wait there; or a new one.
    ///
    /// # Errors
    /// As [`Socket::bind_for`].
    pub fn bind(self, access: SocketAccess) -> Result<Socket, BindError> {
        let adopted = match self.orphan {
            Some((listener, Orphan { identity })) => {
                Socket::adopt(listener, &self.path, identity, access)?
            }
            None => None,
        };
        let mut socket = match adopted {
            Some(socket) => socket,
            None => Socket::bind_for(&self.path, access)?,
        };
        socket.keeper = Some(self.link);
        Ok(socket)
    }

    /// For a server that has its socket already.
    pub(super) fn into_link(self) -> Arc<Link> {
        self.link
    }
}

impl Socket {
    /// As [`Socket::passed`], connected to the keeper of these options, if they have one. So [`Server::at`] needs no new
    /// connection, and may be called where connect(2) is not allowed.
    ///
    /// [`Server::at`]: super::Server::at
    ///
    /// # Errors
    /// As [`Socket::passed`] and [`KeeperLink::connect`].
    pub fn passed_for(listener: UnixListener, options: &ServeOptions) -> Result<Self, BindError> {
        let mut socket = Socket::passed(listener)?;
        socket.keeper = KeeperLink::connect(options, &socket.path)?.map(KeeperLink::into_link);
        Ok(socket)
    }
}

/// The name under which the keeper knows the socket.
fn absolute(path: &Path) -> Result<PathBuf, BindError> {
    let what = "find the socket's folder";
    std::path::absolute(path).map_err(|error| BindError::System { what, error })
}
