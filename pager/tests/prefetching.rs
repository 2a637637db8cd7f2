//! Prefetch: listed pages are loaded without being touched. With any list, no page is ever wrong.
#![allow(missing_docs)]

mod support;

use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use pager::{Pager, Populate, Population, Prefetch, SnapshotSource, SourceError, VecSource};
use snapfmt::{
    Codec, Contents, HotPages, MemoryRegion, PageIndex, Phase, Snapshot, WorkingSet, WriteOptions,
    write_with_set,
};
use support::{Memory, PAGE, shuffled, source_of, stamp, stamped, userfaultfd_works};

const PAGES: usize = 2048;
/// A hang guard.
const LONG: Duration = Duration::from_secs(60);

fn pages(range: Range<usize>) -> Range<u64> {
    (range.start * PAGE) as u64..(range.end * PAGE) as u64
}

#[test]
fn listed_pages_come_without_being_touched_and_no_others() {
    if !userfaultfd_works("listed_pages_come_without_being_touched_and_no_others") {
        return;
    }
    for slices in [1, 3] {
        let memory = Memory::map(PAGES * PAGE);
        // The last quarter is zero.
        let source = source_of(PAGES, |offset, answer| {
            let page = offset as usize / PAGE;
            if page >= 1536 {
                answer.zero(pages(1536..PAGES));
            } else {
                answer.push(page);
            }
            Ok(())
        });
        let list = vec![pages(900..1000), pages(3..4), pages(1600..1664), pages(700..701)];
        let pager = Pager::builder(source)
            .region(memory.whole())
            .slices(slices)
            .prefetch(|| list)
            .start()
            .expect("it starts");
        assert_eq!(pager.wait_prefetched(LONG), Prefetch::Done);
        let stats = pager.stats();
        // A zero page is filled with all pages that the source returns as zero.
        assert_eq!((stats.faults, stats.installed.prefetched), (0, 102 + 512), "{stats:?}");
        assert_eq!(
            pager.touched(),
            [pages(3..4), pages(700..701), pages(900..1000), pages(1536..2048)]
        );
        for page in [900, 999, 3, 700] {
            assert_eq!(memory.read_u64(page * PAGE), stamp(page));
        }
        assert_eq!(memory.read_u64(1650 * PAGE), 0);
        assert_eq!(pager.stats().faults, 0);
        assert_eq!(memory.read_u64(5 * PAGE), stamp(5));
        assert_eq!(pager.stop().faults, 1);
    }
}

/// Before it may start, it loads and installs nothing, so that it does not disturb the guest.
#[test]
fn nothing_is_installed_before_the_start_is_allowed() {
    if !userfaultfd_works("nothing_is_installed_before_the_start_is_allowed") {
        return;
    }
    let memory = Memory::map(64 * PAGE);
    let (go, may_go) = std::sync::mpsc::channel::<()>();
    let pager = Pager::builder(Arc::new(VecSource::new(stamped(64), 4 * PAGE)))
        .region(memory.whole())
        .prefetch(|| vec![pages(0..64)])
        .prefetch_when(move || {
            let _gone_or_late = may_go.recv_timeout(LONG);
        })
        .start()
        .expect("it starts");
    assert_eq!(pager.wait_prefetched(Duration::from_millis(50)), Prefetch::Running);
    assert_eq!(pager.stats().installed.prefetched, 0);
    // Faults are answered before that, too.
    assert_eq!(memory.read_u64(9 * PAGE), stamp(9));
    drop(go);
    assert_eq!(pager.wait_prefetched(LONG), Prefetch::Done);
    assert_eq!(pager.stop().installed.prefetched, 60);
}

/// Offsets of no page, duplicate pages, pages of no region, ranges beyond the end: all of these are skipped.
#[test]
fn a_list_may_have_any_content() {
    if !userfaultfd_works("a_list_may_have_any_content") {
        return;
    }
    let memory = Memory::map(64 * PAGE);
    let source = Arc::new(VecSource::new(stamped(PAGES), 4 * PAGE));
    let reversed = Range { start: 8192, end: 4096 };
    let list = vec![
        reversed,
        0..0,
        17..18,
        pages(2..3),
        pages(2..3),
        u64::MAX - 5..u64::MAX,
        pages(40..60),
        0..u64::MAX,
        pages(1000..2000),
    ];
    // The middle half of the source is mapped.
    let pager = Pager::builder(source)
        .region(memory.region(0, 64, (1000 * PAGE) as u64))
        .prefetch(|| list)
        .start()
        .expect("it starts");
    assert_eq!(pager.wait_prefetched(LONG), Prefetch::Done);
    for page in shuffled(64, 9) {
        assert_eq!(memory.read_u64(page * PAGE), stamp(1000 + page));
    }
    let stats = pager.stop();
    assert_eq!((stats.faults, stats.installed.prefetched), (0, 64), "{stats:?}");
}

/// A page that cannot be loaded fails the thread that touches it. The rest of the list is still installed.
#[test]
fn an_unreadable_page_fails_only_when_it_is_touched() {
    if !userfaultfd_works("an_unreadable_page_fails_only_when_it_is_touched") {
        return;
    }
    let memory = Memory::map(64 * PAGE);
    let source = source_of(64, |offset, answer| match offset as usize / PAGE {
        30 => Err(SourceError::permanent("wrong checksum")),
        page => {
            answer.push(page);
            Ok(())
        }
    });
    let pager = Pager::builder(source)
        .region(memory.whole())
        .prefetch(|| vec![pages(28..33)])
        .start()
        .expect("it starts");
    assert_eq!(pager.wait_prefetched(LONG), Prefetch::Done);
    assert!(pager.failure().is_none());
    assert_eq!(pager.stats().installed.prefetched, 4);
    assert!(memory.read_by_syscall(30).is_err());
    assert!(pager.failure().is_some());
}

#[test]
fn a_panic_of_the_source_or_of_the_list_ends_the_prefetch_alone() {
    if !userfaultfd_works("a_panic_of_the_source_or_of_the_list_ends_the_prefetch_alone") {
        return;
    }
    for in_list in [false, true] {
        let memory = Memory::map(64 * PAGE);
        let panics = Arc::new(AtomicBool::new(true));
        let source = source_of(64, move |offset, answer| {
            let page = offset as usize / PAGE;
            if page == 5 && !in_list && panics.swap(false, Ordering::Relaxed) {
                panic!("page 5 is cursed");
            }
            answer.push(page);
            Ok(())
        });
        let list = move || if in_list { panic!("no list") } else { vec![pages(0..64)] };
        let pager = Pager::builder(source)
            .region(memory.whole())
            .prefetch(list)
            .start()
            .expect("it starts");
        assert_eq!(pager.wait_prefetched(LONG), Prefetch::GivenUp);
        for page in 0..64 {
            assert_eq!(memory.read_u64(page * PAGE), stamp(page));
        }
        assert!(pager.failure().is_none());
    }
}

/// If the listed pages require decoding many more bytes, their number is limited.
#[test]
fn useless_decoding_is_limited() {
    if !userfaultfd_works("useless_decoding_is_limited") {
        return;
    }
    let memory = Memory::map(256 * PAGE);
    let loads = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&loads);
    let source = source_of(256, move |offset, answer| {
        counting.fetch_add(1, Ordering::Relaxed);
        answer.push(offset as usize / PAGE);
        // 8 MiB of which no page is needed.
        for _ in 1..2048 {
            answer.push(1 << 30);
        }
        Ok(())
    });
    let pager = Pager::builder(source)
        .region(memory.whole())
        .prefetch(|| vec![pages(0..256)])
        .start()
        .expect("it starts");
    assert_eq!(pager.wait_prefetched(LONG), Prefetch::GivenUp);
    // The limit: 16 MiB for the pages, plus 64 MiB.
    assert!(loads.load(Ordering::Relaxed) <= 11, "{loads:?}");
    assert_eq!(memory.read_u64(200 * PAGE), stamp(200));
}

/// Threads touch, write and give back pages while it runs. Then the population loads the rest.
#[test]
fn prefetch_beside_faults_and_removals_and_before_population() {
    if !userfaultfd_works("prefetch_beside_faults_and_removals_and_before_population") {
        return;
    }
    for round in 0..6 {
        let memory = Arc::new(Memory::map(PAGES * PAGE));
        let source = Arc::new(VecSource::new(stamped(PAGES), 16 * PAGE));
        let list: Vec<_> = shuffled(PAGES, 77 + round as u64)
            .into_iter()
            .take(PAGES / 2)
            .map(|p| pages(p..p + 1))
            .collect();
        let pager = Pager::builder(source)
            .region(memory.whole())
            .slices(1 + round % 3)
            .prefetch(|| list)
            .populate(Populate::Full)
            .start()
            .expect("it starts");
        let threads: Vec<_> = (0..3)
            .map(|owner| {
                let memory = Arc::clone(&memory);
                thread::spawn(move || {
                    let mine = |page: &usize| page % 3 == owner;
                    let order = shuffled(PAGES, (round * 3 + owner) as u64);
                    for page in order.into_iter().filter(mine) {
                        if page % 5 == 0 {
                            memory.remove(page, 1);
                            assert_eq!(memory.read_u64(page * PAGE), 0, "page {page}");
                        } else {
                            memory.write(page * PAGE + 4000, 0x42);
                            assert_eq!(memory.read_u64(page * PAGE), stamp(page), "page {page}");
                        }
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().expect("all pages are right"));
        assert_eq!(pager.wait_prefetched(LONG), Prefetch::Done);
        assert_eq!(pager.wait_complete(LONG), Population::Complete);
        for page in 0..PAGES {
            let (word, byte) = (memory.read_u64(page * PAGE), memory.read(page * PAGE + 4000));
            let expected = if page % 5 == 0 { (0, 0) } else { (stamp(page), 0x42) };
            assert_eq!((word, byte), expected, "page {page}");
        }
    }
}

/// In a file with the working set at the front, only that part is read, once, in large reads. Equal pages that share a
/// slot are loaded with it. A damaged chunk is left to faults.
#[test]
fn the_working_set_of_a_snapshot_is_read_in_sequence() {
    if !userfaultfd_works("the_working_set_of_a_snapshot_is_read_in_sequence") {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("hot.snap");
    let mut content = stamped(PAGES);
    // Every eighth page is the same, and one in 16 is zero.
    for (number, page) in content.chunks_mut(PAGE).enumerate() {
        match number % 16 {
            0 => page.fill(0),
            8 => page.fill(7),
            _ => {}
        }
    }
    let touched: Vec<_> = shuffled(PAGES, 5)
        .into_iter()
        .take(600)
        .map(|page| (PageIndex(page as u32), Phase::FirstOutput))
        .collect();
    let set = WorkingSet::join([&touched[..]]);
    let regions = [MemoryRegion { gpa: 0, len: content.len() as u64, source_offset: 0 }];
    let data = [0..content.len() as u64];
    let contents = Contents::new(&regions, &content, &data);
    let hot = HotPages::new(&set).front(Codec::Raw);
    write_with_set(&path, contents, None, &hot, &WriteOptions::default(), &|_| {
        ControlFlow::Continue(())
    })
    .expect("it is written");
    let list: Vec<_> = set
        .runs()
        .iter()
        .map(|run| pages(run.first.0 as usize..(run.first.0 + run.pages) as usize))
        .collect();

    for damaged in [false, true] {
        if damaged {
            let mut bytes = std::fs::read(&path).expect("it can be read");
            // In the payload of the first chunk, which is in the working set.
            bytes[4096 + 200] ^= 1;
            std::fs::write(&path, bytes).expect("it can be written");
        }
        let snapshot = Arc::new(Snapshot::open(&path).expect("it opens"));
        let memory = Memory::map(PAGES * PAGE);
        let list = list.clone();
        let pager = Pager::builder(Arc::new(SnapshotSource::new(snapshot)))
            .region(memory.whole())
            .prefetch(|| list)
            .start()
            .expect("it starts");
        assert_eq!(pager.wait_prefetched(LONG), Prefetch::Done);
        assert!(pager.failure().is_none());
        let stats = pager.stats();
        if damaged {
            assert!((500..600).contains(&stats.installed.prefetched), "{stats:?}");
            continue;
        }
        assert_eq!(stats.installed.prefetched, 600);
        assert!(stats.bytes_read <= 600 * PAGE as u64 * 11 / 10, "{stats:?}");
        for (page, _) in &touched {
            let at = page.0 as usize * PAGE;
            assert_eq!(memory.read_u64(at).to_ne_bytes(), content[at..at + 8], "{page:?}");
        }
        assert_eq!(pager.stop().faults, 0);
    }
}

/// A thread touches the listed pages in the order of the list, as fast as they come: the prefetch gets ahead of it, and
/// the pages that it skips for that come at the end.
#[test]
fn a_guest_that_catches_up_is_overtaken_and_no_page_is_skipped() {
    if !userfaultfd_works("a_guest_that_catches_up_is_overtaken_and_no_page_is_skipped") {
        return;
    }
    const MANY: usize = 8192;
    let memory = Memory::map(MANY * PAGE);
    let source = Arc::new(VecSource::new(stamped(MANY), 16 * PAGE));
    let (first_touched, wait) = std::sync::mpsc::channel::<()>();
    let list = move || {
        // It starts behind the thread that touches.
        let _ = wait.recv();
        vec![pages(0..MANY)]
    };
    let pager = Pager::builder(source).region(memory.whole()).prefetch(list).start();
    let pager = pager.expect("it starts");
    for page in 0..MANY / 2 {
        assert_eq!(memory.read_u64(page * PAGE), stamp(page));
        if page == 64 {
            first_touched.send(()).expect("it waits");
        }
    }
    assert_eq!(pager.wait_prefetched(LONG), Prefetch::Done);
    let stats = pager.stats();
    assert_eq!(stats.pages.present, MANY as u64, "{stats:?}");
    assert!(stats.installed.prefetched >= MANY as u64 / 2, "{stats:?}");
    for page in 0..MANY {
        assert_eq!(memory.read_u64(page * PAGE), stamp(page));
    }
    assert_eq!(pager.stop().faults, stats.faults);
}
