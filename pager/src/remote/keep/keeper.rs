//! The keeper: one thread that waits for messages of servers, and for their end.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Weak;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketType};

use super::error::KeepError;
use super::front::Front;
use super::guest::{Guest, Served};
use super::link::Kept;
use super::unserved::{self, Policy};
use super::wire::{self, DESCRIPTORS, FromKeeper, Orphan, ToKeeper, VERSION};
use crate::remote::serve::wire::timespec;
use crate::remote::serve::{BindError, Consequence, Peer, SnapshotName, Socket, SocketAccess};

/// The options of a keeper.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct KeepOptions {
    /// How long guests wait for a server that takes over, before their missing pages fail.
    pub takeover_timeout: Duration,
    /// The limit of guests.
    pub guests: usize,
}

impl Default for KeepOptions {
    /// 30 s, 4096 guests.
    fn default() -> KeepOptions {
        KeepOptions { takeover_timeout: Duration::from_secs(30), guests: 4096 }
    }
}

/// An event of a keeper.
#[derive(Debug)]
#[non_exhaustive]
pub enum KeepEvent<'a> {
    /// A server has connected. This keeper holds its guests from now on.
    Connected {
        /// Its process id.
        server: i32,
    },
    /// A server has ended. These guests had not.
    Lost {
        /// Its process id.
        server: i32,
        /// The number of guests.
        guests: usize,
    },
    /// A server has taken over guests of a dead one.
    TakenOver {
        /// Its process id.
        server: i32,
        /// The number of guests.
        guests: usize,
    },
    /// No server has taken over within the takeover timeout. The missing pages of these guests fail from now on.
    GivenUp {
        /// The number of guests.
        guests: usize,
        /// For each guest whose process had to be killed immediately, the reason.
        killed: &'a [String],
    },
    /// The connection of a server was closed, because of a bad message or too many guests. The keeper holds none of its
    /// guests any more. The server continues to serve them.
    Refused {
        /// The reason.
        error: &'a KeepError,
    },
    /// Connections cannot be accepted at the moment. The keeper tries again.
    Accept {
        /// The error of accept(2).
        error: &'a io::Error,
    },
}

/// Holds the handover states of guests: see [`crate::keep`].
pub struct Keeper {
    socket: Socket,
    options: KeepOptions,
    on_event: Box<dyn Fn(KeepEvent<'_>) + Send>,
    servers: BTreeMap<u64, Server>,
    guests: Vec<Guest>,
    fronts: Vec<Front>,
    /// Processes whose missing pages fail, because no server has taken their connection.
    unserved: Vec<Weak<Peer>>,
    next_server: u64,
}

struct Server {
    socket: OwnedFd,
    pid: i32,
    /// What it serves. Known after `hello`.
    serves: Option<Serves>,
    /// The number of guests that it has taken over since the last event about that.
    taken: usize,
}

/// What a server serves, and where.
#[derive(Clone)]
struct Serves {
    snapshot: SnapshotName,
    policy: Policy,
    path: Vec<u8>,
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keeper").field("guests", &self.guests.len()).finish_non_exhaustive()
    }
}

impl Keeper {
    /// Listens at `path`, a socket that only this user can connect to. It takes over the name of a dead keeper.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind(
        path: impl AsRef<Path>,
        options: KeepOptions,
        on_event: impl Fn(KeepEvent<'_>) + Send + 'static,
    ) -> Result<Keeper, BindError> {
        Ok(Keeper {
            socket: Socket::bind_kind(
                path.as_ref(),
                SocketType::SEQPACKET,
                SocketAccess::default(),
            )?,
            options,
            on_event: Box::new(on_event),
            servers: BTreeMap::new(),
            guests: Vec::new(),
            fronts: Vec::new(),
            unserved: Vec::new(),
            next_server: 0,
        })
    }

    /// Runs until `stop` is readable or hung up. Then it kills the guests without a server by SIGKILL, because they
    /// would wait forever, and returns their number. Guests of a live server are not affected.
    ///
    /// # Errors
    /// As poll(2).
    pub fn run(mut self, stop: BorrowedFd<'_>) -> io::Result<usize> {
        loop {
            let mut fds = vec![
                PollFd::from_borrowed_fd(stop, PollFlags::IN),
                PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN),
            ];
            fds.extend(
                self.servers.values().map(|server| PollFd::new(&server.socket, PollFlags::IN)),
            );
            // A live server reports the end of its guests itself.
            let alone = |guest: &&Guest| !matches!(guest.served, Served::By { .. });
            fds.extend(self.guests.iter().filter(alone).flat_map(|guest| guest.kept.end()));
            fds.extend(self.fronts.iter().filter_map(Front::events));
            let wait = self.next_deadline().map(|at| at.saturating_duration_since(Instant::now()));
            match rustix::event::poll(&mut fds, wait.map(timespec).as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let (stopped, called) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
            self.receive_all();
            if stopped {
                break;
            }
            if called {
                self.accept();
            }
            self.pass_on();
            self.give_up_late();
        }
        let alone = self.guests.iter().filter(|guest| !matches!(guest.served, Served::By { .. }));
        let guests = alone.inspect(|guest| guest.kill()).count();
        let waiting = self.fronts.into_iter().map(Front::kill_waiting).sum::<usize>();
        if self.unserved.iter().any(|peer| peer.strong_count() > 0) {
            // Until it is known which of them are guests.
            std::thread::sleep(unserved::HEAR_TIMEOUT);
        }
        let unserved = self.unserved.iter().filter_map(Weak::upgrade);
        let unserved = unserved.filter(|peer| !unserved::has_ended(peer));
        let failed = unserved.filter(|peer| peer.kill() == Consequence::Killed).count();
        Ok(guests + waiting + failed)
    }

    /// Passes the connections of clients on to their servers.
    fn pass_on(&mut self) {
        for front in &mut self.fronts {
            if let Err(error) = front.pass_on() {
                (self.on_event)(KeepEvent::Accept { error: &error });
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }

    fn accept(&mut self) {
        let socket = match self.socket.accept() {
            Ok(Some(stream)) => OwnedFd::from(stream),
            Ok(None) => return,
            Err(error) => {
                (self.on_event)(KeepEvent::Accept { error: &error });
                // There are no descriptors or no memory left. Other processes may free some meanwhile.
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

    /// Handles the messages of all servers.
    fn receive_all(&mut self) {
        let numbers: Vec<u64> = self.servers.keys().copied().collect();
        let mut requests = Vec::new();
        numbers.iter().for_each(|&number| self.receive_from(number, &mut requests));
        // A server that asks for the guests of a dead one may have connected after the first round has read from that
        // one. So a second round reads all messages, and ends of connections, that came before the request.
        if !requests.is_empty() {
            numbers.iter().for_each(|&number| self.receive_from(number, &mut requests));
        }
        self.forget_dead();
        for (number, request) in requests {
            if let Err(error) = self.answer(number, request) {
                self.lose(number, error);
            }
        }
    }

    fn receive_from(&mut self, number: u64, requests: &mut Vec<(u64, ToKeeper)>) {
        while let Some(server) = self.servers.get(&number) {
            match wire::receive(&server.socket, RecvFlags::DONTWAIT) {
                Ok(None) => return,
                Ok(Some((ToKeeper::Keep { id, shares, connection }, descriptors))) => {
                    if let Err(error) = self.keep(number, id, shares, descriptors) {
                        return self.lose(number, error);
                    }
                    connection.into_iter().for_each(|connection| self.release(number, connection));
                }
                Ok(Some((ToKeeper::Release { connection }, _))) => self.release(number, connection),
                Ok(Some((ToKeeper::Listen { identity, passed }, descriptors))) => {
                    if let Err(error) = self.listen(number, identity, passed, descriptors) {
                        return self.lose(number, error);
                    }
                }
                Ok(Some((ToKeeper::Close {}, _))) => {
                    self.fronts.iter_mut().filter(|front| front.is_of(number)).for_each(Front::close);
                }
                Ok(Some((ToKeeper::Forget { id }, _))) => self.guests.retain(
                    |guest| !matches!(guest.served, Served::By { server, id: own } if (server, own) == (number, id)),
                ),
                Ok(Some((request, _))) => requests.push((number, request)),
                Err(error) => return self.lose(number, error),
            }
        }
    }

    fn release(&mut self, server: u64, connection: u64) {
        let fronts = self.fronts.iter_mut().filter(|front| front.is_of(server));
        fronts.for_each(|front| front.release(connection));
    }

    fn listen(
        &mut self,
        number: u64,
        identity: (u64, u64),
        passed: bool,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), KeepError> {
        let serves = self.servers.get(&number).and_then(|server| server.serves.clone());
        let Serves { policy, path, .. } =
            serves.ok_or_else(|| wire::unclear("`listen` before `hello`"))?;
        let [listener, door] = <[OwnedFd; 2]>::try_from(descriptors)
            .map_err(|_| wire::unclear("`listen` without its descriptors"))?;
        let mut front = Front::new(path, identity, policy, listener, number, door);
        front.passed = passed;
        let before = self.fronts.iter().position(|other| {
            other.path == front.path && (other.is_orphaned() || other.is_of(number))
        });
        if let Some(before) = before {
            front = self.fronts.swap_remove(before).succeeded_by(front);
        }
        self.fronts.push(front);
        Ok(())
    }

    fn keep(
        &mut self,
        server: u64,
        id: u64,
        shares: bool,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), KeepError> {
        let serves = self.servers.get(&server).and_then(|server| server.serves.clone());
        let Serves { snapshot, policy, .. } =
            serves.ok_or_else(|| wire::unclear("a guest before `hello`"))?;
        let on_error = policy.on_error;
        let descriptors = <[OwnedFd; DESCRIPTORS]>::try_from(descriptors);
        let [uffd, connection, process, handover] =
            descriptors.map_err(|_| wire::unclear("a guest without its descriptors"))?;
        if self.guests.len() >= self.options.guests {
            return Err(wire::unclear("more guests than are kept"));
        }
        let kept = Kept { uffd, connection, process, handover, shares };
        self.guests.push(Guest { kept, snapshot, on_error, served: Served::By { server, id } });
        Ok(())
    }

    fn answer(&mut self, number: u64, request: ToKeeper) -> Result<(), KeepError> {
        let Some(server) = self.servers.get_mut(&number) else {
            return Ok(());
        };
        match request {
            ToKeeper::Hello { version, snapshot, on_error, allow, path } => {
                let ours = |front: &&mut Front| front.is_orphaned() && front.path == path;
                let front = self.fronts.iter_mut().find(ours).filter(|_| version == VERSION);
                let orphan = front.as_ref().map(|front| Orphan { identity: front.identity });
                let listener = front.and_then(|front| front.claim(number));
                let (orphan, descriptors) = (listener.and(orphan), listener.map(AsFd::as_fd));
                let welcome = FromKeeper::Welcome { version: VERSION, orphan };
                wire::send(&server.socket, &welcome, descriptors.as_slice(), SendFlags::DONTWAIT)?;
                if version == VERSION {
                    let policy = Policy { on_error: on_error.into(), allow };
                    server.serves = Some(Serves { snapshot, policy, path });
                }
                (self.on_event)(KeepEvent::Connected { server: server.pid });
            }
            ToKeeper::Take { id } => {
                let Serves { snapshot, policy, .. } =
                    server.serves.clone().ok_or_else(|| wire::unclear("`take` before `hello`"))?;
                let orphan = |guest: &&mut Guest| {
                    guest.snapshot == snapshot && !matches!(guest.served, Served::By { .. })
                };
                if let Some(guest) = self.guests.iter_mut().find(orphan) {
                    // Only one process may answer the faults of a guest. If that was the keeper, its pager stops here.
                    guest.served = Served::By { server: number, id };
                    guest.on_error = policy.on_error;
                    let descriptors = guest.kept.descriptors();
                    let answer = FromKeeper::Guest { shares: guest.kept.shares };
                    wire::send(&server.socket, &answer, &descriptors, SendFlags::DONTWAIT)?;
                    server.taken += 1;
                } else {
                    let answer = FromKeeper::NoGuest {};
                    wire::send(&server.socket, &answer, &[], SendFlags::DONTWAIT)?;
                    let (server, guests) = (server.pid, std::mem::take(&mut server.taken));
                    if guests > 0 {
                        (self.on_event)(KeepEvent::TakenOver { server, guests });
                    }
                }
            }
            // Handled when they are received.
            ToKeeper::Keep { .. }
            | ToKeeper::Forget { .. }
            | ToKeeper::Listen { .. }
            | ToKeeper::Close {}
            | ToKeeper::Release { .. } => {}
        }
        Ok(())
    }

    /// Ends the connection of a server. If the server is dead, its guests wait for another one. If it lives and has
    /// sent a bad message, it keeps its guests: no other process may answer their faults.
    fn lose(&mut self, number: u64, error: KeepError) {
        let Some(server) = self.servers.remove(&number) else {
            return;
        };
        let of_server =
            |guest: &Guest| matches!(guest.served, Served::By { server, .. } if server == number);
        if !matches!(error, KeepError::Gone) {
            self.guests.retain(|guest| !of_server(guest));
            // The server notices that, and accepts its connections itself.
            self.fronts.retain(|front| !front.is_of(number));
            return (self.on_event)(KeepEvent::Refused { error: &error });
        }
        self.fronts.iter_mut().filter(|front| front.is_of(number)).for_each(Front::lose_server);
        self.fronts.retain(|front| !front.is_empty());
        let since = Instant::now();
        let mut guests = 0;
        for guest in self.guests.iter_mut().filter(|guest| of_server(guest)) {
            guest.served = Served::Orphaned { since };
            guests += 1;
        }
        (self.on_event)(KeepEvent::Lost { server: server.pid, guests });
    }

    /// Drops guests that have ended.
    fn forget_dead(&mut self) {
        self.guests
            .retain(|guest| matches!(guest.served, Served::By { .. }) || !guest.kept.has_ended());
    }

    fn next_deadline(&self) -> Option<Instant> {
        let waiting = self.guests.iter().filter_map(|guest| match guest.served {
            Served::Orphaned { since } => Some(since + self.options.takeover_timeout),
            _ => None,
        });
        let orphans = self.fronts.iter().filter(|front| front.is_orphaned());
        waiting.chain(orphans.map(|front| front.since + self.options.takeover_timeout)).min()
    }

    fn give_up_late(&mut self) {
        let (now, timeout) = (Instant::now(), self.options.takeover_timeout);
        let late = |guest: &&mut Guest| matches!(guest.served, Served::Orphaned { since } if since + timeout <= now);
        let (mut guests, mut killed) = (0, Vec::new());
        let late_front = |front: &mut Front| front.is_orphaned() && front.since + timeout <= now;
        let given_up: Vec<Weak<Peer>> =
            self.fronts.extract_if(.., late_front).flat_map(Front::give_up).collect();
        guests += given_up.len();
        self.unserved.retain(|peer| peer.strong_count() > 0);
        self.unserved.extend(given_up);
        for guest in self.guests.iter_mut().filter(late) {
            guests += 1;
            killed.extend(guest.give_up().err());
        }
        if guests > 0 {
            (self.on_event)(KeepEvent::GivenUp { guests, killed: &killed });
        }
    }
}
