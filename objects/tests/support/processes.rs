//! Processes that read a snapshot: this test program, started again with only its test `reader`.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use objects::{Cache, Options};
use snapfmt::layout::PAGE_BYTES;
use snapfmt::{PageEntry, PageIndex, ReadAt};

use super::{chain, impatient};

/// What a process reads, and with which cache.
pub(crate) struct Reading<'a> {
    pub(crate) url: &'a str,
    pub(crate) cache: &'a Path,
    pub(crate) cache_bytes: u64,
    /// A file with the right memory.
    pub(crate) memory: &'a Path,
    pub(crate) pages: &'a [u32],
}

/// A process that has started, and reads when it is released.
pub(crate) struct Process(pub(crate) Child);

impl Reading<'_> {
    /// Starts a process. The test program must have an ignored test `reader` that calls [`read`].
    pub(crate) fn start(&self) -> Process {
        let pages: Vec<_> = self.pages.iter().map(u32::to_string).collect();
        let mut command = Command::new(std::env::current_exe().expect("the test program"));
        command.args(["--exact", "reader", "--ignored", "--nocapture", "--test-threads", "1"]);
        command.env("READER_URL", self.url).env("READER_CACHE", self.cache);
        command.env("READER_CACHE_BYTES", self.cache_bytes.to_string());
        command.env("READER_MEMORY", self.memory).env("READER_PAGES", pages.join(","));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Process(command.spawn().expect("it starts"))
    }
}

impl Process {
    pub(crate) fn release(&mut self) {
        let mut stdin = self.0.stdin.take().expect("it is released once");
        // It may have been killed.
        let _ = stdin.write_all(b"go");
    }

    /// Waits for its end. It must succeed.
    #[track_caller]
    pub(crate) fn succeed(self) {
        let output = self.0.wait_with_output().expect("it ends");
        let said =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        assert!(output.status.success(), "{}", said.concat());
    }
}

/// The body of the test `reader`: waits for the release, opens the snapshot and checks its pages.
pub(crate) fn read() {
    let setting = |name: &str| std::env::var(format!("READER_{name}"));
    // Without settings, a user has asked for all ignored tests.
    let Ok(url) = setting("URL") else { return };
    let setting = |name| setting(name).expect(name);
    let memory = std::fs::read(PathBuf::from(setting("MEMORY"))).expect("it is there");
    let pages: Vec<u32> =
        setting("PAGES").split(',').map(|page| page.parse().expect("a page")).collect();
    let limit = setting("CACHE_BYTES").parse().expect("a number");
    std::io::stdin().read_to_end(&mut Vec::new()).expect("it is released");
    let cache = Cache::open(setting("CACHE"), limit).expect("a cache");
    let options = Options::new(cache).retry(impatient());
    let opened = objects::open(&url.parse().expect("an address"), &options);
    let opened = opened.unwrap_or_else(|error| panic!("{}", chain(&error)));
    for &page in &pages {
        let mut bytes = [0; PAGE_BYTES];
        let read = opened.snapshot.read_page(PageIndex(page), &mut Default::default(), &mut bytes);
        read.unwrap_or_else(|error| panic!("page {page}: {}", chain(&error)));
        let at = page as usize * PAGE_BYTES;
        assert!(bytes == memory[at..at + PAGE_BYTES], "page {page} differs");
    }
    // A reader continues before its block is in the cache. A guest runs for longer than that takes.
    let is_cached = |page: u32| match opened.snapshot.entry(PageIndex(page)).expect("it is read") {
        PageEntry::Data { chunk, .. } => {
            let object = &opened.objects[usize::from(chunk.layer())];
            [chunk.offset(), chunk.end() - 1].iter().all(|at| object.is_cached(*at) == Some(true))
        }
        _ => true,
    };
    let started = Instant::now();
    while !pages.iter().all(|page| is_cached(*page)) && started.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(1));
    }
}
