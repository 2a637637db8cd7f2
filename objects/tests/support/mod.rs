//! A snapshot, a server and a cache for tests.
#![allow(dead_code, reason = "not every test uses all of it")]

pub(crate) mod fake;
pub(crate) mod guest;
pub(crate) mod processes;
pub(crate) mod registry;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use objects::{Cache, ObjectUrl, Opened, Options, Retry};
use snapfmt::layout::PAGE_BYTES;
use snapfmt::{
    Codec, Contents, MemoryRegion, PageIndex, Parent, Snapshot, WriteOptions, write_layer,
    write_snapshot,
};
use tempfile::TempDir;

use fake::Fake;

/// The path of the snapshot on the server.
pub(crate) const KEY: &str = "/bucket/guest.snap";

/// Memory whose pages all differ and do not compress.
pub(crate) fn memory(pages: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut memory = Vec::with_capacity(pages * PAGE_BYTES);
    while memory.len() < pages * PAGE_BYTES {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        memory.extend(state.to_le_bytes());
    }
    memory
}

/// A snapshot file with this memory.
pub(crate) fn write(folder: &Path, name: &str, memory: &[u8]) -> PathBuf {
    let path = folder.join(name);
    let len = memory.len() as u64;
    let regions = [MemoryRegion { gpa: 0, len, source_offset: 0 }];
    let data = [0..len];
    let options = WriteOptions::default().codec(Codec::Raw);
    let contents = Contents::new(&regions, &memory, &data);
    write_snapshot(&path, contents, &options, &|_| ControlFlow::Continue(()))
        .expect("it is written");
    path
}

/// A layer with one page of this memory, at an offset.
pub(crate) fn write_on(parent: &Path, file: &Path, memory: &[u8], offset: u64) {
    let onto = Snapshot::open(parent).expect("it opens");
    let regions = [MemoryRegion { gpa: 0, len: memory.len() as u64, source_offset: 0 }];
    let parent = Parent::new(&onto, parent.file_name().expect("a name"));
    let data = [offset..offset + PAGE_BYTES as u64];
    let contents = Contents::new(&regions, &memory, &data);
    let proceed = |_| ControlFlow::Continue(());
    write_layer(file, contents, &parent, &WriteOptions::default(), &proceed)
        .expect("it is written");
}

/// The snapshot and layers on it, each of which has changed one page, are on the server with the name `/bucket/guest`.
/// Returns the path of the last one, and its memory.
pub(crate) fn push_chain(bench: &Bench, layers: u8) -> (String, Vec<u8>) {
    let mut memory = bench.memory.clone();
    let mut files = vec![bench.file.clone()];
    for number in 1..layers {
        let page = usize::from(number) * 100 * 4096;
        memory[page..page + 4096].fill(number);
        let (parent, file) =
            (&files[files.len() - 1], bench.folder.path().join(format!("{number}")));
        write_on(parent, &file, &memory, page as u64);
        files.push(file);
    }
    let bucket = bench.folder.path().join("bucket");
    let name = format!("file://{}/guest", bucket.display()).parse().expect("it can be done");
    let top = Snapshot::open(files.last().expect("the base")).expect("it can be done");
    let proceed = |_| ControlFlow::Continue(());
    objects::push(&top, &name, true, impatient(), &proceed).expect("it can be done");
    for entry in std::fs::read_dir(bucket.join("objects")).expect("it can be done").flatten() {
        let path =
            format!("/bucket/objects/{}", entry.file_name().to_str().expect("it can be done"));
        bench.fake.put(&path, std::fs::read(entry.path()).expect("it can be done"));
    }
    bench.fake.put("/bucket/guest", std::fs::read(bucket.join("guest")).expect("it can be done"));
    (format!("/bucket/objects/{}.snap", top.header().id), memory)
}

/// A server with a snapshot, and a cache.
pub(crate) struct Bench {
    pub(crate) fake: Fake,
    pub(crate) folder: TempDir,
    pub(crate) memory: Vec<u8>,
    pub(crate) file: PathBuf,
}

impl Bench {
    pub(crate) fn start(pages: usize, latency: Duration) -> Self {
        Self::with(pages, Fake::start(latency))
    }

    pub(crate) fn with(pages: usize, fake: Fake) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let memory = memory(pages, 0x9E37_79B9_7F4A_7C15);
        let file = write(folder.path(), "guest.snap", &memory);
        fake.put(KEY, std::fs::read(&file).expect("it is there"));
        Self { fake, folder, memory, file }
    }

    pub(crate) fn url(&self) -> ObjectUrl {
        self.fake.url(KEY).parse().expect("an address")
    }

    /// Options with one second of patience.
    pub(crate) fn options(&self) -> Options {
        self.options_in("cache")
    }

    pub(crate) fn options_in(&self, cache: &str) -> Options {
        let cache = Cache::open(self.folder.path().join(cache), 1 << 30).expect("a cache");
        Options::new(cache).retry(impatient())
    }

    pub(crate) fn open(&self) -> Opened {
        objects::open(&self.url(), &self.options()).expect("it opens")
    }

    /// Checks that a page has the bytes that were written.
    #[track_caller]
    pub(crate) fn check_page(&self, snapshot: &Snapshot, page: u32) {
        let mut bytes = [0; PAGE_BYTES];
        let read = snapshot.read_page(PageIndex(page), &mut Default::default(), &mut bytes);
        read.unwrap_or_else(|error| panic!("page {page}: {}", chain(&error)));
        let at = page as usize * PAGE_BYTES;
        assert!(bytes == self.memory[at..at + PAGE_BYTES], "page {page} differs");
    }

    /// The error of reading a page.
    #[track_caller]
    pub(crate) fn fail_page(&self, snapshot: &Snapshot, page: u32) -> snapfmt::ReadError {
        let mut bytes = [0; PAGE_BYTES];
        let read = snapshot.read_page(PageIndex(page), &mut Default::default(), &mut bytes);
        read.expect_err("it fails")
    }
}

pub(crate) fn impatient() -> Retry {
    Retry {
        patience: Duration::from_secs(1),
        first_pause: Duration::from_millis(5),
        longest_pause: Duration::from_millis(50),
    }
}

/// An error with all its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
