//! A page source that reports when a page takes long, because the disk may be slow.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pager::{Load, PageReader, PageSequence, PageSource, SourceError};

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
        let wait = Often::new(Wait::new(page).hears());
        Ok(Box::new(AwaitedReader { reader: self.source.reader(page_bytes)?, wait }))
    }

    fn len_bytes(&self) -> u64 {
        self.source.len_bytes()
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
}

impl PageReader for AwaitedReader {
    fn load(&mut self, source_offset: u64) -> Result<Load<'_>, SourceError> {
        self.wait.begin();
        let loaded = self.reader.load(source_offset);
        self.wait.end();
        loaded
    }
}
