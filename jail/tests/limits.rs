//! What a thread may still reach under each limit. The threads of these tests have no filter of system calls, unless they
//! enter a role: the rules must hold by themselves.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::net::{TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use jail::{Access, Files, Identity, Limits, Role, Root, enter};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

/// Runs `body` on a thread of its own, which it may limit.
fn on_thread<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> T {
    std::thread::spawn(body).join().expect("it does not panic")
}

/// Whether this kernel has this version of Landlock.
fn has_landlock(abi: u32) -> bool {
    let found = jail::support().landlock_abi;
    if found < abi {
        eprintln!("skipped: this kernel has version {found} of Landlock, not {abi}");
    }
    found >= abi
}

/// Whether these tests run as root: others may not make the namespaces in a process with several threads.
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: this user is not root");
    }
    root
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: io::Result<T>) {
    let error = result.expect_err("it is refused");
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
}

#[test]
fn only_allowed_files_can_be_named() {
    if !has_landlock(3) {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    for name in ["read", "again", "other"] {
        fs::write(at(name), name).expect("it is written");
    }
    for name in ["written", "removed"] {
        fs::create_dir(at(name)).expect("it is made");
        fs::write(at(name).join("old"), "").expect("it is written");
    }
    let mut files = Files::none();
    let open = File::open(at("again")).expect("it opens");
    files.allow(&at("read"), Access::Read).expect("it exists");
    files.allow_again(&open, Access::Read).expect("it is open");
    files.allow(&at("written"), Access::Write).expect("it exists");
    files.allow(&at("removed"), Access::Remove).expect("it exists");
    files.allow(&at("missing"), Access::Write).expect("what is missing is left out");
    let rules = files.rules(Role::Main).expect("the kernel takes them");
    let root = folder.path().to_owned();
    on_thread(move || {
        let at = |name: &str| root.join(name);
        assert!(File::open(at("other")).is_ok());
        rules.apply().expect("it is applied");
        assert!(fs::read(at("read")).is_ok());
        let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&open));
        assert!(fs::read(link).is_ok());
        refused(fs::write(at("read"), "new"));
        refused(File::open(at("other")));
        refused(File::open("/etc/passwd"));
        refused(File::open("/proc/self/status"));
        refused(fs::read_dir("/"));
        refused(fs::write(at("new"), ""));
        refused(fs::remove_file(at("other")));
        refused(fs::write(at("removed").join("new"), ""));
        assert!(fs::remove_file(at("removed").join("old")).is_ok());
        assert!(fs::write(at("written").join("new"), "new").is_ok());
        assert!(fs::rename(at("written").join("new"), at("written").join("old")).is_ok());
        refused(Command::new("/bin/true").status());
    });
}

#[test]
fn files_that_are_not_limited_stay_usable() {
    let rules = Files::any().rules(Role::Writer).expect("the kernel takes them");
    on_thread(move || {
        rules.apply().expect("it is applied");
        assert!(File::open("/etc/passwd").is_ok());
    });
}

#[test]
fn no_connection_is_made_and_no_port_is_bound() {
    if !has_landlock(4) {
        return;
    }
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = listener.local_addr().expect("it has an address");
    assert!(TcpStream::connect(address).is_ok());
    for (files, role) in
        [(Files::none(), Role::Vcpu), (Files::any(), Role::Writer), (Files::any(), Role::Server)]
    {
        let rules = files.rules(role).expect("the kernel takes them");
        on_thread(move || {
            rules.apply().expect("it is applied");
            refused(TcpStream::connect(address));
            refused(TcpListener::bind("127.0.0.1:0"));
        });
    }
}

#[test]
fn other_processes_get_no_signal_and_no_connection_by_an_abstract_name() {
    if !has_landlock(6) {
        return;
    }
    let mut other = Command::new("sleep").arg("60").spawn().expect("it starts");
    let process = rustix::process::Pid::from_child(&other);
    let name = format!("snap-jail-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).expect("it is short");
    let _listener = UnixListener::bind_addr(&address).expect("the name is free");
    let rules = Files::any().rules(Role::Main).expect("the kernel takes them");
    let server = Files::any().rules(Role::Server).expect("the kernel takes them");
    let tries = move |rules: jail::Rules| {
        let address = SocketAddr::from_abstract_name(&name).expect("it is short");
        on_thread(move || {
            rules.apply().expect("it is applied");
            let signal = rustix::process::test_kill_process(process).map_err(io::Error::from);
            (signal, UnixStream::connect_addr(&address))
        })
    };
    let (signal, connection) = tries(rules);
    let (by_server, connection_of_server) = tries(server);
    other.kill().and_then(|()| other.wait()).expect("it ends");
    refused(signal);
    refused(connection);
    by_server.expect("a server kills guests");
    refused(connection_of_server);
}

#[test]
fn a_thread_may_still_signal_the_others_of_its_process() {
    let main = rustix::process::getpid().as_raw_nonzero().get();
    let rules = Files::none().rules(Role::Vcpu).expect("the kernel takes them");
    on_thread(move || {
        rules.apply().expect("it is applied");
        let no_signal = 0;
        // SAFETY: signal 0 has no effect.
        let sent = unsafe { libc::syscall(libc::SYS_tgkill, main, main, no_signal) };
        assert_eq!(sent, 0, "{}", io::Error::last_os_error());
    });
}

#[test]
fn an_empty_root_has_only_what_may_be_named() {
    if !is_root() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("out")).expect("it is made");
    fs::write(at("one.snap"), "one").expect("it is written");
    fs::write(at("two.snap"), "two").expect("it is written");
    let (out, one, two) = (at("out"), at("one.snap"), at("two.snap"));
    let written = out.join("new");
    on_thread(move || {
        // Mounts belong to the namespace in which they were opened.
        jail::separate().expect("root may");
        let mut files = Files::none();
        files.allow(&out, Access::Write).expect("it exists");
        files.allow(&one, Access::Read).expect("it exists");
        files.allow("/proc/self".as_ref(), Access::Read).expect("it exists");
        Root::Empty.enter(&files).expect("root may");
        assert_eq!(fs::read(one).expect("it is there"), b"one");
        assert_eq!(File::open(two).expect_err("it is gone").kind(), ErrorKind::NotFound);
        assert_eq!(File::open("/etc/passwd").expect_err("it is gone").kind(), ErrorKind::NotFound);
        assert!(File::open("/proc/self/stat").is_ok());
        assert!(File::open("/proc/1/stat").is_err());
        assert_eq!(
            fs::write("/new", "").expect_err("it cannot be written").kind(),
            ErrorKind::ReadOnlyFilesystem
        );
        fs::write(out.join("new"), "new").expect("it can be written");
    });
    assert_eq!(fs::read(written).expect("it is there"), b"new");
    assert!(Path::new("/etc/passwd").exists());
}

#[test]
fn by_proc_a_thread_reaches_nothing_of_other_processes_that_others_may_not_see() {
    if !is_root() || !has_landlock(1) {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let precious = folder.path().join("precious");
    fs::write(&precious, "").expect("it is written");
    // A process that stays in the old root.
    let mut other = Command::new("sleep").arg("60").spawn().expect("it starts");
    let of_other = |name: &str| PathBuf::from(format!("/proc/{}/{name}", other.id()));
    let root = of_other("root").join(precious.strip_prefix("/").expect("absolute"));
    let (stat, environ, memory) = (of_other("stat"), of_other("environ"), of_other("mem"));
    on_thread(move || {
        jail::separate().expect("root may");
        let mut files = Files::none();
        files.change_root();
        files.allow("/proc".as_ref(), Access::Read).expect("it exists");
        let rules = files.rules(Role::Server).expect("the kernel takes them");
        Root::Empty.enter(&files).expect("root may");
        drop(files);
        // What a server of root keeps, and more would open more.
        let kept = CapabilitySet::SYS_PTRACE | CapabilitySet::DAC_OVERRIDE | CapabilitySet::KILL;
        let inheritable = CapabilitySet::empty();
        let sets = CapabilitySets { effective: kept, permitted: kept, inheritable };
        set_capabilities(None, sets).expect("fewer than before");
        // Without the rules, this would be a way to the old root.
        assert!(File::open(&root).is_ok());
        assert!(File::open(&environ).is_ok());
        rules.apply().expect("it is applied");
        assert!(File::open(stat).is_ok());
        for path in [environ, memory, root] {
            refused(File::open(path));
        }
        refused(fs::write("/proc/sys/kernel/core_pattern", "core"));
    });
    other.kill().and_then(|()| other.wait()).expect("it ends");
}

#[test]
fn a_folder_becomes_the_root() {
    if !is_root() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("file"), "").expect("it is written");
    for separate in [false, true] {
        let folder = folder.path().to_owned();
        on_thread(move || {
            // Also without other mounts, this thread has a root of its own.
            jail::separate().expect("root may");
            let root = if separate { Root::FolderOnly(folder) } else { Root::Folder(folder) };
            root.enter(&Files::none()).expect("root may");
            assert!(File::open("/file").is_ok());
            assert!(File::open("/../../etc/passwd").is_err());
        });
    }
}

#[test]
fn a_thread_moves_into_an_empty_network() {
    if !is_root() {
        return;
    }
    let network = jail::empty_network().expect("root may");
    on_thread(move || {
        let link = || fs::read_link("/proc/thread-self/ns/net").expect("there is /proc");
        let before = link();
        let limits = Limits { network: Some(&network), ..Limits::default() };
        enter(Role::Writer, limits).expect("root may");
        assert_ne!(link(), before);
        let interfaces = fs::read_to_string("/proc/thread-self/net/dev").expect("there is /proc");
        // After two lines of titles.
        let interfaces: Vec<_> = interfaces.lines().skip(2).map(str::trim_start).collect();
        assert!(interfaces.iter().all(|line| line.starts_with("lo:")), "{interfaces:?}");
    });
}

#[test]
fn a_thread_changes_its_user_and_keeps_no_capability() {
    if !is_root() {
        return;
    }
    let identity = Identity { uid: Some(12_345), gid: Some(54_321) };
    identity.check().expect("root may");
    let (status, inherited) = on_thread(move || {
        let limits = Limits { identity, ..Limits::default() };
        enter(Role::Main, limits).expect("root may");
        let status = || fs::read_to_string("/proc/thread-self/status").expect("there is /proc");
        // A thread that is started later is jailed, too, and is not root any more.
        let later = std::thread::spawn(move || {
            enter(Role::Pager, limits).expect("it is allowed");
            status()
        });
        (status(), later.join().expect("it does not panic"))
    });
    for status in [status, inherited] {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect(name);
            line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(field("Uid:"), ["12345"; 4]);
        assert_eq!(field("Gid:"), ["54321"; 4]);
        assert_eq!(field("Groups:"), [""; 0]);
        assert_eq!(field("CapPrm:"), ["0000000000000000"]);
    }
    // Only that thread has changed.
    assert!(rustix::process::geteuid().is_root());
}
