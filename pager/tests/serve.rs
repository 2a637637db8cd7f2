//! The server against VMMs in other processes: the handshake in all its forms, hostile clients, deaths.
#![allow(missing_docs)]

#[path = "support/serving.rs"]
mod serving;
mod support;
#[path = "support/vmm.rs"]
mod vmm;

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use pager::serve::{Prefetched, ServeOptions, Server, SnapshotName};
use pager::{FailurePolicy, PageSource, Populate, SourceError, VecSource};
use serving::{HUNG, Serving};
use support::{PAGE, source_of, stamped, userfaultfd_works};
use vmm::Vmm;

/// Not a test: the process of a VMM.
#[test]
fn vmm_process() {
    vmm::run();
}

fn quick() -> ServeOptions {
    let mut options = ServeOptions::default();
    // Long enough for good clients on a busy host.
    options.handshake_timeout = Duration::from_secs(2);
    options
}

#[test]
fn every_form_of_the_handshake_is_served() {
    if !userfaultfd_works("every_form_of_the_handshake_is_served") {
        return;
    }
    let serving = Serving::stamped(64);
    for form in ["new", "old", "big", "first-byte", "last-byte"] {
        let mut vmm = Vmm::start(&serving.socket);
        vmm.ok("map 64");
        vmm.ok(&format!("body {form}"));
        vmm.ok("check 0 64 3");
        serving.expect("served 262144");
        vmm.kill();
        serving.expect("ended");
    }
    serving.finish();
}

#[test]
fn invalid_clients_are_refused_next_to_a_good_one() {
    if !userfaultfd_works("invalid_clients_are_refused_next_to_a_good_one") {
        return;
    }
    let source = Arc::new(VecSource::new(stamped(64), 16 * PAGE));
    let serving = Serving::start(source, quick());
    let mut good = Vmm::start(&serving.socket);
    good.ok("map 64");
    good.ok("body new");
    serving.expect("served");
    let mut page = 0;
    for (form, why) in [
        ("silent", "no complete message within 2s (0 bytes, 0 descriptors)"),
        ("half-open", "no complete message within 2s (20 bytes, 1 descriptors)"),
        ("left", "has closed the connection"),
        ("no-descriptor", "bytes, 0 descriptors)"),
        ("two", "2 descriptors; 1 expected"),
        ("file", "not a userfaultfd but \"/dev/null\""),
        ("garbage", "cannot be parsed: expected value"),
        ("empty", "the message has no region"),
        ("overlapping", "two regions overlap in memory"),
        ("beyond", "a region ends at source offset 0x41000, the source at 0x40000"),
        ("wrapping", "is beyond 64 bits"),
        ("endless", "a region ends at source offset"),
        ("odd", "is not a multiple of the page size"),
        ("too-big", "longer than 1048576 bytes"),
    ] {
        let mut vmm = Vmm::start(&serving.socket);
        vmm.ok("map 64");
        // The server may have closed the connection before all of a message was sent.
        // It may also have killed a client that has sent no userfaultfd.
        let answer = vmm.ask(&format!("body {form}"));
        let sent = |answer: &String| answer == "ok" || answer.starts_with("not sent");
        assert!(answer.as_ref().is_none_or(sent), "{form}: {answer:?}");
        serving.expect(why);
        good.ok(&format!("check {page} 4 1"));
        page += 4;
    }
    let mut quiet = Vmm::start(&serving.socket);
    quiet.ok("map-quiet 64");
    quiet.ok("body new");
    serving.expect("removed pages must be reported");
    good.ok("check 0 64 9");
    // The pages that it touches fail, as long as it lives.
    drop(quiet);
    drop(good);
    serving.expect("ended");
    serving.finish();
}

#[test]
fn removed_pages_of_a_client_read_as_zero() {
    if !userfaultfd_works("removed_pages_of_a_client_read_as_zero") {
        return;
    }
    let serving = Serving::stamped(64);
    let mut vmm = Vmm::start(&serving.socket);
    vmm.ok("map 64");
    vmm.ok("body halves");
    vmm.ok("check 0 16 1");
    vmm.ok("remove 8 16");
    for page in 8..24 {
        assert_eq!(vmm.ask(&format!("read {page}")).as_deref(), Some("0"), "page {page}");
    }
    vmm.ok("check 24 40 1");
    // Its pages are served before it is listed.
    serving.expect("served");
    serving.until_loaded(&vmm);
    drop(vmm);
    serving.finish();
}

#[test]
fn huge_pages_are_served_whole() {
    if !userfaultfd_works("huge_pages_are_served_whole") {
        return;
    }
    let serving =
        Serving::start(Arc::new(VecSource::new(stamped(1024), 2 << 20)), ServeOptions::default());
    let mut vmm = Vmm::start(&serving.socket);
    let mapped = vmm.ask("map-huge 2").expect("it lives");
    if mapped != "ok" {
        let line = format!("SKIPPED huge_pages_are_served_whole: {mapped}\n");
        std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).expect("stderr");
        return;
    }
    vmm.ok("body huge");
    vmm.ok("check 0 1024 5");
    drop(vmm);
    serving.finish();
}

/// After closing the socket, a client may still use its memory.
#[test]
fn a_client_that_hangs_up_is_served_until_it_ends() {
    if !userfaultfd_works("a_client_that_hangs_up_is_served_until_it_ends") {
        return;
    }
    let serving = Serving::stamped(64);
    let mut vmm = Vmm::start(&serving.socket);
    vmm.ok("map 64");
    vmm.ok("body new");
    vmm.ok("check 0 16 1");
    vmm.ok("hang-up");
    vmm.ok("check 0 64 2");
    vmm.kill();
    serving.expect("served");
    serving.expect("ended");
    serving.finish();
}

fn failing(bad: usize) -> Arc<dyn PageSource> {
    source_of(64, move |offset, answer| match offset as usize / PAGE {
        page if page == bad => Err(SourceError::permanent("wrong checksum")),
        page => {
            answer.push(page);
            Ok(())
        }
    })
}

#[test]
fn an_unreadable_page_is_poisoned_only_for_its_client() {
    if !userfaultfd_works("an_unreadable_page_is_poisoned_only_for_its_client") {
        return;
    }
    let serving = Serving::start(failing(7), ServeOptions::default());
    let mut vmms = [Vmm::start(&serving.socket), Vmm::start(&serving.socket)];
    for vmm in &mut vmms {
        vmm.ok("map 64");
        vmm.ok("body new");
        serving.expect("served");
    }
    let errno = format!("errno {}", libc::EFAULT);
    assert_eq!(vmms[0].ask("syscall 7"), Some(errno));
    serving.expect("failed: pager0 cannot load the page at source offset 0x7000");
    for vmm in &mut vmms {
        vmm.ok("check 8 56 1");
    }
    // A load instruction gets SIGBUS.
    assert_eq!(vmms[1].ask("read 7"), None);
    let status = vmms[1].child.wait().expect("it ends");
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGBUS));
    vmms[0].ok("check 0 7 1");
    drop(vmms);
    serving.finish();
}

#[test]
fn with_the_policy_kill_only_the_client_is_killed() {
    if !userfaultfd_works("with_the_policy_kill_only_the_client_is_killed") {
        return;
    }
    let mut options = ServeOptions::default();
    options.on_error = FailurePolicy::Kill;
    let serving = Serving::start(failing(7), options);
    let mut vmms = [Vmm::start(&serving.socket), Vmm::start(&serving.socket)];
    for vmm in &mut vmms {
        vmm.ok("map 64");
        vmm.ok("body new");
        serving.expect("served");
    }
    assert_eq!(vmms[0].ask("syscall 7"), None);
    let status = vmms[0].child.wait().expect("it ends");
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL));
    serving.expect("failed");
    serving.expect("ended");
    vmms[1].ok("check 8 56 1");
    drop(vmms);
    serving.finish();
}

/// VMMs are killed while they fault and remove. Nothing of them is left, and another VMM does not notice.
#[test]
fn vmms_killed_under_load_leave_nothing_behind() {
    if !userfaultfd_works("vmms_killed_under_load_leave_nothing_behind") {
        return;
    }
    let mut options = ServeOptions::default();
    // Memory that is loaded ahead faults no more.
    options.populate = Populate::Off;
    let serving = Serving::start(Arc::new(VecSource::new(stamped(512), 16 * PAGE)), options);
    let mut good = Vmm::start(&serving.socket);
    good.ok("map 512");
    good.ok("body new");
    serving.expect("served");
    for round in 0..6 {
        let mut vmm = Vmm::start(&serving.socket);
        vmm.ok("map 512");
        vmm.ok("body new");
        serving.expect("served");
        assert_eq!(vmm.ask(&format!("churn {round}")).as_deref(), Some("churning"));
        let begun = Instant::now();
        while serving.stats(&vmm).is_none_or(|stats| stats.faults < 500) {
            assert!(begun.elapsed() < HUNG, "it does not fault");
            thread::yield_now();
        }
        vmm.kill();
        serving.expect("ended");
        good.ok(&format!("check {} 64 1", round * 64));
    }
    assert_eq!(serving.handle.guests().len(), 1);
    good.ok("check 0 512 2");
    serving.until_loaded(&good);
    assert_eq!(serving.handle.kill_guests(), 0, "it needs nothing any more");
    drop(good);
    serving.expect("ended");
    serving.finish();
}

#[test]
fn a_guest_that_still_needs_pages_is_killed_on_request() {
    if !userfaultfd_works("a_guest_that_still_needs_pages_is_killed_on_request") {
        return;
    }
    let serving = Serving::stamped(64);
    let mut vmm = Vmm::start(&serving.socket);
    vmm.ok("map 64");
    vmm.ok("body new");
    serving.expect("served");
    vmm.ok("check 0 16 1");
    assert_eq!(serving.handle.kill_guests(), 1);
    assert!(!vmm.child.wait().expect("it ends").success());
    serving.expect("ended");
    serving.finish();
}

/// A client makes the shared open file blocking while its faults are answered. The reads of the server do not wait.
#[test]
fn a_client_that_makes_reads_wait_delays_no_other() {
    if !userfaultfd_works("a_client_that_makes_reads_wait_delays_no_other") {
        return;
    }
    for _ in 0..3 {
        let serving =
            Serving::start(Arc::new(VecSource::new(stamped(4096), PAGE)), ServeOptions::default());
        let mut vmm = Vmm::start(&serving.socket);
        vmm.ok("map 4096");
        vmm.ok("body new");
        // The client is killed, or served to the end: this depends on timing.
        let answer = vmm.ask("unruly 4096");
        assert!(answer.is_none() || answer.as_deref() == Some("ok"), "{answer:?}");
        drop(vmm);
        let (done, ended) = channel();
        thread::spawn(move || {
            serving.finish();
            done.send(())
        });
        ended.recv_timeout(HUNG).expect("the server ends");
    }
}

/// The shared file, in the descriptors of a clone.
fn shared_file(vmm: &Vmm) -> PathBuf {
    let process = format!("/proc/{}/fd", vmm.pid());
    let files =
        std::fs::read_dir(process).expect("it lives").map(|file| file.expect("proc").path());
    let shared = |file: &PathBuf| {
        std::fs::read_link(file).is_ok_and(|to| to.display().to_string().contains("snapshot-pages"))
    };
    files.filter(shared).last().expect("it holds the file")
}

/// Half of the pages in two ranges, and one range beyond the end.
fn listing_half_of_64() -> ServeOptions {
    let mut options = ServeOptions::default();
    let page = PAGE as u64;
    let list = move || vec![16 * page..40 * page, 0..8 * page, 1000 * page..2000 * page];
    options.prefetch = Some(Prefetched::new(list));
    options
}

#[test]
fn listed_pages_are_present_before_a_guest_touches_them() {
    if !userfaultfd_works("listed_pages_are_present_before_a_guest_touches_them") {
        return;
    }
    let source = Arc::new(VecSource::new(stamped(64), 4 * PAGE));
    let serving = Serving::start(source, listing_half_of_64());
    let mut vmm = Vmm::start(&serving.socket);
    vmm.ok("map 64");
    vmm.ok("body new");
    serving.expect("served");
    let begun = Instant::now();
    while serving.stats(&vmm).expect("it is served").installed.prefetched < 32 {
        assert!(begun.elapsed() < HUNG, "{:?}", serving.stats(&vmm));
        thread::yield_now();
    }
    vmm.ok("check 16 24 1");
    vmm.ok("check 0 8 2");
    assert_eq!(serving.stats(&vmm).expect("it is served").faults, 0);
    vmm.ok("check 0 64 3");
    assert_eq!(serving.stats(&vmm).expect("it is served").installed.prefetched, 32);
    drop(vmm);
    serving.finish();
}

#[test]
fn listed_pages_are_in_the_shared_file_before_a_clone_touches_them() {
    if !userfaultfd_works("listed_pages_are_in_the_shared_file_before_a_clone_touches_them") {
        return;
    }
    let mut options = listing_half_of_64();
    let layers = vec!["test".into()];
    options.share = Some(SnapshotName { layers, memory_bytes: (64 * PAGE) as u64 });
    let serving = Serving::start(Arc::new(VecSource::new(stamped(64), 4 * PAGE)), options);
    let mut first = Vmm::start(&serving.socket);
    first.ok("share 64");
    serving.expect("served");
    let pages = || {
        let file = std::fs::metadata(shared_file(&first)).expect("it lives");
        std::os::unix::fs::MetadataExt::blocks(&file) * 512 / PAGE as u64
    };
    let begun = Instant::now();
    while pages() < 32 {
        assert!(begun.elapsed() < HUNG, "{} pages", pages());
        thread::yield_now();
    }
    let mut second = Vmm::start(&serving.socket);
    second.ok("share 64");
    // A clone runs a moment before it is counted.
    serving.expect("served");
    for clone in [&mut first, &mut second] {
        clone.ok("check 16 24 1");
        clone.ok("check 0 8 2");
        assert_eq!(serving.stats(clone).expect("it is served").faults, 0);
    }
    first.ok("check 0 64 3");
    assert!(serving.stats(&first).expect("it is served").faults > 0);
    drop((first, second));
    serving.finish();
}

/// Another process adds a page to the shared file: the clones that have it fail at their next missing page, and later
/// clones get another file.
#[test]
fn a_file_that_was_written_to_is_not_shared_again() {
    if !userfaultfd_works("a_file_that_was_written_to_is_not_shared_again") {
        return;
    }
    let mut options = ServeOptions::default();
    let layers = vec!["test".into()];
    options.share = Some(SnapshotName { layers, memory_bytes: (64 * PAGE) as u64 });
    let serving = Serving::start(Arc::new(VecSource::new(stamped(64), 16 * PAGE)), options);
    let mut first = Vmm::start(&serving.socket);
    first.ok("share 64");
    first.ok("check 0 16 1");
    let file = shared_file(&first);
    // The mode of the file allows this only to root.
    let Ok(file) = std::fs::OpenOptions::new().read(true).write(true).open(file) else { return };
    let (at, page) = ((20 * PAGE) as u64, PAGE as u64);
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), at, page).expect("zeros");
    let errno = format!("errno {}", libc::EFAULT);
    assert_eq!(first.ask("syscall 24"), Some(errno));
    first.ok("check 0 16 2");
    let mut second = Vmm::start(&serving.socket);
    second.ok("share 64");
    second.ok("check 0 64 3");
    drop((first, second));
    serving.finish();
}

/// A guest that cannot be served sees the end of its connection, instead of waiting for an answer.
#[test]
fn a_guest_that_cannot_be_served_is_disconnected_promptly() {
    if !userfaultfd_works("a_guest_that_cannot_be_served_is_disconnected_promptly") {
        return;
    }
    let source = Arc::new(VecSource::new(stamped(64), 16 * PAGE));
    let serving = Serving::start(source, ServeOptions::default());
    let mut fastest = HUNG;
    for _ in 0..5 {
        let mut vmm = Vmm::start(&serving.socket);
        vmm.ok("map 64");
        let begun = Instant::now();
        // Its memory is larger than the snapshot's.
        vmm.ok("body beyond");
        assert_eq!(vmm.ask("failure").as_deref(), Some(""));
        fastest = fastest.min(begun.elapsed());
        serving.expect("a region ends at source offset");
    }
    serving.finish();
    assert!(fastest < Duration::from_millis(100), "{fastest:?}");
}

/// The handshake may take a minute here, but a server that ends does not wait for it.
#[test]
fn a_client_in_the_handshake_is_closed_when_the_server_ends() {
    if !userfaultfd_works("a_client_in_the_handshake_is_closed_when_the_server_ends") {
        return;
    }
    let mut fastest = HUNG;
    for round in 0..5 {
        let mut options = ServeOptions::default();
        options.handshake_timeout = HUNG;
        let source = Arc::new(VecSource::new(stamped(64), 16 * PAGE));
        let mut serving = Serving::start(source, options);
        let mut good = Vmm::start(&serving.socket);
        good.ok("map 64");
        good.ok("body new");
        serving.expect("served");
        let form = ["silent", "half-open"][round % 2];
        let mut vmm = Vmm::start(&serving.socket);
        vmm.ok("map 64");
        vmm.ok(&format!("body {form}"));
        // The server waits for the rest of its message.
        thread::sleep(Duration::from_millis(20));
        let begun = Instant::now();
        serving.stop();
        assert_eq!(vmm.ask("failure").as_deref(), Some(""));
        fastest = fastest.min(begun.elapsed());
        match form {
            "silent" => serving.expect("the server is ending; Closed"),
            _ => {
                serving.expect("the server is ending; Poisoned");
                assert_eq!(vmm.ask("syscall 3"), Some(format!("errno {}", libc::EFAULT)));
            }
        }
        assert!(!serving.socket.exists());
        // A guest that is served already is served to its end.
        good.ok("check 0 64 1");
        drop((good, vmm));
        serving.finish();
    }
    assert!(fastest < Duration::from_millis(100), "{fastest:?}");
}

/// A client whose whole message waits in the queue when the server ends has got its place.
#[test]
fn a_client_in_the_queue_is_served_by_a_server_that_ends() {
    if !userfaultfd_works("a_client_in_the_queue_is_served_by_a_server_that_ends") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("pager.sock");
    let source = Arc::new(VecSource::new(stamped(64), 16 * PAGE));
    let server = Server::bind(&socket, source, ServeOptions::default(), |_| {}).expect("it binds");
    let mut vmms = [Vmm::start(&socket), Vmm::start(&socket)];
    for vmm in &mut vmms {
        vmm.ok("map 64");
        vmm.ok("body new");
    }
    let (stopped, _) = std::io::pipe().expect("a pipe");
    let serving = thread::spawn(move || server.run(stopped.as_fd()).expect("it can poll"));
    for vmm in &mut vmms {
        assert_eq!(vmm.ask_within("check 0 64 1", HUNG).as_deref(), Some("ok"));
    }
    drop(vmms);
    serving.join().expect("no panic");
}
