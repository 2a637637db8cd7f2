//! The state that all threads of a server share.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::error::RefuseError;
use super::event::{Consequence, OnEvent, ServeEvent};
use super::metrics::Totals;
use super::options::ServeOptions;
use super::peer::Peer;
use super::session::Session;
use super::spare::Spare;
use crate::remote::keep::Link;
use crate::remote::shared::{ImageLoader, SharedImage};
use crate::source::page_source::PageSource;

/// The state that all threads of a server share.
pub(crate) struct ServerState {
    pub(crate) source: Arc<dyn PageSource>,
    pub(crate) options: ServeOptions,
    pub(crate) on_event: OnEvent,
    /// The file that clones share. It is created for the first clone.
    pub(crate) image: Mutex<Option<SharedFile>>,
    /// The clients, and the number of their threads.
    pub(super) guests: Mutex<Guests>,
    pub(super) spare: Mutex<Spare>,
    pub(super) emptied: Condvar,
    /// An eventfd that is readable from the moment on at which the server accepts no more clients.
    pub(super) ending: OwnedFd,
    pub(super) next_id: AtomicU64,
    pub(super) keeper: Option<Arc<Link>>,
}

/// A file that clones share, and its loader.
#[derive(Clone)]
pub(crate) struct SharedFile {
    pub(crate) image: Arc<SharedImage>,
    pub(crate) ahead: Option<Arc<ImageLoader>>,
}

/// The clients of a server.
#[derive(Default)]
pub(super) struct Guests {
    pub(super) sessions: BTreeMap<u64, Arc<Session>>,
    /// Refused clients whose pages are poisoned.
    pub(super) refused: BTreeMap<u64, Arc<Peer>>,
    pub(super) threads: usize,
    /// The sums of clients that have ended.
    pub(super) ended: Totals,
}

impl ServerState {
    pub(crate) fn new_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn keeper(&self) -> Option<&Arc<Link>> {
        self.keeper.as_ref()
    }

    pub(crate) fn refuse(&self, pid: Option<i32>, error: &RefuseError, consequence: Consequence) {
        (self.on_event)(ServeEvent::Refused { pid, error, consequence });
    }

    /// Lists a refused client, which needs this process, until the result is dropped.
    pub(crate) fn list_refused(self: &Arc<ServerState>, peer: &Arc<Peer>) -> Entry {
        let id = self.new_id();
        self.guests().refused.insert(id, Arc::clone(peer));
        Entry { server: Arc::clone(self), id }
    }

    /// Lists a session until the result is dropped.
    pub(crate) fn enter(self: &Arc<ServerState>, id: u64, session: Arc<Session>) -> Entry {
        self.guests().sessions.insert(id, session);
        Entry { server: Arc::clone(self), id }
    }

    /// The statistics of all clients, as JSON in one line.
    pub(crate) fn stats_json(&self) -> String {
        let guests: Vec<_> = self.sessions().iter().map(|session| session.stats()).collect();
        // This does not fail: JSON can represent numbers and fixed names.
        serde_json::to_string(&guests).unwrap_or_default()
    }

    pub(super) fn sessions(&self) -> Vec<Arc<Session>> {
        self.guests().sessions.values().cloned().collect()
    }

    pub(super) fn wait_until_empty(&self) {
        let mut guests = self.guests();
        while guests.threads > 0 {
            guests = self.emptied.wait(guests).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn guests(&self) -> MutexGuard<'_, Guests> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for ServerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerState").field("options", &self.options).finish_non_exhaustive()
    }
}

/// A listed session or refused client.
pub(crate) struct Entry {
    server: Arc<ServerState>,
    id: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut guests = self.server.guests();
        guests.refused.remove(&self.id);
        if let Some(session) = guests.sessions.remove(&self.id) {
            guests.ended.add(&session.pager.stats());
        }
    }
}

/// Counts the thread of a client until it is dropped, even by a panic.
pub(super) struct CountedThread(pub(super) Arc<ServerState>);

impl Drop for CountedThread {
    fn drop(&mut self) {
        self.0.guests().threads -= 1;
        self.0.emptied.notify_all();
    }
}
