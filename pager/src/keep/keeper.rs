//! The keeper itself: one thread that waits for servers to speak or to die.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketType};

use super::Kept;
use super::guest::{Guest, Served};
use super::wire::{self, DESCRIPTORS, FromKeeper, KeepError, ToKeeper, VERSION};
use crate::failure::FailurePolicy;
use crate::serve::wire::timespec;
use crate::serve::{BindError, SnapshotName, Socket};

/// How a keeper is to be.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct KeepOptions {
    /// How long guests wait for a server that comes back, before their missing pages fail.
    pub patience: Duration,
    /// No more guests than these are kept.
    pub guests: usize,
}

impl Default for KeepOptions {
    /// 30 seconds, 4096 guests.
    fn default() -> KeepOptions {
        KeepOptions { patience: Duration::from_secs(30), guests: 4096 }
    }
}

/// What a keeper tells while it runs.
#[derive(Debug)]
#[non_exhaustive]
pub enum KeepEvent<'a> {
    /// A server gives its guests to this keeper from now on.
    Connected {
        /// Its process.
        server: i32,
    },
    /// A server has ended, and these guests were still there.
    Lost {
        /// Its process.
        server: i32,
        /// How many.
        guests: usize,
    },
    /// A server goes on with guests of one that has ended.
    TakenOver {
        /// Its process.
        server: i32,
        /// How many.
        guests: usize,
    },
    /// No server has come back in time: what this many guests lack fails from now on.
    GivenUp {
        /// How many.
        guests: usize,
        /// Those of them whose processes had to be killed at once, and why.
        killed: &'a [String],
    },
    /// A server's connection was closed: it says what it should not, or has more guests than are kept. None of its
    /// guests is kept any more; it serves them on.
    Refused {
        /// What.
        error: &'a KeepError,
    },
    /// Connections cannot be accepted at the moment; it is tried again.
    Accept {
        /// The answer.
        error: &'a io::Error,
    },
}

/// Holds what servers need to go on: see [`crate::keep`].
pub struct Keeper {
    socket: Socket,
    options: KeepOptions,
    on_event: Box<dyn Fn(KeepEvent<'_>) + Send>,
    servers: BTreeMap<u64, Server>,
    guests: Vec<Guest>,
    next_server: u64,
}

struct Server {
    socket: OwnedFd,
    pid: i32,
    /// What it serves, once it has said so.
    serves: Option<(SnapshotName, FailurePolicy)>,
    /// Guests that it has taken and that were not told of yet.
    taken: usize,
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keeper").field("guests", &self.guests.len()).finish_non_exhaustive()
    }
}

impl Keeper {
    /// Listens at `path`: a socket that only this user can connect to. The name of a keeper that is dead is taken over.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind(
        path: impl AsRef<Path>,
        options: KeepOptions,
        on_event: impl Fn(KeepEvent<'_>) + Send + 'static,
    ) -> Result<Keeper, BindError> {
        Ok(Keeper {
            socket: Socket::bind_kind(path.as_ref(), SocketType::SEQPACKET)?,
            options,
            on_event: Box::new(on_event),
            servers: BTreeMap::new(),
            guests: Vec::new(),
            next_server: 0,
        })
    }

    /// Keeps until `stop` is readable or hung up. Guests that have no server then are ended by SIGKILL: they would wait
    /// for ever. Answers how many. Those of a server that lives are not touched.
    ///
    /// # Errors
    /// What `poll(2)` says.
    pub fn run(mut self, stop: BorrowedFd<'_>) -> io::Result<usize> {
        loop {
            let mut fds = vec![
                PollFd::from_borrowed_fd(stop, PollFlags::IN),
                PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN),
            ];
            fds.extend(
                self.servers.values().map(|server| PollFd::new(&server.socket, PollFlags::IN)),
            );
            // A server forgets its guests itself.
            let alone = |guest: &&Guest| !matches!(guest.served, Served::By { .. });
            fds.extend(self.guests.iter().filter(alone).flat_map(|guest| guest.kept.end()));
            let wait = self.next_deadline().map(|at| at.saturating_duration_since(Instant::now()));
            match rustix::event::poll(&mut fds, wait.map(timespec).as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let (stopped, called) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
            self.hear();
            if stopped {
                break;
            }
            if called {
                self.accept();
            }
            self.give_up_late();
        }
        let alone = self.guests.iter().filter(|guest| !matches!(guest.served, Served::By { .. }));
        Ok(alone.inspect(|guest| guest.kill()).count())
    }

    fn accept(&mut self) {
        let socket = match self.socket.accept() {
            Ok(Some(stream)) => OwnedFd::from(stream),
            Ok(None) => return,
            Err(error) => {
                (self.on_event)(KeepEvent::Accept { error: &error });
                // Out of descriptors or memory: others may end.
                return std::thread::sleep(Duration::from_millis(50));
            }
        };
        match wire::trusted(&socket) {
            Err(error) => (self.on_event)(KeepEvent::Refused { error: &error }),
            Ok(pid) => {
                let server = Server { socket, pid, serves: None, taken: 0 };
                self.servers.insert(self.next_server, server);
                self.next_server += 1;
            }
        }
    }

    /// Takes what the servers say.
    fn hear(&mut self) {
        let numbers: Vec<u64> = self.servers.keys().copied().collect();
        let mut questions = Vec::new();
        numbers.iter().for_each(|&number| self.hear_one(number, &mut questions));
        // Who asks for a dead server's guests may have come while we listened, after that one's end: all that was said
        // before the question, and each end, is heard before it is answered.
        if !questions.is_empty() {
            numbers.iter().for_each(|&number| self.hear_one(number, &mut questions));
        }
        self.forget_dead();
        for (number, question) in questions {
            if let Err(error) = self.answer(number, question) {
                self.lose(number, error);
            }
        }
    }

    fn hear_one(&mut self, number: u64, questions: &mut Vec<(u64, ToKeeper)>) {
        while let Some(server) = self.servers.get(&number) {
            match wire::receive(&server.socket, RecvFlags::DONTWAIT) {
                Ok(None) => return,
                Ok(Some((ToKeeper::Keep { id, shares }, descriptors))) => {
                    if let Err(error) = self.keep(number, id, shares, descriptors) {
                        return self.lose(number, error);
                    }
                }
                Ok(Some((ToKeeper::Forget { id }, _))) => self.guests.retain(
                    |guest| !matches!(guest.served, Served::By { server, id: own } if (server, own) == (number, id)),
                ),
                Ok(Some((question, _))) => questions.push((number, question)),
                Err(error) => return self.lose(number, error),
            }
        }
    }

    fn keep(
        &mut self,
        server: u64,
        id: u64,
        shares: bool,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), KeepError> {
        let serves = self.servers.get(&server).and_then(|server| server.serves.clone());
        let (snapshot, on_error) = serves.ok_or_else(|| wire::unclear("a guest before `hello`"))?;
        let descriptors = <[OwnedFd; DESCRIPTORS]>::try_from(descriptors);
        let [uffd, connection, process, ledger] =
            descriptors.map_err(|_| wire::unclear("a guest without its descriptors"))?;
        if self.guests.len() >= self.options.guests {
            return Err(wire::unclear("more guests than are kept"));
        }
        let kept = Kept { uffd, connection, process, ledger, shares };
        self.guests.push(Guest { kept, snapshot, on_error, served: Served::By { server, id } });
        Ok(())
    }

    fn answer(&mut self, number: u64, question: ToKeeper) -> Result<(), KeepError> {
        let Some(server) = self.servers.get_mut(&number) else {
            return Ok(());
        };
        match question {
            ToKeeper::Hello { version, snapshot, on_error } => {
                if version == VERSION {
                    server.serves = Some((snapshot, on_error.into()));
                }
                let welcome = FromKeeper::Welcome { version: VERSION };
                wire::send(&server.socket, &welcome, &[], SendFlags::DONTWAIT)?;
                (self.on_event)(KeepEvent::Connected { server: server.pid });
            }
            ToKeeper::Take { id } => {
                let (snapshot, on_error) =
                    server.serves.clone().ok_or_else(|| wire::unclear("`take` before `hello`"))?;
                let orphan = |guest: &&mut Guest| {
                    guest.snapshot == snapshot && !matches!(guest.served, Served::By { .. })
                };
                if let Some(guest) = self.guests.iter_mut().find(orphan) {
                    // Only one may answer its faults: if that was the keeper, it ends here.
                    guest.served = Served::By { server: number, id };
                    guest.on_error = on_error;
                    let descriptors = guest.kept.descriptors();
                    let words = FromKeeper::Guest { shares: guest.kept.shares };
                    wire::send(&server.socket, &words, &descriptors, SendFlags::DONTWAIT)?;
                    server.taken += 1;
                } else {
                    let words = FromKeeper::Nobody {};
                    wire::send(&server.socket, &words, &[], SendFlags::DONTWAIT)?;
                    let (server, guests) = (server.pid, std::mem::take(&mut server.taken));
                    if guests > 0 {
                        (self.on_event)(KeepEvent::TakenOver { server, guests });
                    }
                }
            }
            ToKeeper::Keep { .. } | ToKeeper::Forget { .. } => {}
        }
        Ok(())
    }

    /// A server's guests wait for another one when it has ended. One that lives and says what it should not is left to
    /// itself, with its guests: nobody else may answer their faults.
    fn lose(&mut self, number: u64, error: KeepError) {
        let Some(server) = self.servers.remove(&number) else {
            return;
        };
        let its =
            |guest: &Guest| matches!(guest.served, Served::By { server, .. } if server == number);
        if !matches!(error, KeepError::Gone) {
            self.guests.retain(|guest| !its(guest));
            return (self.on_event)(KeepEvent::Refused { error: &error });
        }
        let since = Instant::now();
        let mut guests = 0;
        for guest in self.guests.iter_mut().filter(|guest| its(guest)) {
            guest.served = Served::Nobody { since };
            guests += 1;
        }
        (self.on_event)(KeepEvent::Lost { server: server.pid, guests });
    }

    /// Of guests that have ended nothing is kept.
    fn forget_dead(&mut self) {
        self.guests
            .retain(|guest| matches!(guest.served, Served::By { .. }) || !guest.kept.has_ended());
    }

    fn next_deadline(&self) -> Option<Instant> {
        let waiting = self.guests.iter().filter_map(|guest| match guest.served {
            Served::Nobody { since } => Some(since + self.options.patience),
            _ => None,
        });
        waiting.min()
    }

    fn give_up_late(&mut self) {
        let (now, patience) = (Instant::now(), self.options.patience);
        let late = |guest: &&mut Guest| matches!(guest.served, Served::Nobody { since } if since + patience <= now);
        let (mut guests, mut killed) = (0, Vec::new());
        for guest in self.guests.iter_mut().filter(late) {
            guests += 1;
            killed.extend(guest.give_up().err());
        }
        if guests > 0 {
            (self.on_event)(KeepEvent::GivenUp { guests, killed: &killed });
        }
    }
}
