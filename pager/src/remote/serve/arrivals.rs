//! Where the connections of a server come from: its listening socket, or a keeper that accepts them.
//!
//! A keeper holds each connection from accept(2) on, so that it outlives the server at every moment.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::Shutdown;

use super::error::BindError;
use super::session::Held;
use super::socket::Socket;
use super::wire::timespec;
use crate::remote::keep::{Door, KeepError, Link};

/// After this time the server accepts a connection itself. The keeper may be stopped, or may have no descriptors.
const KEEPER_ACCEPTS: Duration = Duration::from_millis(100);
/// How long a server that ends waits for the last connections from its keeper.
const LAST_CONNECTIONS: Duration = Duration::from_millis(50);

/// The sources of connections.
#[derive(Debug)]
pub(super) struct Arrivals {
    socket: Socket,
    /// The connections that the keeper has accepted. `None`: there is no keeper any more.
    keeper: Option<(Arc<Link>, Door)>,
    /// Since when a connection waits that the keeper should have accepted.
    waiting_since: Option<Instant>,
}

/// A connection, and what the keeper holds of it.
pub(super) type Arrival = (UnixStream, Option<Held>);

impl Arrivals {
    pub(super) fn new(socket: Socket, keeper: Option<&Arc<Link>>) -> Result<Arrivals, BindError> {
        let keeper = keeper.map(|link| {
            let door = link
                .listen(socket.as_fd(), socket.identity, socket.passed)
                .map_err(BindError::Keep)?;
            Ok((Arc::clone(link), door))
        });
        Ok(Arrivals { socket, keeper: keeper.transpose()?, waiting_since: None })
    }

    /// Waits until there may be a connection. Returns whether `stop` is readable or hung up.
    ///
    /// # Errors
    /// As poll(2).
    pub(super) fn wait(&mut self, stop: BorrowedFd<'_>) -> io::Result<bool> {
        let mut fds = vec![PollFd::from_borrowed_fd(stop, PollFlags::IN)];
        fds.extend(self.keeper.iter().map(|(_, door)| PollFd::new(door, PollFlags::IN)));
        if self.waiting_since.is_none() {
            fds.push(PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN));
        }
        let left = self.waiting_since.map(|since| {
            timespec((since + KEEPER_ACCEPTS).saturating_duration_since(Instant::now()))
        });
        match rustix::event::poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(!fds[0].revents().is_empty()),
            Err(error) => Err(error.into()),
        }
    }

    /// The next connection, if there is one.
    ///
    /// # Errors
    /// As accept(2).
    pub(super) fn take(&mut self) -> io::Result<Option<Arrival>> {
        let Some((link, door)) = &self.keeper else {
            return Ok(self.socket.accept()?.map(|stream| (stream, None)));
        };
        // A connection for which there is no descriptor would be lost.
        drop(self.socket.as_fd().try_clone_to_owned()?);
        match door.next() {
            Ok(Some((stream, connection))) => {
                self.waiting_since = None;
                let stream = UnixStream::from(stream);
                return Ok(Some((stream, Some(Held::new(link, connection)))));
            }
            Ok(None) => {}
            Err(KeepError::DescriptorLost { .. }) => return Err(Errno::MFILE.into()),
            Err(_) => {
                self.keeper = None;
                self.waiting_since = None;
                return Ok(None);
            }
        }
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        if rustix::event::poll(&mut fds, Some(&timespec(Duration::ZERO)))? == 0 {
            self.waiting_since = None;
            return Ok(None);
        }
        match self.waiting_since {
            Some(since) if since.elapsed() >= KEEPER_ACCEPTS => {
                self.waiting_since = None;
                Ok(self.socket.accept()?.map(|stream| (stream, None)))
            }
            Some(_) => Ok(None),
            None => {
                self.waiting_since = Some(Instant::now());
                Ok(None)
            }
        }
    }

    /// From now on no client can connect, except to a socket that the next server has, too. Those that have are left to be taken.
    pub(super) fn close(&mut self) {
        if !self.socket.passed {
            self.socket.remove_name();
            // A client may just have found the name. This makes its connect(2) fail.
            let _ = rustix::net::shutdown(&self.socket, Shutdown::Read);
        }
        if let Some((link, _)) = &self.keeper {
            link.close();
        }
    }

    /// The next connection after `close`. `None`: that was the last one.
    ///
    /// # Errors
    /// As accept(2).
    pub(super) fn take_last(&mut self) -> io::Result<Option<Arrival>> {
        let begun = Instant::now();
        while let Some((_, door)) = &self.keeper {
            let left = LAST_CONNECTIONS.saturating_sub(begun.elapsed());
            let mut fds = [PollFd::new(door, PollFlags::IN)];
            if rustix::event::poll(&mut fds, Some(&timespec(left)))? == 0 {
                self.keeper = None;
            } else if let Some(arrival) = self.take()? {
                return Ok(Some(arrival));
            }
        }
        if self.socket.passed {
            // Those in its queue wait for the next server.
            return Ok(None);
        }
        match self.socket.accept() {
            Ok(accepted) => Ok(accepted.map(|stream| (stream, None))),
            // The socket is shut down, and its queue is empty.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
