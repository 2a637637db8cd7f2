//! Runs `snap`, and checks what this host can do.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use pager::with_causes;
use serde_json::Value;
use tempfile::TempDir;

/// The longest that any one command may take before it counts as hung.
const HUNG: Duration = Duration::from_secs(120);

/// The binary under test.
pub(crate) const SNAP: &str = env!("CARGO_BIN_EXE_snap");

/// Whether this host can run guests and serve their faults. If not, this prints so on stderr, not captured by the test
/// harness, and the test is skipped; with `SNAP_REQUIRE_VM` set, a skip is a failure.
pub(crate) fn host_can_run(place: &str) -> bool {
    // The test harness names its threads after their tests.
    let thread = std::thread::current();
    let test = thread.name().filter(|name| *name != "main").unwrap_or(place);
    let kvm = vmm::probe().map(drop).map_err(|error| with_causes(&error));
    let uffd = pager::uffd::Uffd::open(pager::uffd::Features::NONE, pager::uffd::Features::NONE);
    match kvm.and(uffd.map(drop).map_err(|error| with_causes(&error))) {
        Ok(()) => true,
        Err(reason) => {
            skip(test, &reason);
            assert!(std::env::var_os("SNAP_REQUIRE_VM").is_none(), "{test} was skipped: {reason}");
            false
        }
    }
}

/// Prints that a test was skipped and why.
pub(crate) fn skip(test: &str, reason: &str) {
    let line = format!("SKIPPED {test}: {reason}\n");
    std::io::stderr().write_all(line.as_bytes()).expect("stderr is open");
}

/// Skips the rest of a test where there is no KVM or no userfaultfd.
macro_rules! needs_vm {
    () => {
        if !$crate::support::host_can_run(concat!(module_path!(), ":", line!())) {
            return;
        }
    };
}
pub(crate) use needs_vm;

/// How a command ended.
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    pub(crate) fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{}{}", self.stdout, self.stderr);
        self
    }

    /// The command failed with this code and printed all of these messages.
    #[track_caller]
    pub(crate) fn failed(self, code: i32, messages: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{}{}", self.stdout, self.stderr);
        for what in messages {
            assert!(self.stderr.contains(what), "{what:?} not in: {}", self.stderr);
        }
        self
    }

    /// The JSON that the command printed on stdout.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).expect(&self.stdout)
    }

    /// The JSON report that `snap restore --report json` printed on stderr.
    #[track_caller]
    pub(crate) fn report(&self) -> Value {
        serde_json::from_str(&self.stderr).expect(&self.stderr)
    }
}

/// Runs `snap` to its end; a command that hangs fails the test.
#[track_caller]
pub(crate) fn snap<A: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = A>) -> Ran {
    let mut command = Command::new(SNAP);
    command.args(args);
    run(command)
}

#[track_caller]
pub(crate) fn run(command: Command) -> Ran {
    Ran::from(end_of(start(command)))
}

pub(crate) fn start(mut command: Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("snap starts")
}

/// Waits for a command; one that hangs is killed and fails the test.
#[track_caller]
pub(crate) fn end_of(child: Child) -> Output {
    let id = child.id();
    let (done, timer) = std::sync::mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        let hung = timer.recv_timeout(HUNG) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
        if hung {
            signal(id, "KILL");
        }
        hung
    });
    let output = child.wait_with_output().expect("the command can be waited for");
    drop(done);
    assert!(!watch.join().expect("the watch does not panic"), "the command hung");
    output
}

/// Waits until a process handles SIGINT, or has ended. Before that, the signal just kills it.
pub(crate) fn wait_for_handlers(process: u32) {
    // "SigCgt:\t0000000100004002": see proc_pid_status(5). SIGINT is 2, so bit 1.
    let handled = |status: &str| {
        let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        mask.is_none_or(|mask| u64::from_str_radix(mask.trim(), 16).is_ok_and(|m| m & 0b10 != 0))
            || status.contains("State:\tZ")
    };
    while std::fs::read_to_string(format!("/proc/{process}/status")).is_ok_and(|s| !handled(&s)) {
        std::thread::yield_now();
    }
}

/// Sends a signal to a process.
pub(crate) fn signal(process: u32, name: &str) {
    let kill = Command::new("kill").arg(format!("-{name}")).arg(process.to_string()).status();
    assert!(kill.expect("kill runs").success());
}

/// A folder with a snapshot of the demo guest in it.
pub(crate) struct Sample {
    pub(crate) folder: TempDir,
    pub(crate) file: PathBuf,
}

impl Sample {
    /// Makes one with the given options of `snap create`.
    #[track_caller]
    pub(crate) fn create(options: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("guest.snap");
        let args = ["create".as_ref(), file.as_os_str()];
        snap(args.into_iter().chain(options.iter().map(|option| option.as_ref()))).ok();
        Self { folder, file }
    }

    /// A small guest: 64 MiB of which 8 are used.
    #[track_caller]
    pub(crate) fn small() -> Self {
        Self::create(&["--memory", "64M", "--work", "8M"])
    }

    /// Restores it with the given options, reporting as JSON.
    #[track_caller]
    pub(crate) fn restore(&self, options: &[&str]) -> Ran {
        restore(&self.file, options)
    }

    pub(crate) fn names(&self) -> Vec<String> {
        names(self.folder.path())
    }
}

/// `snap restore FILE --report json` with more options.
#[track_caller]
pub(crate) fn restore(file: &Path, options: &[&str]) -> Ran {
    let mut command = Command::new(SNAP);
    command.arg("restore").arg(file).args(["--report", "json"]).args(options);
    run(command)
}

/// The names in a folder, sorted, hidden ones too.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("the folder is there");
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.expect("the folder can be read").file_name().to_string_lossy().into_owned()
    };
    let mut names: Vec<_> = entries.map(name).collect();
    names.sort();
    names
}
