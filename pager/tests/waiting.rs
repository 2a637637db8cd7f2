//! Faults whose pages come from another host do not hold up the other faults of their slice.
#![allow(missing_docs)]

mod support;

use std::collections::HashMap;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use pager::{
    FailurePolicy, Load, LoadCost, LoadedPage, LoadedPages, PageReader, PageSource, Pager,
    RetryPolicy, SourceError, Stats, WhenReady,
};
use support::{Memory, PAGE, stamp, stamped, userfaultfd_works};

const PAGES: usize = 64;
/// Pages of a chunk.
const CHUNK: usize = 4;

/// A source whose chunks from page 16 on are on another host. The test decides when they come.
#[derive(Default)]
struct Far {
    /// By the first page of the chunk: those that have come, and the waits for the others.
    come: Mutex<HashMap<usize, bool>>,
    asked: Mutex<Vec<(usize, WhenReady)>>,
    loads: AtomicUsize,
    /// The source forgets that a chunk has come.
    forgets: bool,
    /// The source panics when it loads this page.
    panics_at: Option<usize>,
}

struct FarSource(Arc<Far>);

struct FarReader {
    far: Arc<Far>,
    bytes: Vec<u8>,
    pages: Vec<LoadedPage>,
}

impl PageSource for FarSource {
    fn reader(&self, _page_bytes: usize) -> Result<Box<dyn PageReader>, SourceError> {
        let far = Arc::clone(&self.0);
        Ok(Box::new(FarReader { far, bytes: stamped(PAGES), pages: Vec::new() }))
    }

    fn len_bytes(&self) -> u64 {
        (PAGES * PAGE) as u64
    }
}

fn chunk_of(source_offset: u64) -> usize {
    let page = source_offset as usize / PAGE;
    page - page % CHUNK
}

impl PageReader for FarReader {
    fn load(&mut self, source_offset: u64) -> Result<Load<'_>, SourceError> {
        self.far.loads.fetch_add(1, Ordering::SeqCst);
        assert_ne!(Some(source_offset as usize / PAGE), self.far.panics_at, "as the test wants");
        let first = chunk_of(source_offset);
        self.pages.clear();
        self.pages.extend((first..first + CHUNK).map(|page| LoadedPage {
            source_offset: (page * PAGE) as u64,
            buffer_offset: page * PAGE,
        }));
        let (bytes, pages) = (&self.bytes, &self.pages);
        Ok(Load::Pages(LoadedPages { bytes, pages, cost: LoadCost::default() }))
    }

    fn would_wait(&mut self, source_offset: u64) -> bool {
        let chunk = chunk_of(source_offset);
        chunk >= 16 && !self.far.come.lock().unwrap().contains_key(&chunk)
    }

    fn when_ready(&mut self, source_offset: u64, ready: WhenReady) {
        self.far.asked.lock().unwrap().push((chunk_of(source_offset), ready));
    }
}

impl Far {
    /// Waits until this many waits have begun.
    fn asked(&self, count: usize) -> Vec<usize> {
        let begun = Instant::now();
        loop {
            let asked: Vec<usize> =
                self.asked.lock().unwrap().iter().map(|(chunk, _)| *chunk).collect();
            if asked.len() >= count {
                return asked;
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "{asked:?}");
            thread::yield_now();
        }
    }

    /// Ends all waits.
    fn end(&self, result: impl Fn() -> Result<(), SourceError>) {
        for (chunk, ready) in std::mem::take(&mut *self.asked.lock().unwrap()) {
            if result().is_ok() && !self.forgets {
                self.come.lock().unwrap().insert(chunk, true);
            }
            ready(result());
        }
    }
}

type Touch = thread::JoinHandle<std::io::Result<u64>>;

/// Reads a page in a thread of its own: by a system call first, so that a failed page is an error.
fn touch(memory: &Arc<Memory>, page: usize) -> Touch {
    let memory = Arc::clone(memory);
    thread::spawn(move || memory.read_by_syscall(page).map(|_| memory.read_u64(page * PAGE)))
}

struct Fixture {
    far: Arc<Far>,
    memory: Arc<Memory>,
    pager: Pager,
}

fn start(test: &str, far: Far, slices: usize) -> Option<Fixture> {
    if !userfaultfd_works(test) {
        return None;
    }
    let (far, memory) = (Arc::new(far), Arc::new(Memory::map(PAGES * PAGE)));
    let pager = Pager::builder(Arc::new(FarSource(Arc::clone(&far))))
        .region(memory.whole())
        .slices(slices)
        .retry(RetryPolicy { retries: 2, ..RetryPolicy::default() })
        .start()
        .expect("it starts");
    Some(Fixture { far, memory, pager })
}

/// A thread continues a moment before its fault is counted.
#[track_caller]
fn wait_until(pager: &Pager, is: impl Fn(&Stats) -> bool) {
    let begun = Instant::now();
    while !is(&pager.stats()) {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", pager.stats());
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn other_faults_are_answered_meanwhile_and_a_chunk_is_loaded_once() {
    let name = "other_faults_are_answered_meanwhile_and_a_chunk_is_loaded_once";
    let Some(Fixture { far, memory, pager }) = start(name, Far::default(), 1) else { return };
    let touches: Vec<Touch> = [16, 17, 19, 32, 32].map(|page| touch(&memory, page)).into();
    far.asked(5);
    // The slice has one demand thread, and five of its faults wait.
    assert_eq!(memory.read_u64(3 * PAGE), stamp(3));
    assert_eq!(far.loads.load(Ordering::SeqCst), 1);
    wait_until(&pager, |stats| stats.pages.present == CHUNK as u64);
    far.end(|| Ok(()));
    let read: Vec<u64> = touches.into_iter().map(|t| t.join().unwrap().unwrap()).collect();
    assert_eq!(read, [16, 17, 19, 32, 32].map(stamp));
    assert_eq!(memory.read_u64(18 * PAGE), stamp(18));
    // A thread that another fault's load has woken continues before its own fault is answered.
    wait_until(&pager, |stats| stats.times.service.count == 6);
    let stats = pager.stop();
    assert_eq!(far.loads.load(Ordering::SeqCst), 3);
    assert_eq!((stats.pages.present, stats.installed.demand), (3 * CHUNK as u64, 3));
    // Each fault is counted and timed once. Those of present pages are answered, too.
    assert_eq!((stats.faults, stats.times.service.count, stats.times.read.count), (6, 6, 5));
    assert!(stats.spurious_faults <= 3, "{stats:?}");
    assert_eq!((stats.stalled, stats.stalls), (0, 0));
}

#[test]
fn an_error_fails_only_its_page_and_a_transient_one_is_tried_again() {
    let name = "an_error_fails_only_its_page_and_a_transient_one_is_tried_again";
    let Some(Fixture { far, memory, pager }) = start(name, Far::default(), 1) else { return };
    let lost = touch(&memory, 20);
    far.asked(1);
    far.end(|| Err(SourceError::permanent("the object was deleted")));
    assert_eq!(lost.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EFAULT));
    let cause = pager::with_causes(pager.failure().expect("it is kept"));
    assert!(cause.contains("the object was deleted"), "{cause}");
    let busy = touch(&memory, 24);
    for _ in 0..2 {
        far.asked(1);
        far.end(|| Err(SourceError::transient("busy")));
    }
    far.asked(1);
    far.end(|| Ok(()));
    assert_eq!(busy.join().unwrap().unwrap(), stamp(24));
    let busy = touch(&memory, 28);
    for _ in 0..3 {
        far.asked(1);
        far.end(|| Err(SourceError::transient("busy")));
    }
    assert!(busy.join().unwrap().is_err());
    // The source drops what it should have called.
    let dropped = touch(&memory, 32);
    far.asked(1);
    far.asked.lock().unwrap().clear();
    assert!(dropped.join().unwrap().is_err());
    let stats = pager.stop();
    assert_eq!((stats.pages.poisoned, stats.source_retries), (3, 4));
}

#[test]
fn a_page_that_is_removed_meanwhile_is_zero_also_after_an_error() {
    let name = "a_page_that_is_removed_meanwhile_is_zero_also_after_an_error";
    let Some(Fixture { far, memory, pager }) = start(name, Far::default(), 1) else { return };
    for error in [false, true] {
        let page = if error { 40 } else { 36 };
        let waits = touch(&memory, page);
        far.asked(1);
        memory.remove(page, 1);
        far.end(|| match error {
            true => Err(SourceError::permanent("lost")),
            false => Ok(()),
        });
        assert_eq!(waits.join().unwrap().unwrap(), 0);
    }
    assert_eq!(memory.read_u64(37 * PAGE), stamp(37));
    assert!(pager.failure().is_none());
    assert_eq!(pager.stop().pages.poisoned, 0);
}

#[test]
fn a_source_that_forgets_what_has_come_is_loaded_by_the_thread_itself() {
    let name = "a_source_that_forgets_what_has_come_is_loaded_by_the_thread_itself";
    let far = Far { forgets: true, ..Far::default() };
    let Some(Fixture { far, memory, pager }) = start(name, far, 1) else { return };
    let waits = touch(&memory, 16);
    for _ in 0..4 {
        far.asked(1);
        far.end(|| Ok(()));
    }
    assert_eq!(waits.join().unwrap().unwrap(), stamp(16));
    pager.stop();
}

#[test]
fn a_panic_of_the_source_ends_the_waits() {
    let name = "a_panic_of_the_source_ends_the_waits";
    let far = Far { panics_at: Some(3), ..Far::default() };
    let Some(Fixture { far, memory, pager }) = start(name, far, 1) else { return };
    let waits = [16, 20, 20].map(|page| touch(&memory, page));
    far.asked(3);
    // The source never calls back for these.
    assert!(touch(&memory, 3).join().unwrap().is_err());
    for waits in waits {
        assert_eq!(waits.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EFAULT));
    }
    // An end that comes after that has no effect.
    far.end(|| Ok(()));
    assert!(touch(&memory, 24).join().unwrap().is_err());
    let stats = pager.stop();
    assert_eq!((stats.pages.poisoned, stats.stalled), (4, 0));
}

#[test]
fn a_pager_with_waiting_faults_stops_without_them() {
    let name = "a_pager_with_waiting_faults_stops_without_them";
    let Some(Fixture { far, memory, pager }) = start(name, Far::default(), 2) else { return };
    let waits = [touch(&memory, 16), touch(&memory, 60)];
    far.asked(2);
    let begun = Instant::now();
    // The kernel wakes the threads when the memory is not registered any more, and they read zeros: in this test that
    // is known, and nothing else runs on this memory.
    let stats = pager.stop();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!((stats.faults, stats.pages.missing), (2, PAGES as u64));
    // An end that comes after that has no effect.
    far.end(|| Ok(()));
    waits.into_iter().for_each(|waits| assert_eq!(waits.join().unwrap().unwrap(), 0));
}

#[test]
fn faults_that_wait_for_a_second_are_stalled() {
    let name = "faults_that_wait_for_a_second_are_stalled";
    let Some(Fixture { far, memory, pager }) = start(name, Far::default(), 1) else { return };
    let waits = [touch(&memory, 16), touch(&memory, 20)];
    far.asked(2);
    let begun = Instant::now();
    wait_until(&pager, |stats| stats.stalled >= 2);
    assert!(begun.elapsed() > Duration::from_millis(900), "{:?}", begun.elapsed());
    far.end(|| Ok(()));
    for (waits, page) in waits.into_iter().zip([16, 20]) {
        assert_eq!(waits.join().unwrap().unwrap(), stamp(page));
    }
    wait_until(&pager, |stats| stats.stalls == 2 && stats.stalled == 0);
    let stats = pager.stop();
    assert_eq!((stats.stalled, stats.stalls), (0, 2));
}

const CHILD: &str = "PAGER_TEST_KILLED_CHILD";

#[test]
fn under_kill_an_error_of_a_wait_ends_the_process() {
    let name = "under_kill_an_error_of_a_wait_ends_the_process";
    if !userfaultfd_works(name) {
        return;
    }
    if std::env::var_os(CHILD).is_some() {
        let (far, memory) = (Arc::new(Far::default()), Arc::new(Memory::map(PAGES * PAGE)));
        let _pager = Pager::builder(Arc::new(FarSource(Arc::clone(&far))))
            .region(memory.whole())
            .on_error(FailurePolicy::Kill)
            .start()
            .expect("it starts");
        let waits = touch(&memory, 16);
        far.asked(1);
        far.end(|| Err(SourceError::permanent("the store does not answer")));
        let read = waits.join();
        unreachable!("the page was read: {read:?}");
    }
    let child = Command::new(std::env::current_exe().expect("it runs"))
        .args([name, "--exact", "--nocapture"])
        .env(CHILD, "1")
        .stdin(Stdio::null())
        .output()
        .expect("the child runs");
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&child.status), Some(libc::SIGKILL));
    let words = String::from_utf8_lossy(&child.stderr);
    assert!(words.contains("the store does not answer"), "{words}");
}
