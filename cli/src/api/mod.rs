//! The control socket of a guest: JSON over HTTP/1.1 at a private unix socket. docs/api.md describes the requests.
//!
//! A connection has a thread of its own and limits in bytes and in time, so that no client holds up
//! the guest or another client.

mod bodies;
pub(crate) mod client;
mod response;
mod routes;
mod server;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pager::serve::{BindError, LOCK_TIMEOUT, Socket};

pub(crate) use bodies::CheckpointFields;
pub(crate) use routes::{Facts, PagerFigures};
pub(crate) use server::Serving;

use crate::leftovers;
use crate::live::Remote;
use crate::waits::Wait;

/// Where a guest can be controlled.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct ApiArgs {
    /// Create a socket to control the guest: pause, resume, snapshot, state, figures. See docs/api.md.
    #[arg(long, value_name = "SOCKET")]
    pub(crate) api: Option<PathBuf>,
}

impl ApiArgs {
    pub(crate) fn bind(&self) -> Result<Option<Api>> {
        self.api.as_deref().map(Api::bind).transpose()
    }
}

/// Makes a private socket with this name, by `bind`. The name is removed with this process, in whatever way it ends.
pub(crate) fn private_socket<T>(
    path: &Path,
    bind: impl FnOnce() -> Result<T, BindError>,
) -> Result<T> {
    let named = path.to_owned();
    let locking = move || format!("the lock of the folder of {}", named.display());
    let _locking = Wait::new(locking).at_most(LOCK_TIMEOUT).begin();
    let _creating = leftovers::creating();
    let bound = bind().with_context(|| format!("cannot listen at {}", path.display()))?;
    leftovers::name(path);
    Ok(bound)
}

/// A control socket that has no server yet. Its clients wait.
pub(crate) struct Api(Socket);

impl Api {
    fn bind(path: &Path) -> Result<Self> {
        Ok(Self(private_socket(path, || Socket::bind(path))?))
    }

    /// Answers clients until the returned value is dropped.
    pub(crate) fn serve(self, remote: Remote, facts: Facts) -> Result<Serving> {
        Serving::start(self.0, routes::Routes { remote, facts })
            .context("cannot serve the control socket")
    }
}
