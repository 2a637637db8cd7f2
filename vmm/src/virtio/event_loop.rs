//! The one thread on which all devices of a guest work. It sleeps until a descriptor is readable.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::threads::{self, ThreadKind};

/// Descriptors handled in one turn.
const EVENTS_MAX: usize = 32;
/// The number of no device.
const EXIT_TOKEN: u64 = u64::MAX;

/// The devices' thread. It ends when the last reference to this is dropped.
pub struct EventLoop {
    shared: Arc<Shared>,
    exit: EventFd,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    epoll: Epoll,
    listeners: Mutex<Listeners>,
}

#[derive(Default)]
struct Listeners {
    next_id: u32,
    by_id: HashMap<u32, Weak<dyn Listener>>,
}

/// A listener that is called when one of its descriptors is ready.
pub(super) trait Listener: Send + Sync {
    /// `source` is the number that the descriptor was added with.
    fn ready(&self, source: u32, events: EventSet);
}

/// Watches descriptors for a listener, from any thread.
#[derive(Clone)]
pub(super) struct Watcher {
    shared: Arc<Shared>,
    listener_id: u32,
}

impl Watcher {
    /// Calls the listener when `fd` becomes readable or writable, or when its other end hangs up: once for each
    /// change, so that a descriptor that is not read does not keep the thread busy. It ends when `fd` is closed.
    pub(super) fn watch_changes(&self, source: u32, fd: &impl AsRawFd) -> io::Result<()> {
        let changes = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        self.watch(source, fd, changes)
    }

    /// Calls the listener as long as `fd` is readable.
    pub(super) fn watch_readable(&self, source: u32, fd: &impl AsRawFd) -> io::Result<()> {
        self.watch(source, fd, EventSet::IN)
    }

    fn watch(&self, source: u32, fd: &impl AsRawFd, events: EventSet) -> io::Result<()> {
        let token = u64::from(self.listener_id) << 32 | u64::from(source);
        let event = EpollEvent::new(events, token);
        self.shared.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)
    }
}

impl EventLoop {
    /// Starts the thread.
    ///
    /// # Errors
    /// The error of creating the epoll, the eventfd or the thread.
    pub fn start() -> io::Result<Arc<EventLoop>> {
        let exit = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let shared =
            Arc::new(Shared { epoll: Epoll::new()?, listeners: Mutex::new(Listeners::default()) });
        let event = EpollEvent::new(EventSet::IN, EXIT_TOKEN);
        shared.epoll.ctl(ControlOperation::Add, exit.as_raw_fd(), event)?;
        let on_thread = Arc::clone(&shared);
        let thread = threads::spawn(ThreadKind::Devices, "devices", move || on_thread.run())?;
        Ok(Arc::new(EventLoop { shared, exit, thread: Some(thread) }))
    }

    /// Adds a listener, as long as another reference to it exists. Returns its number.
    pub(super) fn add_listener(&self, listener: Weak<dyn Listener>) -> u32 {
        let mut listeners = self.shared.lock();
        let id = listeners.next_id;
        listeners.next_id += 1;
        listeners.by_id.insert(id, listener);
        id
    }

    /// The watcher of listener `id`.
    pub(super) fn watcher(&self, id: u32) -> Watcher {
        Watcher { shared: Arc::clone(&self.shared), listener_id: id }
    }

    /// Undoes [`Watcher`].
    pub(super) fn unwatch(&self, fd: &impl AsRawFd) {
        // It fails only for a descriptor that is not watched.
        let _ =
            self.shared.epoll.ctl(ControlOperation::Delete, fd.as_raw_fd(), EpollEvent::default());
    }

    /// Undoes [`EventLoop::add_listener`].
    pub(super) fn remove_listener(&self, id: u32) {
        self.shared.lock().by_id.remove(&id);
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        // The counter starts at 0: adding 1 cannot fail.
        let _ = self.exit.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self) {
        let mut events = [EpollEvent::default(); EVENTS_MAX];
        loop {
            // Without a timeout, it fails only when a signal comes.
            let count = self.epoll.wait(-1, &mut events).unwrap_or(0);
            for event in &events[..count] {
                if event.data() == EXIT_TOKEN {
                    return;
                }
                let (id, source) = ((event.data() >> 32) as u32, event.data() as u32);
                let listener = self.lock().by_id.get(&id).and_then(Weak::upgrade);
                if let Some(listener) = listener {
                    listener.ready(source, event.event_set());
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Listeners> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
