//! The processes of the children of a fork.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::exit::Interrupted;
use crate::session::Session;

/// How long children may take to end, before they are killed.
const PATIENCE: Duration = Duration::from_secs(2);
/// The interval of checks for the end of a child.
const LOOK: Duration = Duration::from_millis(10);

/// What is to be started.
pub(super) struct Wanted<'a> {
    /// How many children.
    pub(super) count: u16,
    /// The file of each child's output, with `{}` for its number.
    pub(super) log: Option<&'a str>,
    /// Options that give them the keys of a sealed snapshot.
    pub(super) keys: &'a [OsString],
    /// Options of `snap restore`, with `{}`, too.
    pub(super) options: &'a [String],
}

/// The processes. Dropping this ends them: they have the time to remove their sockets.
pub(super) struct Children(Vec<Running>);

struct Running {
    process: Child,
    /// Held for `Interrupt`, too, which knows it weakly.
    pidfd: Arc<OwnedFd>,
}

impl Children {
    pub(super) fn start(
        wanted: &Wanted<'_>,
        file: &Path,
        pages: &Path,
        session: &Session,
    ) -> Result<Self> {
        let program = std::env::current_exe().context("cannot find the program itself")?;
        // Before the first child: one that had begun would be ended again.
        let logs = logs(wanted)?;
        let mut children = Self(Vec::new());
        for (number, log) in logs.into_iter().enumerate() {
            if session.interrupt.requested() {
                return Err(Interrupted.into());
            }
            let mut command = Command::new(&program);
            command
                .args(["restore", "--quiet", "--lazy", "--share"])
                .arg(pages)
                .arg(file)
                .args(wanted.keys);
            let options = wanted.options.iter().map(|option| numbered(option, number));
            command.args(options).stdin(Stdio::null()).stdout(log);
            let mut process = command.spawn().context("cannot start a child")?;
            let Ok(pidfd) = pidfd_open(Pid::from_child(&process), PidfdFlags::empty()) else {
                let _ = process.kill();
                let _ = process.wait();
                bail!("cannot watch over a child (pidfd_open)");
            };
            let pidfd = Arc::new(pidfd);
            session.interrupt.reaches(&pidfd);
            children.0.push(Running { process, pidfd });
        }
        Ok(children)
    }

    /// Their process ids.
    pub(super) fn ids(&self) -> Vec<u32> {
        self.0.iter().map(|child| child.process.id()).collect()
    }

    /// Waits for all of them. Returns the number and the status of those that have failed. `None`: the server, at the
    /// other end of `server`, has ended before.
    pub(super) fn wait(
        &mut self,
        server: BorrowedFd<'_>,
    ) -> Result<Option<Vec<(usize, ExitStatus)>>> {
        let mut failed = Vec::new();
        for (number, child) in self.0.iter_mut().enumerate() {
            let mut fds = [
                PollFd::new(&*child.pidfd, PollFlags::IN),
                PollFd::from_borrowed_fd(server, PollFlags::IN),
            ];
            while let Err(error) = poll(&mut fds, None) {
                if error != Errno::INTR {
                    return Err(error).context("cannot wait for a child");
                }
            }
            if fds[0].revents().is_empty() {
                return Ok(None);
            }
            let status = child.process.wait().context("cannot wait for a child")?;
            if !status.success() {
                failed.push((number, status));
            }
        }
        Ok(Some(failed))
    }

    fn are_running(&mut self) -> bool {
        self.0.iter_mut().any(|child| matches!(child.process.try_wait(), Ok(None)))
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        for child in &self.0 {
            // One that has ended needs no signal.
            let _ = pidfd_send_signal(&*child.pidfd, Signal::INT);
        }
        let deadline = Instant::now() + PATIENCE;
        while self.are_running() && Instant::now() < deadline {
            thread::sleep(LOOK);
        }
        for child in &mut self.0 {
            // One that has ended is not killed.
            let _ = child.process.kill();
            let _ = child.process.wait();
        }
    }
}

/// The text for the child of this number.
fn numbered(text: &str, number: usize) -> String {
    text.replace("{}", &number.to_string())
}

/// Creates the files for the outputs of all children, or none.
fn logs(wanted: &Wanted<'_>) -> Result<Vec<Stdio>> {
    let numbers = 0..usize::from(wanted.count);
    let Some(log) = wanted.log else { return Ok(numbers.map(|_| Stdio::null()).collect()) };
    let mut logs = Vec::new();
    for path in numbers.map(|number| numbered(log, number)) {
        match File::create_new(&path) {
            Ok(file) => logs.push((path, file)),
            Err(error) => {
                for (created, _) in logs {
                    // It is empty.
                    let _ = std::fs::remove_file(created);
                }
                return Err(error).with_context(|| format!("cannot create {path}"));
            }
        }
    }
    Ok(logs.into_iter().map(|(_, file)| file.into()).collect())
}
