//! `--on-restore`: a command that is run once, when the restored guest runs.
//!
//! In the jail no process can be started. So a shell is started before it, and waits for a line on its stdin, which is a
//! write to a descriptor that is open. If this process ends before that, the shell ends without running the command. When the
//! command has ended, the shell stays as a zombie until this process ends.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};

use crate::interrupt::spawn_unblocked;

/// The shell that waits. It writes the command's exit status to stdout, because waiting for a process is not allowed in the
/// jail either. The command's own output goes to stderr: stdout is the guest's.
const WAITS: &str = r#"read -r go || exit; sh -c "$0" </dev/null >&2; echo "$?""#;

/// Most bytes of an exit status and its line end.
const STATUS_BYTES: u64 = 8;

/// The command, and the control socket that it may use.
pub(crate) struct OnRestore {
    pub(crate) command: String,
    pub(crate) api: Option<PathBuf>,
}

/// What the command gets to know, as environment variables.
pub(crate) struct Restored<'a> {
    /// Of the snapshot: `SNAP_ID`.
    pub(crate) id: uuid::Uuid,
    /// Of the guest, if it has one: `SNAP_GENERATION_ID`.
    pub(crate) generation_id: Option<[u8; 16]>,
    /// The control socket, if there is one: `SNAP_API`.
    pub(crate) api: Option<&'a Path>,
}

/// A command that waits for the guest to run.
pub(crate) struct Hook {
    go: ChildStdin,
    status: ChildStdout,
}

/// Why the command of `--on-restore` was not successful.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HookError {
    #[error("--on-restore: the command cannot be run")]
    Run(#[from] io::Error),
    #[error("--on-restore: the command failed: exit status {0}; the guest was stopped")]
    Failed(u32),
    #[error("--on-restore: the shell that runs the command was killed; the guest was stopped")]
    Killed,
}

impl Hook {
    /// Starts the shell that waits. This is before the jail.
    pub(crate) fn start(command: &str, restored: &Restored<'_>) -> Result<Self, HookError> {
        let mut shell = Command::new("sh");
        shell.args(["-c", WAITS, command]).stdin(Stdio::piped()).stdout(Stdio::piped());
        for name in ["SNAP_GENERATION_ID", "SNAP_API"] {
            // Those of a `snap` that has started this one.
            shell.env_remove(name);
        }
        shell.env("SNAP_ID", restored.id.to_string());
        if let Some(id) = restored.generation_id {
            let hex: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
            shell.env("SNAP_GENERATION_ID", hex);
        }
        if let Some(api) = restored.api {
            shell.env("SNAP_API", std::path::absolute(api)?);
        }
        let mut child = spawn_unblocked(&mut shell)?;
        let ends = (child.stdin.take(), child.stdout.take());
        let (Some(go), Some(status)) = ends else {
            return Err(io::Error::from(io::ErrorKind::BrokenPipe).into());
        };
        Ok(Self { go, status })
    }

    /// Runs the command on a thread. `failed` is called if it is not successful.
    pub(crate) fn run(self, failed: impl FnOnce(HookError) + Send + 'static) -> io::Result<()> {
        let Self { mut go, status } = self;
        let run = move || {
            if let Err(error) = go.write_all(b"\n").map_err(Into::into).and_then(|()| end(status)) {
                failed(error);
            }
        };
        std::thread::Builder::new().name("on-restore".into()).spawn(run).map(drop)
    }
}

/// Waits for the command's exit status.
fn end(status: impl Read) -> Result<(), HookError> {
    let mut text = String::new();
    status.take(STATUS_BYTES).read_to_string(&mut text)?;
    match text.trim_end().parse() {
        Ok(0) => Ok(()),
        Ok(status) => Err(HookError::Failed(status)),
        Err(_) => Err(HookError::Killed),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{RecvTimeoutError, channel};
    use std::time::Duration;

    use super::*;

    fn start(command: &str) -> Hook {
        let restored = Restored { id: uuid::Uuid::nil(), generation_id: None, api: None };
        Hook::start(command, &restored).expect("sh starts")
    }

    /// `None`: it was successful.
    fn outcome(command: &str) -> Option<String> {
        let (failed, received) = channel();
        let run = start(command).run(move |error| drop(failed.send(error.to_string())));
        run.expect("a thread starts");
        match received.recv_timeout(Duration::from_secs(60)) {
            Ok(error) => Some(error),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("it hangs"),
        }
    }

    #[test]
    fn the_status_of_the_command_is_reported() {
        assert_eq!(outcome("true"), None);
        assert!(outcome("exit 7").expect("it fails").contains("exit status 7"));
        assert!(outcome("kill -9 $$").expect("it fails").contains("exit status 137"));
        assert!(outcome("kill -9 $PPID").expect("it fails").contains("was killed"));
        // Its output is no status, and what it leaves running is not waited for.
        assert_eq!(outcome("echo 5; sleep 5 & true"), None);
    }

    #[test]
    fn a_guest_that_never_runs_runs_no_command() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("ran");
        let hook = start(&format!("touch {}", file.display()));
        let Hook { go, mut status } = hook;
        drop(go);
        let mut text = String::new();
        status.read_to_string(&mut text).expect("the shell ends");
        assert!(text.is_empty() && !file.exists(), "{text}");
    }
}
