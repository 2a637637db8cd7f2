//! The server: accepts connections, and starts a thread for each client.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use super::client;
use super::error::{BindError, RefuseError};
use super::event::{Consequence, ServeEvent};
use super::metrics::{self, Totals};
use super::options::ServeOptions;
use super::peer::{self, Peer};
use super::session::KeptGuest;
use super::socket::Socket;
use super::spare::Spare;
use super::state::{CountedThread, ServerState};
use crate::remote::keep::{Kept, Link};
use crate::source::page_source::PageSource;
use crate::stats::Stats;

/// A listening server.
#[derive(Debug)]
pub struct Server {
    socket: Socket,
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
        Server::at(Socket::bind(path.as_ref())?, source, options, on_event)
    }

    /// As [`Server::bind`], with an existing socket. If there is a keeper, this waits for each of its answers, at most
    /// [`keep::ANSWER_TIMEOUT`](crate::keep::ANSWER_TIMEOUT).
    ///
    /// # Errors
    /// [`BindError`].
    pub fn at(
        socket: Socket,
        source: Arc<dyn PageSource>,
        options: ServeOptions,
        on_event: impl Fn(ServeEvent<'_>) + Send + Sync + 'static,
    ) -> Result<Server, BindError> {
        let keeper = options.keep.as_ref().map(|keep| {
            Link::connect(&keep.socket, &keep.snapshot, options.on_error)
                .map(Arc::new)
                .map_err(BindError::Keep)
        });
        let state = ServerState {
            keeper: keeper.transpose()?,
            source,
            options,
            on_event: Box::new(on_event),
            image: Mutex::new(None),
            guests: Mutex::default(),
            spare: Mutex::new(Spare::full()),
            emptied: Condvar::new(),
            next_id: AtomicU64::new(0),
        };
        let server = Server { socket, state: Arc::new(state) };
        server.take_over()?;
        Ok(server)
    }

    /// Takes over the clients of a dead server.
    fn take_over(&self) -> Result<(), BindError> {
        let Some(keeper) = self.state.keeper() else {
            return Ok(());
        };
        loop {
            let id = self.state.new_id();
            let Some(kept) = keeper.take(id).map_err(BindError::Keep)? else {
                return Ok(());
            };
            self.state.resume(keeper, id, kept);
        }
    }

    /// A handle for other threads.
    pub fn handle(&self) -> ServerHandle {
        ServerHandle(Arc::clone(&self.state))
    }

    /// Serves until `stop` is readable or hung up. Then it accepts no more clients, and returns when the last one has
    /// ended.
    ///
    /// # Errors
    /// As poll(2).
    pub fn run(self, stop: BorrowedFd<'_>) -> io::Result<()> {
        let Server { socket, state } = self;
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
                Ok(Some(stream)) => state.receive(stream),
                Ok(None) => {}
                Err(error) => {
                    if !peer::is_shortage(&error) || !state.accept_by_spare(&socket, error) {
                        // Other clients may end meanwhile. The connection waits.
                        thread::sleep(Duration::from_millis(50));
                    }
                }
            }
        }
        drop(socket);
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
    /// Starts the thread of a connection.
    fn receive(self: &Arc<ServerState>, stream: UnixStream) {
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
            if let Ok(stream) = take.recv() {
                client::attend(server, stream);
            }
        });
        match given {
            // The thread waits for the connection.
            Ok(()) => drop(give.send(stream)),
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
