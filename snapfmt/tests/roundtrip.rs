//! The memory that is read equals the memory that was written, for any memory, codec, chunk size and number of threads.

mod common;

use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use proptest::prelude::*;
use snapfmt::layout::PAGE_BYTES as PAGE;
use snapfmt::{
    ChunkBuffer, Codec, Contents, Existing, MemoryRegion, Metadata, PageEntry, PageIndex, Snapshot,
    StateBlob, WriteError, WriteOptions, write_snapshot,
};

/// A page of one of the kinds that guests have.
fn page(kind: u8, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut random = move || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 56) as u8
    };
    match kind % 4 {
        0 => vec![0; PAGE],
        1 => (0..PAGE).map(|at| (at / 64) as u8 ^ seed as u8).collect(),
        2 => (0..PAGE).map(|_| random()).collect(),
        _ => {
            let mut page = vec![0; PAGE];
            page[seed as usize % PAGE] = 1;
            page
        }
    }
}

fn never_stop(_: snapfmt::Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn codec() -> impl Strategy<Value = Codec> {
    prop::sample::select(if cfg!(feature = "zstd") {
        vec![Codec::Raw, Codec::Lz4, Codec::Zstd]
    } else {
        vec![Codec::Raw, Codec::Lz4]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn every_page_comes_back(
        pages in prop::collection::vec((0u8..8, 0u64..1000), 1..1500),
        codec in codec(),
        chunk_pages in prop::sample::select(vec![1usize, 3, 16, 512]),
        threads in 1usize..4,
    ) {
        // Kinds 4 to 7 are zero too: most of a guest's memory is.
        let memory: Vec<u8> = pages
            .iter()
            .flat_map(|(kind, seed)| page(if *kind < 4 { *kind } else { 0 }, *seed))
            .collect();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.snap");
        let split = (pages.len() / 2 * PAGE) as u64;
        let len = memory.len() as u64;
        let mut regions = vec![MemoryRegion { gpa: 0, len, source_offset: 0 }];
        if split > 0 {
            regions[0].len = split;
            regions.push(MemoryRegion { gpa: 1 << 32, len: len - split, source_offset: split });
        }
        let states = [StateBlob { tag: 3, version: 4, bytes: vec![5; 600] }];
        let data = [0..len];
        let named = || Metadata::default().tool("test");
        let contents =
            || Contents::new(&regions, &memory, &data).states(&states).metadata(named());
        let threads = NonZeroUsize::new(threads).unwrap();
        let options =
            WriteOptions::default().codec(codec).chunk_pages(chunk_pages).threads(threads);
        let (header, metadata) =
            write_snapshot(&path, contents(), &options, &never_stop).unwrap();

        let snapshot = Snapshot::open(&path).unwrap();
        prop_assert_eq!(snapshot.header(), &header);
        prop_assert_eq!(snapshot.regions(), &regions[..]);
        prop_assert_eq!(snapshot.metadata().unwrap(), metadata);
        prop_assert_eq!(snapshot.state(3).unwrap(), Some(states[0].clone()));
        prop_assert_eq!(snapshot.state(9).unwrap(), None);
        let (mut buffer, mut found) = (ChunkBuffer::new(), vec![0; PAGE]);
        let mut zero_pages = 0;
        for (number, expected) in memory.chunks(PAGE).enumerate() {
            let number = PageIndex(number as u32);
            snapshot.read_page(number, &mut buffer, &mut found).unwrap();
            prop_assert_eq!(&found[..], expected);
            let zero = expected.iter().all(|byte| *byte == 0);
            zero_pages += u64::from(zero);
            prop_assert_eq!(snapshot.entry(number).unwrap() == PageEntry::Zero, zero);
            if zero {
                let run = snapshot.zero_run(number).unwrap();
                prop_assert!(run.contains(&number.source_offset()) && run.end <= len);
                let run = run.start as usize..run.end as usize;
                prop_assert!(memory[run].iter().all(|byte| *byte == 0));
            }
        }
        prop_assert_eq!(header.zero_pages(), zero_pages);
        prop_assert!(snapshot.entry(PageIndex(pages.len() as u32)).is_err());
        let verified = snapshot.verify(threads, &never_stop).unwrap();
        prop_assert_eq!(verified.data_pages, header.data_pages);

        // Loading everything gives the same memory, each page once.
        let loaded = std::sync::Mutex::new(vec![0; memory.len()]);
        let place = |offset: u64, bytes: &[u8]| {
            let mut loaded = loaded.lock().unwrap();
            let target = &mut loaded[offset as usize..][..bytes.len()];
            assert!(target.iter().all(|byte| *byte == 0));
            target.copy_from_slice(bytes);
        };
        snapshot.load(threads, &place, &never_stop).unwrap();
        prop_assert!(loaded.into_inner().unwrap() == memory);

        // The same bytes for any number of threads, except the id and the time.
        let again = directory.path().join("b.snap");
        let options = options.threads(NonZeroUsize::MIN);
        write_snapshot(&again, contents(), &options, &never_stop).unwrap();
        let bytes = |path| common::without_id(std::fs::read(path).unwrap());
        prop_assert!(bytes(&path) == bytes(&again));
    }
}

fn small_contents<'a>(
    memory: &'a dyn snapfmt::ReadAt,
    regions: &'a [MemoryRegion],
) -> Contents<'a> {
    Contents::new(regions, memory, &[0..8192])
}

#[test]
fn opening_reads_the_same_for_any_memory_size() {
    // Counts what is read; the memory's content is the same, its size is not.
    struct Counting(Vec<u8>, std::sync::atomic::AtomicU64);
    impl snapfmt::ReadAt for Counting {
        fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
            self.1.fetch_add(buf.len() as u64, std::sync::atomic::Ordering::SeqCst);
            self.0.read_exact_at(buf, offset)
        }
        fn len_bytes(&self) -> std::io::Result<u64> {
            self.0.len_bytes()
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let read_to_open = |memory_bytes: u64| {
        let memory = vec![1; 8192];
        let regions = [MemoryRegion { gpa: 0, len: memory_bytes, source_offset: 0 }];
        let path = directory.path().join(memory_bytes.to_string());
        let contents = small_contents(&memory, &regions);
        write_snapshot(&path, contents, &WriteOptions::default(), &never_stop).unwrap();
        let bytes = std::fs::read(path).unwrap();
        let file_bytes = bytes.len();
        let snapshot = Snapshot::new(Counting(bytes, 0.into())).unwrap();
        (snapshot.storage().1.load(std::sync::atomic::Ordering::SeqCst), file_bytes)
    };
    assert_eq!(read_to_open(64 << 20), read_to_open(64 << 30));
}

#[test]
fn a_cancelled_or_failing_write_leaves_nothing_behind() {
    struct Broken;
    impl snapfmt::ReadAt for Broken {
        fn read_exact_at(&self, _: &mut [u8], _: u64) -> std::io::Result<()> {
            Err(std::io::Error::from_raw_os_error(5))
        }
        fn len_bytes(&self) -> std::io::Result<u64> {
            Ok(8192)
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.snap");
    let regions = [MemoryRegion { gpa: 0, len: 8192, source_offset: 0 }];
    let memory = vec![1; 8192];
    let cancelled =
        write_snapshot(&path, small_contents(&memory, &regions), &WriteOptions::default(), &|_| {
            ControlFlow::Break(())
        });
    assert!(matches!(cancelled, Err(WriteError::Cancelled)));
    let mut contents = small_contents(&memory, &regions);
    contents.memory = &Broken;
    let failed = write_snapshot(&path, contents, &WriteOptions::default(), &never_stop);
    assert!(matches!(failed, Err(WriteError::Memory { source_offset: 0, .. })));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn an_existing_file_is_kept_by_default() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.snap");
    std::fs::write(&path, b"mine").unwrap();
    let regions = [MemoryRegion { gpa: 0, len: 8192, source_offset: 0 }];
    let memory = vec![1; 8192];
    let mut options = WriteOptions::default();
    let kept = write_snapshot(&path, small_contents(&memory, &regions), &options, &never_stop);
    assert!(matches!(kept, Err(WriteError::Exists { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    options.existing = Existing::Replace;
    write_snapshot(&path, small_contents(&memory, &regions), &options, &never_stop).unwrap();
    assert_eq!(Snapshot::open(&path).unwrap().header().data_pages, 2);
}
