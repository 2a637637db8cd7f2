//! Ctrl-C and SIGTERM: the first asks everything to come to a clean end, the second ends at once.

use std::io::PipeWriter;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use anyhow::{Context, Result};
use pager::serve::ServerHandle;
use rustix::process::{Signal, pidfd_send_signal};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vmm::VmHandle;

use crate::terminal;

/// Whether the user has interrupted; shared by all who must know.
#[derive(Clone, Default)]
pub(crate) struct Interrupt(Arc<Shared>);

#[derive(Default)]
struct Shared {
    requested: AtomicBool,
    guest: Mutex<Option<VmHandle>>,
    server: Mutex<Option<Serving>>,
    /// Processes of ours, for as long as somebody waits for them.
    children: Mutex<Vec<Weak<OwnedFd>>>,
}

/// A server, or a keeper, which has no handle; and what to drop to stop it.
struct Serving {
    server: Option<ServerHandle>,
    stop: Option<PipeWriter>,
}

impl Interrupt {
    /// Takes the two signals over for the rest of the process.
    pub(crate) fn install() -> Result<Self> {
        let interrupt = Self::default();
        let mut signals =
            Signals::new([SIGINT, SIGTERM]).context("cannot handle SIGINT and SIGTERM")?;
        let told = interrupt.clone();
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for _ in signals.forever() {
                    told.request();
                }
            })
            .context("cannot start the thread that waits for signals")?;
        Ok(interrupt)
    }

    pub(crate) fn requested(&self) -> bool {
        self.0.requested.load(Ordering::SeqCst)
    }

    /// Pauses this guest when an interrupt comes, or now if one has come.
    pub(crate) fn pauses(&self, guest: VmHandle) {
        if self.requested() {
            guest.request_pause();
        }
        *self.0.guest.lock().unwrap_or_else(PoisonError::into_inner) = Some(guest);
        // One that came in between has not found the guest.
        self.pause_guest();
    }

    /// The first interrupt drops `stop`; the second ends the guests that still need the server, which would
    /// wait for ever without it.
    pub(crate) fn stops(&self, server: Option<ServerHandle>, stop: PipeWriter) {
        *self.server() = Some(Serving { server, stop: Some(stop) });
        if self.requested() {
            self.stop_server();
        }
    }

    /// Passes an interrupt on to the process of this pidfd, or one that has come already, for as long as
    /// the pidfd is there.
    pub(crate) fn reaches(&self, process: &Arc<OwnedFd>) {
        let mut children = self.children();
        children.retain(|child| child.strong_count() > 0);
        children.push(Arc::downgrade(process));
        drop(children);
        if self.requested() {
            self.interrupt_children();
        }
    }

    fn request(&self) {
        if self.0.requested.swap(true, Ordering::SeqCst) {
            if let Some(serving) = &*self.server() {
                let _ = serving.server.as_ref().map(ServerHandle::kill_guests);
            }
            terminal::restore();
            std::process::exit(130);
        }
        self.pause_guest();
        self.stop_server();
        self.interrupt_children();
    }

    fn interrupt_children(&self) {
        for child in self.children().iter().filter_map(Weak::upgrade) {
            // One that has ended already needs no telling.
            let _ = pidfd_send_signal(&*child, Signal::INT);
        }
    }

    fn children(&self) -> MutexGuard<'_, Vec<Weak<OwnedFd>>> {
        self.0.children.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop_server(&self) {
        if let Some(serving) = &mut *self.server() {
            drop(serving.stop.take());
        }
    }

    fn server(&self) -> MutexGuard<'_, Option<Serving>> {
        self.0.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pause_guest(&self) {
        if self.requested() {
            let guest = self.0.guest.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(guest) = &*guest {
                guest.request_pause();
            }
        }
    }
}
