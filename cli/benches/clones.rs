//! The memory cost of clones that share the memory of one guest: fifty paused ones. And a hundred that run.
//!
//!     cargo bench -p snapvm-cli --bench clones
//!
//! Idle clones are processes of `snap restore --lazy --share` of a guest of 1 GiB. Each has run for at least one beat,
//! so that it has touched its memory and written to it, and is then paused by its control socket. The cost of one is
//! its PSS (from `/proc/PID/smaps`) without the pages of the server's file, which are in memory once for all, plus the
//! growth of the server. The kernel's own memory (page tables, KVM) is not included.
#![allow(missing_docs, clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Instant;

const SNAP: &str = env!("CARGO_BIN_EXE_snap");

fn main() {
    if let Err(error) = vmm::probe() {
        println!("SKIPPED clones: {error}");
        return;
    }
    // `cargo bench` passes `--bench`; `cargo test --benches` does not, and only checks that it runs.
    let full = std::env::args().any(|arg| arg == "--bench");
    let (idle, running) = if full { (50, 100) } else { (2, 2) };
    let folder = tempfile::tempdir().unwrap();
    idle_clones(idle, folder.path());
    running_clones(running, folder.path());
}

fn idle_clones(count: usize, folder: &Path) {
    let serving = Serving::start(folder, "idle", &["--memory", "1G", "--work", "4M"]);
    let empty = Pss::of(serving.server.id());
    let clones: Vec<(Child, BufReader<ChildStdout>)> = (0..count)
        .map(|number| {
            let control = folder.join(format!("control-{number}"));
            let mut clone = serving.clone(&["--api", control.to_str().unwrap()]);
            let mut lines = BufReader::new(clone.stdout.take().unwrap());
            let mut line = String::new();
            lines.read_line(&mut line).unwrap();
            assert!(line.starts_with("beat ") && line.contains("ok"), "{line}");
            pause(&control);
            (clone, lines)
        })
        .collect();
    let each: Vec<Pss> = clones.iter().map(|(clone, _)| Pss::of(clone.id())).collect();
    let mean = |pick: fn(&Pss) -> u64| each.iter().map(pick).sum::<u64>() as f64 / count as f64;
    let own = mean(|pss| pss.kib - pss.shared_kib);
    let server = Pss::of(serving.server.id());
    let grown = (server.kib - server.shared_kib) as f64 - (empty.kib - empty.shared_kib) as f64;
    println!("{count} idle clones of a guest of 1 GiB, KiB each:");
    println!("  beyond the shared pages     {own:8.0}");
    println!("    guest's own pages         {:8.0}", mean(|pss| pss.guest_kib));
    println!("    heap and stacks           {:8.0}", mean(|pss| pss.heap_kib));
    println!("    program and libraries     {:8.0}", mean(|pss| pss.files_kib));
    println!("  the server's part           {:8.0}", grown / count as f64);
    println!("  together                    {:8.0}", own + grown / count as f64);
    println!("  shared pages, once for all  {:8.0}", mean(|pss| pss.shared_kib) * count as f64);
    for (mut clone, _said) in clones {
        clone.kill().unwrap();
        clone.wait().unwrap();
    }
}

/// All at the same time, each until its third beat.
fn running_clones(count: usize, folder: &Path) {
    let serving = Serving::start(folder, "running", &["--memory", "128M", "--work", "32M"]);
    let begin = Instant::now();
    let clones: Vec<Child> = (0..count).map(|_| serving.clone(&["--beats", "3"])).collect();
    let mut beats = 0;
    for clone in clones {
        let output = clone.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && !text.contains("BAD"), "{text}");
        beats += text.lines().filter(|line| line.ends_with("ok")).count();
    }
    let seconds = begin.elapsed().as_secs_f64();
    println!(
        "{count} clones at the same time, three beats each: {beats} beats ok in {seconds:.1} s"
    );
    assert_eq!(beats, 3 * count);
}

struct Serving {
    server: Child,
    socket: PathBuf,
    file: PathBuf,
}

impl Serving {
    fn start(folder: &Path, name: &str, guest: &[&str]) -> Serving {
        let (file, socket) = (folder.join(format!("{name}.snap")), folder.join(name));
        let created = Command::new(SNAP)
            .args(["create", "--quiet"])
            .args(guest)
            .arg(&file)
            .stdout(Stdio::null())
            .status();
        assert!(created.unwrap().success());
        let mut server = Command::new(SNAP);
        server.arg("serve").arg(&file).arg("--listen").arg(&socket).stderr(Stdio::piped());
        let mut server = server.spawn().unwrap();
        let mut lines = BufReader::new(server.stderr.take().unwrap());
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        assert!(line.starts_with("serving "), "{line}");
        std::thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
        Serving { server, socket, file }
    }

    fn clone(&self, options: &[&str]) -> Child {
        let mut clone = Command::new(SNAP);
        clone.arg("restore").arg(&self.file).arg("--lazy").arg("--share").arg(&self.socket);
        clone.args(options).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        clone.spawn().unwrap()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.server.kill().unwrap();
        self.server.wait().unwrap();
    }
}

fn pause(control: &Path) {
    let body = r#"{"state":"Paused"}"#;
    let mut stream = UnixStream::connect(control).unwrap();
    write!(
        stream,
        "PATCH /vm HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 20"), "{answer}");
}

/// The proportional set size of a process, by kind of mapping.
#[derive(Default)]
struct Pss {
    kib: u64,
    /// Pages of the server's file.
    shared_kib: u64,
    /// Pages that the guest has written: copies of those.
    guest_kib: u64,
    heap_kib: u64,
    files_kib: u64,
}

impl Pss {
    fn of(process: u32) -> Pss {
        let smaps = std::fs::read_to_string(format!("/proc/{process}/smaps")).unwrap();
        let (mut pss, mut name, mut of_mapping) = (Pss::default(), "", 0);
        for line in smaps.lines() {
            let mut words = line.split_ascii_whitespace();
            let (word, number) = (words.next().unwrap(), words.next());
            let kib = || number.and_then(|number| number.parse::<u64>().ok()).unwrap();
            match word {
                "Pss:" => {
                    of_mapping = kib();
                    pss.kib += of_mapping;
                }
                "Anonymous:" => match name {
                    // Anonymous pages there belong only to this process.
                    name if name.starts_with("/memfd:snapshot-pages") => {
                        pss.guest_kib += kib();
                        pss.shared_kib += of_mapping.saturating_sub(kib());
                    }
                    name if name.starts_with('/') => pss.files_kib += of_mapping,
                    _ => pss.heap_kib += of_mapping,
                },
                word if !word.ends_with(':') => {
                    name = line.splitn(6, ' ').nth(5).unwrap_or("").trim()
                }
                _ => {}
            }
        }
        pss
    }
}
