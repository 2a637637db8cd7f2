//! A page server in a process of its own, which can be killed: the test binary, started again. And a keeper in this
//! process.
#![allow(dead_code, missing_docs, unreachable_pub)]

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use pager::keep::{KeepOptions, Keeper};
use pager::serve::{KeepAt, ServeEvent, ServeOptions, Server, SnapshotName};
use pager::{FailurePolicy, SourceError};

use super::support::{PAGE, is_lost, source_of};

const SETTINGS: &str = "PAGER_TEST_DAEMON";
/// Longer than any step takes, so that a hang becomes a failure.
const HUNG: Duration = Duration::from_secs(60);

/// A server, as the test sees it.
pub struct Daemon {
    pub child: Child,
    events: Receiver<String>,
    /// The lines that it has printed before it listens.
    early: Vec<String>,
}

impl Daemon {
    /// Starts one of `pages` stamped pages. With the policy `lossy` it poisons, some pages cannot be loaded, and some
    /// loads fail once. The test binary must have a test `daemon_process` that calls [`run`].
    pub fn start(folder: &Path, pages: usize, policy: &str) -> Daemon {
        let own = Command::new(std::env::current_exe().expect("this test"));
        Daemon::start_by(own, folder, pages, policy)
    }

    /// In a PID namespace of its own, from which it does not see this process. That takes root.
    pub fn start_apart(folder: &Path, pages: usize, policy: &str) -> Daemon {
        let mut apart = Command::new("unshare");
        apart.args(["--pid", "--fork", "--kill-child"]);
        apart.arg(std::env::current_exe().expect("this test"));
        Daemon::start_by(apart, folder, pages, policy)
    }

    fn start_by(mut program: Command, folder: &Path, pages: usize, policy: &str) -> Daemon {
        let settings = format!("{pages} {policy} {}", folder.display());
        let mut child = program
            .args(["--exact", "daemon_process", "--nocapture", "--test-threads=1"])
            .env(SETTINGS, settings)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("it starts");
        let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let (sender, events) = channel();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if let Some((_, event)) = line.split_once("daemon: ") {
                    let _ = sender.send(event.to_owned());
                }
            }
        });
        let mut daemon = Daemon { child, events, early: Vec::new() };
        loop {
            match daemon.expect("") {
                event if event.contains("listens") => return daemon,
                event => daemon.early.push(event),
            }
        }
    }

    /// Waits until it has taken over this number of guests of a dead server.
    pub fn takes_over(&self, guests: usize) {
        let early = self.early.iter().filter(|event| event.contains("taken over")).count();
        (early..guests).for_each(|_| drop(self.expect("taken over")));
    }

    /// The next line that contains this text.
    #[track_caller]
    pub fn expect(&self, what: &str) -> String {
        loop {
            let event = self.events.recv_timeout(HUNG).expect("the server has sent an event");
            if event.contains(what) {
                return event;
            }
        }
    }

    pub fn kill(self) {
        drop(self);
    }

    /// Kills it by SIGKILL.
    pub fn end(&mut self) {
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it ends");
    }
}

/// A test that fails leaves no server running.
impl Drop for Daemon {
    fn drop(&mut self) {
        self.end();
    }
}

/// The name of the socket of the server in the folder.
pub fn socket(folder: &Path) -> PathBuf {
    folder.join("pages.sock")
}

/// The process of the server. It does nothing without settings.
pub fn run() {
    let Ok(settings) = std::env::var(SETTINGS) else {
        return;
    };
    let mut words = settings.splitn(3, ' ');
    let mut word = || words.next().expect("three words");
    let (pages, policy, folder) =
        (word().parse().expect("a number"), word(), PathBuf::from(word()));
    // A page is loaded with seven others of its block, and one from far away.
    let lossy = policy == "lossy";
    let loads = Arc::new(AtomicU64::new(0));
    let source = source_of(pages, move |offset, answer| {
        let page = offset as usize / PAGE;
        if lossy && is_lost(page) {
            return Err(SourceError::permanent("injected"));
        }
        if lossy && loads.fetch_add(1, Ordering::Relaxed) % 50 == 49 {
            return Err(SourceError::transient("injected"));
        }
        answer.push(page);
        let block = page - page % 8;
        let around = (block..(block + 8).min(pages)).chain([(page * 7 + 211) % pages]);
        around
            .filter(|&other| other != page && !(lossy && is_lost(other)))
            .for_each(|other| answer.push(other));
        Ok(())
    });
    let snapshot =
        SnapshotName { layers: vec!["test".into()], memory_bytes: (pages * PAGE) as u64 };
    let mut options = ServeOptions::default();
    options.share = Some(snapshot.clone());
    options.keep = Some(KeepAt { socket: folder.join("keep.sock"), snapshot });
    options.on_error = match policy {
        "kill" => FailurePolicy::Kill,
        _ => FailurePolicy::Poison,
    };
    let print = |event: ServeEvent<'_>| {
        let text = format!("\ndaemon: {event:?}\n").replace("TakenOver", "taken over");
        let _ = std::io::stdout().write_all(text.as_bytes());
    };
    // Before it prints anything, because tests count its descriptors.
    let (stop, _never) = std::io::pipe().expect("a pipe");
    // Its socket exists before it takes over guests.
    let server = Server::bind(socket(&folder), source, options, print).expect("it binds");
    println!("\ndaemon: listens");
    server.run(stop.as_fd()).expect("it can poll");
}

/// A keeper, on a thread of this process.
pub struct Keeping {
    events: Receiver<String>,
    stop: Option<std::io::PipeWriter>,
    thread: Option<JoinHandle<usize>>,
}

impl Keeping {
    pub fn start(folder: &Path, timeout: Duration) -> Keeping {
        Keeping::of(folder, timeout, KeepOptions::default().guests)
    }

    /// With this limit of guests.
    pub fn of(folder: &Path, timeout: Duration, guests: usize) -> Keeping {
        let (sender, events) = channel();
        let mut options = KeepOptions::default();
        (options.takeover_timeout, options.guests) = (timeout, guests);
        let keeper = Keeper::bind(folder.join("keep.sock"), options, move |event| {
            let _ = sender.send(format!("{event:?}"));
        });
        let keeper = keeper.expect("it binds");
        let (reader, stop) = std::io::pipe().expect("a pipe");
        let thread = thread::spawn(move || keeper.run(reader.as_fd()).expect("it can poll"));
        Keeping { events, stop: Some(stop), thread: Some(thread) }
    }

    /// The next line that contains this text.
    #[track_caller]
    pub fn expect(&self, what: &str) -> String {
        loop {
            let event = self.events.recv_timeout(HUNG).expect("the keeper has sent an event");
            if event.contains(what) {
                return event;
            }
        }
    }

    /// Stops it. Returns how many guests it has killed.
    pub fn finish(mut self) -> usize {
        drop(self.stop.take());
        self.thread.take().expect("once").join().expect("the keeper does not panic")
    }
}
