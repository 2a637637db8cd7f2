//! The one thread that all requests of this process run on.

use std::future::Future;
use std::io;
use std::sync::OnceLock;

use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;

static RUNTIME: OnceLock<io::Result<Runtime>> = OnceLock::new();

fn runtime() -> io::Result<&'static Runtime> {
    let started = RUNTIME.get_or_init(|| {
        Builder::new_multi_thread()
            .worker_threads(1)
            // These write to the cache, and read `file://`.
            .max_blocking_threads(32)
            .thread_name("objects")
            .enable_all()
            .build()
    });
    started.as_ref().map_err(|error| io::Error::new(error.kind(), error.to_string()))
}

/// Whether the thread can be started. After that, [`spawn`] does not fail.
pub(crate) fn start() -> io::Result<()> {
    runtime().map(drop)
}

/// Runs a future on the thread of the requests.
pub(crate) fn spawn<F>(future: F) -> io::Result<JoinHandle<F::Output>>
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    Ok(runtime()?.spawn(future))
}

/// Waits for a future, on the calling thread. The thread of the requests must not call this.
pub(crate) fn wait<F: Future>(future: F) -> io::Result<F::Output> {
    Ok(runtime()?.block_on(future))
}
