//! Guests that the server refuses: none of them hangs at a missing page.
#![allow(missing_docs)]

#[path = "support/serving.rs"]
mod serving;
mod support;
#[path = "support/vmm.rs"]
mod vmm;

use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::time::Duration;

use pager::serve::{ServeOptions, SnapshotName};
use pager::{FailurePolicy, VecSource};
use serving::Serving;
use support::{PAGE, stamped, userfaultfd_works};
use vmm::Vmm;

/// Not a test: the process of a VMM.
#[test]
fn vmm_process() {
    vmm::run();
}

fn serving(on_error: FailurePolicy) -> Serving {
    let mut options = ServeOptions::default();
    options.on_error = on_error;
    // For clients that send too little.
    options.handshake_timeout = Duration::from_secs(1);
    Serving::start(Arc::new(VecSource::new(stamped(64), 16 * PAGE)), options)
}

/// What a guest may send with its userfaultfd, and why it is refused.
const REFUSED: [(&str, &str); 10] = [
    // The snapshot of a smaller guest.
    ("beyond", "a region ends at source offset 0x41000, the source at 0x40000"),
    ("overlapping", "two regions overlap"),
    ("odd", "is not a multiple of the page size"),
    ("empty", "the message has no region"),
    ("garbage", "cannot be parsed"),
    ("half-open", "no complete message within 1s"),
    ("left", "has closed the connection"),
    ("two", "2 descriptors; 1 expected"),
    ("with-file", "2 descriptors; 1 expected"),
    ("too-big", "longer than"),
];

/// What a guest sends without a userfaultfd with which its pages could be poisoned.
const WITHOUT_USERFAULTFD: [(&str, &str); 3] = [
    ("file", "not a userfaultfd but \"/dev/null\""),
    ("no-descriptor", "0 descriptors"),
    // More descriptors than the server receives.
    ("many", " descriptors; 1 expected"),
];

fn killed(vmm: &mut Vmm) {
    let status = vmm.child.wait().expect("it ends");
    assert_eq!(status.signal(), Some(libc::SIGKILL));
}

fn efault() -> Option<String> {
    Some(format!("errno {}", libc::EFAULT))
}

#[test]
fn by_the_policy_poison_touches_of_a_refused_guest_fail() {
    if !userfaultfd_works("by_the_policy_poison_touches_of_a_refused_guest_fail") {
        return;
    }
    let serving = serving(FailurePolicy::Poison);
    for (form, why) in REFUSED {
        let mut vmm = Vmm::start(&serving.socket);
        vmm.ok("map 64");
        // One thread already waits. The server may not read a message that is too long to its end.
        let answer = vmm.ask(&format!("waiting 3 {form}"));
        let event = serving.next_event();
        assert!(event.contains(why) && event.contains("; Poisoned"), "{form}: {event}");
        let not_sent = answer.as_ref().is_some_and(|answer| answer.starts_with("not sent"));
        assert!(answer == efault() || form == "too-big" && not_sent, "{form}: {answer:?}");
        // Another thread touches another page later. The connection is closed.
        assert_eq!(vmm.ask("syscall 40"), efault(), "{form}");
        if form != "left" {
            assert_eq!(vmm.ask("failure").as_deref(), Some(""), "{form}");
        }
        // An access to a page that it has given back neither hangs nor reads zeros.
        vmm.ok("remove 40 1");
        assert_eq!(vmm.ask("syscall 40"), efault(), "{form}");
        // A load instruction gets SIGBUS.
        assert_eq!(vmm.ask("read 7"), None, "{form}");
        assert_eq!(vmm.child.wait().expect("it ends").signal(), Some(libc::SIGBUS), "{form}");
    }
    assert_eq!(serving.handle.guests().len(), 0);
    serving.finish();
}

#[test]
fn by_the_policy_kill_a_refused_guest_is_killed() {
    if !userfaultfd_works("by_the_policy_kill_a_refused_guest_is_killed") {
        return;
    }
    let serving = serving(FailurePolicy::Kill);
    for (form, why) in REFUSED.into_iter().chain(WITHOUT_USERFAULTFD) {
        let mut vmm = Vmm::start(&serving.socket);
        vmm.ok("map 64");
        vmm.say(&format!("waiting 3 {form}"));
        let event = serving.next_event();
        assert!(event.contains(why) && event.contains("; Killed"), "{form}: {event}");
        killed(&mut vmm);
    }
    serving.finish();
}

/// Its pages cannot be made to fail, so that it would hang.
#[test]
fn a_refused_guest_without_a_userfaultfd_is_killed_by_either_policy() {
    if !userfaultfd_works("a_refused_guest_without_a_userfaultfd_is_killed_by_either_policy") {
        return;
    }
    let serving = serving(FailurePolicy::Poison);
    for (form, why) in WITHOUT_USERFAULTFD {
        let mut vmm = Vmm::start(&serving.socket);
        vmm.ok("map 64");
        vmm.say(&format!("waiting 3 {form}"));
        let event = serving.next_event();
        assert!(event.contains(why) && event.contains("; Killed"), "{form}: {event}");
        killed(&mut vmm);
    }
    serving.finish();
}

/// A program that only checks whether a server listens, or sends something else, has no memory that needs pages.
#[test]
fn a_client_without_memory_is_not_killed() {
    if !userfaultfd_works("a_client_without_memory_is_not_killed") {
        return;
    }
    for policy in [FailurePolicy::Poison, FailurePolicy::Kill] {
        let serving = serving(policy);
        let mut vmm = Vmm::start(&serving.socket);
        vmm.ok("map 64");
        for (form, why) in [("silent", "no complete message"), ("noise", "cannot be parsed")] {
            vmm.ok(&format!("body {form}"));
            let event = serving.next_event();
            assert!(event.contains(why) && event.contains("; Closed"), "{form}: {event}");
        }
        vmm.ok("body figures");
        assert_eq!(vmm.ask("failure").as_deref(), Some("[]"));
        // It is one that can still be served.
        vmm.ok("body new");
        serving.expect("served");
        vmm.ok("check 0 64 1");
        drop(vmm);
        serving.finish();
    }
}

/// A clone gets an error, and touches nothing.
#[test]
fn a_refused_clone_gets_the_reason() {
    if !userfaultfd_works("a_refused_clone_gets_the_reason") {
        return;
    }
    let mut options = ServeOptions::default();
    options.on_error = FailurePolicy::Kill;
    options.clients = 1;
    options.share =
        Some(SnapshotName { layers: vec!["test".into()], memory_bytes: 64 * PAGE as u64 });
    let serving = Serving::start(Arc::new(VecSource::new(stamped(64), 16 * PAGE)), options);
    let mut clone = Vmm::start(&serving.socket);
    // A snapshot of another size.
    let answer = clone.ask("share 32").expect("it lives");
    assert!(
        answer
            .contains("requests snapshot test (131072 bytes), this server has test (262144 bytes)"),
        "{answer}"
    );
    serving.expect("; Closed");
    // One too many.
    let mut guest = Vmm::start(&serving.socket);
    guest.ok("map 64");
    while guest.ask("body new").is_some() && !serving.next_event().contains("served 262144") {}
    let answer = clone.ask("share 64").expect("it lives");
    assert!(answer.contains("1 clients are served already"), "{answer}");
    serving.expect("; Closed");
    drop((guest, clone));
    serving.finish();
}

/// The first guest is served all the time. Guests above the limit are killed, because nothing would answer their
/// faults.
#[test]
fn a_guest_too_many_is_killed() {
    if !userfaultfd_works("a_guest_too_many_is_killed") {
        return;
    }
    let mut options = ServeOptions::default();
    options.clients = 1;
    let serving = Serving::start(Arc::new(VecSource::new(stamped(64), 16 * PAGE)), options);
    let mut first = Vmm::start(&serving.socket);
    first.ok("map 64");
    first.ok("body new");
    serving.expect("served");
    for form in ["new", "no-descriptor"] {
        let mut second = Vmm::start(&serving.socket);
        second.ok("map 64");
        second.say(&format!("waiting 3 {form}"));
        serving.expect("1 clients are served already; Killed");
        killed(&mut second);
    }
    let mut silent = Vmm::start(&serving.socket);
    silent.ok("map 64");
    silent.ok("body silent");
    serving.expect("1 clients are served already; Closed");
    silent.ok("body noise");
    serving.expect("; Closed");
    first.ok("check 0 64 1");
    drop((first, silent));
    serving.finish();
}

/// It closes its end immediately, because it expects no answer. It is served anyway.
#[test]
fn a_guest_that_closes_its_connection_immediately_is_served() {
    if !userfaultfd_works("a_guest_that_closes_its_connection_immediately_is_served") {
        return;
    }
    let serving = serving(FailurePolicy::Poison);
    for _ in 0..20 {
        let mut vmm = Vmm::start(&serving.socket);
        vmm.ok("map 64");
        vmm.ok("body quick");
        serving.expect("served 262144");
        vmm.ok("check 0 64 1");
        drop(vmm);
        serving.expect("ended");
    }
    serving.finish();
}

/// A server that has to end immediately also kills the clients whose pages it poisons: they would hang without it.
#[test]
fn refused_guests_are_killed_with_the_others() {
    if !userfaultfd_works("refused_guests_are_killed_with_the_others") {
        return;
    }
    let serving = serving(FailurePolicy::Poison);
    let mut vmm = Vmm::start(&serving.socket);
    vmm.ok("map 64");
    vmm.ok("body beyond");
    serving.expect("; Poisoned");
    assert_eq!(serving.handle.kill_guests(), 1);
    killed(&mut vmm);
    serving.finish();
}

#[test]
fn huge_pages_of_a_refused_guest_are_poisoned_whole() {
    let name = "huge_pages_of_a_refused_guest_are_poisoned_whole";
    if !userfaultfd_works(name) {
        return;
    }
    let serving = serving(FailurePolicy::Poison);
    let mut vmm = Vmm::start(&serving.socket);
    let mapped = vmm.ask("map-huge 1").expect("it lives");
    if mapped != "ok" {
        let line = format!("SKIPPED {name}: {mapped}\n");
        std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).expect("stderr");
        return;
    }
    // The source is too small for a huge page.
    assert_eq!(vmm.ask("waiting 3 huge"), efault());
    serving.expect("; Poisoned");
    assert_eq!(vmm.ask("syscall 500"), efault());
    drop(vmm);
    serving.finish();
}
