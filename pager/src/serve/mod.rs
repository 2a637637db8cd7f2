//! A server that fills the memory of other processes: virtual machines that send their userfaultfd over a unix
//! socket. It speaks the handshake of Firecracker (`mem_backend` of type `Uffd`).
//!
//! Each client is served by threads of its own: one that is silent, hostile or dead holds up no other. The
//! protocol, who is trusted, and what happens when things fail: `docs/serving.md`.

mod error;
pub(crate) mod handshake;
mod metrics;
mod no_room;
mod peer;
mod refused;
mod session;
mod socket;
pub(crate) mod wire;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

pub(crate) use error::limit_text;
pub use error::{BindError, RefuseError};
#[cfg(feature = "vm-memory")]
pub(crate) use handshake::Answer;
pub use handshake::SnapshotName;
pub use peer::check_user;
pub use refused::Consequence;
pub use socket::{LOCK_PATIENCE, Socket};
pub use wire::connect;

use crate::failure::FailurePolicy;
use crate::keep::{KeepError, Kept, Link};
use crate::populate::Populate;
use crate::shared::{ImageLoader, SharedImage};
use crate::source::PageSource;
use crate::stats::Stats;
use metrics::Totals;
use no_room::Spare;
use peer::Peer;
use session::{KeptGuest, Session};

/// How a server is to be.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ServeOptions {
    /// What is done to a client when one of its pages cannot be had: the page is poisoned, or the client's
    /// process is killed.
    pub on_error: FailurePolicy,
    /// A client that has not said what it wants after this long is dropped.
    pub handshake_timeout: Duration,
    /// No more clients than these are served at once.
    pub clients: usize,
    /// The name of the source's snapshot, to share its pages between clones that ask for it.
    pub share: Option<SnapshotName>,
    /// Pages that guests will probably ask for, as ranges of source offsets, in that order: loaded before they do. For
    /// clones into the memory that they share, when the first of them asks for it; for others in front of each, as
    /// [`PagerBuilder::prefetch`](crate::PagerBuilder::prefetch) does.
    pub prefetch: Option<Prefetched>,
    /// When pages that no guest has touched are loaded in the background, into each guest's memory or into that which clones
    /// share. For clones, everything but [`Populate::Off`] is [`Populate::Auto`].
    pub populate: Populate,
    /// See [`PagerBuilder::fault_overhead`](crate::PagerBuilder::fault_overhead); not of clones.
    pub fault_overhead: Option<Duration>,
    /// The keeper that holds what the next server needs, should this one die: see [`crate::keep`].
    pub keep: Option<KeepAt>,
}

/// Lists pages, whenever it is asked to, on the thread that loads them. A hint: see
/// [`PagerBuilder::prefetch`](crate::PagerBuilder::prefetch).
#[derive(Clone)]
pub struct Prefetched(Arc<dyn Fn() -> Vec<Range<u64>> + Send + Sync>);

impl Prefetched {
    /// What `list` answers.
    pub fn new(list: impl Fn() -> Vec<Range<u64>> + Send + Sync + 'static) -> Prefetched {
        Prefetched(Arc::new(list))
    }

    pub(crate) fn list(&self) -> impl FnOnce() -> Vec<Range<u64>> + Send + 'static {
        let list = Arc::clone(&self.0);
        move || list()
    }
}

impl fmt::Debug for Prefetched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Prefetched(..)")
    }
}

/// A keeper, and what it is told.
#[derive(Clone, Debug)]
pub struct KeepAt {
    /// Its socket.
    pub socket: PathBuf,
    /// The name of what is served. The guests of a dead server of the same name are taken over.
    pub snapshot: SnapshotName,
}

impl Default for ServeOptions {
    /// Poison, five seconds, 4096 clients, loading ahead for those that wait.
    fn default() -> ServeOptions {
        ServeOptions {
            on_error: FailurePolicy::Poison,
            handshake_timeout: Duration::from_secs(5),
            clients: 4096,
            share: None,
            prefetch: None,
            populate: Populate::Auto,
            fault_overhead: None,
            keep: None,
        }
    }
}

/// What a server tells while it runs.
#[derive(Debug)]
#[non_exhaustive]
pub enum ServeEvent<'a> {
    /// A client's memory is served from now on.
    Served {
        /// Its process.
        pid: i32,
        /// Size of its memory.
        memory_bytes: u64,
    },
    /// A client of a server that has died is served on from now on.
    TakenOver {
        /// Its process.
        pid: i32,
        /// Size of its memory.
        memory_bytes: u64,
    },
    /// A client is served, but would not survive this server: its keeper does not keep it.
    NotKept {
        /// Its process.
        pid: i32,
        /// Why.
        error: &'a KeepError,
    },
    /// A client is not served.
    Refused {
        /// Its process, where that is known.
        pid: Option<i32>,
        /// Why.
        error: &'a RefuseError,
        /// What was done about it.
        consequence: Consequence,
    },
    /// A page of a client could not be had.
    Failed {
        /// Its process.
        pid: i32,
        /// What failed, and why.
        failure: &'a crate::failure::Failure,
    },
    /// A client has ended, and what was kept for it is free.
    Ended {
        /// Its process.
        pid: i32,
        /// What was done for it.
        stats: &'a Stats,
    },
    /// Connections cannot be accepted at the moment; it is tried again.
    Accept {
        /// The answer.
        error: &'a io::Error,
    },
}

/// Called with each event, on the thread that has it.
pub type OnEvent = Box<dyn Fn(ServeEvent<'_>) + Send + Sync>;

/// A server, listening.
#[derive(Debug)]
pub struct Server {
    socket: Socket,
    hall: Arc<Hall>,
}

/// What all threads of a server share.
pub(crate) struct Hall {
    pub(crate) source: Arc<dyn PageSource>,
    pub(crate) options: ServeOptions,
    pub(crate) on_event: OnEvent,
    /// The pages that clones share, once one has asked.
    pub(crate) image: Mutex<Option<SharedFile>>,
    /// Everybody who is served, and how many threads there are for clients.
    guests: Mutex<Guests>,
    spare: Mutex<Spare>,
    emptied: Condvar,
    next_id: AtomicU64,
    keep: Option<Link>,
}

/// A file that clones share, and what fills it before they ask.
#[derive(Clone)]
pub(crate) struct SharedFile {
    pub(crate) image: Arc<SharedImage>,
    pub(crate) ahead: Option<Arc<ImageLoader>>,
}

#[derive(Default)]
struct Guests {
    sessions: BTreeMap<u64, Arc<Session>>,
    /// Those that are refused and whose pages are poisoned.
    refused: BTreeMap<u64, Arc<Peer>>,
    threads: usize,
    /// What was done for those that have ended.
    ended: Totals,
}

impl Server {
    /// Listens at `path`: a socket that only this user can connect to. The name of a server that is dead is taken
    /// over; where there is a keeper, so are its clients.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind(
        path: impl AsRef<Path>,
        source: Arc<dyn PageSource>,
        options: ServeOptions,
        on_event: impl Fn(ServeEvent<'_>) + Send + Sync + 'static,
    ) -> Result<Server, BindError> {
        Server::at(Socket::bind(path.as_ref())?, source, options, on_event)
    }

    /// As [`Server::bind`], at a socket that is there already. Waits for the keeper, if there is one, no longer than
    /// [`keep::PATIENCE`](crate::keep::PATIENCE) for each answer.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn at(
        socket: Socket,
        source: Arc<dyn PageSource>,
        options: ServeOptions,
        on_event: impl Fn(ServeEvent<'_>) + Send + Sync + 'static,
    ) -> Result<Server, BindError> {
        let keep = options.keep.as_ref().map(|keep| {
            Link::connect(&keep.socket, &keep.snapshot, options.on_error).map_err(BindError::Keep)
        });
        let hall = Hall {
            keep: keep.transpose()?,
            source,
            options,
            on_event: Box::new(on_event),
            image: Mutex::new(None),
            guests: Mutex::default(),
            spare: Mutex::new(Spare::full()),
            emptied: Condvar::new(),
            next_id: AtomicU64::new(0),
        };
        let server = Server { socket, hall: Arc::new(hall) };
        server.take_over()?;
        Ok(server)
    }

    /// Goes on with the clients of a server that has died.
    fn take_over(&self) -> Result<(), BindError> {
        let Some(keep) = &self.hall.keep else {
            return Ok(());
        };
        loop {
            let id = self.hall.new_id();
            let Some(kept) = keep.take(id).map_err(BindError::Keep)? else {
                return Ok(());
            };
            self.hall.resume(id, kept);
        }
    }

    /// For other threads.
    pub fn handle(&self) -> ServerHandle {
        ServerHandle(Arc::clone(&self.hall))
    }

    /// Serves until `stop` is readable or hung up; then accepts nobody any more, and returns when the last client
    /// has ended.
    ///
    /// # Errors
    /// What `poll(2)` says.
    pub fn run(self, stop: BorrowedFd<'_>) -> io::Result<()> {
        let Server { socket, hall } = self;
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(stop, PollFlags::IN),
            ];
            match rustix::event::poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            if !fds[1].revents().is_empty() {
                break;
            }
            match socket.accept() {
                Ok(Some(stream)) => hall.receive(stream),
                Ok(None) => {}
                Err(error) => {
                    if !peer::is_shortage(&error) || !hall.accept_by_spare(&socket, error) {
                        // Others may end meanwhile, and the connection waits.
                        thread::sleep(Duration::from_millis(50));
                    }
                }
            }
        }
        drop(socket);
        hall.wait_until_empty();
        Ok(())
    }
}

/// Looks at a server, and ends its clients.
#[derive(Clone, Debug)]
pub struct ServerHandle(Arc<Hall>);

impl ServerHandle {
    /// The processes of the clients that are served now, and what was done for each.
    pub fn guests(&self) -> Vec<(i32, Stats)> {
        self.0.sessions().iter().map(|session| (session.peer.pid, session.pager.stats())).collect()
    }

    /// The figures of all clients, those that have ended too, in the text format of Prometheus.
    pub fn metrics(&self) -> String {
        let (ended, sessions): (Totals, Vec<_>) = {
            let guests = self.0.guests();
            (guests.ended, guests.sessions.values().cloned().collect())
        };
        metrics::text(ended, &sessions.iter().map(|session| session.figures()).collect::<Vec<_>>())
    }

    /// Ends the processes of all clients that still need the server, by SIGKILL: without it they would wait for
    /// ever for their missing pages. Answers how many. Those that a keeper has are left to it.
    pub fn kill_guests(&self) -> usize {
        let sessions = self.0.sessions();
        let keeper = self.0.keep().is_some_and(Link::is_alive);
        let needy = sessions.iter().filter(|session| {
            !(keeper && session.kept.is_some()) && session.pager.stats().pages.missing > 0
        });
        let refused: Vec<_> = self.0.guests().refused.values().cloned().collect();
        needy.map(|session| &session.peer).chain(&refused).map(|peer| peer.kill()).count()
    }
}

impl Hall {
    /// Gives a connection its thread.
    fn receive(self: &Arc<Hall>, stream: UnixStream) {
        let limit = self.options.clients;
        {
            let mut guests = self.guests();
            if guests.threads >= limit {
                drop(guests);
                return self.refuse_without_room(&stream, &RefuseError::Full { limit });
            }
            guests.threads += 1;
        }
        // Handed over afterwards: if there is no thread, it is still here.
        let (give, take) = mpsc::channel();
        let given = self.give_thread(move |hall| {
            if let Ok(stream) = take.recv() {
                session::attend(hall, stream);
            }
        });
        match given {
            // The thread waits for it.
            Ok(()) => drop(give.send(stream)),
            Err(error) => self.refuse_without_room(&stream, &error),
        }
    }

    /// Gives a client of a dead server its thread. There are as many as that one had.
    fn resume(self: &Arc<Hall>, id: u64, kept: Kept) {
        self.guests().threads += 1;
        let process = kept.process.try_clone();
        let needs_us = !kept.shares;
        let guest = KeptGuest { hall: Arc::clone(self), id };
        let given = self.give_thread(move |hall| session::resume(hall, guest, kept));
        if let Err(error) = given {
            let consequence = match (needs_us, process) {
                // The keeper takes it for served: it would wait without an end.
                (true, Ok(process)) => {
                    Peer::kept(0, process).kill();
                    Consequence::Killed
                }
                _ => Consequence::Closed,
            };
            self.refuse(None, &error, consequence);
        }
    }

    /// The thread is counted before.
    fn give_thread(
        self: &Arc<Hall>,
        body: impl FnOnce(&Arc<Hall>) + Send + 'static,
    ) -> Result<(), RefuseError> {
        let place = Place(Arc::clone(self));
        let spawned = thread::Builder::new().name("client".into()).spawn(move || body(&place.0));
        spawned.map(drop).map_err(|error| RefuseError::System { what: "start a thread", error })
    }

    pub(crate) fn new_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn keep(&self) -> Option<&Link> {
        self.keep.as_ref()
    }

    pub(crate) fn refuse(&self, pid: Option<i32>, error: &RefuseError, consequence: Consequence) {
        (self.on_event)(ServeEvent::Refused { pid, error, consequence });
    }

    /// Keeps a refused client among those that need this process; until the answer is dropped.
    pub(crate) fn list_refused(self: &Arc<Hall>, peer: &Arc<Peer>) -> Entry {
        let id = self.new_id();
        self.guests().refused.insert(id, Arc::clone(peer));
        Entry { hall: Arc::clone(self), id }
    }

    /// Keeps the session among those that are served; until the answer is dropped.
    pub(crate) fn enter(self: &Arc<Hall>, id: u64, session: Arc<Session>) -> Entry {
        self.guests().sessions.insert(id, session);
        Entry { hall: Arc::clone(self), id }
    }

    /// The figures of all clients, in one line.
    pub(crate) fn stats_json(&self) -> String {
        let guests: Vec<_> = self.sessions().iter().map(|session| session.figures()).collect();
        // Numbers and fixed names: nothing that JSON could not hold.
        serde_json::to_string(&guests).unwrap_or_default()
    }

    fn sessions(&self) -> Vec<Arc<Session>> {
        self.guests().sessions.values().cloned().collect()
    }

    fn wait_until_empty(&self) {
        let mut guests = self.guests();
        while guests.threads > 0 {
            guests = self.emptied.wait(guests).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn guests(&self) -> MutexGuard<'_, Guests> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Hall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hall").field("options", &self.options).finish_non_exhaustive()
    }
}

/// A session, or a client that is refused, among those that need this process.
pub(crate) struct Entry {
    hall: Arc<Hall>,
    id: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut guests = self.hall.guests();
        guests.refused.remove(&self.id);
        if let Some(session) = guests.sessions.remove(&self.id) {
            guests.ended.add(&session.pager.stats());
        }
    }
}

/// A client's thread is counted as long as this lives, also if it panics.
struct Place(Arc<Hall>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.guests().threads -= 1;
        self.0.emptied.notify_all();
    }
}
