//! The memory of the guest that is forked: its process adds it to the file of the cut while children already read it.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use pager::{Load, PageReader, PageSequence, PageSource, SnapshotSource, SourceError, WhenReady};
use snapfmt::{PageEntry, PageIndex, ReadError, Snapshot, Storage};

use crate::api::client;
use crate::exit::{Interrupted, describe};
use crate::session::Session;

/// The interval of checks for an interrupt.
const LOOK: Duration = Duration::from_millis(100);

/// The file of a cut, and the guest that adds memory to it. Dropping this makes the guest add no more.
pub(super) struct GuestPages {
    pages: Arc<Pages>,
    thread: Option<JoinHandle<()>>,
}

struct Pages {
    guest: PathBuf,
    snapshot: Arc<Snapshot>,
    /// `None`: not all memory is in the file.
    result: Mutex<Option<Result<(), String>>>,
    changed: Condvar,
    /// Held by the thread that asks for a page.
    turn: Mutex<()>,
    /// Nothing needs the pages any more.
    stopping: AtomicBool,
}

impl GuestPages {
    /// Waits for the guest at the socket `guest` on a thread of its own.
    pub(super) fn start(guest: &Path, snapshot: &Arc<Snapshot>) -> Result<Self> {
        let pages = Arc::new(Pages {
            guest: guest.to_owned(),
            snapshot: Arc::clone(snapshot),
            result: Mutex::new(None),
            changed: Condvar::new(),
            turn: Mutex::new(()),
            stopping: AtomicBool::new(false),
        });
        let waiting = Arc::clone(&pages);
        let wait = move || {
            let added = waiting.ask(None).map_err(|error| describe(&error));
            *waiting.result() = Some(added);
            waiting.changed.notify_all();
        };
        let thread = thread::Builder::new().name("copy".into()).spawn(wait);
        let thread = thread.context("the thread that waits for the copy cannot be started")?;
        Ok(Self { pages, thread: Some(thread) })
    }

    /// A source that waits for each page.
    pub(super) fn as_source(&self) -> Arc<dyn PageSource> {
        let source = SnapshotSource::new(Arc::clone(&self.pages.snapshot));
        Arc::new(GuestSource { source, pages: Arc::clone(&self.pages) })
    }

    /// Waits until all memory is in the file.
    ///
    /// # Errors
    /// The guest has not added it; [`Interrupted`].
    pub(super) fn wait(&mut self, session: &Session) -> Result<()> {
        let mut result = self.pages.result();
        loop {
            match &*result {
                Some(Ok(())) => break,
                Some(Err(reason)) => bail!("cannot copy the guest's memory: {reason}"),
                None if session.interrupt.requested() => return Err(Interrupted.into()),
                None => {}
            }
            let waited = self.pages.changed.wait_timeout(result, LOOK);
            result = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(result);
        if let Some(thread) = self.thread.take() {
            // The result was the last that it had to do. Nothing in it panics.
            let _ = thread.join();
        }
        Ok(())
    }
}

impl Drop for GuestPages {
    fn drop(&mut self) {
        if self.pages.result().is_none() {
            // So that it takes the next request. If it does not answer, it may have ended.
            let _ = client::cancel_pages(&self.pages.guest, &self.pages.id());
        }
        self.pages.stopping.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // Nothing in it panics.
            let _ = thread.join();
        }
    }
}

impl Pages {
    fn result(&self) -> MutexGuard<'_, Option<Result<(), String>>> {
        self.result.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a page, or for all.
    fn ask(&self, page: Option<PageIndex>) -> Result<()> {
        let waiting = || match self.stopping.load(Ordering::SeqCst) {
            true => Err(anyhow!("the fork ends")),
            false => Ok(()),
        };
        client::wait_for_pages(&self.guest, &self.id(), page.map(|page| page.0), &waiting)
    }

    fn id(&self) -> String {
        self.snapshot.header().id.to_string()
    }

    /// Returns when the page is in the file, or in a parent.
    fn wait_for(&self, source_offset: u64) -> Result<(), SourceError> {
        if matches!(*self.result(), Some(Ok(()))) {
            return Ok(());
        }
        let Some(page) = PageIndex::containing(source_offset) else { return Ok(()) };
        let failed = |error: ReadError| {
            SourceError::permanent(format!("page {} of the cut", page.0)).caused_by(error)
        };
        let chunk = match self.snapshot.entry(page).map_err(failed)? {
            PageEntry::Data { chunk, .. } if chunk.layer() == 0 => chunk,
            _ => return Ok(()),
        };
        let is_there = || self.snapshot.has_chunk(chunk).map_err(failed);
        if is_there()? {
            return Ok(());
        }
        {
            // The guest answers few clients at a time, and many children need the same pages.
            let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
            if !is_there()? {
                // If this fails, the page comes in its turn, or the copy fails.
                let _ = self.ask(Some(page));
            }
        }
        match is_there()? {
            true => Ok(()),
            false => self.wait_for_all(),
        }
    }

    /// Returns when all pages are in the file.
    fn wait_for_all(&self) -> Result<(), SourceError> {
        let result = self.changed.wait_while(self.result(), |result| result.is_none());
        match &*result.unwrap_or_else(PoisonError::into_inner) {
            Some(Err(reason)) => {
                let what = "the memory of the guest that is forked cannot be copied";
                Err(SourceError::permanent(what).caused_by(reason.clone()))
            }
            _ => Ok(()),
        }
    }
}

/// The pages of the cut.
struct GuestSource {
    source: SnapshotSource<Storage>,
    pages: Arc<Pages>,
}

impl PageSource for GuestSource {
    fn reader(&self, page_bytes: usize) -> Result<Box<dyn PageReader>, SourceError> {
        let reader = self.source.reader(page_bytes)?;
        Ok(Box::new(GuestReader { reader, pages: Arc::clone(&self.pages) }))
    }

    fn len_bytes(&self) -> u64 {
        self.source.len_bytes()
    }

    /// It reads ahead in the file, and no thread waits for these pages: so the file must be complete.
    fn sequence(
        &self,
        page_bytes: usize,
        pages: Vec<Range<u64>>,
    ) -> Result<Box<dyn PageSequence>, SourceError> {
        self.pages.wait_for_all()?;
        self.source.sequence(page_bytes, pages)
    }
}

struct GuestReader {
    reader: Box<dyn PageReader>,
    pages: Arc<Pages>,
}

impl PageReader for GuestReader {
    fn load(&mut self, source_offset: u64) -> Result<Load<'_>, SourceError> {
        self.pages.wait_for(source_offset)?;
        self.reader.load(source_offset)
    }

    fn would_wait(&mut self, source_offset: u64) -> bool {
        self.reader.would_wait(source_offset)
    }

    fn when_ready(&mut self, source_offset: u64, ready: WhenReady) {
        self.reader.when_ready(source_offset, ready);
    }
}
