//! `snap serve --record`: working sets of guests of another program.

use std::io::{BufRead, BufReader};
use std::process::Command;

use serde_json::Value;
use snapfmt::{Phase, Snapshot};

use crate::support::{SNAP, end_of, signal, snap, start};

#[path = "../pager/tests/support/mod.rs"]
mod support;
#[path = "../pager/tests/support/vmm.rs"]
pub(crate) mod vmm;

use support::{stamped, userfaultfd_works};
use vmm::Vmm;

const PAGES: usize = 64;

/// Not a test: the process of a VMM.
#[test]
fn vmm_process() {
    vmm::run();
}

#[test]
fn the_pages_that_served_guests_touch_are_recorded_and_joined() {
    if !userfaultfd_works("the_pages_that_served_guests_touch_are_recorded_and_joined") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    let text = |name: &str| path(name).to_string_lossy().into_owned();
    std::fs::write(path("memory"), stamped(PAGES)).expect("it can be written");
    snap(["import", &text("memory"), "-o", &text("a.snap")]).ok();
    let serve = |options: &[&str]| {
        let mut command = Command::new(SNAP);
        command.args(["serve", &text("a.snap"), "--listen", &text("pages.sock")]);
        command.args(["--record", "-o", &text("out.snap")]).args(options);
        command
    };
    crate::support::run(serve(&["--populate", "full"])).failed(2, &["--record", "--populate"]);

    // Without a guest there is no set.
    let server = start(serve(&[]));
    while !path("pages.sock").exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let mut first = [Vmm::start(&path("pages.sock")), Vmm::start(&path("pages.sock"))];
    for (vmm, pages) in
        first.iter_mut().zip([["check 40 1 1", "check 3 2 1"], ["check 4 1 1", "check 60 1 1"]])
    {
        vmm.ok(&format!("map {PAGES}"));
        vmm.ok("body new");
        pages.iter().for_each(|touch| vmm.ok(touch));
    }
    signal(server.id(), "TERM");
    // Guests that are served are recorded to their end.
    first[0].ok("check 10 1 1");
    assert!(!path("out.snap").exists());
    drop(first);
    let ended = end_of(server);
    assert_eq!(ended.status.code(), Some(130), "{}", String::from_utf8_lossy(&ended.stderr));

    let set = Snapshot::open(path("out.snap")).expect("it opens").working_set();
    let set = set.expect("it is readable").expect("it has one");
    assert_eq!(set.restores(), 2);
    let mut pages: Vec<u32> = set.pages().map(|(page, _)| page.0).collect();
    pages.sort_unstable();
    assert_eq!(pages, [3, 4, 10, 40, 60], "exactly the touched pages");
    let run = set.runs().iter().find(|run| run.first.0 == 4).expect("it is in the set");
    assert_eq!(run.seen, 2, "both have touched it");
    assert!(set.runs().iter().all(|run| run.phase != Phase::FirstOutput));
    snap(["verify", &text("out.snap")]).ok();
    snap(["optimize", &text("out.snap"), "-o", &text("fast.snap")]).ok();
    let info: Value = snap(["info", &text("fast.snap"), "--json"]).ok().json();
    assert_eq!(info["working_set"]["pages"], 5, "{info}");
}

#[test]
fn an_output_that_exists_or_would_have_no_set_is_not_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let text = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    std::fs::write(text("memory"), stamped(4)).expect("it can be written");
    snap(["import", &text("memory"), "-o", &text("a.snap")]).ok();
    let serve = |out: &str| {
        let mut command = Command::new(SNAP);
        command.args([
            "serve",
            &text("a.snap"),
            "--listen",
            &text("s"),
            "--record",
            "-o",
            &text(out),
        ]);
        command
    };
    crate::support::run(serve("a.snap")).failed(1, &["a.snap"]);
    crate::support::run(serve("memory")).failed(1, &["memory exists"]);
    let mut server = start(serve("out.snap"));
    let mut lines = BufReader::new(server.stderr.take().expect("a pipe")).lines();
    lines.next().expect("a line").expect("text");
    signal(server.id(), "TERM");
    let rest: Vec<String> = lines.map_while(Result::ok).collect();
    assert!(rest.iter().any(|line| line.contains("no guest has touched a page")), "{rest:?}");
    assert_eq!(end_of(server).status.code(), Some(1));
    assert!(!folder.path().join("out.snap").exists());
}
