//! A Firecracker for a test or a benchmark: `$SNAP_FIRECRACKER`, driven by its API socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);

/// The program, if the environment names one.
pub(crate) fn program() -> Option<PathBuf> {
    std::env::var_os("SNAP_FIRECRACKER").map(PathBuf::from)
}

/// A Firecracker that runs. It is killed when this is dropped.
pub(crate) struct Firecracker {
    process: Child,
    socket: PathBuf,
    /// Its guest's serial port.
    pub(crate) serial: ChildStdout,
}

impl Firecracker {
    /// Starts one without a guest. `name` is that of its socket in the folder.
    pub(crate) fn start(program: &Path, folder: &Path, name: &str) -> Self {
        let socket = folder.join(name);
        let mut command = Command::new(program);
        command.arg("--api-sock").arg(&socket).current_dir(folder);
        command.args(["--level", "Error"]).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = command.spawn().expect("Firecracker starts");
        let serial = process.stdout.take().expect("its stdout is a pipe");
        let started = Instant::now();
        while UnixStream::connect(&socket).is_err() {
            let ended = process.try_wait().expect("it can be waited for");
            assert!(ended.is_none() && started.elapsed() < PATIENCE, "Firecracker listens");
            std::thread::sleep(Duration::from_millis(1));
        }
        Self { process, socket, serial }
    }

    /// Boots a guest with one CPU, whose written pages are tracked: then there are diff snapshots.
    pub(crate) fn boot(&self, boot_source: &Value, mib: u64) {
        self.send("PUT", "/boot-source", boot_source);
        let machine = json!({"vcpu_count": 1, "mem_size_mib": mib, "track_dirty_pages": true});
        self.send("PUT", "/machine-config", &machine);
        self.send("PUT", "/actions", &json!({"action_type": "InstanceStart"}));
    }

    /// Pauses the guest, or resumes it.
    pub(crate) fn set_state(&self, state: &str) {
        self.send("PATCH", "/vm", &json!({"state": state}));
    }

    /// Writes a snapshot of the paused guest. `kind` is `Full` or `Diff`.
    pub(crate) fn snapshot(&self, kind: &str, memory: &Path, vmstate: &Path) {
        let request =
            json!({"snapshot_type": kind, "mem_file_path": memory, "snapshot_path": vmstate});
        self.send("PUT", "/snapshot/create", &request);
    }

    /// Restores a guest and resumes it. `backend` is `File` with a memory file, or `Uffd` with a socket.
    pub(crate) fn load(&self, vmstate: &Path, backend: &str, path: &Path) {
        let memory = json!({"backend_type": backend, "backend_path": path});
        let request = json!({"snapshot_path": vmstate, "mem_backend": memory, "resume_vm": true});
        self.send("PUT", "/snapshot/load", &request);
    }

    /// The id of the process.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Sends a request, which must succeed.
    fn send(&self, method: &str, path: &str, body: &Value) {
        let body = body.to_string();
        let mut stream = UnixStream::connect(&self.socket).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let head = format!("{method} {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all((head + &body).as_bytes()).expect("the request is sent");
        let mut answer = [0; 4096];
        let len = stream.read(&mut answer).expect("it answers");
        let answer = String::from_utf8_lossy(&answer[..len]);
        assert!(answer.starts_with("HTTP/1.1 204"), "{method} {path} {body}: {answer}");
    }
}

impl Drop for Firecracker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}
