//! Pages at the front of the file, in the order in which a restored guest accesses them. So one sequential read loads
//! what the guest needs.

use std::collections::HashSet;

use crate::codec::Codec;
use crate::entry::PageIndex;
use crate::error::WriteError;
use crate::layout::{MAX_CHUNK_PAGES, PAGE_BYTES};
use crate::pack::LeafTasks;
use crate::working_set::{Phase, WorkingSet};

/// The working set of a file that is written, and the place of its pages.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct HotPages<'a> {
    /// The set, which becomes a section of the file.
    pub set: &'a WorkingSet,
    /// The codec of the chunks at the front, for the set's pages. With `None`, no page is moved to the front.
    pub front: Option<Codec>,
}

impl<'a> HotPages<'a> {
    /// A working set whose pages are not moved to the front.
    #[must_use]
    pub fn new(set: &'a WorkingSet) -> Self {
        Self { set, front: None }
    }

    /// Sets [`HotPages::front`].
    #[must_use]
    pub fn front(mut self, front: impl Into<Option<Codec>>) -> Self {
        self.front = front.into();
        self
    }
}

/// The pages at the front, in their order.
pub(crate) struct Front {
    pub(crate) pages: Vec<PageIndex>,
    phases: Vec<Phase>,
    pub(crate) codec: Codec,
}

/// The approximate number of pages in one task: enough work for a thread at a time.
const TASK_PAGES: usize = 256;

/// Which pages of the set may hold data, each once.
pub(crate) fn front(
    hot: Option<&HotPages<'_>>,
    tasks: &LeafTasks,
    memory_bytes: u64,
) -> Result<Front, WriteError> {
    let mut front = Front { pages: Vec::new(), phases: Vec::new(), codec: Codec::Raw };
    let Some(hot) = hot else { return Ok(front) };
    hot.set.check(memory_bytes / PAGE_BYTES as u64)?;
    let Some(codec) = hot.front else { return Ok(front) };
    front.codec = codec;
    let mut seen = HashSet::new();
    for (page, phase) in hot.set.pages() {
        if tasks.covers(page) && seen.insert(page) {
            front.pages.push(page);
            front.phases.push(phase);
        }
    }
    Ok(front)
}

impl Front {
    /// The pages cut into tasks. No chunk has pages of two phases; within a chunk pages ascend, so that
    /// neighbours in memory are installed together.
    pub(crate) fn tasks(&self, chunk_pages: usize) -> Vec<Vec<PageIndex>> {
        let task_pages = TASK_PAGES.next_multiple_of(chunk_pages).min(MAX_CHUNK_PAGES);
        let mut tasks = Vec::new();
        let mut at = 0;
        for of_phase in self.phases.chunk_by(|a, b| a == b) {
            let pages = &self.pages[at..at + of_phase.len()];
            at += of_phase.len();
            tasks.extend(pages.chunks(task_pages).map(|task| {
                let mut task = task.to_vec();
                task.chunks_mut(chunk_pages).for_each(<[_]>::sort_unstable);
                task
            }));
        }
        tasks
    }
}
