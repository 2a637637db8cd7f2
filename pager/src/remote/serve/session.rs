//! A client that is served.

use std::sync::Arc;

use super::metrics::Guest;
use super::peer::Peer;
use crate::pager::Pager;
use crate::remote::keep::Link;

/// A client that is served.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) id: u64,
    pub(crate) peer: Arc<Peer>,
    pub(crate) pager: Pager,
    /// The keeper holds the handover state of this client. This drops after the pager.
    pub(crate) kept: Option<KeptGuest>,
}

impl Session {
    pub(super) fn stats(&self) -> Guest {
        let Session { id, peer, pager, .. } = self;
        Guest { id: *id, pid: peer.pid, stats: pager.stats(), regions: pager.region_stats() }
    }
}

/// A guest that the keeper holds. Dropping this makes the keeper forget it. A server that is killed drops nothing.
#[derive(Debug)]
pub(crate) struct KeptGuest {
    pub(super) keeper: Arc<Link>,
    pub(super) id: u64,
}

impl Drop for KeptGuest {
    fn drop(&mut self) {
        self.keeper.forget(self.id);
    }
}

/// A connection that the keeper holds for the next server. Dropping this makes the keeper forget it.
#[derive(Debug)]
pub(crate) struct Held {
    keeper: Arc<Link>,
    connection: Option<u64>,
}

impl Held {
    pub(super) fn new(keeper: &Arc<Link>, connection: u64) -> Held {
        Held { keeper: Arc::clone(keeper), connection: Some(connection) }
    }

    pub(super) fn connection(&self) -> Option<u64> {
        self.connection
    }

    /// The keeper has the guest of this connection by now.
    pub(super) fn replaced(&mut self) {
        self.connection = None;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(connection) = self.connection {
            self.keeper.release(connection);
        }
    }
}
