//! Demand threads lower their priority for the only thread that faults, and raise it when another thread needs its CPU.
#![allow(missing_docs, unsafe_code)]

mod support;

use std::fs;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pager::{Pager, VecSource};
use support::{Memory, PAGE, stamp, stamped, userfaultfd_works};

const PAGES: usize = 16384;
/// A hang guard.
const LONG: Duration = Duration::from_secs(60);

/// The scheduling policies of the demand threads of this process: field 41 of `/proc/<pid>/stat` (proc_pid_stat(5)).
fn policies() -> Vec<i32> {
    let tasks = fs::read_dir("/proc/self/task").expect("there is /proc");
    tasks
        // A thread may have ended.
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("stat")).ok())
        .filter(|stat| stat.contains("(pager0)"))
        .filter_map(|stat| stat.rsplit_once(") ")?.1.split(' ').nth(38)?.parse().ok())
        .collect()
}

/// A thread that was joined may be seen in /proc for a moment longer.
fn until_gone() {
    let began = Instant::now();
    while !policies().is_empty() {
        assert!(began.elapsed() < LONG, "{:?}", policies());
        thread::yield_now();
    }
}

/// Touches each page once, at most a thousand in a second, until the demand thread has this policy. The content of each
/// page is right under every policy.
fn touch_until(memory: &Memory, next: &mut usize, policy: i32) {
    while policies() != [policy] {
        assert!(*next < PAGES, "{:?} after all pages", policies());
        assert_eq!(memory.read_u64(*next * PAGE), stamp(*next));
        *next += 1;
        thread::sleep(Duration::from_millis(1));
    }
}

/// Whether threads of this process may leave `SCHED_IDLE` again.
fn may_lower_priority() -> bool {
    thread::spawn(|| {
        // SAFETY: takes numbers, and affects only this thread.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -1) == 0 }
    })
    .join()
    .expect("it does not panic")
}

/// A single test, because it checks all threads of the process.
#[test]
fn demand_threads_lower_and_raise_their_priority() {
    let name = "demand_threads_lower_and_raise_their_priority";
    if !userfaultfd_works(name) {
        return;
    }
    if !may_lower_priority() {
        assert!(std::env::var_os("SNAP_REQUIRE_VM").is_none(), "{name}: no CAP_SYS_NICE");
        let line = format!("SKIPPED {name}: no CAP_SYS_NICE\n");
        io::stderr().write_all(line.as_bytes()).expect("stderr can be written");
        return;
    }
    let source = Arc::new(VecSource::new(stamped(PAGES), PAGE));
    let start = |memory: &Memory| {
        Pager::builder(source.clone()).region(memory.whole()).start().expect("it starts")
    };

    let memory = Memory::map(PAGES * PAGE);
    let pager = start(&memory);
    let mut next = 0;
    touch_until(&memory, &mut next, libc::SCHED_IDLE);
    // Without faults, the demand thread gets the normal priority again.
    let began = Instant::now();
    while policies() != [libc::SCHED_OTHER] {
        assert!(began.elapsed() < LONG, "{:?}", policies());
        thread::sleep(Duration::from_millis(1));
    }
    touch_until(&memory, &mut next, libc::SCHED_IDLE);

    // More computing threads than CPUs. Without the watchdog, each fault would wait for the CPU time that they leave: a
    // few thousandths of a CPU.
    let busy = AtomicBool::new(true);
    thread::scope(|scope| {
        for _ in 0..2 * thread::available_parallelism().map_or(2, |cpus| cpus.get()) {
            scope.spawn(|| {
                while busy.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        touch_until(&memory, &mut next, libc::SCHED_OTHER);
        // No fault is lost or wrong, and the pager stops while they compute.
        for page in (0..PAGES).step_by(7) {
            assert_eq!(memory.read_u64(page * PAGE), stamp(page));
        }
        drop(pager);
        busy.store(false, Ordering::Relaxed);
    });
    until_gone();

    // The pager also stops while the priority is lowered.
    let memory = Memory::map(PAGES * PAGE);
    let pager = start(&memory);
    touch_until(&memory, &mut 0, libc::SCHED_IDLE);
    drop(pager);
    until_gone();
}
