//! A wait of a command is reported after a second, and ended by Ctrl-C.

use std::ffi::OsString;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::FlockOperation;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

use crate::support::{Ran, SNAP, Sample, end_of, names, needs_vm, signal};
use crate::talking::{Talking, state, wait_until};

/// A socket at `path` whose process never sends a message.
fn mute(path: &Path) -> UnixListener {
    UnixListener::bind(path).expect("it binds")
}

/// A socket whose queue of connections is full, and the connection that fills it.
fn full(path: &Path, kind: SocketType) -> [OwnedFd; 2] {
    let address = SocketAddrUnix::new(path).expect("a name");
    let socket = || rustix::net::socket(AddressFamily::UNIX, kind, None).expect("a socket");
    let (listener, first) = (socket(), socket());
    rustix::net::bind(&listener, &address).expect("it binds");
    // A queue of length 0 takes one.
    rustix::net::listen(&listener, 0).expect("it listens");
    rustix::net::connect(&first, &address).expect("there is room");
    [listener, first]
}

/// Arguments, then options with paths; a path alone has no option.
fn args(command: &[&str], paths: &[(&str, &Path)]) -> Vec<OsString> {
    let options = paths.iter().flat_map(|(option, path)| [(*option).into(), (*path).into()]);
    let options = options.filter(|word: &OsString| !word.is_empty());
    command.iter().map(OsString::from).chain(options).collect()
}

/// A clone that requests its pages at this socket.
fn clone(sample: &Sample, server: &Path, options: &[&str]) -> Talking {
    let api = sample.folder.path().join("api.sock");
    let mut all =
        args(&["restore", "--lazy"], &[("--share", server), ("--api", &api), ("", &sample.file)]);
    all.extend(options.iter().map(OsString::from));
    Talking::snap(all)
}

#[test]
fn a_page_server_that_does_not_answer() {
    // This was silent for 30 seconds, ignored Ctrl-C, and was not ended by --for.
    needs_vm!();
    let sample = Sample::small();
    let folder = sample.folder.path();
    let (silent, busy) = (folder.join("silent.sock"), folder.join("busy.sock"));
    let (_silent, _busy) = (mute(&silent), full(&busy, SocketType::STREAM));
    let pages = folder.join("pages.sock");
    let mut server = Talking::snap(args(&["serve"], &[("--listen", &pages), ("", &sample.file)]));
    server.prints(&["serving"]);
    server.stop();
    let before = sample.names();
    for socket in [&silent, &busy, &pages] {
        let mut waiting = clone(&sample, socket, &[]);
        let name = socket.to_str().expect("text");
        waiting.prints(&["waiting for the page server at", name, "at most 30s", "Ctrl-C ends it"]);
        waiting.interrupt();
        let mut short = clone(&sample, socket, &["--for", "1200ms"]);
        short.prints(&["waiting for the page server at", name, "at most 1s 200ms"]);
        short.end().failed(1, &["cannot share memory through", "within 1.2s", "may be stopped"]);
    }
    assert_eq!(sample.names(), before);
    server.signal("CONT");
    server.interrupt();
}

#[test]
fn a_keeper_that_does_not_answer() {
    // This waited without a limit or a message, and ignored Ctrl-C.
    needs_vm!();
    let sample = Sample::small();
    let folder = sample.folder.path();
    let (busy, kept) = (folder.join("busy.sock"), folder.join("keep.sock"));
    let _busy = full(&busy, SocketType::SEQPACKET);
    let mut keeper = Talking::snap(args(&["keep"], &[("--listen", &kept)]));
    keeper.prints(&["keeping"]);
    keeper.stop();
    let before = sample.names();
    let serve = |keeper: &Path| {
        let listen = folder.join("pages.sock");
        let file = ("", &*sample.file);
        Talking::snap(args(&["serve"], &[("--listen", &listen), ("--keep", keeper), file]))
    };
    for keeper in [&busy, &kept] {
        let mut waiting = serve(keeper);
        let name = keeper.to_str().expect("text");
        waiting.prints(&["waiting for the keeper at", name, "at most 10s", "Ctrl-C ends it"]);
        waiting.interrupt();
    }
    serve(&kept).end().failed(1, &["the keeper: it has not answered within 10s"]);
    assert_eq!(sample.names(), before);
}

#[test]
fn a_guest_that_does_not_answer() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let folder = folder.path();
    let (silent, busy) = (folder.join("silent.sock"), folder.join("busy.sock"));
    let (_silent, _busy) = (mute(&silent), full(&busy, SocketType::STREAM));
    let api = folder.join("api.sock");
    let mut guest =
        Talking::snap(args(&["run", "--memory", "32M", "--work", "4M"], &[("--api", &api)]));
    guest.beats(1);
    guest.stop();
    let before = names(folder);
    let out = folder.join("out.snap");
    for (socket, what, limit) in [
        (&silent, "to be stored", "no time limit"),
        (&busy, "to take a request", "at most 10s"),
        (&api, "to be stored", "no time limit"),
    ] {
        let mut waiting = Talking::snap(args(&["create"], &[("", &out), ("--vm", socket)]));
        let name = socket.to_str().expect("text");
        waiting.prints(&["waiting for the guest at", name, what, limit, "Ctrl-C ends it"]);
        waiting.interrupt();
    }
    assert_eq!(names(folder), before);
    guest.signal("CONT");
    guest.beats(1);
    guest.interrupt();
    assert!(!names(folder).contains(&"out.snap".into()), "a cancelled snapshot was written later");
}

#[test]
fn a_folder_that_another_process_has_locked() {
    needs_vm!();
    let sample = Sample::small();
    let folder = sample.folder.path();
    let listen = folder.join("a.sock");
    let held = std::fs::File::open(folder).expect("it opens");
    rustix::fs::flock(&held, FlockOperation::LockExclusive).expect("it is free");
    let (at, api, file) = (("--listen", &*listen), ("--api", &*listen), ("", &*sample.file));
    for command in [
        args(&["serve"], &[at, file]),
        args(&["keep"], &[at]),
        args(&["run"], &[api]),
        args(&["restore"], &[api, file]),
    ] {
        let mut waiting = Talking::snap(&command);
        waiting.prints(&["waiting for the lock of the folder of", "a.sock", "at most 10s"]);
        waiting.interrupt();
    }
    Talking::snap(args(&["keep"], &[at])).end().failed(1, &["locked by another process", "10s"]);
    assert_eq!(sample.names(), ["guest.snap"]);
    let mut waiting = Talking::snap(args(&["keep"], &[at]));
    waiting.prints(&["waiting for the lock"]);
    drop(held);
    waiting.prints(&["keeping at"]);
    waiting.interrupt();
}

#[test]
fn a_guest_that_is_not_ready_and_one_that_no_client_resumes() {
    needs_vm!();
    let sample = Sample::small();
    let folder = sample.folder.path();
    let (out, api) = (folder.join("out.snap"), folder.join("api.sock"));
    let small = ["create", "--memory", "32M", "--work", "4M", "--when", "output:never"];
    let mut waiting = Talking::snap(args(&small, &[("", &out)]));
    waiting.prints(&["1 s, waiting for the guest's output \"never\", at most 5m"]);
    waiting.interrupt();
    let layer = ["create", "--when", "output:never", "--timeout", "3s"];
    let mut waiting = Talking::snap(args(&layer, &[("", &out), ("--from", &sample.file)]));
    waiting.prints(&["1 s, waiting for", "at most 3s"]);
    waiting.end().failed(1, &["not ready after 3s"]);
    let paused = args(&["restore", "--paused"], &[("--api", &api), ("", &sample.file)]);
    let mut waiting = Talking::snap(paused);
    waiting.prints(&["waiting for a client to resume the guest", "no time limit"]);
    waiting.interrupt();
    assert_eq!(sample.names(), ["guest.snap"]);
}

#[test]
fn a_server_that_waits_for_its_last_guests() {
    needs_vm!();
    let sample = Sample::small();
    let pages = sample.folder.path().join("pages.sock");
    let serve = args(&["serve"], &[("--listen", &pages), ("", &sample.file)]);
    let mut server = Talking::snap(serve);
    server.prints(&["serving"]);
    let mut guest = clone(&sample, &pages, &[]);
    guest.beats(1);
    server.signal("INT");
    server.prints(&["waiting for 1 guests to end", "Ctrl-C kills"]);
    // The guest is left alone anyway.
    guest.beats(1);
    guest.interrupt();
    server.end().failed(130, &["interrupted"]);
}

#[test]
fn a_missing_page_does_not_keep_a_guest_from_ending() {
    // A vCPU that waits for a page in the kernel may react to no signal. Neither Ctrl-C nor --for ended it.
    needs_vm!();
    let sample = Sample::small();
    let folder = sample.folder.path();
    let pages = folder.join("pages.sock");
    let serve = args(&["serve", "--prefetch", "off"], &[("--listen", &pages), ("", &sample.file)]);
    let mut server = Talking::snap(serve);
    server.prints(&["serving"]);
    for options in [&["--paused"][..], &["--paused", "--for", "1500ms"]] {
        let mut guest = clone(&sample, &pages, options);
        guest.prints(&["waiting for a client to resume the guest"]);
        server.stop();
        resume(&folder.join("api.sock"));
        if options.len() == 1 {
            guest.signal("TERM");
        }
        let ran = guest.end();
        match ran.code {
            // Where a signal ends the wait for a page.
            Some(0) => assert!(ran.stderr.contains("time is up"), "{}", ran.stderr),
            Some(130) => assert!(ran.stderr.contains("interrupted"), "{}", ran.stderr),
            _ => drop(ran.failed(1, &["a page that it waits for does not come", "30s"])),
        }
        server.signal("CONT");
    }
    server.interrupt();
    assert_eq!(sample.names(), ["guest.snap"]);
}

/// Runs a guest that waits for that.
pub(crate) fn resume(api: &Path) {
    let mut client = UnixStream::connect(api).expect("it listens");
    let body = r#"{"state":"Resumed"}"#;
    let head = "PATCH /vm HTTP/1.1\r\nConnection: close\r\nContent-Length: 19\r\n\r\n";
    std::io::Write::write_all(&mut client, format!("{head}{body}").as_bytes()).expect("sent");
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("an answer");
    assert!(answer.contains(" 204 "), "{answer}");
}

#[test]
fn a_named_pipe_as_the_file_of_options() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pipe = folder.path().join("options.json");
    let made = Command::new("mkfifo").arg(&pipe).status();
    assert!(made.expect("mkfifo runs").success());
    for command in ["run", "create"] {
        let out = folder.path().join("out.snap");
        let config = ("--config", &*pipe);
        let mut waiting = Talking::snap(match command {
            "create" => args(&[command], &[("", &out), config]),
            _ => args(&[command], &[config]),
        });
        waiting.prints(&["waiting for", "options.json to be read", "no time limit"]);
        waiting.interrupt();
    }
    assert_eq!(names(folder.path()), ["options.json"]);
}

#[test]
fn a_reader_that_does_not_read() {
    needs_vm!();
    let sample = Sample::create(&["--memory", "64M", "--work", "16M", "--chunk-pages", "1"]);
    for args in [&["pages", "--json"][..], &["cat", "--gpa", "1M", "--len", "32M"]] {
        let mut command = Command::new(SNAP);
        command.args(args).arg(&sample.file);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().expect("it starts");
        let stdout = child.stdout.as_ref().expect("it is piped");
        // The pipe is nearly full: the next write waits.
        wait_until("nothing is written", || {
            rustix::io::ioctl_fionread(stdout).expect("it is a pipe") >= 60 << 10
        });
        signal(child.id(), "INT");
        // Nothing reads it meanwhile.
        wait_until("it does not end", || state(child.id()) == Some('Z'));
        Ran::from(end_of(child)).failed(130, &["interrupted"]);
    }
}
