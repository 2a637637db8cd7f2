//! The threads of a guest, and what the program does at the start of each.

use std::io;
use std::sync::OnceLock;
use std::thread::{Builder, JoinHandle};

/// What a thread of a guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ThreadKind {
    /// It runs a vCPU.
    Vcpu,
    /// It serves the virtio devices.
    Devices,
}

static HOOK: OnceLock<fn(ThreadKind)> = OnceLock::new();

/// Calls `hook` on each thread that this crate starts from now on for a vCPU or for devices, before the thread begins its
/// work. A program jails its threads with it. Only the first call in a process has an effect; the result is whether this
/// is the first.
///
/// A hook that cannot do its work must end the process: the thread continues when it returns.
pub fn on_thread_start(hook: fn(ThreadKind)) -> bool {
    HOOK.set(hook).is_ok()
}

/// Starts a thread.
///
/// # Errors
/// As pthread_create(3).
pub(crate) fn spawn<T: Send + 'static>(
    kind: ThreadKind,
    name: impl Into<String>,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    Builder::new().name(name.into()).spawn(move || {
        if let Some(hook) = HOOK.get() {
            hook(kind);
        }
        body()
    })
}
