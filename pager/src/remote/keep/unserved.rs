//! Clients that have connected to a dead server, and that no server has taken.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use crate::failure::FailurePolicy;
use crate::remote::serve::handshake::{self, Hello};
use crate::remote::serve::wire::{SocketReader, timespec};
use crate::remote::serve::{AllowedUsers, Consequence, Given, Peer, poison};

/// How long the keeper waits for the message of such a client. It had all the time that guests wait for a server.
pub(super) const HEAR_TIMEOUT: Duration = Duration::from_millis(100);

/// What the dead server would have done with clients that it does not serve.
#[derive(Clone, Debug)]
pub(super) struct Policy {
    pub(super) on_error: FailurePolicy,
    pub(super) allow: AllowedUsers,
}

/// Makes the missing pages of a client fail by the policy, on a thread of its own, until its process ends. Returns the
/// process, which is forgotten when the thread ends: after [`HEAR_TIMEOUT`], if it turns out that the client is no guest.
/// `None` for one that would not have been served, which is left alone.
pub(super) fn fail(stream: UnixStream, policy: &Policy) -> Option<Weak<Peer>> {
    let own = Arc::new(Peer::allowed(&stream, &policy.allow).ok()?);
    let (peer, poisons) = (Arc::downgrade(&own), policy.on_error == FailurePolicy::Poison);
    let failed = Arc::clone(&own);
    let failing = move || {
        let given = given(&stream);
        drop(stream);
        if !given.is_guest() {
            return;
        }
        let fillers = if poisons { given.userfaultfds() } else { Vec::new() };
        if fillers.is_empty() || poison::touched_pages(&own, &fillers).is_err() {
            own.kill();
        }
    };
    if thread::Builder::new().name("unserved".into()).spawn(failing).is_err() {
        failed.kill();
    }
    Some(peer)
}

/// Kills the process of a client that waits for pages. Returns whether it was one.
pub(super) fn kill(stream: &UnixStream, policy: &Policy) -> bool {
    let Ok(peer) = Peer::allowed(stream, &policy.allow) else {
        return false;
    };
    given(stream).is_guest() && peer.kill() == Consequence::Killed
}

/// Whether a process has ended.
pub(super) fn has_ended(peer: &Peer) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(peer.process(), PollFlags::IN)];
    matches!(rustix::event::poll(&mut fds, Some(&timespec(Duration::ZERO))), Ok(1..))
}

fn given(stream: &UnixStream) -> Given {
    let mut reader = SocketReader::new(stream, HEAR_TIMEOUT);
    match handshake::receive(&mut reader) {
        Ok(Hello::Fill { descriptor, .. }) => {
            Given { descriptors: vec![descriptor], lost: false, names_memory: true }
        }
        // A clone sees the end of the connection, and does not touch its memory before it is accepted.
        Ok(Hello::Request(_)) => Given::default(),
        Err(_) => reader.into_given(),
    }
}
