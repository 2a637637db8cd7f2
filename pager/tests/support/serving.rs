//! A server in the process of a test, and its events.
#![allow(dead_code, missing_docs, unreachable_pub)]

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pager::serve::{ServeEvent, ServeOptions, Server, ServerHandle, Socket, SocketAccess};
use pager::{PageSource, Stats, VecSource, with_causes};

use super::support::{PAGE, stamped};
use super::vmm::Vmm;

/// Longer than any step takes, so that a hang becomes a failure.
pub const HUNG: Duration = Duration::from_secs(60);

pub struct Serving {
    pub socket: PathBuf,
    pub handle: ServerHandle,
    events: Receiver<String>,
    stop: Option<std::io::PipeWriter>,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Serving {
    pub fn start(source: Arc<dyn PageSource>, options: ServeOptions) -> Serving {
        Serving::for_users(source, options, SocketAccess::default())
    }

    /// With a socket of this owner and mode, in a folder that every user can enter.
    pub fn for_users(
        source: Arc<dyn PageSource>,
        options: ServeOptions,
        access: SocketAccess,
    ) -> Serving {
        let folder = tempfile::tempdir().expect("a folder");
        let everyone = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(folder.path(), everyone).expect("its mode can be set");
        let socket = folder.path().join("pager.sock");
        let (sender, events) = channel();
        let on_event = move |event: ServeEvent<'_>| {
            let text = match event {
                ServeEvent::Served { memory_bytes, .. } => format!("served {memory_bytes}"),
                ServeEvent::Refused { error, consequence, .. } => {
                    format!("refused: {}; {consequence:?}", with_causes(error))
                }
                ServeEvent::Failed { failure, .. } => format!("failed: {failure}"),
                ServeEvent::Ended { .. } => "ended".into(),
                other => format!("{other:?}"),
            };
            let _ = sender.send(text);
        };
        let bound = Socket::bind_for(&socket, access).expect("it binds");
        let server = Server::at(bound, source, options, on_event).expect("it starts");
        let handle = server.handle();
        let (reader, stop) = std::io::pipe().expect("a pipe");
        let thread = thread::spawn(move || {
            server.run(std::os::fd::AsFd::as_fd(&reader)).expect("it can poll");
        });
        Serving { socket, handle, events, stop: Some(stop), thread: Some(thread), _folder: folder }
    }

    pub fn stamped(pages: usize) -> Serving {
        let source = Arc::new(VecSource::new(stamped(pages), 16 * PAGE));
        Serving::start(source, ServeOptions::default())
    }

    #[track_caller]
    pub fn expect(&self, what: &str) {
        let event = self.next_event();
        assert!(event.contains(what), "{what:?} is not in: {event}");
    }

    #[track_caller]
    pub fn next_event(&self) -> String {
        self.events.recv_timeout(HUNG).expect("the server has sent an event")
    }

    /// A page is usable a moment before it is counted.
    #[track_caller]
    pub fn until_loaded(&self, vmm: &Vmm) {
        let begun = Instant::now();
        while self.stats(vmm).expect("it is served").pages.missing > 0 {
            assert!(begun.elapsed() < HUNG, "{:?}", self.stats(vmm));
            thread::yield_now();
        }
    }

    pub fn stats(&self, vmm: &Vmm) -> Option<Stats> {
        let guests = self.handle.guests();
        guests.into_iter().find(|(pid, _)| *pid as u32 == vmm.pid()).map(|(_, stats)| stats)
    }

    /// From now on it accepts no clients.
    pub fn stop(&mut self) {
        drop(self.stop.take());
    }

    pub fn finish(mut self) {
        self.stop();
        self.thread.take().expect("once").join().expect("the server does not panic");
    }
}
