//! A snapshot whose pages are added after the file has appeared.
//!
//! The place of each page is fixed when the file appears, because all chunks are raw. So the file opens, and has its
//! index, states and metadata. A chunk that was not added yet is a hole of the file. A reader refuses it, because it does
//! not begin with the magic of a chunk: no reader takes the hole for zeros.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;

use uuid::Uuid;

use crate::chunk::{self, Binding};
use crate::codec::{Appended, Codec, Compressor};
use crate::contents::{Contents, WriteOptions};
use crate::entry::{ChunkExtent, PageIndex};
use crate::error::WriteError;
use crate::file_builder::FileBuilder;
use crate::header::Header;
use crate::layout::{CHUNK_HEADER_BYTES, PAGE_BYTES};
use crate::memory_map;
use crate::output::Output;
use crate::pack::{LeafTasks, is_zero};
use crate::parent::Parent;
use crate::read_at::ReadAt;
use crate::seal::Seal;
use crate::section::SectionKind;
use crate::writer::{check_limits, check_regions};

/// A file that has appeared, and whose chunks are added by [`DeferredChunks::add`].
pub struct DeferredChunks {
    file: File,
    path: PathBuf,
    id: Uuid,
    seal: Option<Seal>,
    /// By ascending page.
    chunks: Vec<DeferredChunk>,
}

/// A chunk of consecutive pages, and its place.
#[derive(Debug)]
struct DeferredChunk {
    first_page: u32,
    pages: u16,
    extent: ChunkExtent,
    state: AtomicU8,
}

/// No thread has begun to add the chunk.
const MISSING: u8 = 0;
/// One thread adds it.
const CLAIMED: u8 = 1;
/// It is in the file.
const ADDED: u8 = 2;
/// It could not be added.
const FAILED: u8 = 3;

/// Writes a snapshot, or with a parent a layer, without the bytes of its memory. Every page in `contents.data` gets a
/// place, also if it is zero or equal to the parent's. Of `options`, only `chunk_pages`, `existing` and `seal` are used.
///
/// # Errors
/// As [`write_layer`](crate::write_layer); then there is no file.
pub fn write_deferred(
    path: impl AsRef<Path>,
    contents: &Contents<'_>,
    parent: Option<&Parent<'_>>,
    options: &WriteOptions,
) -> Result<(Header, DeferredChunks), WriteError> {
    let path = path.as_ref();
    check_regions(contents, parent)?;
    let memory_bytes = memory_map::validate(contents.regions)?;
    check_limits(contents, parent, options)?;
    let id = Uuid::new_v4();
    let seal = options.seal.as_deref().map(|keys| Seal::create(keys, id)).transpose()?;
    let mut output = Output::create(path, options.existing)?;
    let mut file = FileBuilder::new(&mut output, id, seal.as_ref(), parent);
    let tasks = LeafTasks::new(contents.data, memory_bytes);
    file.begin(SectionKind::CHUNKS);
    let mut chunks = Vec::new();
    for task in 0..tasks.len() {
        let (number, ranges) = tasks.ranges_of(task);
        let parts = ranges.flat_map(|range| {
            let page = |offset: u64| (offset / PAGE_BYTES as u64) as u32;
            parts(page(range.start)..page(range.end), options.chunk_pages as u32)
        });
        for (first_page, pages, extent) in file.reserve_leaf(number, parts)? {
            chunks.push(DeferredChunk { first_page, pages, extent, state: AtomicU8::new(MISSING) });
        }
    }
    file.end(0);
    let mut metadata = contents.metadata.clone();
    metadata.storage = file.storage();
    let header =
        file.finish(contents.regions, memory_bytes, contents.states, &metadata, options)?;
    let failed =
        |operation| move |source| WriteError::Output { operation, path: path.to_owned(), source };
    check_space(output.file(), header.file_bytes).map_err(failed("write"))?;
    let file = output.file().try_clone().map_err(failed("open"))?;
    output.publish()?;
    Ok((header, DeferredChunks { file, path: path.to_owned(), id, seal, chunks }))
}

/// Refuses a file for which there is no space now, because later it would have appeared already.
fn check_space(file: &File, bytes: u64) -> io::Result<()> {
    let found = rustix::fs::fstatvfs(file)?;
    // 0: a file system without a limit.
    match found.f_blocks > 0 && found.f_bavail.saturating_mul(found.f_frsize) < bytes {
        true => Err(io::ErrorKind::StorageFull.into()),
        false => Ok(()),
    }
}

/// Cuts a range of pages at multiples of `chunk_pages`.
fn parts(range: Range<u32>, chunk_pages: u32) -> impl Iterator<Item = (u32, u16)> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let first = at;
        // At most 512 pages.
        at = (first - first % chunk_pages + chunk_pages).min(range.end);
        (first < range.end).then(|| (first, (at - first) as u16))
    })
}

impl fmt::Debug for DeferredChunks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeferredChunks").field("path", &self.path).finish_non_exhaustive()
    }
}

impl DeferredChunks {
    /// How many chunks the file has.
    pub fn count(&self) -> usize {
        self.chunks.len()
    }

    /// The memory that the chunks have, as ascending ranges of source offsets in bytes, one for each chunk.
    pub fn memory(&self) -> Vec<Range<u64>> {
        let bytes = |pages: u32| u64::from(pages) * PAGE_BYTES as u64;
        let memory = |chunk: &DeferredChunk| {
            bytes(chunk.first_page)..bytes(chunk.first_page) + bytes(chunk.pages.into())
        };
        self.chunks.iter().map(memory).collect()
    }

    /// The chunk that has the page, if one has it.
    pub fn of(&self, page: PageIndex) -> Option<usize> {
        let after = self.chunks.partition_point(|chunk| chunk.first_page <= page.0);
        let (number, chunk) = (after.checked_sub(1)?, self.chunks.get(after.checked_sub(1)?)?);
        (page.0 - chunk.first_page < u32::from(chunk.pages)).then_some(number)
    }

    /// Makes sure that a chunk is in the file. Its bytes are read from `memory` once, whichever threads call this. A
    /// thread that finds another one at it waits for the result.
    ///
    /// # Errors
    /// [`WriteError::Memory`] and [`WriteError::Output`], and for the same chunk always one of [`WriteError`] after that.
    pub fn add(&self, number: usize, memory: &dyn ReadAt) -> Result<(), WriteError> {
        let Some(chunk) = self.chunks.get(number) else { return Ok(()) };
        let claim =
            chunk.state.compare_exchange(MISSING, CLAIMED, Ordering::AcqRel, Ordering::Acquire);
        if claim.is_ok() {
            let added = self.write(chunk, memory);
            let state = if added.is_ok() { ADDED } else { FAILED };
            chunk.state.store(state, Ordering::Release);
            return added;
        }
        // It takes microseconds.
        while chunk.state.load(Ordering::Acquire) == CLAIMED {
            thread::yield_now();
        }
        match chunk.state.load(Ordering::Acquire) {
            ADDED => Ok(()),
            _ => {
                let source = io::Error::other("a chunk could not be written before");
                Err(WriteError::Output { operation: "write", path: self.path.clone(), source })
            }
        }
    }

    fn write(&self, chunk: &DeferredChunk, memory: &dyn ReadAt) -> Result<(), WriteError> {
        let offset = u64::from(chunk.first_page) * PAGE_BYTES as u64;
        let mut raw = vec![0; usize::from(chunk.pages) * PAGE_BYTES];
        memory
            .read_exact_at(&mut raw, offset)
            .map_err(|source| WriteError::memory(offset, raw.len() as u64, source))?;
        let pages: Vec<_> = (0..u32::from(chunk.pages))
            .map(|number| PageIndex(chunk.first_page + number))
            .collect();
        let mut bytes = Appended::default();
        let mut compressor = Compressor::new(Codec::Raw, 0)?;
        let binding = Binding::new(chunk::seed(self.id), self.seal.as_ref());
        chunk::encode(&mut compressor, &pages, &raw, binding, &mut bytes)?;
        // A chunk is written once, so no nonce is used twice.
        chunk::set_place(&mut bytes, chunk.extent.offset(), binding)?;
        let (header, body) = bytes.split_at(CHUNK_HEADER_BYTES);
        // A hole of the file is zero, too.
        let body =
            if self.seal.is_none() && is_zero(&raw) { &body[..4 * pages.len()] } else { body };
        let place = chunk.extent.offset();
        // The header comes last: where it is, the chunk is complete.
        self.file
            .write_all_at(body, place + CHUNK_HEADER_BYTES as u64)
            .and_then(|()| self.file.write_all_at(header, place))
            .map_err(|source| {
                let path = self.path.clone();
                WriteError::Output { operation: "write", path, source }
            })
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::ops::ControlFlow;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::layout::CHUNK_MAGIC;
    use crate::{
        ChunkBuffer, KeyProvider, MemoryRegion, PageEntry, Parents, ReadError, SecretKey, Snapshot,
        StateBlob, write_snapshot,
    };

    const PAGES: usize = 1100;

    /// Page `n` begins with `n`, or is zero. Each page can be read once.
    struct Once(Vec<AtomicBool>);

    impl Once {
        fn new() -> Self {
            Self((0..PAGES).map(|_| AtomicBool::new(false)).collect())
        }
    }

    impl ReadAt for Once {
        fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
            let first = offset as usize / PAGE_BYTES;
            for (page, bytes) in (first..).zip(buf.chunks_mut(PAGE_BYTES)) {
                assert!(!self.0[page].swap(true, Ordering::SeqCst), "page {page} is read again");
                bytes[..8].copy_from_slice(&content(page).to_le_bytes());
            }
            Ok(())
        }

        fn len_bytes(&self) -> io::Result<u64> {
            Ok((PAGES * PAGE_BYTES) as u64)
        }
    }

    fn content(page: usize) -> u64 {
        if page.is_multiple_of(3) || (512..544).contains(&page) { 0 } else { page as u64 }
    }

    fn bytes_of(pages: Range<usize>) -> Range<u64> {
        (pages.start * PAGE_BYTES) as u64..(pages.end * PAGE_BYTES) as u64
    }

    fn regions() -> [MemoryRegion; 1] {
        [MemoryRegion { gpa: 0, len: (PAGES * PAGE_BYTES) as u64, source_offset: 0 }]
    }

    fn read(snapshot: &Snapshot, page: usize) -> Result<u64, ReadError> {
        let mut bytes = [0; PAGE_BYTES];
        snapshot.read_page(PageIndex(page as u32), &mut ChunkBuffer::new(), &mut bytes)?;
        Ok(u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")))
    }

    #[test]
    fn a_page_is_refused_until_it_is_added_and_then_right() {
        added_pages(None);
    }

    #[test]
    fn the_same_in_a_sealed_file() {
        added_pages(Some(Arc::new(SecretKey::new([7; 32]))));
    }

    fn added_pages(keys: Option<Arc<dyn KeyProvider>>) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("deferred.snap");
        let memory = Once::new();
        let (data, regions) = ([bytes_of(5..700), bytes_of(1000..1100)], regions());
        let states = [StateBlob { tag: 7, version: 1, bytes: vec![9; 100] }];
        let contents = Contents::new(&regions, &memory, &data).states(&states);
        let options = WriteOptions::default().chunk_pages(16).seal(keys.clone());
        let parents = Parents { keys, ..Parents::default() };
        let (_, chunks) = write_deferred(&path, &contents, None, &options).expect("it is written");
        // A reader that was there before.
        let snapshot = Snapshot::open_with(&path, &parents).expect("it opens");
        assert_eq!(snapshot.state(7).expect("it is whole").expect("it is there").bytes, [9; 100]);
        assert_eq!(snapshot.header().data_pages, 795);
        for page in [0, 4, 700, 999] {
            assert_eq!(read(&snapshot, page).expect("it is zero"), 0);
            assert_eq!(chunks.of(PageIndex(page as u32)), None);
        }
        let has = |page: usize| match snapshot.entry(PageIndex(page as u32)).expect("an entry") {
            PageEntry::Data { chunk, .. } => snapshot.has_chunk(chunk).expect("it can be read"),
            entry => panic!("{entry:?}"),
        };
        for page in [5, 512, 699, 1000, 1099] {
            assert!(!has(page));
            let error = read(&snapshot, page).expect_err("it is a hole");
            assert!(format!("{error:?}").contains("chunk.magic"), "{error:?}");
            let chunk = chunks.of(PageIndex(page as u32)).expect("it has one");
            // A header of which only the start is written.
            let place = chunks.chunks[chunk].extent.offset();
            chunks.file.write_all_at(&CHUNK_MAGIC, place).expect("it is written");
            assert!(!has(page));
            chunks.add(chunk, &memory).expect("it is added");
            assert!(has(page));
            assert_eq!(read(&snapshot, page).expect("it is there"), content(page));
        }
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| (0..chunks.count()).for_each(|at| chunks.add(at, &memory).unwrap()));
            }
        });
        for page in (5..700).chain(1000..1100) {
            assert_eq!(read(&snapshot, page).expect("it is there"), content(page));
        }
        let verified = Snapshot::open_with(&path, &parents)
            .expect("it opens")
            .verify(NonZeroUsize::MIN, &|_| ControlFlow::Continue(()));
        assert!(verified.is_ok(), "{verified:?}");
    }

    #[test]
    fn a_layer_has_the_pages_of_its_parent() {
        let folder = tempfile::tempdir().expect("a folder");
        let (parent, layer) = (folder.path().join("a.snap"), folder.path().join("b.snap"));
        let (data, regions) = ([bytes_of(0..PAGES)], regions());
        let (whole, changed) = (Once::new(), Once::new());
        let options = WriteOptions::default();
        let contents = Contents::new(&regions, &whole, &data).read_once(&|| Ok(()));
        write_snapshot(&parent, contents, &options, &|_| ControlFlow::Continue(()))
            .expect("it is written");
        let opened = Snapshot::open(&parent).expect("it opens");
        let data = [bytes_of(600..700)];
        let contents = Contents::new(&regions, &changed, &data);
        let on = Parent::new(&opened, PathBuf::from("a.snap"));
        let (_, chunks) =
            write_deferred(&layer, &contents, Some(&on), &options).expect("it is written");
        let snapshot = Snapshot::open_with(&layer, &Parents::default()).expect("it opens");
        assert!(read(&snapshot, 650).is_err());
        assert_eq!(read(&snapshot, 599).expect("it is the parent's"), content(599));
        (0..chunks.count()).for_each(|at| chunks.add(at, &changed).expect("it is added"));
        for page in 0..PAGES {
            assert_eq!(read(&snapshot, page).expect("it is there"), content(page));
        }
    }

    /// The guest's memory may be gone, and a retry would read other bytes.
    #[test]
    fn a_chunk_that_could_not_be_read_stays_refused() {
        struct Broken;
        impl ReadAt for Broken {
            fn read_exact_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
                Err(io::Error::other("broken"))
            }
            fn len_bytes(&self) -> io::Result<u64> {
                Ok(bytes_of(0..PAGES).end)
            }
        }
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("broken.snap");
        let (data, regions) = ([bytes_of(0..8)], regions());
        let contents = Contents::new(&regions, &Broken, &data);
        let (_, chunks) = write_deferred(&path, &contents, None, &WriteOptions::default())
            .expect("it is written");
        assert!(matches!(chunks.add(0, &Broken), Err(WriteError::Memory { .. })));
        assert!(matches!(chunks.add(0, &Once::new()), Err(WriteError::Output { .. })));
        assert!(read(&Snapshot::open(&path).expect("it opens"), 0).is_err());
    }
}
