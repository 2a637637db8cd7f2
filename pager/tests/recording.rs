//! Recording: exactly the pages that were touched, in the order of their chunks and by marks.
#![allow(missing_docs)]

mod support;

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::Arc;

use pager::{PageSource, Pager, Recording, VecSource};
use support::{Memory, PAGE, shuffled, source_of, stamp, stamped, userfaultfd_works};

const PAGES: usize = 1024;
const CHUNK: usize = 16;

fn start(source: Arc<dyn PageSource>, slices: usize) -> (Memory, Recording, Pager) {
    let file: File = rustix::fs::memfd_create("recorded", rustix::fs::MemfdFlags::CLOEXEC)
        .expect("a memfd")
        .into();
    file.set_len((PAGES * PAGE) as u64).expect("any size");
    let memory = Memory::of_file(&file, PAGES * PAGE);
    let recording = Recording::new(source, file, vec![memory.whole()]).expect("pagemap opens");
    let pager = Pager::recording(&recording).slices(slices).start().expect("it starts");
    (memory, recording, pager)
}

fn numbers(touched: &[(u64, u32)]) -> Vec<(usize, u32)> {
    touched.iter().map(|(offset, mark)| (*offset as usize / PAGE, *mark)).collect()
}

#[test]
fn only_touched_pages_are_recorded_each_by_its_mark() {
    if !userfaultfd_works("only_touched_pages_are_recorded_each_by_its_mark") {
        return;
    }
    let (memory, recording, pager) =
        start(Arc::new(VecSource::new(stamped(PAGES), CHUNK * PAGE)), 1);
    // Reads and writes, of several pages of a chunk, and of pages that were loaded with others.
    assert_eq!(memory.read_u64(200 * PAGE), stamp(200));
    memory.write(203 * PAGE + 9, 0x42);
    assert_eq!(memory.read_u64(202 * PAGE), stamp(202));
    memory.write(17 * PAGE, 1);
    recording.mark().expect("pagemap can be read");
    assert_eq!(memory.read_u64(16 * PAGE), stamp(16));
    assert_eq!(memory.read_u64(900 * PAGE), stamp(900));
    assert_eq!(memory.read(203 * PAGE + 9), 0x42);
    recording.mark().expect("pagemap can be read");
    assert_eq!(memory.read_u64(901 * PAGE), stamp(901));
    // Sorted by mark, then in the order of loading. In a chunk, the requested page comes first, the others ascend.
    let expected = [(200, 0), (202, 0), (203, 0), (17, 0), (16, 1), (900, 1)];
    assert_eq!(numbers(&recording.touched()), expected);
    recording.mark().expect("pagemap can be read");
    assert_eq!(numbers(&recording.touched())[6], (901, 2));
    let stats = pager.stop();
    assert_eq!(stats.faults, 3, "one for each chunk");
}

#[test]
fn any_pages_touched_by_several_threads_are_found_and_right() {
    if !userfaultfd_works("any_pages_touched_by_several_threads_are_found_and_right") {
        return;
    }
    for round in 0..4 {
        // The second half is zero.
        let source = source_of(PAGES, |offset, answer| {
            let page = offset as usize / PAGE;
            if page >= PAGES / 2 {
                answer.zero((PAGES / 2 * PAGE) as u64..(PAGES * PAGE) as u64);
            } else {
                (page - page % CHUNK..page - page % CHUNK + CHUNK)
                    .for_each(|page| answer.push(page));
            }
            Ok(())
        });
        let (memory, recording, pager) = start(source, 1 + round % 2);
        let touched: Vec<_> = shuffled(PAGES, 3 + round as u64).into_iter().take(200).collect();
        std::thread::scope(|scope| {
            let memory = &memory;
            for part in touched.chunks(70) {
                scope.spawn(move || {
                    for page in part {
                        let expected = if *page < PAGES / 2 { stamp(*page) } else { 0 };
                        assert_eq!(memory.read_u64(page * PAGE), expected, "page {page}");
                    }
                });
            }
        });
        recording.mark().expect("pagemap can be read");
        // All zero pages that were filled in count.
        let expected: BTreeSet<_> = touched
            .iter()
            .flat_map(|page| {
                if *page < PAGES / 2 {
                    return *page..page + 1;
                }
                // Blocks are aligned by address.
                let shift = memory.addr() as usize / PAGE % 16;
                let block = (page + shift - (page + shift) % 16).saturating_sub(shift);
                block.max(PAGES / 2)..(page + shift - (page + shift) % 16 + 16 - shift).min(PAGES)
            })
            .collect();
        let found: BTreeSet<_> = numbers(&recording.touched()).into_iter().map(|of| of.0).collect();
        assert_eq!(found, expected);
        assert!(pager.failure().is_none());
    }
}

/// The page would come back from the file: it is refused, and no thread reads the old content.
#[test]
fn giving_back_recorded_memory_fails_closed() {
    if !userfaultfd_works("giving_back_recorded_memory_fails_closed") {
        return;
    }
    let (memory, _recording, pager) =
        start(Arc::new(VecSource::new(stamped(PAGES), CHUNK * PAGE)), 1);
    assert_eq!(memory.read_u64(0), stamp(0));
    memory.remove(700, 1);
    assert!(memory.read_by_syscall(700).is_err());
    assert!(pager.failure().is_some());
}
