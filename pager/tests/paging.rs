//! Memory of this process, paged from a source: each read returns the content of the source.
#![allow(missing_docs)]

mod support;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pager::{Pager, Placement, Populate, StartError, Stats, VecSource};
use support::{Memory, PAGE, shuffled, source_of, stamp, stamped, userfaultfd_works};

/// Reads all pages in a random order, and checks the first, a middle and the last word of each.
fn check_all(memory: &Memory, pages: usize, page_of: impl Fn(usize) -> usize, seed: u64) {
    for page in shuffled(pages, seed) {
        for word in [0, 2040, PAGE - 8] {
            assert_eq!(memory.read_u64(page * PAGE + word), stamp(page_of(page)), "page {page}");
        }
    }
}

fn assert_sums_up(stats: &Stats) {
    let pages = &stats.pages;
    assert_eq!(pages.total, pages.missing + pages.present + pages.removed + pages.poisoned);
    let by_origin = &stats.installed;
    let on_faults = by_origin.demand + by_origin.fault_around + by_origin.zero + by_origin.existing;
    let installed = on_faults + by_origin.populated;
    assert_eq!(installed, pages.present, "{stats:?}");
    assert_eq!(stats.times.service.count, stats.faults);
}

#[test]
fn each_region_has_its_own_figures() {
    if !userfaultfd_works("each_region_has_its_own_figures") {
        return;
    }
    let memory = Memory::map(2048 * PAGE);
    let source = Arc::new(VecSource::new(stamped(2048), 16 * PAGE));
    // The regions have the other order in the source. The second one is cut into slices.
    let pager = Pager::builder(source)
        .region(memory.region(0, 512, (1536 * PAGE) as u64))
        .region(memory.region(512, 1536, 0))
        .slices(3)
        .start()
        .expect("it starts");
    for page in [0, 16, 600, 1000, 1400, 2000] {
        let in_source = if page < 512 { 1536 + page } else { page - 512 };
        assert_eq!(memory.read_u64(page * PAGE), stamp(in_source));
    }
    memory.remove(0, 1);
    // A page is usable, and given back, a moment before it is counted.
    let begun = Instant::now();
    let counted = |stats: Stats| stats.times.service.count == 6 && stats.pages.removed == 1;
    while !counted(pager.stats()) {
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", pager.stats());
        thread::yield_now();
    }
    let stats = pager.stats();
    let queue = stats.times.queue;
    assert!(queue.count == 6 && queue.max_ns <= stats.times.service.max_ns, "{stats:?}");
    let regions = pager.region_stats();
    let found: Vec<_> = regions
        .iter()
        .map(|region| {
            let (pages, times) = (&region.pages, region.times.expect("there are two"));
            assert_eq!(
                region.host_addr - memory.addr(),
                [0, 512][pages.total as usize / 1536] * PAGE as u64
            );
            (region.source_offset, pages.total, pages.present, pages.removed, times.install.count)
        })
        .collect();
    assert_eq!(found, [((1536 * PAGE) as u64, 512, 31, 1, 2), (0, 1536, 64, 0, 4)]);
    pager.stop();
}

#[test]
fn reads_in_random_order_return_the_content_of_the_source() {
    if !userfaultfd_works("reads_in_random_order_return_the_content_of_the_source") {
        return;
    }
    for (chunk_pages, placement) in
        [(1, Placement::None), (16, Placement::Follow), (64, Placement::Cpu(0))]
    {
        let memory = Memory::map(1024 * PAGE);
        let source = Arc::new(VecSource::new(stamped(1024), chunk_pages * PAGE));
        let pager = Pager::builder(source)
            .region(memory.whole())
            .populate(Populate::Off)
            .placement(placement)
            .start()
            .expect("it starts");
        check_all(&memory, 1024, |page| page, 1);
        let stats = pager.stop();
        assert_sums_up(&stats);
        assert_eq!(stats.pages.present, 1024);
        assert_eq!(stats.installed.demand, 1024 / chunk_pages as u64);
        assert_eq!(stats.bytes_read, 1024 * PAGE as u64);
        assert!(
            stats.times.service.p50_ns > 0
                && stats.times.service.max_ns >= stats.times.service.p99_ns
        );
        // Loaded pages stay without the pager.
        check_all(&memory, 1024, |page| page, 2);
    }
}

#[test]
fn several_threads_slices_and_scattered_regions() {
    if !userfaultfd_works("several_threads_slices_and_scattered_regions") {
        return;
    }
    const PAGES: usize = 4096;
    for slices in [1, 2, 3, 8] {
        // Three regions with gaps between them, in another order in the source than in memory.
        let memory = Arc::new(Memory::map((PAGES + 64) * PAGE));
        let parts = [(0, 1000), (1010, 2000), (3064, 1096)];
        let offsets = [3096, 0, 2000];
        let source = Arc::new(VecSource::new(stamped(PAGES), 16 * PAGE));
        let pager = Pager::builder(source)
            .regions(
                parts
                    .iter()
                    .zip(offsets)
                    .map(|(&(first, pages), at)| memory.region(first, pages, (at * PAGE) as u64)),
            )
            .slices(slices)
            .start()
            .expect("it starts");
        let threads: Vec<_> = (0..4)
            .map(|seed| {
                let memory = Arc::clone(&memory);
                thread::spawn(move || {
                    for part in shuffled(3, seed + 1) {
                        let (first, pages) = parts[part];
                        for page in shuffled(pages, seed + 7) {
                            let word = memory.read_u64((first + page) * PAGE + 8);
                            assert_eq!(word, stamp(offsets[part] + page));
                        }
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().expect("all pages are right");
        }
        let stats = pager.stop();
        assert_sums_up(&stats);
        assert_eq!((stats.pages.present, stats.pages.missing), (PAGES as u64, 0));
        // The memory between the regions is not paged.
        assert_eq!(memory.read(1005 * PAGE), 0);
    }
}

/// Chunks as in a packed working set: pages from everywhere, in any order.
#[test]
fn scattered_chunks_reach_into_other_slices() {
    if !userfaultfd_works("scattered_chunks_reach_into_other_slices") {
        return;
    }
    const PAGES: usize = 2048;
    let memory = Arc::new(Memory::map(PAGES * PAGE));
    let order = Arc::new(shuffled(PAGES, 99));
    let mut chunk_of = vec![0; PAGES];
    for (at, &page) in order.iter().enumerate() {
        chunk_of[page] = at / 16;
    }
    let source = source_of(PAGES, move |offset, answer| {
        let chunk = chunk_of[offset as usize / PAGE];
        order[chunk * 16..][..16].iter().for_each(|&page| answer.push(page));
        Ok(())
    });
    let pager = Pager::builder(source).region(memory.whole()).slices(4).start().expect("it starts");
    let threads: Vec<_> = (0..3)
        .map(|seed| {
            let memory = Arc::clone(&memory);
            thread::spawn(move || check_all(&memory, PAGES, |page| page, seed + 20))
        })
        .collect();
    for thread in threads {
        thread.join().expect("all pages are right");
    }
    let stats = pager.stop();
    assert_sums_up(&stats);
    assert_eq!(stats.pages.missing, 0);
    assert!(stats.installed.fault_around > PAGES as u64 / 2, "{stats:?}");
}

#[test]
fn writes_are_kept_when_the_chunk_around_them_arrives() {
    if !userfaultfd_works("writes_are_kept_when_the_chunk_around_them_arrives") {
        return;
    }
    // Chunks overlap: each load has pages on both sides, which may already be written to.
    const PAGES: usize = 512;
    let memory = Arc::new(Memory::map(PAGES * PAGE));
    let source = source_of(PAGES, |offset, answer| {
        let page = offset as usize / PAGE;
        (page.saturating_sub(8)..(page + 8).min(PAGES)).for_each(|page| answer.push(page));
        Ok(())
    });
    let pager = Pager::builder(source).region(memory.whole()).start().expect("it starts");
    let threads: Vec<_> = (0..2)
        .map(|thread| {
            let memory = Arc::clone(&memory);
            thread::spawn(move || {
                for page in shuffled(PAGES, 5).into_iter().filter(|page| page % 2 == thread) {
                    memory.write(page * PAGE, 0xaa);
                    assert_eq!(memory.read_u64(page * PAGE + 8), stamp(page));
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("all pages are right");
    }
    assert!((0..PAGES).all(|page| memory.read(page * PAGE) == 0xaa), "a write was lost");
    assert_sums_up(&pager.stop());
}

#[test]
fn present_pages_are_kept() {
    if !userfaultfd_works("present_pages_are_kept") {
        return;
    }
    let memory = Memory::map(64 * PAGE);
    memory.write(3 * PAGE, 0x33);
    let source = Arc::new(VecSource::new(stamped(64), 16 * PAGE));
    let pager = Pager::builder(source).region(memory.whole()).start().expect("it starts");
    assert_eq!(memory.read_u64(4 * PAGE), stamp(4));
    assert_eq!(memory.read(3 * PAGE), 0x33);
    let stats = pager.stop();
    assert_eq!((stats.installed.existing, stats.installed.fault_around), (1, 14));
    assert_sums_up(&stats);
}

#[test]
fn zero_pages_are_filled_in_blocks_and_kept_apart_from_data() {
    if !userfaultfd_works("zero_pages_are_filled_in_blocks_and_kept_apart_from_data") {
        return;
    }
    let mut bytes = vec![0; 256 * PAGE];
    bytes[128 * PAGE] = 1;
    let memory = Memory::map(256 * PAGE);
    let source = Arc::new(VecSource::new(bytes, 128 * PAGE));
    let pager = Pager::builder(source).region(memory.whole()).start().expect("it starts");
    assert_eq!(memory.read(40 * PAGE), 0);
    // A page is readable a moment before it is counted.
    let begin = Instant::now();
    while pager.stats().installed.zero == 0 && begin.elapsed() < Duration::from_secs(60) {
        thread::yield_now();
    }
    let zero = pager.stats().installed.zero;
    assert!((1..=16).contains(&zero), "{zero} pages for one fault");
    memory.write(41 * PAGE, 9);
    assert_eq!((memory.read(41 * PAGE), memory.read(41 * PAGE + 1)), (9, 0));
    assert_eq!(memory.read(128 * PAGE), 1);
    let stats = pager.stop();
    assert_eq!(stats.installed.fault_around, 127);
    assert_sums_up(&stats);
}

#[test]
fn huge_pages_are_paged_whole() {
    if !userfaultfd_works("huge_pages_are_paged_whole") {
        return;
    }
    const HUGE: usize = 2 << 20;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let memory = match Memory::map_with(2 * HUGE, flags) {
        Ok(memory) => memory,
        Err(error) => {
            // This does not fail the test: the owner of the host reserves huge pages.
            eprintln!("SKIPPED huge_pages_are_paged_whole: hugetlbfs: {error}");
            return;
        }
    };
    let mut bytes = stamped(HUGE / PAGE);
    bytes.resize(2 * HUGE, 0);
    #[allow(unsafe_code)]
    // SAFETY: mapped until after the pager has stopped, and no references into it are made.
    let region = unsafe { pager::Region::new(memory.addr(), 2 * HUGE as u64, HUGE, 0) };
    let pager = Pager::builder(Arc::new(VecSource::new(bytes, HUGE)))
        .region(region.expect("whole pages"))
        .start()
        .expect("it starts");
    assert_eq!(memory.read_u64(7 * PAGE), stamp(7));
    assert_eq!(memory.read(HUGE + 5), 0);
    let stats = pager.stop();
    assert_eq!((stats.installed.demand, stats.installed.zero, stats.pages.total), (1, 1, 2));
}

#[test]
fn unsuitable_memory_is_refused_at_the_start() {
    if !userfaultfd_works("unsuitable_memory_is_refused_at_the_start") {
        return;
    }
    let memory = Memory::map(64 * PAGE);
    let source = Arc::new(VecSource::new(stamped(64), PAGE));
    let start = |regions: Vec<pager::Region>| {
        Pager::builder(source.clone()).regions(regions).start().map(|_| ())
    };
    assert!(matches!(start(vec![]), Err(StartError::NoRegion)));
    let (one, two) = (memory.region(0, 8, 0), memory.region(7, 8, 8 * PAGE as u64));
    assert!(matches!(
        start(vec![one.clone(), two]),
        Err(StartError::Overlap { space: "memory", .. })
    ));
    let two = memory.region(8, 8, 7 * PAGE as u64);
    assert!(matches!(start(vec![one, two]), Err(StartError::Overlap { space: "the source", .. })));
    let beyond = memory.region(0, 8, 60 * PAGE as u64);
    assert!(matches!(start(vec![beyond]), Err(StartError::BeyondSource { .. })));

    let running = Pager::builder(source.clone()).region(memory.whole()).start().expect("it starts");
    match start(vec![memory.region(0, 8, 0)]) {
        Err(StartError::Register { errno, .. }) => assert_eq!(errno.0, libc::EBUSY),
        other => panic!("{other:?}"),
    }
    drop(running);
}

/// 16 GiB start as fast as 64 MiB: no work is done, and no memory is touched, for each page.
#[test]
fn the_start_does_not_depend_on_the_size() {
    if !userfaultfd_works("the_start_does_not_depend_on_the_size") {
        return;
    }
    let touched_at_start = |bytes: usize| {
        let memory = Memory::map(bytes);
        let source = source_of(bytes / PAGE, |offset, answer| {
            answer.push(offset as usize / PAGE);
            Ok(())
        });
        let before = minor_faults();
        let pager = Pager::builder(source).region(memory.whole()).start().expect("it starts");
        let touched = minor_faults() - before;
        drop(pager);
        touched
    };
    // The first start also does one-time work.
    touched_at_start(64 << 20);
    let (small, large) = (touched_at_start(64 << 20), touched_at_start(16 << 30));
    // 4 million pages have 4 MiB of states: 1024 pages.
    assert!(large < small + 64, "{small} pages touched for 64 MiB, {large} for 16 GiB");
}

/// The number of minor faults of the calling thread.
fn minor_faults() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").expect("it can be read");
    // "TID (NAME) STATE ..." of which minflt is the tenth: see proc_pid_stat(5).
    let (_, fields) = stat.rsplit_once(')').expect("it has a name");
    fields.split_whitespace().nth(7).and_then(|faults| faults.parse().ok()).expect("a number")
}

#[cfg(feature = "vm-memory")]
#[test]
fn guest_memory_is_paged_without_unsafe() {
    use pager::Region;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    if !userfaultfd_works("guest_memory_is_paged_without_unsafe") {
        return;
    }
    let ranges = [(GuestAddress(0), 64 * PAGE), (GuestAddress(1 << 32), 32 * PAGE)];
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&ranges).expect("anonymous memory"));
    let regions =
        Region::of_guest_memory(&memory, |gpa| if gpa.0 == 0 { 0 } else { 64 * PAGE as u64 })
            .expect("whole pages");
    let pager = Pager::builder(Arc::new(VecSource::new(stamped(96), 16 * PAGE)))
        .regions(regions)
        .start()
        .expect("it starts");
    for (gpa, page) in [(5 * PAGE as u64, 5), ((1 << 32) + 31 * PAGE as u64, 95)] {
        assert_eq!(memory.read_obj::<u64>(GuestAddress(gpa)).expect("in memory"), stamp(page));
    }
    // The pager keeps the memory until its userfaultfds are closed.
    let weak = Arc::downgrade(&memory);
    drop(memory);
    assert!(weak.upgrade().is_some());
    pager.stop();
    assert!(weak.upgrade().is_none());
}

#[test]
fn touched_pages_are_reported_by_source_offset() {
    if !userfaultfd_works("touched_pages_are_reported_by_source_offset") {
        return;
    }
    // Two regions, in another order in the source than in memory, in two slices.
    let memory = Memory::map(2048 * PAGE);
    let source = Arc::new(VecSource::new(stamped(2048), 4 * PAGE));
    let pager = Pager::builder(source)
        .region(memory.region(0, 1024, (1024 * PAGE) as u64))
        .region(memory.region(1024, 1024, 0))
        .slices(2)
        .start()
        .expect("it starts");
    assert!(pager.touched().is_empty());
    // Pages of the source: 1024 and 1031 in the first region, 0 in the second one. Chunks have four pages.
    for page in [0, 7, 1024] {
        memory.read_u64(page * PAGE);
    }
    let page = PAGE as u64;
    assert_eq!(pager.touched(), [0..4 * page, 1024 * page..1032 * page]);
}
