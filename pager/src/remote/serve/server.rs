//! The server: accepts connections, and starts a thread for each client.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use rustix::event::EventfdFlags;

use super::arrivals::{Arrival, Arrivals};
use super::client;
use super::error::{BindError, RefuseError};
use super::event::{Consequence, ServeEvent};
use super::kept_socket::KeeperLink;
use super::metrics::{self, Totals};
use super::options::ServeOptions;
use super::peer::{self, Peer};
use super::session::{Held, KeptGuest};
use super::socket::{Socket, SocketAccess};
use super::spare::Spare;
use super::state::{CountedThread, ServerState};
use crate::remote::keep::{Kept, Link};
use crate::source::page_source::PageSource;
use crate::stats::Stats;

/// A listening server.
#[derive(Debug)]
pub struct Server {
    arrivals: Arrivals,
    state: Arc<ServerState>,
}

impl Server {
    /// Listens at `path`, a socket that only this user can connect to. It takes over the name of a dead server and, if
    /// there is a keeper, the clients of that server.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind(
        path: impl AsRef<Path>,
        source: Arc<dyn PageSource>,
        options: ServeOptions,
        on_event: impl Fn(ServeEvent<'_>) + Send + Sync + 'static,
    ) -> Result<Server, BindError> {
        let path = path.as_ref();
        let socket = match KeeperLink::connect(&options, path)? {
            Some(keeper) => keeper.bind(SocketAccess::default())?,
            None => Socket::bind(path)?,
        };
        Server::at(socket, source, options, on_event)
    }

    /// As [`Server::bind`], with an existing socket. If there is a keeper, this waits for each of its answers, at most
    /// [`keep::ANSWER_TIMEOUT`](crate::keep::ANSWER_TIMEOUT).
    ///
    /// # Errors
    /// [`BindError`].
    pub fn at(
        mut socket: Socket,
        source: Arc<dyn PageSource>,
        options: ServeOptions,
        on_event: impl Fn(ServeEvent<'_>) + Send + Sync + 'static,
    ) -> Result<Server, BindError> {
        let keeper = match socket.keeper.take() {
            Some(keeper) => Some(keeper),
            None => KeeperLink::connect(&options, &socket.path)?.map(KeeperLink::into_link),
        };
        let ending = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| {
            BindError::System { what: "create an eventfd", error: error.into() }
        })?;
        let state = ServerState {
            keeper,
            source,
            options,
            on_event: Box::new(on_event),
            image: Mutex::new(None),
            guests: Mutex::default(),
            spare: Mutex::new(Spare::full()),
            emptied: Condvar::new(),
            ending,
            next_id: AtomicU64::new(0),
        };
        let state = Arc::new(state);
        // Before clients are taken over: their threads would continue after an error.
        let arrivals = Arrivals::new(socket, state.keeper())?;
        Server::take_over(&state)?;
        Ok(Server { arrivals, state })
    }

    /// Takes over the clients of a dead server.
    fn take_over(state: &Arc<ServerState>) -> Result<(), BindError> {
        let Some(keeper) = state.keeper() else {
            return Ok(());
        };
        loop {
            let id = state.new_id();
            let Some(kept) = keeper.take(id).map_err(BindError::Keep)? else {
                return Ok(());
            };
            state.resume(keeper, id, kept);
        }
    }

    /// A handle for other threads.
    pub fn handle(&self) -> ServerHandle {
        ServerHandle(Arc::clone(&self.state))
    }

    /// Serves until `stop` is readable or hung up. Then no client can connect any more. Clients that have connected and
    /// have sent their message are still served, others are refused. Returns when the last client has ended.
    ///
    /// # Errors
    /// As poll(2).
    pub fn run(self, stop: BorrowedFd<'_>) -> io::Result<()> {
        let Server { mut arrivals, state } = self;
        while !arrivals.wait(stop)? {
            state.receive_next(|| arrivals.take());
        }
        arrivals.close();
        // Threads that wait for a message stop waiting.
        let _ = rustix::io::write(&state.ending, &1_u64.to_ne_bytes());
        while state.receive_next(|| arrivals.take_last()) {}
        drop(arrivals);
        state.wait_until_empty();
        Ok(())
    }
}

/// Reads the statistics of a server, and ends its clients.
#[derive(Clone, Debug)]
pub struct ServerHandle(Arc<ServerState>);

impl ServerHandle {
    /// The process id and the statistics of each client that is served now.
    pub fn guests(&self) -> Vec<(i32, Stats)> {
        self.0.sessions().iter().map(|session| (session.peer.pid, session.pager.stats())).collect()
    }

    /// The statistics of all clients, including those that have ended, in the text format of Prometheus
    /// ([`METRICS_CONTENT_TYPE`](super::METRICS_CONTENT_TYPE)).
    pub fn metrics(&self) -> String {
        let (ended, sessions): (Totals, Vec<_>) = {
            let guests = self.0.guests();
            (guests.ended, guests.sessions.values().cloned().collect())
        };
        metrics::text(ended, &sessions.iter().map(|session| session.stats()).collect::<Vec<_>>())
    }

    /// Kills the processes of all clients that still need the server, by SIGKILL. Without the server they would wait
    /// forever for their missing pages. Returns how many. Clients that a keeper holds are left to it.
    pub fn kill_guests(&self) -> usize {
        let sessions = self.0.sessions();
        let keeper = self.0.keeper().is_some_and(|keeper| keeper.is_alive());
        let needing = sessions.iter().filter(|session| {
            !(keeper && session.kept.is_some()) && session.pager.stats().pages.missing > 0
        });
        let refused: Vec<_> = self.0.guests().refused.values().cloned().collect();
        let peers = needing.map(|session| &session.peer).chain(&refused);
        peers.filter(|peer| peer.kill() == Consequence::Killed).count()
    }
}

impl ServerState {
    /// Serves the next connection. Returns whether there was one.
    fn receive_next(
        self: &Arc<ServerState>,
        mut take: impl FnMut() -> io::Result<Option<Arrival>>,
    ) -> bool {
        match take() {
            Ok(Some((stream, held))) => {
                self.receive(stream, held);
                true
            }
            Ok(None) => false,
            Err(error) => {
                let accepted = peer::is_shortage(&error) && self.accept_by_spare(take, error);
                if !accepted {
                    // Other clients may end meanwhile. The connection waits.
                    thread::sleep(Duration::from_millis(50));
                }
                accepted
            }
        }
    }

    /// Starts the thread of a connection.
    fn receive(self: &Arc<ServerState>, stream: UnixStream, held: Option<Held>) {
        let limit = self.options.clients;
        {
            let mut guests = self.guests();
            if guests.threads >= limit {
                drop(guests);
                return self.refuse_without_room(&stream, &RefuseError::Full { limit });
            }
            guests.threads += 1;
        }
        // The connection is handed over after the start of the thread: if that fails, it is still here.
        let (give, take) = mpsc::channel();
        let given = self.give_thread(move |server| {
            if let Ok((stream, held)) = take.recv() {
                client::attend(server, stream, held);
            }
        });
        match given {
            // The thread waits for the connection.
            Ok(()) => drop(give.send((stream, held))),
            Err(error) => self.refuse_without_room(&stream, &error),
        }
    }

    /// Starts the thread of a client of a dead server. That server had as many.
    fn resume(self: &Arc<ServerState>, keeper: &Arc<Link>, id: u64, kept: Kept) {
        self.guests().threads += 1;
        let process = kept.process.try_clone();
        let needs_server = !kept.shares;
        let guest = KeptGuest { keeper: Arc::clone(keeper), id };
        let given = self.give_thread(move |server| client::resume(server, guest, kept));
        if let Err(error) = given {
            let consequence = match (needs_server, process) {
                // The keeper believes that this server serves the client: it would wait forever.
                (true, Ok(process)) => Peer::kept(0, process).kill(),
                _ => Consequence::Closed,
            };
            self.refuse(None, &error, consequence);
        }
    }

    /// The caller has counted the thread.
    fn give_thread(
        self: &Arc<ServerState>,
        body: impl FnOnce(&Arc<ServerState>) + Send + 'static,
    ) -> Result<(), RefuseError> {
        let counted = CountedThread(Arc::clone(self));
        let spawned = thread::Builder::new().name("client".into()).spawn(move || body(&counted.0));
        spawned.map(drop).map_err(|error| RefuseError::System { what: "start a thread", error })
    }
}
