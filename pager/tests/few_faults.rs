//! `Populate::Auto`: a few faults begin nothing. Alone in its process, because it needs to know how long this pager's threads
//! had no CPU: that counts as waiting, too.
#![allow(missing_docs)]

mod support;

use std::fs;
use std::time::{Duration, Instant};

use pager::{Pager, Population};
use support::{Memory, PAGE, shuffled, source_of, stamp, userfaultfd_works};

const PAGES: usize = 8192;
/// A small idle Linux guest has about as many faults after its restore. They count as 5.4 ms at most, and 8 ms begin the
/// loading.
const FAULTS: usize = 50;

#[test]
fn a_few_faults_begin_nothing() {
    if !userfaultfd_works("a_few_faults_begin_nothing") {
        return;
    }
    let memory = Memory::map(PAGES * PAGE);
    let source = source_of(PAGES, |offset, answer| {
        let began = Instant::now();
        while began.elapsed() < Duration::from_micros(50) {
            std::hint::spin_loop();
        }
        answer.push(offset as usize / PAGE);
        Ok(())
    });
    let pager = Pager::builder(source)
        .region(memory.whole())
        .populate_threads(1)
        .start()
        .expect("it starts");
    for page in shuffled(PAGES, 7).into_iter().take(FAULTS) {
        assert_eq!(memory.read_u64(page * PAGE), stamp(page), "page {page}");
    }
    let (population, populated) = (pager.population(), pager.stats().installed.populated);
    // With a delay of up to 2 ms they do not fill the bucket either.
    let without_cpu = without_cpu();
    assert!(
        (population, populated) == (Population::Quiet, 0) || without_cpu > Duration::from_millis(2),
        "{population:?}, {populated} pages, {without_cpu:?} without a CPU"
    );
}

/// How long the demand threads of this process could have run and had no CPU.
fn without_cpu() -> Duration {
    let threads = fs::read_dir("/proc/self/task").expect("this process");
    let folders = threads.map(|thread| thread.expect("a thread").path());
    let delays = folders.filter_map(|folder| {
        let name = fs::read_to_string(folder.join("comm")).ok()?;
        let schedstat = fs::read_to_string(folder.join("schedstat")).ok()?;
        let delay_ns = schedstat.split_ascii_whitespace().nth(1)?.parse().ok()?;
        name.starts_with("pager").then_some(Duration::from_nanos(delay_ns))
    });
    delays.sum()
}
