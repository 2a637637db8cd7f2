//! For a thread that must not wait for slow storage: it asks whether a page can be loaded without waiting, and is called
//! back when it can.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::entry::{ChunkExtent, PageEntry, PageIndex};
use crate::error::{Part, ReadError};
use crate::read_at::ReadAt;
use crate::section::SectionKind;
use crate::snapshot::Snapshot;

/// Called when a page can be loaded, or looked up, without waiting: see [`Snapshot::when_readable`].
pub type WhenReadable = Box<dyn FnOnce(Result<(), ReadError>) + Send>;

impl<R: ReadAt> Snapshot<R> {
    /// Whether a part of it is on another host. Otherwise no read waits for one, and the following need not be called.
    pub fn is_remote(&self) -> bool {
        self.layers.iter().any(|layer| layer.storage.is_remote())
    }

    /// Whether [`Snapshot::entry`] would wait for another host: see [`ReadAt::would_wait`]. Does not wait itself.
    pub fn entry_would_wait(&self, page: PageIndex) -> bool {
        self.awaited_leaves(page).next().is_some()
    }

    /// Whether [`Snapshot::fetch_chunk`] would wait for another host: see [`ReadAt::would_wait`]. Does not wait itself.
    pub fn chunk_would_wait(&self, extent: ChunkExtent) -> bool {
        let layer = self.layers.get(usize::from(extent.layer()));
        layer.is_some_and(|layer| layer.storage.would_wait(extent.offset()..extent.end()))
    }

    /// Starts to read what the look-up of a page would wait for or, if the look-up would not wait, what its chunk would
    /// wait for. Returns without waiting. `readable` is called when all of that can be read without waiting, or with
    /// the first error. It may be called on any thread, also before this returns, and must not wait.
    pub fn when_readable(&self, page: PageIndex, readable: WhenReadable) {
        let mut awaited: Vec<_> = self.awaited_leaves(page).collect();
        if awaited.is_empty()
            && let Ok(PageEntry::Data { chunk, .. }) = self.entry(page)
            && self.chunk_would_wait(chunk)
        {
            awaited.push((chunk.layer().into(), SectionKind::CHUNKS, chunk.offset()..chunk.end()));
        }
        let all = Arc::new(All::of(awaited.len(), readable));
        for (number, kind, bytes) in awaited {
            let layer = &self.layers[number];
            let (all, id, path) = (Arc::clone(&all), layer.header.id, layer.path.clone());
            let (part, offset, len) = (Part::Section(kind), bytes.start, bytes.end - bytes.start);
            let here = move |result: std::io::Result<()>| {
                all.one(result.map_err(|source| {
                    let source = ReadError::io(part, offset, len, source);
                    match number {
                        0 => source,
                        _ => {
                            let (layer, source) = (number as u16, Box::new(source));
                            ReadError::InParent { layer, id, path, source }
                        }
                    }
                }));
            };
            layer.storage.when_here(bytes, Box::new(here));
        }
    }

    /// The leaves, one of each layer, that the look-up of a page would wait for.
    fn awaited_leaves(
        &self,
        page: PageIndex,
    ) -> impl Iterator<Item = (usize, SectionKind, Range<u64>)> {
        let leaf = self.table.unread_leaf(page);
        leaf.into_iter().flat_map(move |leaf| {
            self.layers.iter().enumerate().filter_map(move |(number, layer)| {
                let bytes = layer.index.leaf_bytes(leaf)?;
                let waits = layer.storage.would_wait(bytes.clone());
                waits.then_some((number, SectionKind::INDEX_LEAVES, bytes))
            })
        })
    }
}

/// Several reads under way.
struct All(Mutex<(usize, Option<WhenReadable>)>);

impl All {
    fn of(reads: usize, readable: WhenReadable) -> All {
        let all = All(Mutex::new((reads + 1, Some(readable))));
        // This calls `readable` if the number of reads is 0.
        all.one(Ok(()));
        all
    }

    /// One read has ended.
    fn one(&self, result: Result<(), ReadError>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 -= 1;
        let readable = match state.0 == 0 || result.is_err() {
            true => state.1.take(),
            false => None,
        };
        drop(state);
        if let Some(readable) = readable {
            readable(result);
        }
    }
}
