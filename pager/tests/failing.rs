//! If a page cannot be loaded, the access fails: no zeros, no hang.
#![allow(missing_docs)]

mod support;

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pager::{FailureCause, FailurePolicy, Pager, RetryPolicy, SourceError, StartError, VecSource};
use support::{Memory, PAGE, source_of, stamp, stamped, thread_id, userfaultfd_works};

#[test]
fn an_unreadable_page_is_an_error_and_the_others_are_served() {
    if !userfaultfd_works("an_unreadable_page_is_an_error_and_the_others_are_served") {
        return;
    }
    let memory = Memory::map(64 * PAGE);
    let source = source_of(64, |offset, answer| match offset as usize / PAGE {
        page @ 30..40 => Err(SourceError::permanent(format!("page {page}: wrong checksum"))),
        page => {
            answer.push(page);
            Ok(())
        }
    });
    let failures = Arc::new(Mutex::new(Vec::new()));
    let pager = Pager::builder(source)
        .region(memory.whole())
        .on_failure({
            let failures = Arc::clone(&failures);
            move |failure| {
                let cause = std::error::Error::source(&failure.cause).map(|c| c.to_string());
                failures.lock().expect("not poisoned").push((failure.source_offset, cause));
            }
        })
        .start()
        .expect("it starts");
    assert_eq!(memory.read_by_syscall(29).expect("it is there"), stamp(29) as u8);
    assert!(pager.failure().is_none());
    for page in [33, 35, 33] {
        let error = memory.read_by_syscall(page).expect_err("the page is unreadable");
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        // The callback was called before.
        let expected = (Some(33 * PAGE as u64), Some("page 33: wrong checksum".to_owned()));
        assert_eq!(*failures.lock().expect("not poisoned"), [expected]);
    }
    let failure = pager.failure().expect("it is kept");
    assert_eq!(failure.host_addr, Some(memory.addr() + 33 * PAGE as u64));
    assert_eq!(memory.read_u64(41 * PAGE), stamp(41));
    assert_eq!(pager.stop().pages.poisoned, 2);
}

/// Two threads waited for one page that failed. The message of the second thread found the page already
/// poisoned, and so it was recorded as present, and as installed by another thread.
#[test]
fn a_page_poisoned_for_two_stays_poisoned() {
    if !userfaultfd_works("a_page_poisoned_for_two_stays_poisoned") {
        return;
    }
    let memory = Arc::new(Memory::map(64 * PAGE));
    let (page_1_asked, is_asked) = std::sync::mpsc::channel();
    let waiting: Arc<[AtomicI32; 2]> = Arc::default();
    let source = source_of(64, {
        let waiting = Arc::clone(&waiting);
        move |offset, answer| match offset as usize / PAGE {
            5 => Err(SourceError::permanent("lost")),
            page => {
                // While page 1 is slow, both messages for page 5 are queued.
                if page == 1 {
                    page_1_asked.send(()).expect("the test waits for it");
                    waiting.iter().for_each(wait_until_asleep);
                }
                answer.push(page);
                Ok(())
            }
        }
    });
    let pager = Pager::builder(source).region(memory.whole()).start().expect("it starts");
    let touch = |page, tid: Option<usize>| {
        let (memory, waiting) = (Arc::clone(&memory), Arc::clone(&waiting));
        std::thread::spawn(move || {
            if let Some(index) = tid {
                waiting[index].store(thread_id(), Ordering::SeqCst);
            }
            memory.read_by_syscall(page).is_ok()
        })
    };
    let first = touch(1, None);
    is_asked.recv().expect("page 1 is requested");
    let touchers = [first, touch(5, Some(0)), touch(5, Some(1))];
    let read = touchers.map(|toucher| toucher.join().expect("it does not hang"));
    assert_eq!(read, [true, false, false]);
    // Faults are answered in order: when this page is present, both messages are answered.
    assert_eq!(memory.read_u64(2 * PAGE), stamp(2));
    let stats = pager.stop();
    assert_eq!((stats.pages.present, stats.pages.poisoned), (2, 1));
    assert_eq!((stats.spurious_faults, stats.installed.existing), (1, 0));
}

/// Waits until `tid` has the id of a thread, and that thread sleeps in the kernel.
fn wait_until_asleep(tid: &AtomicI32) {
    let asleep = || {
        let stat =
            std::fs::read_to_string(format!("/proc/self/task/{}/stat", tid.load(Ordering::SeqCst)));
        // "TID (NAME) STATE ...": see proc_pid_stat(5).
        stat.is_ok_and(|stat| stat.contains(") S ") || stat.contains(") D "))
    };
    let begin = Instant::now();
    while !asleep() {
        assert!(begin.elapsed() < Duration::from_secs(20), "the thread does not sleep");
        std::thread::yield_now();
    }
}

#[test]
fn answers_that_make_no_sense_are_failures() {
    if !userfaultfd_works("answers_that_make_no_sense_are_failures") {
        return;
    }
    let memory = Memory::map(64 * PAGE);
    let source = source_of(64, |offset, answer| {
        match offset as usize / PAGE {
            1 => answer.push(2),        // Another page.
            3 => {}                     // None.
            4 => answer.push_beyond(4), // Beyond the buffer.
            page => {
                answer.push(page);
                answer.push(1 << 40); // A page of no region is left out.
            }
        }
        Ok(())
    });
    let pager = Pager::builder(source).region(memory.whole()).start().expect("it starts");
    for page in [1, 3, 4] {
        assert_eq!(
            memory.read_by_syscall(page).map_err(|e| e.raw_os_error()),
            Err(Some(libc::EFAULT))
        );
    }
    assert!(matches!(pager.failure().expect("kept").cause, FailureCause::Answer(_)));
    assert_eq!(memory.read_u64(5 * PAGE), stamp(5));
    assert_eq!(pager.stop().pages.poisoned, 3);
}

#[test]
fn transient_errors_are_tried_again_and_not_for_ever() {
    if !userfaultfd_works("transient_errors_are_tried_again_and_not_for_ever") {
        return;
    }
    let memory = Memory::map(64 * PAGE);
    let tries = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&tries);
    let source = source_of(64, move |offset, answer| {
        let page = offset as usize / PAGE;
        let tried = counter.fetch_add(1, Ordering::Relaxed);
        if page == 9 || tried < 3 {
            return Err(SourceError::transient("timed out"));
        }
        answer.push(page);
        Ok(())
    });
    let pager = Pager::builder(source)
        .region(memory.whole())
        .retry(RetryPolicy { retries: 4, ..RetryPolicy::default() })
        .start()
        .expect("it starts");
    assert_eq!(memory.read_u64(7 * PAGE), stamp(7));
    assert_eq!(tries.load(Ordering::Relaxed), 4);
    assert!(memory.read_by_syscall(9).is_err());
    assert_eq!(tries.load(Ordering::Relaxed), 9);
    assert_eq!(pager.stop().source_retries, 7);
}

/// The thread panics while it answers a fault and others are queued. Later faults arrive, too.
#[test]
fn a_panic_fails_all_missing_pages_and_keeps_the_present_ones() {
    if !userfaultfd_works("a_panic_fails_all_missing_pages_and_keeps_the_present_ones") {
        return;
    }
    let memory = Arc::new(Memory::map(64 * PAGE));
    let waiting: Arc<[AtomicI32; 2]> = Arc::default();
    let (page_13_asked, is_asked) = std::sync::mpsc::channel();
    let source = source_of(64, {
        let waiting = Arc::clone(&waiting);
        move |offset, answer| {
            let page = offset as usize / PAGE;
            if page == 13 {
                page_13_asked.send(()).expect("the test waits for it");
                waiting.iter().for_each(wait_until_asleep);
                panic!("page 13 is cursed");
            }
            answer.push(page);
            Ok(())
        }
    });
    let pager = Pager::builder(source).region(memory.whole()).start().expect("it starts");
    assert_eq!(memory.read_u64(12 * PAGE), stamp(12));
    let touch = |page, tid: Option<usize>| {
        let (memory, waiting) = (Arc::clone(&memory), Arc::clone(&waiting));
        std::thread::spawn(move || {
            if let Some(index) = tid {
                waiting[index].store(thread_id(), Ordering::SeqCst);
            }
            memory.read_by_syscall(page)
        })
    };
    let mut touchers = vec![touch(13, None), touch(13, None)];
    // 14 and 15 arrive while 13 is being loaded.
    is_asked.recv().expect("page 13 is requested");
    touchers.extend([touch(14, Some(0)), touch(15, Some(1))]);
    for toucher in touchers {
        let touched = toucher.join().expect("it does not hang");
        assert_eq!(touched.map_err(|error| error.raw_os_error()), Err(Some(libc::EFAULT)));
    }
    match &pager.failure().expect("it is kept").cause {
        FailureCause::Panic(text) => assert_eq!(text, "page 13 is cursed"),
        other => panic!("{other:?}"),
    }
    assert!(memory.read_by_syscall(16).is_err(), "touched after the panic");
    assert_eq!(memory.read_u64(12 * PAGE), stamp(12));
    assert_eq!(pager.stop().pages.poisoned, 4);
}

#[test]
fn a_panic_of_the_callback_ends_no_thread() {
    if !userfaultfd_works("a_panic_of_the_callback_ends_no_thread") {
        return;
    }
    let memory = Memory::map(8 * PAGE);
    let source = source_of(8, |offset, answer| match offset {
        0 => Err(SourceError::permanent("lost")),
        _ => {
            answer.push(offset as usize / PAGE);
            Ok(())
        }
    });
    let pager = Pager::builder(source)
        .region(memory.whole())
        .on_failure(|_| panic!("in the callback"))
        .start()
        .expect("it starts");
    assert!(memory.read_by_syscall(0).is_err());
    assert_eq!(memory.read_u64(PAGE), stamp(1));
    pager.stop();
}

#[test]
fn a_source_without_readers_is_an_error_of_the_start() {
    let memory = Memory::map(8 * PAGE);
    // The chunks have half a page.
    let source = Arc::new(VecSource::new(stamped(8), PAGE / 2));
    match Pager::builder(source).region(memory.whole()).start() {
        Err(StartError::Source(error)) => assert!(error.to_string().contains("2048"), "{error}"),
        other => panic!("{other:?}"),
    }
}

const CHILD: &str = "PAGER_TEST_KILLED_CHILD";

#[test]
fn under_kill_the_process_ends_with_a_message() {
    if !userfaultfd_works("under_kill_the_process_ends_with_a_message") {
        return;
    }
    if std::env::var_os(CHILD).is_some() {
        read_an_unreadable_page_under_kill();
    }
    let child = Command::new(std::env::current_exe().expect("it runs"))
        .args(["under_kill_the_process_ends_with_a_message", "--exact", "--nocapture"])
        .env(CHILD, "1")
        .stdin(Stdio::null())
        .output()
        .expect("the child runs");
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&child.status), Some(libc::SIGKILL));
    let words = String::from_utf8_lossy(&child.stderr);
    assert!(words.contains("source offset 0x3000") && words.contains("wrong checksum"), "{words}");
}

/// The message went to a closed pipe: printing it panicked, and the process stayed, with a guest that waited forever.
#[test]
fn under_kill_the_process_ends_with_a_closed_stderr() {
    let name = "under_kill_the_process_ends_with_a_closed_stderr";
    if !userfaultfd_works(name) {
        return;
    }
    if std::env::var_os(CHILD).is_some() {
        // The parent has closed the other end before the failure.
        std::io::stdin().read_line(&mut String::new()).expect("stdin is closed, not broken");
        read_an_unreadable_page_under_kill();
    }
    let mut child = Command::new(std::env::current_exe().expect("it runs"))
        .args([name, "--exact", "--nocapture"])
        .env(CHILD, "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the child runs");
    drop(child.stderr.take());
    drop(child.stdin.take());
    let begin = Instant::now();
    let status = loop {
        match child.try_wait().expect("it can be waited for") {
            Some(status) => break status,
            None if begin.elapsed() > Duration::from_secs(20) => {
                child.kill().expect("it runs");
                child.wait().expect("it ends");
                panic!("the process was not killed");
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL));
}

fn read_an_unreadable_page_under_kill() -> ! {
    let memory = Memory::map(8 * PAGE);
    let source = source_of(8, |_, _| Err(SourceError::permanent("wrong checksum")));
    let _pager = Pager::builder(source)
        .region(memory.whole())
        .on_error(FailurePolicy::Kill)
        .start()
        .expect("it starts");
    let byte = memory.read(3 * PAGE);
    unreachable!("the page was read: {byte}");
}

/// Stopping, even immediately after starting, leaves no descriptor and no thread behind.
#[test]
fn a_thousand_starts_and_stops_leave_nothing_behind() {
    if !userfaultfd_works("a_thousand_starts_and_stops_leave_nothing_behind") {
        return;
    }
    // Other tests of this file have descriptors and threads, too. A child process has only its own.
    if std::env::var_os(CHILD).is_none() {
        let status = Command::new(std::env::current_exe().expect("it runs"))
            .args(["a_thousand_starts_and_stops_leave_nothing_behind", "--exact", "--nocapture"])
            .env(CHILD, "1")
            .status()
            .expect("the child runs");
        assert!(status.success());
        return;
    }
    let count = |what: &str| std::fs::read_dir(format!("/proc/self/{what}")).expect("proc").count();
    let memory = Memory::map(1024 * PAGE);
    let source = Arc::new(VecSource::new(stamped(1024), PAGE));
    let before = (count("fd"), count("task"));
    for round in 0..1000 {
        let _pager = Pager::builder(source.clone())
            .region(memory.whole())
            .slices(2)
            .start()
            .expect("it starts");
        if round % 2 == 0 {
            assert_eq!(memory.read_u64(round * PAGE), stamp(round));
        }
    }
    // A thread that was joined may be seen in /proc for a moment longer.
    let begin = Instant::now();
    while (count("fd"), count("task")) != before && begin.elapsed() < Duration::from_secs(60) {
        std::thread::yield_now();
    }
    assert_eq!((count("fd"), count("task")), before);
}

/// Messages can no longer be read: the kernel reports an error for a userfaultfd that is blocking. Threads that
/// touched a missing page waited forever.
#[test]
fn no_thread_waits_forever_when_messages_are_unreadable() {
    let name = "no_thread_waits_forever_when_messages_are_unreadable";
    if !userfaultfd_works(name) {
        return;
    }
    // Other tests of this file have userfaultfds, too. A child process has only its own.
    if std::env::var_os(CHILD).is_none() {
        let child = Command::new(std::env::current_exe().expect("it runs"))
            .args([name, "--exact", "--nocapture"])
            .env(CHILD, "1")
            .output()
            .expect("the child runs");
        assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
        return;
    }
    let memory = Memory::map(64 * PAGE);
    let source = Arc::new(VecSource::new(stamped(64), PAGE));
    let pager = Pager::builder(source).region(memory.whole()).start().expect("it starts");
    assert_eq!(memory.read_u64(3 * PAGE), stamp(3));
    memory.remove(10, 1);
    support::make_userfaultfds_blocking();
    for page in [5, 6, 10] {
        assert!(memory.read_by_syscall(page).is_err(), "page {page}");
    }
    assert!(matches!(pager.failure().expect("it is reported").cause, FailureCause::Messages(_)));
    assert_eq!(memory.read_u64(3 * PAGE), stamp(3));
    assert_eq!(pager.stop().pages.poisoned, 63);
}

/// Memory that `mremap` had moved was not registered any more, and read as zeros.
#[test]
fn moved_memory_fails_and_does_not_read_as_zeros() {
    if !userfaultfd_works("moved_memory_fails_and_does_not_read_as_zeros") {
        return;
    }
    let mut memory = Memory::map(64 * PAGE);
    let source = Arc::new(VecSource::new(stamped(64), PAGE));
    let pager = Pager::builder(source).region(memory.whole()).start().expect("it starts");
    assert_eq!(memory.read_u64(3 * PAGE), stamp(3));
    memory.move_away();
    for page in [5, 6] {
        assert!(memory.read_by_syscall(page).is_err(), "page {page}");
    }
    assert_eq!(memory.read_u64(3 * PAGE), stamp(3));
    assert!(matches!(pager.failure().expect("it is reported").cause, FailureCause::Event(_)));
    pager.stop();
}

/// A forked child read zeros in place of missing pages.
#[test]
fn a_forked_child_has_no_paged_memory() {
    if !userfaultfd_works("a_forked_child_has_no_paged_memory") {
        return;
    }
    let memory = Memory::map(64 * PAGE);
    let source = Arc::new(VecSource::new(stamped(64), PAGE));
    let pager = Pager::builder(source).region(memory.whole()).start().expect("it starts");
    assert_eq!(memory.read_u64(3 * PAGE), stamp(3));
    assert_eq!(memory.touch_in_a_child(5), Some(libc::SIGSEGV));
    pager.stop();
    assert_eq!(memory.touch_in_a_child(3), None);
}
