//! Ends a client that is not served. A guest has already registered its memory, and would wait forever at its first
//! missing page. So it is killed, or the pages that it touches are poisoned: the policy for pages that cannot be loaded
//! decides.

use std::sync::Arc;

use super::error::RefuseError;
use super::event::Consequence;
use super::given::Given;
use super::peer::Peer;
use super::poison;
use super::state::ServerState;
use crate::failure::FailurePolicy;

/// Applies the policy to a client whose connection is already closed. If its pages are poisoned, this returns when its
/// process has ended.
pub(crate) fn end(server: &Arc<ServerState>, peer: &Arc<Peer>, given: Given, error: &RefuseError) {
    let pid = Some(peer.pid);
    if !given.is_guest() {
        return server.refuse(pid, error, Consequence::Closed);
    }
    let poisons = server.options.on_error == FailurePolicy::Poison;
    let fillers = if poisons { given.userfaultfds() } else { Vec::new() };
    if fillers.is_empty() {
        return server.refuse(pid, error, peer.kill());
    }
    let _listed = server.list_refused(peer);
    server.refuse(pid, error, Consequence::Poisoned);
    if let Err(error) = poison::touched_pages(peer, &fillers) {
        server.refuse(pid, &RefuseError::Poison(error), peer.kill());
    }
}
