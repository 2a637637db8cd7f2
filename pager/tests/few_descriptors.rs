//! A server with few descriptors left: with any number of them, none of its guests hangs. This is a test binary of its
//! own, because the limit applies to the whole process.
#![allow(missing_docs)]

#[path = "support/serving.rs"]
mod serving;
mod support;
#[path = "support/vmm.rs"]
mod vmm;

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;

use pager::serve::{ServeOptions, SnapshotName};
use pager::{FailurePolicy, VecSource};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serving::Serving;
use support::{PAGE, stamp, stamped, userfaultfd_works};
use vmm::Vmm;

/// Not a test: the process of a VMM.
#[test]
fn vmm_process() {
    vmm::run();
}

/// Takes all descriptors of this process except this number.
fn all_but(left: usize) -> Vec<File> {
    let mut taken = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        taken.push(file);
    }
    taken.truncate(taken.len() - left);
    taken
}

fn serve(on_error: FailurePolicy) -> Serving {
    let mut options = ServeOptions::default();
    options.on_error = on_error;
    let memory_bytes = 64 * PAGE as u64;
    options.share = Some(SnapshotName { layers: vec!["test".into()], memory_bytes });
    Serving::start(Arc::new(VecSource::new(stamped(64), 16 * PAGE)), options)
}

/// What happened to a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Served,
    Killed,
    Poisoned,
    Notified,
}

/// A guest with a thread that waits for a page, while the server has this number of descriptors.
fn guest(serving: &Serving, left: usize) -> Outcome {
    let mut vmm = Vmm::start(&serving.socket);
    vmm.ok("map 64");
    let taken = all_but(left);
    vmm.say("waiting 3 new");
    let event = serving.next_event();
    let answer = vmm.answer();
    drop(taken);
    if event.starts_with("served") {
        assert_eq!(answer, Some(format!("{:x}", stamp(3).to_ne_bytes()[0])), "{left}: {event}");
        vmm.ok("check 0 64 1");
        drop(vmm);
        serving.expect("ended");
        return Outcome::Served;
    }
    assert!(event.contains("open files"), "{left}: {event}");
    if event.contains("; Killed") {
        assert_eq!(answer, None, "{left}: {event}");
        let signal = vmm.child.wait().expect("it ends").signal();
        assert_eq!(signal, Some(libc::SIGKILL), "{left}: {event}");
        return Outcome::Killed;
    }
    assert!(event.contains("; Poisoned"), "{left}: {event}");
    assert_eq!(answer, Some(format!("errno {}", libc::EFAULT)), "{left}: {event}");
    Outcome::Poisoned
}

/// A clone gets an error, or finds its connection closed. It is not killed.
fn clone(serving: &Serving, left: usize) -> Outcome {
    let mut vmm = Vmm::start(&serving.socket);
    let taken = all_but(left);
    let answer = vmm.ask("share 64").expect("it is not killed");
    let event = serving.next_event();
    drop(taken);
    if event.starts_with("served") {
        assert_eq!(answer, "ok");
        drop(vmm);
        serving.expect("ended");
        return Outcome::Served;
    }
    assert!(answer.starts_with("not shared: "), "{left}: {answer}, {event}");
    assert!(event.contains("open files") && event.contains("; Closed"), "{left}: {event}");
    Outcome::Notified
}

#[test]
fn however_few_descriptors_are_left_no_guest_hangs() {
    if !userfaultfd_works("however_few_descriptors_are_left_no_guest_hangs") {
        return;
    }
    // With a lower limit, fewer descriptors must be taken.
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(128), ..limit }).expect("it is lowered");
    for policy in [FailurePolicy::Kill, FailurePolicy::Poison] {
        let serving = serve(policy);
        let with_more_and_more = |kind: fn(&Serving, usize) -> Outcome| {
            let mut outcomes = Vec::new();
            while outcomes.last() != Some(&Outcome::Served) {
                outcomes.push(kind(&serving, outcomes.len()));
                assert!(outcomes.len() < 40, "{outcomes:?}");
            }
            outcomes
        };
        let outcomes = with_more_and_more(guest);
        assert_eq!(outcomes[0], Outcome::Killed, "{outcomes:?}");
        // The policy decides, if there are enough descriptors to hold its userfaultfd.
        let poisons = policy == FailurePolicy::Poison;
        assert_eq!(outcomes.contains(&Outcome::Poisoned), poisons, "{outcomes:?}");
        let outcomes = with_more_and_more(clone);
        assert_eq!(outcomes[0], Outcome::Notified, "{outcomes:?}");
        serving.finish();
    }
}
