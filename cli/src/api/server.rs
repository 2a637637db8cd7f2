//! Connections of the control socket. Each has a thread, and their number is limited.

use std::io::{self, PipeWriter};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pager::serve::{Socket, check_user};
use rustix::event::{PollFd, PollFlags};

use super::response::Response;
use super::routes::Routes;
use crate::http::{Connection, NoRequest, Patience};

/// The limit of open connections. One more replaces the connection that has been quiet for the longest.
const CONNECTIONS: usize = 16;
const PATIENCE: Patience =
    Patience { idle: Duration::from_secs(60), request: Duration::from_secs(5) };
/// The time within which a client must read its answer.
const WRITE: Duration = Duration::from_secs(5);

/// Answers clients until it is dropped. Then the socket's name is removed, and requests under way are still answered.
pub(crate) struct Serving {
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Serving {
    pub(super) fn start(socket: Socket, routes: Routes) -> io::Result<Self> {
        let (stopped, stop) = io::pipe()?;
        let routes = Arc::new(routes);
        let serve = move || {
            let clients = Clients::default();
            loop {
                let mut fds =
                    [PollFd::new(&socket, PollFlags::IN), PollFd::new(&stopped, PollFlags::IN)];
                match rustix::event::poll(&mut fds, None) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(_) => break,
                }
                if !fds[1].revents().is_empty() {
                    break;
                }
                match socket.accept() {
                    Ok(Some(stream)) => clients.add(stream, &routes),
                    Ok(None) => {}
                    // The process may be out of descriptors. Clients that leave free some.
                    Err(_) => std::thread::sleep(Duration::from_millis(100)),
                }
            }
            drop(socket);
            clients.finish();
        };
        let thread = std::thread::Builder::new().name("api".into()).spawn(serve)?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic in the thread has been printed already.
            let _ = thread.join();
        }
    }
}

/// The open connections.
#[derive(Default)]
struct Clients(Mutex<Vec<Client>>);

struct Client {
    stream: Arc<UnixStream>,
    activity: Arc<Activity>,
    thread: JoinHandle<()>,
}

struct Activity {
    /// Whether a request is being answered.
    busy: AtomicBool,
    since: Mutex<Instant>,
}

impl Activity {
    fn set_busy(&self, busy: bool) {
        *self.since.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        self.busy.store(busy, Ordering::SeqCst);
    }

    fn quiet_since(&self) -> Option<Instant> {
        let since = *self.since.lock().unwrap_or_else(PoisonError::into_inner);
        (!self.busy.load(Ordering::SeqCst)).then_some(since)
    }
}

impl Clients {
    /// Serves one more connection. If there are too many, the quietest one is closed.
    fn add(&self, stream: UnixStream, routes: &Arc<Routes>) {
        let mut clients = self.lock();
        clients.retain(|client| !client.thread.is_finished());
        if clients.len() >= CONNECTIONS {
            let quietest = (0..clients.len())
                .filter_map(|i| Some((clients[i].activity.quiet_since()?, i)))
                .min()
                .map(|(_, i)| i);
            match quietest {
                Some(i) => {
                    // Its thread ends at its next check.
                    let _ = clients.swap_remove(i).stream.shutdown(Shutdown::Both);
                }
                // All connections are being answered. This client may try again.
                None => return,
            }
        }
        let stream = Arc::new(stream);
        let activity =
            Arc::new(Activity { busy: AtomicBool::new(false), since: Mutex::new(Instant::now()) });
        let serve = {
            let (stream, activity) = (Arc::clone(&stream), Arc::clone(&activity));
            let routes = Arc::clone(routes);
            move || {
                serve(&stream, &activity, &routes);
                // The list still has the connection, so it is closed here for the client.
                let _ = stream.shutdown(Shutdown::Both);
            }
        };
        let spawned = snapvm::room::check(snapvm::room::THREAD_BYTES)
            .and_then(|()| std::thread::Builder::new().name("api-client".into()).spawn(serve));
        match spawned {
            Ok(thread) => clients.push(Client { stream, activity, thread }),
            Err(error) => {
                let why = format!(
                    "there is no thread for this request ({error}): a limit of processes, threads or memory \
                     is reached (RLIMIT_NPROC, RLIMIT_AS, a cgroup's pids.max)"
                );
                // The answer fits into an empty socket. Then the connection closes.
                let _ = Response::fault(503, why).write(&mut &*stream, false);
            }
        }
    }

    /// Waits for the requests that are being answered.
    fn finish(&self) {
        for client in self.lock().drain(..) {
            let _ = client.stream.shutdown(Shutdown::Read);
            let _ = client.thread.join();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Client>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Answers one client until it leaves.
fn serve(stream: &UnixStream, activity: &Activity, routes: &Routes) {
    if stream.set_write_timeout(Some(WRITE)).is_err() {
        return;
    }
    if let Err(error) = check_user(stream) {
        let _ = Response::fault(403, error.to_string()).write(&mut &*stream, false);
        return;
    }
    let mut connection = Connection::new(stream);
    loop {
        let (response, keep_alive) = match connection.request(PATIENCE) {
            Ok(request) => {
                activity.set_busy(true);
                (routes.answer(&request, stream), request.keep_alive)
            }
            Err(NoRequest::Refused(status, message)) => (Response::fault(status, message), false),
            Err(NoRequest::Gone) => return,
        };
        let written = response.write(&mut &*stream, keep_alive);
        activity.set_busy(false);
        if written.is_err() || !keep_alive {
            return;
        }
    }
}
