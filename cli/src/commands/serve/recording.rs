//! A working set that is recorded while guests are served.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail};
use pager::PageSource;
use snapfmt::Snapshot;

use crate::interrupt::Interrupt;
use crate::recorded_source::{Record, RecordedSource};
use crate::session::Session;
use crate::stderr;
use crate::working_set_file::Output;

/// The record of all guests, and the file to write.
pub(super) struct Recording<'a> {
    output: Output<'a>,
    record: Arc<Record>,
}

impl<'a> Recording<'a> {
    pub(super) fn new(out: &'a Path, snapshot: &Snapshot) -> Result<Recording<'a>> {
        let output = Output { path: out, replace: false };
        output.check(snapshot)?;
        Ok(Recording { output, record: Arc::default() })
    }

    /// The source, recorded.
    pub(super) fn of(&self, source: Arc<dyn PageSource>) -> Arc<dyn PageSource> {
        Arc::new(RecordedSource::new(source, Arc::clone(&self.record)))
    }

    /// Writes the copy of the snapshot. The server has ended, by Ctrl-C as usual: another one ends the writing, too.
    pub(super) fn write(self, snapshot: &Snapshot, session: &Session) -> Result<()> {
        let set = self.record.join();
        let path = self.output.path.display();
        if set.is_empty() {
            bail!("{path} is not written: no guest has touched a page");
        }
        let (guests, pages) = (set.restores(), set.len());
        let interrupt = Interrupt::default();
        let writing = Session { quiet: session.quiet, started: session.started, interrupt };
        self.output.write(snapshot, set, &writing)?;
        if !session.quiet {
            let line = format!("{path}: a working set of {pages} pages, of {guests} guests\n");
            stderr::print(&line);
        }
        Ok(())
    }
}
