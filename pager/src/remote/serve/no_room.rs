//! Refuses clients for which there are no threads or descriptors left.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::arrivals::Arrival;
use super::error::RefuseError;
use super::event::{Consequence, ServeEvent};
use super::handshake::{self, Answer, Hello};
use super::peer::{self, Peer};
use super::spare::Spare;
use super::state::ServerState;
use super::wire::SocketReader;
use crate::causes::with_causes;
use crate::failure::FailurePolicy;

/// How long the server waits for the message of such a client.
const HEAR_TIMEOUT: Duration = Duration::from_millis(100);

impl ServerState {
    /// The process of a connection.
    ///
    /// # Errors
    /// [`RefuseError`], with the process id if that is known.
    pub(super) fn peer_of(&self, stream: &UnixStream) -> Result<Peer, (Option<i32>, RefuseError)> {
        let found = peer::allowed(stream, &self.options.allow).map_err(|error| (None, error))?;
        let named = |error| (Some(found.pid), error);
        let peer = Peer::of(stream, found).map_err(named)?;
        if self.options.on_error == FailurePolicy::Kill {
            peer.check_kill().map_err(named)?;
        }
        Ok(peer)
    }

    /// Accepts a connection with the reserved descriptors, and refuses it. Returns whether that was possible.
    pub(super) fn accept_by_spare(
        self: &Arc<ServerState>,
        accept: impl FnOnce() -> io::Result<Option<Arrival>>,
        error: io::Error,
    ) -> bool {
        let accepted = self.spare().released(accept);
        match accepted {
            Ok(None) => true,
            Ok(Some((stream, _held))) => {
                self.refuse_without_room(&stream, &RefuseError::Shortage(error));
                true
            }
            Err(error) => {
                (self.on_event)(ServeEvent::Accept { error: &error });
                false
            }
        }
    }

    /// Refuses a client for which no thread or no descriptor is left. To learn whether it is a guest, this waits for
    /// its message for a short time, with the reserved descriptors. Its pages could not be poisoned later, so that a
    /// guest is killed under either policy.
    pub(super) fn refuse_without_room(
        self: &Arc<ServerState>,
        stream: &UnixStream,
        error: &RefuseError,
    ) {
        self.spare().released(|| {
            let begun = Instant::now();
            let peer = loop {
                match self.peer_of(stream) {
                    Ok(peer) => break peer,
                    // Another thread has taken the free descriptors, perhaps only for a moment.
                    Err((_, RefuseError::Shortage(_))) if begun.elapsed() < HEAR_TIMEOUT => {
                        thread::sleep(Duration::from_millis(1));
                    }
                    Err((pid, error)) => return self.refuse(pid, &error, Consequence::Closed),
                }
            };
            let mut reader = SocketReader::new(stream, HEAR_TIMEOUT);
            let is_guest = match handshake::receive(&mut reader) {
                Ok(Hello::Fill { .. }) => true,
                Ok(Hello::Request(_)) => {
                    // The clone gets the error. It may have ended.
                    let _ = Answer::Refused(with_causes(error)).send(stream, None);
                    false
                }
                Err(_) => reader.into_given().is_guest(),
            };
            let consequence = if is_guest { peer.kill() } else { Consequence::Closed };
            self.refuse(Some(peer.pid), error, consequence);
        });
    }

    fn spare(&self) -> MutexGuard<'_, Spare> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
