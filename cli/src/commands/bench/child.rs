//! The processes that `snap bench` starts: `snap` itself, so that each run has its own memory, faults and times, and
//! users run the same program.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::exit::{ChildFailed, Interrupted};
use crate::session::Session;

/// Starts `snap`.
pub(super) struct Snap<'a> {
    program: PathBuf,
    session: &'a Session,
}

impl<'a> Snap<'a> {
    pub(super) fn new(session: &'a Session) -> Result<Self> {
        let program = std::env::current_exe().context("cannot find the program itself")?;
        Ok(Self { program, session })
    }

    /// Runs a command to its end and returns its output on stderr.
    pub(super) fn run<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Result<String> {
        let mut running = self.start(args)?;
        let mut output = String::new();
        running.stderr.read_to_string(&mut output).context("cannot read from snap")?;
        let status = running.child.wait().context("cannot wait for snap")?;
        if self.session.interrupt.requested() {
            return Err(Interrupted.into());
        }
        if !status.success() {
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            return Err(ChildFailed { message: message(&output, status), code }.into());
        }
        Ok(output)
    }

    /// Starts a command that runs until it is dropped, and waits for its first line on stderr.
    pub(super) fn serve<A: AsRef<OsStr>>(
        &self,
        args: impl IntoIterator<Item = A>,
    ) -> Result<Running> {
        let mut running = self.start(args)?;
        let mut line = String::new();
        running.stderr.read_line(&mut line).context("cannot read from snap")?;
        if line.starts_with("serving ") {
            return Ok(running);
        }
        if self.session.interrupt.requested() {
            return Err(Interrupted.into());
        }
        running.stderr.read_to_string(&mut line).context("cannot read from snap")?;
        let status = running.child.wait().context("cannot wait for snap")?;
        let code = status.code().and_then(|code| u8::try_from(code).ok());
        Err(ChildFailed { message: message(&line, status), code }.into())
    }

    fn start<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Result<Running> {
        if self.session.interrupt.requested() {
            return Err(Interrupted.into());
        }
        let mut child = Command::new(&self.program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))?;
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        let (Some(stderr), Ok(pidfd)) = (child.stderr.take(), pidfd) else {
            let _ = child.kill();
            let _ = child.wait();
            bail!("cannot watch over another process (pidfd_open)");
        };
        let pidfd = Arc::new(pidfd);
        self.session.interrupt.reaches(&pidfd);
        Ok(Running { child, stderr: BufReader::new(stderr), pidfd })
    }
}

/// A process that ends at the latest when this is dropped.
pub(super) struct Running {
    child: Child,
    stderr: BufReader<ChildStderr>,
    /// Held for `Interrupt`, which knows it weakly.
    pidfd: Arc<OwnedFd>,
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // The first signal lets it remove its files; the second one ends it immediately.
            for _ in 0..2 {
                let _ = pidfd_send_signal(&*self.pidfd, Signal::INT);
            }
            let _ = self.child.wait();
        }
    }
}

/// The error of a failed `snap`: its last line that begins with its name.
fn message(output: &str, status: std::process::ExitStatus) -> String {
    let message = output.lines().rev().find_map(|line| line.strip_prefix("snap: "));
    message.map_or_else(|| format!("snap: {status}\n{}", output.trim()), str::to_owned)
}
