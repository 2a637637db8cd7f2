//! The client of a control socket: `snap create --vm`, `snap reset`.

use std::cell::Cell;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pager::serve::connect;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use snapfmt::Progress;

use super::bodies::{CheckpointFields, CreateSnapshot, DeferredPages, Pausing, SnapshotType};
use crate::exit::Interrupted;
use crate::http::read_response;
use crate::keys::KeyArgs;
use crate::progress::Bar;
use crate::session::Session;
use crate::storage::Storage;
use crate::summary::{ResetSummary, Summary};
use crate::waits::Wait;

/// The interval of checks for the progress of the guest's file, and for an interrupt by the user.
const LOOK: Duration = Duration::from_millis(100);
/// A socket that does not report its progress within this time is not queried again.
const STATE: Duration = Duration::from_secs(1);
/// The time within which a guest's process must listen: too short for a message about the wait.
const STARTING: Duration = Duration::from_millis(800);
/// The time within which a guest's process must accept the request.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is wanted of a guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    /// Only what has changed since the snapshot that it was restored from.
    pub(crate) diff: bool,
    /// Let it run while the file is written.
    pub(crate) live: bool,
    /// End it afterwards.
    pub(crate) stop: bool,
}

/// Makes the guest at this socket write its snapshot to `out`, a path of its own file system. An interrupt cancels it.
pub(crate) fn create(
    socket: &Path,
    out: &Path,
    kind: Kind,
    storage: &Storage,
    session: &Session,
) -> Result<Summary> {
    let wanted = wanted(out, kind, storage)?;
    let summary = ask(socket, &Request::create(&wanted, session.quiet), session)?;
    summary.context("the guest has written no file, and does not say why")
}

/// Makes the guest at this socket write a live snapshot to `out` whose memory it adds later: see [`wait_for_pages`].
pub(crate) fn create_deferred(
    socket: &Path,
    out: &Path,
    storage: &Storage,
    session: &Session,
) -> Result<Summary> {
    let kind = Kind { diff: false, live: true, stop: false };
    let wanted = CreateSnapshot { deferred: true, ..wanted(out, kind, storage)? };
    let summary = ask(socket, &Request::create(&wanted, true), session)?;
    summary.context("the guest has written no file, and does not say why")
}

/// Waits until the guest at this socket has added a page of memory, or all of it, to the file with this id. `waiting` is
/// called meanwhile; its error ends the wait.
pub(crate) fn wait_for_pages(
    socket: &Path,
    id: &str,
    page: Option<u32>,
    waiting: &dyn Fn() -> Result<()>,
) -> Result<()> {
    pages("PUT", socket, DeferredPages { id: id.to_owned(), page }, waiting)
}

/// Makes the guest at this socket add no more memory to the file with this id, and waits for that.
pub(crate) fn cancel_pages(socket: &Path, id: &str) -> Result<()> {
    let deadline = Instant::now() + STATE;
    let in_time = || match Instant::now() < deadline {
        true => Ok(()),
        false => bail!("it does not answer"),
    };
    pages("DELETE", socket, DeferredPages { id: id.to_owned(), page: None }, &in_time)
}

/// Connects to the guest at this socket. A script may have started the guest just before.
fn reach(socket: &Path) -> Result<UnixStream> {
    let started = Instant::now();
    loop {
        match connect(socket, PATIENCE) {
            Ok(stream) => return Ok(stream),
            Err(error)
                if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) =>
            {
                return Err(error.into());
            }
            Err(_) if started.elapsed() < STARTING => std::thread::sleep(LOOK),
            Err(error) => {
                return Err(anyhow::Error::new(error).context(
                    "no guest listens there; snap run or snap restore with --api starts one",
                ));
            }
        }
    }
}

fn pages(
    method: &str,
    socket: &Path,
    wanted: DeferredPages,
    waiting: &dyn Fn() -> Result<()>,
) -> Result<()> {
    let named = || format!("cannot ask the guest at {}", socket.display());
    let stream = connect(socket, PATIENCE).with_context(named)?;
    send(&stream, method, "/snapshot/pages", &json!(wanted), PATIENCE).with_context(named)?;
    match receive(stream, waiting).with_context(named)? {
        (204, _) => Ok(()),
        (status, body) => Err(Fault::of(socket, status, &body).into()),
    }
}

/// Makes the guest at this socket write a checkpoint to `out`. `None`: it has not changed, and has written nothing.
pub(crate) fn checkpoint(
    socket: &Path,
    out: &Path,
    fields: CheckpointFields,
    storage: &Storage,
    session: &Session,
) -> Result<Option<Summary>> {
    let kind = Kind { diff: false, live: true, stop: false };
    let wanted = CreateSnapshot { checkpoint: Some(fields), ..wanted(out, kind, storage)? };
    ask(socket, &Request::create(&wanted, true), session)
}

fn wanted(out: &Path, kind: Kind, storage: &Storage) -> Result<CreateSnapshot> {
    Ok(CreateSnapshot {
        snapshot_path: std::path::absolute(out).context("cannot find the working folder")?,
        snapshot_type: if kind.diff { SnapshotType::Diff } else { SnapshotType::Full },
        pausing: if kind.live { Pausing::Live } else { Pausing::Paused },
        checkpoint: None,
        deferred: false,
        stop: kind.stop,
        force: storage.force,
        codec: Some(storage.codec.to_string()),
        level: storage.level,
        chunk_pages: Some(storage.chunk_pages),
        dedupe: Some(!storage.no_dedupe),
        threads: storage.threads,
    })
}

/// Puts the guest at this socket back to its snapshot. An interrupt ends the wait, and not the reset.
pub(crate) fn reset(socket: &Path, session: &Session) -> Result<ResetSummary> {
    let request = Request {
        path: "/snapshot/load",
        body: json!({ "type": "reset" }),
        doing: "resetting",
        done: "reset",
        quiet: session.quiet,
    };
    ask(socket, &request, session)?.context("the guest's answer is empty")
}

/// An answer that is not what was requested.
#[derive(Debug, thiserror::Error)]
#[error("{}: {message}", socket.display())]
pub(crate) struct Fault {
    socket: PathBuf,
    pub(crate) status: u16,
    message: String,
}

impl Fault {
    fn of(socket: &Path, status: u16, body: &Value) -> Fault {
        let message = match body["fault_message"].as_str() {
            Some(message) => message.to_owned(),
            None => format!("answer {status}"),
        };
        Fault { socket: socket.to_owned(), status, message }
    }
}

/// A request that takes a while.
struct Request {
    path: &'static str,
    body: Value,
    /// What the guest's process does, and what is then done to the guest.
    doing: &'static str,
    done: &'static str,
    /// Whether no progress is shown.
    quiet: bool,
}

impl Request {
    fn create(wanted: &CreateSnapshot, quiet: bool) -> Self {
        let (doing, done) = ("storing", "stored");
        Self { path: "/snapshot/create", body: json!(wanted), doing, done, quiet }
    }
}

/// Sends the request, and waits for the answer. `None`: nothing had to be done.
fn ask<T: DeserializeOwned>(
    socket: &Path,
    request: &Request,
    session: &Session,
) -> Result<Option<T>> {
    let Request { path, body: wanted, doing, done, quiet } = request;
    let named = || format!("cannot ask the guest at {}", socket.display());
    let (requested, stored) = (socket.display().to_string(), socket.display().to_string());
    let requesting = Wait::new(move || format!("the guest at {requested} to take a request"));
    let requesting = requesting.at_most(PATIENCE).begin();
    let stream = reach(socket).with_context(named)?;
    send(&stream, "PUT", path, wanted, PATIENCE).with_context(named)?;
    drop(requesting);
    let done = *done;
    let storing = Wait::new(move || format!("the guest at {stored} to be {done}"));
    let storing = Cell::new(Some(storing.hears().begin()));
    let bar = Bar::of_other(doing, *quiet, &session.interrupt);
    let waiting = || {
        if session.interrupt.requested() {
            return Err(Interrupted.into());
        }
        if bar.is_shown()
            && let Some(progress) = progress(socket)
        {
            // The progress bar shows more.
            drop(storing.take());
            // Interrupts are handled above.
            let _ = bar.update(progress);
        }
        Ok(())
    };
    let (status, body) = receive(stream, &waiting).with_context(named)?;
    drop(bar);
    match status {
        200 => Ok(serde_json::from_value(body).context("the guest's answer is not understood")?),
        204 => Ok(None),
        _ => Err(Fault::of(socket, status, &body).into()),
    }
}

/// What `GET /vm` reports about the files of a guest.
#[derive(Deserialize)]
pub(crate) struct GuestFiles {
    /// The snapshot that the guest was restored from: an absolute path, or an address.
    pub(crate) restored_from: Option<PathBuf>,
    /// Whether the files that its process writes are sealed.
    #[serde(default)]
    pub(crate) sealed: bool,
}

impl GuestFiles {
    /// Refuses, before a file is written, a guest whose files a key could not open.
    pub(crate) fn check_key(&self, socket: &Path, keys: &KeyArgs) -> Result<()> {
        if keys.is_given() && !self.sealed {
            bail!(
                "the guest at {} writes files that are not sealed: leave the key away, or give it to its snap run or snap \
                 restore",
                socket.display()
            );
        }
        Ok(())
    }
}

/// The files of the guest at this socket.
pub(crate) fn guest_files(socket: &Path) -> Result<GuestFiles> {
    let named = || format!("cannot ask the guest at {}", socket.display());
    let asking = socket.display().to_string();
    let asking = Wait::new(move || format!("the guest at {asking} to take a request"));
    let _asking = asking.at_most(PATIENCE).begin();
    let deadline = Instant::now() + PATIENCE;
    let in_time = || match Instant::now() < deadline {
        true => Ok(()),
        false => bail!("it does not answer"),
    };
    let stream = reach(socket).with_context(named)?;
    send(&stream, "GET", "/vm", &Value::Null, PATIENCE).with_context(named)?;
    let (_, state) = receive(stream, &in_time).with_context(named)?;
    serde_json::from_value(state).context("the guest's answer is not understood")
}

/// The progress of the guest's file, from its socket.
fn progress(socket: &Path) -> Option<Progress> {
    #[derive(Deserialize)]
    struct Storing {
        done_bytes: u64,
        total_bytes: u64,
    }
    let deadline = Instant::now() + STATE;
    let stream = connect(socket, STATE).ok()?;
    let in_time = || match Instant::now() < deadline {
        true => Ok(()),
        false => bail!("too late"),
    };
    send(&stream, "GET", "/vm", &Value::Null, STATE).ok()?;
    let (_, mut state) = receive(stream, &in_time).ok()?;
    let at = ["storing", "saving", "resetting"].into_iter().find(|at| !state[at].is_null())?;
    let Storing { done_bytes, total_bytes } = serde_json::from_value(state[at].take()).ok()?;
    Some(Progress::new(done_bytes, total_bytes))
}

/// Sends one request.
fn send(
    mut stream: &UnixStream,
    method: &str,
    path: &str,
    body: &Value,
    patience: Duration,
) -> Result<()> {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.set_write_timeout(Some(patience))?;
    match stream.write_all((head + &body).as_bytes()) {
        // It has closed the connection, after it sent the reason.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        sent => Ok(sent?),
    }
}

/// Receives an answer. `waiting` is called meanwhile; its error ends the wait.
fn receive(stream: UnixStream, waiting: &dyn Fn() -> Result<()>) -> Result<(u16, Value)> {
    stream.set_read_timeout(Some(LOOK))?;
    let mut patient = Patient { stream, waiting };
    let (status, body) = match read_response(&mut patient) {
        Ok(response) => response,
        Err(error) => {
            // An interrupt is reported rather than the error that it causes.
            waiting()?;
            return Err(error.into());
        }
    };
    let body = match body.is_empty() {
        true => Value::Null,
        false => serde_json::from_slice(&body).context("the answer is not JSON")?,
    };
    Ok((status, body))
}

/// A reader without a timeout that calls a check regularly.
struct Patient<'a> {
    stream: UnixStream,
    waiting: &'a dyn Fn() -> Result<()>,
}

impl Read for Patient<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.stream.read(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    (self.waiting)().map_err(io::Error::other)?;
                }
                read => return read,
            }
        }
    }
}
