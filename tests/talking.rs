//! A running command: its messages, and its end.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use crate::support::{Ran, SNAP, end_of, signal};

/// A hang guard.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// It is killed when it is dropped.
pub(crate) struct Talking {
    child: Option<Child>,
    /// Lines of its stderr, and of its stdout.
    errors: Receiver<String>,
    lines: Receiver<String>,
    /// What was read of its stderr.
    printed: String,
}

impl Talking {
    pub(crate) fn start(mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("it starts");
        let errors = lines_of(child.stderr.take().expect("it is piped"));
        let lines = lines_of(child.stdout.take().expect("it is piped"));
        Self { child: Some(child), errors, lines, printed: String::new() }
    }

    /// `snap` with these arguments.
    pub(crate) fn snap<A: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = A>) -> Self {
        let mut command = Command::new(SNAP);
        command.args(args);
        Self::start(command)
    }

    /// Waits for a line on stderr that has all of these texts.
    #[track_caller]
    pub(crate) fn prints(&mut self, what: &[&str]) -> String {
        loop {
            let Ok(line) = self.errors.recv_timeout(LONG) else {
                panic!("{what:?} is not printed; only: {}", self.printed);
            };
            self.printed += &format!("{line}\n");
            if what.iter().all(|what| line.contains(what)) {
                return line;
            }
        }
    }

    /// Waits for this many beats of its guest, from now on.
    #[track_caller]
    pub(crate) fn beats(&mut self, count: usize) {
        while self.lines.try_recv().is_ok() {}
        let mut seen = 0;
        while seen < count {
            let Ok(line) = self.lines.recv_timeout(LONG) else {
                panic!("the guest does not run: {}", self.printed);
            };
            if line.starts_with("beat ") {
                assert!(line.ends_with(" ok"), "{line}");
                seen += 1;
            }
        }
    }

    /// Waits for a beat of its guest: `false` if it ends before.
    #[track_caller]
    pub(crate) fn beats_or_ends(&mut self) -> bool {
        loop {
            match self.lines.recv_timeout(LONG) {
                Ok(line) if line.starts_with("beat ") => return true,
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => return false,
                Err(RecvTimeoutError::Timeout) => panic!("it hangs: {}", self.printed),
            }
        }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    pub(crate) fn signal(&self, name: &str) {
        signal(self.id(), name);
    }

    /// Stops it as Ctrl-Z does; it is stopped when this returns.
    pub(crate) fn stop(&self) {
        self.signal("STOP");
        while state(self.id()) != Some('T') {
            std::thread::yield_now();
        }
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn end(mut self) -> Ran {
        let ended = end_of(self.child.take().expect("it runs"));
        self.printed.extend(self.errors.iter().map(|line| line + "\n"));
        let stdout = self.lines.iter().map(|line| line + "\n").collect();
        Ran { code: ended.status.code(), stdout, stderr: std::mem::take(&mut self.printed) }
    }

    /// Interrupts it, which ends it.
    #[track_caller]
    pub(crate) fn interrupt(self) -> Ran {
        self.signal("INT");
        self.end().failed(130, &["interrupted"])
    }
}

impl Drop for Talking {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn lines_of(stream: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    lines
}

/// The state of a process: see proc_pid_stat(5).
pub(crate) fn state(process: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Waits until `path` exists.
#[track_caller]
pub(crate) fn wait_for(path: &Path) {
    wait_until(&format!("{} does not exist", path.display()), || path.symlink_metadata().is_ok());
}

/// Waits until `is` returns true.
#[track_caller]
pub(crate) fn wait_until(or: &str, is: impl Fn() -> bool) {
    let begun = std::time::Instant::now();
    while !is() {
        assert!(begun.elapsed() < LONG, "{or}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
