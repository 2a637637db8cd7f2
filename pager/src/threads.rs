//! The threads of this crate, and what the program does at the start of each.

use std::io;
use std::sync::OnceLock;
use std::thread::{Builder, JoinHandle};

static HOOK: OnceLock<fn()> = OnceLock::new();

/// Calls `hook` on each thread that this crate starts from now on, before the thread begins its work. A program jails its
/// threads with it. Only the first call in a process has an effect; the result is whether this is the first.
///
/// The hook must be set before any pager starts if all threads are to call it. A hook that cannot do its work must end
/// the process: the thread continues when it returns.
pub fn on_thread_start(hook: fn()) -> bool {
    HOOK.set(hook).is_ok()
}

/// Starts a thread.
///
/// # Errors
/// As pthread_create(3).
pub(crate) fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    Builder::new().name(name.into()).spawn(move || {
        if let Some(hook) = HOOK.get() {
            hook();
        }
        body()
    })
}
