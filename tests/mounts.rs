//! A mount for a test, and what can be mounted in it.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::support::{Ran, SNAP, end_of, run, signal, skip, start};

/// Whether this user can mount here. If not, this prints why, and the test is skipped.
pub(crate) fn host_can_mount(test: &str) -> bool {
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        skip(test, &format!("/dev/fuse cannot be opened: {error}"));
        return false;
    }
    let namespace = ["--mount", "mount", "-t", "tmpfs", "none", "/mnt"];
    let mounts = Command::new("unshare").args(namespace).stderr(Stdio::null()).status();
    let can = mounts.is_ok_and(|status| status.success());
    if !can {
        skip(test, "this user may not mount a file system");
    }
    can
}

/// A running `snap mount`, on a folder of its own.
pub(crate) struct Mounted {
    server: Option<Child>,
    place: Option<TempDir>,
    lines: Receiver<String>,
}

impl Mounted {
    #[track_caller]
    pub(crate) fn start(file: &Path, options: &[&str]) -> Self {
        let place = tempfile::tempdir().expect("a temporary folder");
        let folder = place.path().join("mounted");
        std::fs::create_dir(&folder).expect("it can be created");
        Self::start_at(file, options, place)
    }

    /// On the folder `mounted` in `place`.
    #[track_caller]
    pub(crate) fn start_at(file: &Path, options: &[&str], place: TempDir) -> Self {
        let mut command = Command::new(SNAP);
        command.arg("mount").arg(file).arg(place.path().join("mounted")).args(options);
        let mut server = start(command);
        let mut lines = BufReader::new(server.stderr.take().expect("a pipe")).lines();
        let first = lines.next().expect("it prints a line").expect("text");
        assert!(first.contains(" is mounted at "), "{first}");
        let (sender, received) = channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Self { server: Some(server), place: Some(place), lines: received }
    }

    pub(crate) fn folder(&self) -> PathBuf {
        self.place.as_ref().expect("it is there").path().join("mounted")
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    pub(crate) fn id(&self) -> u32 {
        self.server.as_ref().expect("it runs").id()
    }

    /// Sends it a signal, and waits for its end: its exit code, and its remaining lines.
    #[track_caller]
    pub(crate) fn end(&mut self, signal_name: &str) -> (Option<i32>, Vec<String>) {
        signal(self.id(), signal_name);
        self.ended()
    }

    /// Waits for a line with this text.
    #[track_caller]
    pub(crate) fn prints(&self, what: &str) {
        let lines = || self.lines.recv_timeout(Duration::from_secs(60)).expect("another line");
        while !lines().contains(what) {}
    }

    #[track_caller]
    pub(crate) fn ended(&mut self) -> (Option<i32>, Vec<String>) {
        let server = self.server.take().expect("it runs");
        (end_of(server).status.code(), self.lines.iter().collect())
    }

    /// The folder that the mount's folder is in.
    pub(crate) fn take_place(mut self) -> TempDir {
        self.place.take().expect("it is there")
    }

    /// Whether something is mounted on the folder.
    pub(crate) fn is_mounted(&self) -> bool {
        let mounts = std::fs::read_to_string("/proc/self/mounts").expect("it can be read");
        let folder = self.folder().canonicalize().unwrap_or_else(|_| self.folder());
        mounts.lines().any(|line| line.split(' ').nth(1) == folder.to_str())
    }

    #[track_caller]
    pub(crate) fn wait_until_unmounted(&self) {
        let began = Instant::now();
        while self.is_mounted() {
            assert!(began.elapsed() < Duration::from_secs(60), "it is still mounted");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Runs a Python script; its first argument is a file of the mount. One that hangs fails the test.
    #[track_caller]
    pub(crate) fn python(&self, script: &str, name: &str) -> Ran {
        run(python(script, &self.file(name)))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
        }
        if self.place.is_some() && self.is_mounted() {
            let _ = Command::new("umount").arg("-l").arg(self.folder()).status();
        }
    }
}

pub(crate) fn python(script: &str, file: &Path) -> Command {
    let mut command = Command::new("python3");
    command.args(["-c", script]).arg(file);
    command
}

/// How many bytes of a file are in the page cache.
#[track_caller]
pub(crate) fn cached_bytes(file: &Path) -> u64 {
    let mut command = Command::new("fincore");
    command.args(["-b", "-n", "-o", "RES"]).arg(file);
    run(command).ok().stdout.trim().parse().expect("a number")
}
