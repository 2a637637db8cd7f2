//! Servers are killed, a keeper outlives them, and the guests do not notice.
#![allow(missing_docs)]

#[path = "support/daemon.rs"]
mod daemon;
mod support;
#[path = "support/vmm.rs"]
mod vmm;

use std::os::unix::process::ExitStatusExt;
use std::thread;
use std::time::Duration;

use daemon::{Daemon, Keeping};
use support::userfaultfd_works;
use vmm::Vmm;

const PAGES: usize = 1024;
const FOREVER: Duration = Duration::from_secs(3600);

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

fn vmm_of(folder: &std::path::Path, daemon: &Daemon) -> Vmm {
    let mut vmm = Vmm::start(&daemon::socket(folder));
    vmm.ok(&format!("map {PAGES}"));
    vmm.ok("body new");
    daemon.expect("Served");
    vmm
}

fn clone_of(folder: &std::path::Path, daemon: &Daemon) -> Vmm {
    let mut vmm = Vmm::start(&daemon::socket(folder));
    vmm.ok(&format!("share {PAGES}"));
    daemon.expect("Served");
    vmm
}

#[test]
fn guests_continue_when_their_server_is_killed_under_load() {
    if !userfaultfd_works("guests_continue_when_their_server_is_killed_under_load") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let keeping = Keeping::start(folder, FOREVER);
    let mut server = Daemon::start(folder, PAGES, "poison");
    let mut vmms: Vec<Vmm> = (0..3).map(|_| vmm_of(folder, &server)).collect();
    for (seed, vmm) in vmms.iter_mut().enumerate() {
        vmm.ok(&format!("storm {seed}"));
    }
    for round in 0..8 {
        // Early moments, when most pages are missing, and later ones.
        thread::sleep(Duration::from_micros(500 << round));
        server.kill();
        keeping.expect("Lost");
        server = Daemon::start(folder, PAGES, "poison");
        let event = keeping.expect("TakenOver");
        assert!(event.contains("guests: 3"), "{event}");
    }
    for vmm in &mut vmms {
        let found = vmm.ask("calm").expect("it lives");
        assert!(found.starts_with("ok "), "{found}");
    }
    drop(vmms);
    (0..3).for_each(|_| drop(server.expect("Ended")));
    server.kill();
    let event = keeping.expect("Lost");
    assert!(event.contains("guests: 0"), "{event}");
    assert_eq!(keeping.finish(), 0);
}

/// A clone, next to guests with private memory: the next server copies missing pages into the memory of the clone.
#[test]
fn clones_continue_when_their_server_is_killed_under_load() {
    if !userfaultfd_works("clones_continue_when_their_server_is_killed_under_load") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let keeping = Keeping::start(folder, FOREVER);
    let mut server = Daemon::start(folder, PAGES, "lossy");
    let mut clones: Vec<Vmm> = (0..3).map(|_| clone_of(folder, &server)).collect();
    for (seed, clone) in clones.iter_mut().enumerate() {
        clone.ok(&format!("storm {seed} lossy"));
    }
    for round in 0..8 {
        thread::sleep(Duration::from_micros(200 << round));
        server.kill();
        keeping.expect("Lost");
        server = Daemon::start(folder, PAGES, "lossy");
        let event = keeping.expect("TakenOver");
        assert!(event.contains(&format!("guests: {}", clones.len())), "{event}");
        // New clones share the pages that the new server loads.
        let mut clone = clone_of(folder, &server);
        clone.ok(&format!("storm {} lossy", 10 + round));
        clones.push(clone);
    }
    for clone in &mut clones {
        let found = clone.ask("calm").expect("it lives");
        assert!(found.starts_with("ok "), "{found}");
    }
    // A clone has ended when it hangs up, with or without a server.
    clones[0].ok("hang-up");
    server.expect("Ended");
    server.kill();
    keeping.expect("Lost");
    clones[1].ok("hang-up");
    let left = clones.len() - 2;
    let server = Daemon::start(folder, PAGES, "lossy");
    let event = keeping.expect("TakenOver");
    assert!(event.contains(&format!("guests: {left}")), "{event}");
    // A clone that ends before the server has answered it counts as refused.
    server.takes_over(left);
    drop(clones);
    (0..left).for_each(|_| drop(server.expect("Ended")));
    server.kill();
    keeping.expect("Lost");
    assert_eq!(keeping.finish(), 0);
}

#[test]
fn missing_pages_of_a_clone_fail_when_no_server_comes_back() {
    if !userfaultfd_works("missing_pages_of_a_clone_fail_when_no_server_comes_back") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let keeping = Keeping::start(folder, Duration::from_millis(50));
    let server = Daemon::start(folder, PAGES, "poison");
    let (mut one, mut other) = (clone_of(folder, &server), clone_of(folder, &server));
    one.ok("check 0 8 1");
    server.kill();
    let errno = format!("errno {}", libc::EFAULT);
    assert_eq!(one.ask("syscall 512").as_deref(), Some(&*errno));
    keeping.expect("GivenUp { guests: 2, killed: [] }");
    let event = one.ask("failure").expect("it lives");
    assert!(event.contains("failure") && event.contains("the page server has ended"), "{event}");
    // Both have the pages that one of them has touched.
    one.ok("check 0 8 1");
    other.ok("check 0 8 2");
    let server = Daemon::start(folder, PAGES, "poison");
    keeping.expect("TakenOver");
    other.ok(&format!("check 0 {PAGES} 1"));
    one.ok("check 600 100 1");
    assert_eq!(one.ask("syscall 512").as_deref(), Some(&*errno));
    drop((one, other));
    server.kill();
    keeping.finish();
}

#[test]
fn a_guest_of_a_dead_server_is_forgotten_when_it_ends() {
    if !userfaultfd_works("a_guest_of_a_dead_server_is_forgotten_when_it_ends") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let keeping = Keeping::start(folder, FOREVER);
    let server = Daemon::start(folder, PAGES, "poison");
    let (dies, mut lives) = (vmm_of(folder, &server), vmm_of(folder, &server));
    server.kill();
    keeping.expect("Lost");
    drop(dies);
    let server = Daemon::start(folder, PAGES, "poison");
    let event = keeping.expect("TakenOver");
    assert!(event.contains("guests: 1"), "{event}");
    lives.ok(&format!("check 0 {PAGES} 1"));
    server.kill();
    keeping.expect("Lost");
    // Without a keeper no server can take it over.
    assert_eq!(keeping.finish(), 1);
    let status = lives.child.wait().expect("it ends");
    assert_eq!(status.signal(), Some(libc::SIGKILL));
}

#[test]
fn missing_pages_of_a_guest_fail_when_no_server_comes_back() {
    if !userfaultfd_works("missing_pages_of_a_guest_fail_when_no_server_comes_back") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let keeping = Keeping::start(folder, Duration::from_millis(50));
    let server = Daemon::start(folder, PAGES, "poison");
    let mut vmm = vmm_of(folder, &server);
    vmm.ok("check 0 8 1");
    vmm.ok("remove 4 1");
    server.kill();
    // It waits for its page until the takeover timeout.
    let errno = format!("errno {}", libc::EFAULT);
    assert_eq!(vmm.ask("syscall 512").as_deref(), Some(&*errno));
    keeping.expect("GivenUp { guests: 1, killed: [] }");
    vmm.ok("check 0 4 1");
    assert_eq!(vmm.ask("read 4").as_deref(), Some("0"));
    // A late server loads the pages that have not failed yet.
    let server = Daemon::start(folder, PAGES, "poison");
    keeping.expect("TakenOver");
    vmm.ok("check 600 100 1");
    assert_eq!(vmm.ask("syscall 512").as_deref(), Some(&*errno));
    drop(vmm);
    server.expect("Ended");
    server.kill();
    assert_eq!(keeping.finish(), 0);
}

#[test]
fn with_the_policy_kill_a_guest_without_a_server_dies() {
    if !userfaultfd_works("with_the_policy_kill_a_guest_without_a_server_dies") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let keeping = Keeping::start(folder, Duration::from_millis(50));
    let server = Daemon::start(folder, PAGES, "kill");
    let mut vmm = vmm_of(folder, &server);
    vmm.ok("check 0 8 1");
    server.kill();
    assert_eq!(vmm.ask("syscall 512"), None);
    let status = vmm.child.wait().expect("it ends");
    assert_eq!(status.signal(), Some(libc::SIGKILL));
    assert_eq!(keeping.finish(), 0);
}

/// A keeper with too many guests closes the connection of a live server. It must not fail the pages of its guests then.
#[test]
fn a_server_with_too_many_guests_continues_without_its_keeper() {
    if !userfaultfd_works("a_server_with_too_many_guests_continues_without_its_keeper") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let keeping = Keeping::of(folder, Duration::from_millis(50), 1);
    let server = Daemon::start(folder, PAGES, "poison");
    let mut vmms = [vmm_of(folder, &server), vmm_of(folder, &server)];
    let event = keeping.expect("Refused");
    assert!(event.contains("more guests than are kept"), "{event}");
    // Longer than the takeover timeout.
    thread::sleep(Duration::from_millis(200));
    for vmm in &mut vmms {
        vmm.ok(&format!("check 0 {PAGES} 1"));
    }
    let another = clone_of(folder, &server);
    drop((vmms, another));
    server.kill();
    assert_eq!(keeping.finish(), 0);
}

/// The number of kills: `SNAP_KILLS`, by default few.
fn kills() -> u32 {
    let asked = std::env::var("SNAP_KILLS").ok().and_then(|kills| kills.parse().ok());
    asked.unwrap_or(30)
}

/// The server is killed 0 to 2 ms after a guest has begun to connect: before it has accepted the connection, while it
/// reads the message, before and after the keeper has the guest. The next server serves that guest.
#[test]
fn a_kill_at_any_moment_of_a_load_leaves_no_guest_waiting() {
    if !userfaultfd_works("a_kill_at_any_moment_of_a_load_leaves_no_guest_waiting") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let keeping = Keeping::start(folder, FOREVER);
    let mut server = Daemon::start(folder, PAGES, "poison");
    let (kills, mut hung) = (kills(), Vec::new());
    for kill in 0..kills {
        let mut vmm = Vmm::start(&daemon::socket(folder));
        vmm.ok(&format!("map {PAGES}"));
        let moment = Duration::from_millis(2) * kill / kills;
        vmm.say("body new");
        thread::sleep(moment);
        server.end();
        assert_eq!(vmm.answer().as_deref(), Some("ok"));
        server = Daemon::start(folder, PAGES, "poison");
        let found = vmm.ask_within(&format!("check 0 {PAGES} {kill}"), Duration::from_secs(20));
        if found.as_deref() != Some("ok") {
            hung.push((moment, found));
        }
    }
    assert!(hung.is_empty(), "{} of {kills}: {hung:?}", hung.len());
    server.kill();
    keeping.finish();
}

/// The keeper has a duplicate of the connection, which must not keep it open.
#[test]
fn a_guest_that_cannot_be_served_is_disconnected_promptly() {
    if !userfaultfd_works("a_guest_that_cannot_be_served_is_disconnected_promptly") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let keeping = Keeping::start(folder, FOREVER);
    let server = Daemon::start(folder, PAGES, "poison");
    let mut fastest = FOREVER;
    for _ in 0..5 {
        let mut vmm = Vmm::start(&daemon::socket(folder));
        vmm.ok(&format!("map {PAGES}"));
        let begun = std::time::Instant::now();
        vmm.ok("body beyond");
        assert_eq!(vmm.ask("failure").as_deref(), Some(""));
        fastest = fastest.min(begun.elapsed());
        server.expect("Refused");
    }
    server.kill();
    assert_eq!(keeping.finish(), 0);
    assert!(fastest < Duration::from_millis(100), "{fastest:?}");
}

/// A guest whose connection no server has taken fails like others, and does not wait forever.
#[test]
fn a_guest_that_has_just_connected_fails_when_no_server_comes_back() {
    if !userfaultfd_works("a_guest_that_has_just_connected_fails_when_no_server_comes_back") {
        return;
    }
    for policy in ["poison", "kill"] {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path();
        let keeping = Keeping::start(folder, Duration::from_millis(500));
        let mut server = Daemon::start(folder, PAGES, policy);
        let mut vmm = Vmm::start(&daemon::socket(folder));
        vmm.ok(&format!("map {PAGES}"));
        server.end();
        keeping.expect("Lost");
        // The keeper still has the listening socket.
        vmm.ok("body new");
        let answer = vmm.ask("syscall 512");
        keeping.expect("GivenUp { guests: 1, killed: [] }");
        match policy {
            "poison" => assert_eq!(answer, Some(format!("errno {}", libc::EFAULT))),
            _ => assert_eq!(vmm.child.wait().expect("it ends").signal(), Some(libc::SIGKILL)),
        }
        // Later clients see that no server listens.
        let late = std::os::unix::net::UnixStream::connect(daemon::socket(folder));
        assert_eq!(
            late.map(drop).map_err(|error| error.kind()),
            Err(std::io::ErrorKind::ConnectionRefused)
        );
        let server = Daemon::start(folder, PAGES, policy);
        drop(vmm_of(folder, &server));
        server.expect("Ended");
        server.kill();
        assert_eq!(keeping.finish(), usize::from(policy == "poison"));
    }
}
