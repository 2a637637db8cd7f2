//! The listening socket of a server, of which the keeper has a duplicate, and the connections that it has accepted for
//! that server.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Weak;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};
use rustix::net::{SendFlags, Shutdown};

use super::error::KeepError;
use super::unserved::{self, Policy};
use super::wire::{self, Accepted};
use crate::remote::serve::Peer;

/// The limit of connections that wait for a server. Others wait in the queue of the listening socket.
const CONNECTIONS: usize = 4096;

/// The socket at one path.
pub(super) struct Front {
    pub(super) path: Vec<u8>,
    pub(super) identity: (u64, u64),
    pub(super) policy: Policy,
    /// A service manager has the listening socket, too.
    pub(super) passed: bool,
    /// `None`: the server listens no longer.
    listener: Option<UnixListener>,
    /// The number of the server. `None`: it is dead.
    server: Option<u64>,
    /// The socket to which its connections are sent. `None`: the server is dead, or has just started.
    door: Option<OwnedFd>,
    /// The connections of clients that no server has taken yet.
    waiting: BTreeMap<u64, Waiting>,
    next: u64,
    /// When the server died.
    pub(super) since: Instant,
}

struct Waiting {
    stream: UnixStream,
    /// The server has a duplicate.
    sent: bool,
}

impl Front {
    pub(super) fn new(
        path: Vec<u8>,
        identity: (u64, u64),
        policy: Policy,
        listener: OwnedFd,
        server: u64,
        door: OwnedFd,
    ) -> Front {
        Front {
            path,
            identity,
            policy,
            passed: false,
            listener: Some(listener.into()),
            server: Some(server),
            door: Some(door),
            waiting: BTreeMap::new(),
            next: 0,
            since: Instant::now(),
        }
    }

    /// The front of the next server at the same path. Its server gets all connections that wait.
    pub(super) fn succeeded_by(mut self, mut next: Front) -> Front {
        if self.identity != next.identity {
            // The name was removed in between. Its last clients may still be in the queue.
            self.drain();
        }
        next.waiting = self.waiting;
        next.waiting.values_mut().for_each(|waiting| waiting.sent = false);
        next.next = self.next;
        next
    }

    pub(super) fn is_of(&self, server: u64) -> bool {
        self.server == Some(server)
    }

    pub(super) fn is_orphaned(&self) -> bool {
        self.server.is_none()
    }

    /// The next server at this path. It gets the listening socket of the dead one, if that has not closed it.
    pub(super) fn claim(&mut self, server: u64) -> Option<&UnixListener> {
        self.server = Some(server);
        self.listener.as_ref()
    }

    /// What to wait for.
    pub(super) fn events(&self) -> Option<PollFd<'_>> {
        let door = self.door.as_ref()?;
        if self.waiting.values().any(|waiting| !waiting.sent) {
            return Some(PollFd::new(door, PollFlags::OUT));
        }
        let listener = self.listener.as_ref().filter(|_| self.waiting.len() < CONNECTIONS)?;
        Some(PollFd::new(listener, PollFlags::IN))
    }

    /// Accepts connections, and sends them to the server.
    ///
    /// # Errors
    /// As accept(2). Connections then wait, or the server accepts them itself.
    pub(super) fn pass_on(&mut self) -> io::Result<()> {
        let mut accepted = Ok(());
        while self.door.is_some() && self.waiting.len() < CONNECTIONS {
            match self.accept() {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    accepted = Err(error);
                    break;
                }
            }
        }
        let Some(door) = &self.door else {
            return accepted;
        };
        for (connection, waiting) in self.waiting.iter_mut().filter(|(_, waiting)| !waiting.sent) {
            let packet = Accepted { connection: *connection };
            match wire::send(door, &packet, &[waiting.stream.as_fd()], SendFlags::DONTWAIT) {
                Ok(()) => waiting.sent = true,
                // The server is dead, or accepts its connections itself from now on.
                Err(KeepError::Gone) => {
                    self.door = None;
                    return accepted;
                }
                // If the queue is full, this is tried again.
                Err(_) => break,
            }
        }
        if self.listener.is_none() && self.waiting.values().all(|waiting| waiting.sent) {
            // The server has closed its socket, and gets no more connections.
            let _ = rustix::net::shutdown(door, Shutdown::Write);
        }
        accepted
    }

    /// Whether there was a connection.
    fn accept(&mut self) -> io::Result<bool> {
        let Some(listener) = &self.listener else {
            return Ok(false);
        };
        match listener.accept() {
            Ok((stream, _)) => {
                self.waiting.insert(self.next, Waiting { stream, sent: false });
                self.next += 1;
                Ok(true)
            }
            // EINVAL: the server has shut it down, and the queue is empty.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn drain(&mut self) {
        while self.accept().is_ok_and(|more| more) {}
        self.listener = None;
    }

    /// The server listens no longer. It gets the connections that are left.
    pub(super) fn close(&mut self) {
        self.drain();
    }

    /// The client of this connection does not need the next server to find it.
    pub(super) fn release(&mut self, connection: u64) {
        self.waiting.remove(&connection);
    }

    pub(super) fn lose_server(&mut self) {
        // A server that never got so far as to listen does not give the clients more time.
        if self.door.is_some() {
            self.since = Instant::now();
        }
        (self.server, self.door) = (None, None);
        self.waiting.values_mut().for_each(|waiting| waiting.sent = false);
    }

    /// Nothing is left to hold.
    pub(super) fn is_empty(&self) -> bool {
        self.is_orphaned() && self.listener.is_none() && self.waiting.is_empty()
    }

    /// No server has come. Clients can connect no longer, except to a service manager's socket. Those that have are failed
    /// by the policy. Returns their processes.
    pub(super) fn give_up(mut self) -> Vec<Weak<Peer>> {
        if let Some(listener) = self.listener.as_ref().filter(|_| !self.passed) {
            // From now on connect(2) fails, so that no client enters the queue after it was emptied.
            let _ = rustix::net::shutdown(listener, Shutdown::Read);
        }
        self.drain();
        let waiting = self.waiting.into_values();
        waiting.filter_map(|waiting| unserved::fail(waiting.stream, &self.policy)).collect()
    }

    /// The keeper ends. Returns the number of processes that it has killed.
    pub(super) fn kill_waiting(mut self) -> usize {
        if !self.is_orphaned() {
            return 0;
        }
        self.drain();
        let waiting = self.waiting.into_values();
        waiting.filter(|waiting| unserved::kill(&waiting.stream, &self.policy)).count()
    }
}
