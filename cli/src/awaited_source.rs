//! A page source that reports when a page takes long, because the disk may be slow.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pager::{Load, PageReader, PageSequence, PageSource, SourceError, WhenReady};

use crate::waits::{Often, Wait};

/// The source that it wraps.
pub(crate) struct AwaitedSource {
    source: Arc<dyn PageSource>,
    path: PathBuf,
}

impl AwaitedSource {
    /// `path` is for messages.
    pub(crate) fn new(source: Arc<dyn PageSource>, path: &Path) -> Self {
        Self { source, path: path.to_owned() }
    }
}

impl PageSource for AwaitedSource {
    fn reader(&self, page_bytes: usize) -> Result<Box<dyn PageReader>, SourceError> {
        let path = self.path.clone();
        let page = move || format!("a page of {} to be read", path.display());
        let wait = || Often::new(Wait::new(page.clone()).hears());
        let remote = Arc::new(RemoteWaits { count: Mutex::new(0), wait: wait() });
        Ok(Box::new(AwaitedReader {
            reader: self.source.reader(page_bytes)?,
            wait: wait(),
            remote,
        }))
    }

    fn len_bytes(&self) -> u64 {
        self.source.len_bytes()
    }

    fn data_bytes(&self) -> u64 {
        self.source.data_bytes()
    }

    /// No thread waits for pages that are loaded ahead, so this wait is not reported.
    fn sequence(
        &self,
        page_bytes: usize,
        pages: Vec<Range<u64>>,
    ) -> Result<Box<dyn PageSequence>, SourceError> {
        self.source.sequence(page_bytes, pages)
    }
}

struct AwaitedReader {
    reader: Box<dyn PageReader>,
    wait: Often,
    remote: Arc<RemoteWaits>,
}

/// The waits of one reader for pages that another host sends, while it loads others.
struct RemoteWaits {
    count: Mutex<usize>,
    wait: Often,
}

/// One of them. It ends when this is dropped, also by a source that never calls back.
struct RemoteWait(Arc<RemoteWaits>);

impl RemoteWait {
    fn begin(waits: &Arc<RemoteWaits>) -> Self {
        let mut count = waits.count();
        *count += 1;
        if *count == 1 {
            waits.wait.begin();
        }
        Self(Arc::clone(waits))
    }
}

impl Drop for RemoteWait {
    fn drop(&mut self) {
        let mut count = self.0.count();
        *count -= 1;
        match *count {
            0 => self.0.wait.end(),
            // While pages come, the others do not count as waited for.
            _ => self.0.wait.begin(),
        }
    }
}

impl RemoteWaits {
    fn count(&self) -> MutexGuard<'_, usize> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PageReader for AwaitedReader {
    fn load(&mut self, source_offset: u64) -> Result<Load<'_>, SourceError> {
        self.wait.begin();
        let loaded = self.reader.load(source_offset);
        self.wait.end();
        loaded
    }

    fn would_wait(&mut self, source_offset: u64) -> bool {
        self.reader.would_wait(source_offset)
    }

    fn when_ready(&mut self, source_offset: u64, ready: WhenReady) {
        let wait = RemoteWait::begin(&self.remote);
        let ended = move |result: Result<(), SourceError>| {
            drop(wait);
            ready(result);
        };
        self.reader.when_ready(source_offset, Box::new(ended));
    }
}
