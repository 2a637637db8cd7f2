//! The options of a server.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::handshake::SnapshotName;
use crate::background::populate::population::Populate;
use crate::failure::FailurePolicy;

/// The options of a server.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ServeOptions {
    /// What happens if a page of a client cannot be loaded: the page is poisoned, or the process of the client is
    /// killed.
    pub on_error: FailurePolicy,
    /// A client that has not completed its handshake after this time is refused.
    pub handshake_timeout: Duration,
    /// The limit of clients at the same time.
    pub clients: usize,
    /// The name of the snapshot, if clones may share its pages. `None`: they may not.
    pub share: Option<SnapshotName>,
    /// Pages that guests will probably need, which are loaded in advance. For clones they are loaded once into the
    /// memory that they share, when the first clone connects. For other clients they are loaded for each client, as
    /// [`PagerBuilder::prefetch`](crate::PagerBuilder::prefetch) does.
    pub prefetch: Option<Prefetched>,
    /// When pages that no guest has touched are loaded in the background, into the memory of each guest or into the
    /// memory that clones share. For clones, every mode except [`Populate::Off`] acts as [`Populate::Auto`].
    pub populate: Populate,
    /// See [`PagerBuilder::fault_overhead`](crate::PagerBuilder::fault_overhead). It is not used for clones.
    pub fault_overhead: Option<Duration>,
    /// The users that are served besides root and the user of this process.
    pub allow: AllowedUsers,
    /// The keeper that holds the handover state for the next server, if this one dies: see [`crate::keep`].
    pub keep: Option<KeepAt>,
}

/// Users that may connect besides root and the user of the server. The default is none.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[non_exhaustive]
pub struct AllowedUsers {
    /// User ids: the effective user of the client at the time of connect(2).
    pub uids: Vec<u32>,
    /// Group ids: the effective group of the client, or one of its supplementary groups.
    pub gids: Vec<u32>,
}

/// A function that lists pages, called on the thread that loads them. The list is a hint: see
/// [`PagerBuilder::prefetch`](crate::PagerBuilder::prefetch).
#[derive(Clone)]
pub struct Prefetched(Arc<dyn Fn() -> Vec<Range<u64>> + Send + Sync>);

impl Prefetched {
    /// The pages that `list` returns, as ranges of source offsets in bytes, in the order in which they are needed.
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

/// A keeper, and the name of the served snapshot.
#[derive(Clone, Debug)]
pub struct KeepAt {
    /// The socket of the keeper.
    pub socket: PathBuf,
    /// The name of the served snapshot. The guests of a dead server with the same name are taken over.
    pub snapshot: SnapshotName,
}

impl Default for ServeOptions {
    /// Poison, 5 s for the handshake, 4096 clients, [`Populate::Auto`].
    fn default() -> ServeOptions {
        ServeOptions {
            on_error: FailurePolicy::Poison,
            handshake_timeout: Duration::from_secs(5),
            clients: 4096,
            share: None,
            prefetch: None,
            populate: Populate::Auto,
            fault_overhead: None,
            allow: AllowedUsers::default(),
            keep: None,
        }
    }
}
