//! Guests of other users, and of other PID namespaces.
#![allow(missing_docs)]

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/serving.rs"]
mod serving;
mod support;
#[path = "support/vmm.rs"]
mod vmm;

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use daemon::{Daemon, Keeping};
use pager::VecSource;
use pager::serve::{ServeOptions, SocketAccess};
use serving::Serving;
use support::{PAGE, stamped, userfaultfd_works};
use vmm::Vmm;

const PAGES: usize = 64;
/// Ids of users and groups that need no entry in /etc/passwd.
const USER: u32 = 4321;
const GROUP: u32 = 5321;
const SECOND_GROUP: u32 = 6321;

/// Not a test: the process of a VMM.
#[test]
fn vmm_process() {
    vmm::run();
}

/// Not a test: the process of a server.
#[test]
fn daemon_process() {
    daemon::run();
}

/// Only root can become another user, and can make a PID namespace.
fn works_as_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        let line = format!("SKIPPED {test}: it does not run as root\n");
        std::io::stderr().write_all(line.as_bytes()).expect("stderr is open");
    }
    root && userfaultfd_works(test)
}

fn serving(uids: &[u32], gids: &[u32], access: SocketAccess) -> Serving {
    let mut options = ServeOptions::default();
    options.allow.uids = uids.to_vec();
    options.allow.gids = gids.to_vec();
    let source = Arc::new(VecSource::new(stamped(PAGES), 16 * PAGE));
    Serving::for_users(source, options, access)
}

fn access(uid: Option<u32>, gid: Option<u32>, mode: u32) -> SocketAccess {
    let mut access = SocketAccess::default();
    (access.uid, access.gid, access.mode) = (uid, gid, Some(mode));
    access
}

/// A guest that runs as the other user.
fn other_user(serving: &Serving) -> Vmm {
    let mut vmm = Vmm::start(&serving.socket);
    vmm.ok(&format!("map {PAGES}"));
    vmm.ok(&format!("user {USER} {GROUP} {SECOND_GROUP}"));
    vmm
}

#[test]
fn an_allowed_user_is_served_at_a_socket_given_to_it() {
    if !works_as_root("an_allowed_user_is_served_at_a_socket_given_to_it") {
        return;
    }
    for (uids, gids, access) in [
        (&[USER][..], &[][..], access(Some(USER), None, 0o600)),
        (&[], &[GROUP], access(None, Some(GROUP), 0o660)),
        (&[1, USER], &[], access(None, Some(SECOND_GROUP), 0o660)),
        (&[], &[1, SECOND_GROUP], access(None, None, 0o666)),
    ] {
        let serving = serving(uids, gids, access);
        let mut vmm = other_user(&serving);
        vmm.ok("body new");
        serving.expect("served");
        vmm.ok(&format!("check 0 {PAGES} 1"));
        drop(vmm);
        serving.expect("ended");
        serving.finish();
    }
}

#[test]
fn other_users_are_kept_out_by_the_socket_and_by_the_server() {
    if !works_as_root("other_users_are_kept_out_by_the_socket_and_by_the_server") {
        return;
    }
    // The default, and a user who is allowed without a socket to connect to.
    for uids in [&[][..], &[USER]] {
        let serving = serving(uids, &[], SocketAccess::default());
        let mut vmm = other_user(&serving);
        let answer = vmm.ask("body new").expect("it lives");
        assert!(answer.starts_with("not connected: Permission denied"), "{answer}");
        drop(vmm);
        serving.finish();
    }
    // Access to the socket alone does not make a user a client.
    let serving = serving(&[USER + 1], &[GROUP + 1], access(None, None, 0o666));
    let mut vmm = other_user(&serving);
    let answer = vmm.ask("body new").expect("it lives");
    assert!(answer == "ok" || answer.starts_with("not sent"), "{answer}");
    serving.expect("the client runs as user 4321, which is not allowed; Closed");
    drop(vmm);
    serving.finish();
}

#[test]
fn a_guest_of_another_pid_namespace_is_served_and_taken_over() {
    if !works_as_root("a_guest_of_another_pid_namespace_is_served_and_taken_over") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let keeping = Keeping::start(folder, Duration::from_secs(3600));
    let server = Daemon::start_apart(folder, PAGES, "poison");
    let mut vmm = Vmm::start(&daemon::socket(folder));
    vmm.ok(&format!("map {PAGES}"));
    vmm.ok("body new");
    server.expect("Served { pid: 0,");
    vmm.ok("check 0 16 1");
    server.kill();
    keeping.expect("Lost");
    let server = Daemon::start_apart(folder, PAGES, "poison");
    keeping.expect("TakenOver");
    vmm.ok(&format!("check 0 {PAGES} 2"));
    drop(vmm);
    // The end of a process is seen, too.
    server.expect("Ended { pid: 0,");
    server.kill();
    assert_eq!(keeping.finish(), 0);
}

/// A server cannot kill a process of such a namespace. A policy that it could not carry out is not accepted.
#[test]
fn with_the_policy_kill_a_guest_that_cannot_be_killed_is_refused() {
    if !works_as_root("with_the_policy_kill_a_guest_that_cannot_be_killed_is_refused") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let keeping = Keeping::start(folder, Duration::from_secs(3600));
    let server = Daemon::start_apart(folder, PAGES, "kill");
    let mut vmm = Vmm::start(&daemon::socket(folder));
    vmm.ok(&format!("map {PAGES}"));
    let answer = vmm.ask("body new").expect("it lives");
    assert!(answer == "ok" || answer.starts_with("not sent"), "{answer}");
    let event = server.expect("Refused");
    assert!(event.contains("Unkillable"), "{event}");
    drop(vmm);
    server.kill();
    assert_eq!(keeping.finish(), 0);
}
