//! Releasing the page cache of a file that is read once as a whole, if the file was not cached before.
//!
//! When all of a guest's memory is loaded, it is decoded in memory. If the file stayed in the page cache too, it would
//! evict pages that other programs use. But a file that is in use, or that is restored repeatedly, should stay
//! cached. The page cache itself shows which case it is:
//!
//! - A part of the file is cached: another process reads it, or it was read recently. Nothing is released.
//! - No part is cached: the chunks are released after they are read. The index stays cached; it is less than a
//!   hundredth of the file. If the file is read again while its index is cached, nothing is released from then on.

use std::ops::Range;

use crate::layer::Layer;
use crate::layout::PAGE_BYTES;
use crate::read_at::ReadAt;

/// Bytes of chunks that are released together while others are read. The chunks of smaller files are released at the
/// end, when the caller requests it.
const STEP_BYTES: u64 = 256 << 20;
/// Files with less than this in their chunks stay: opening them reads ahead, and there is little to gain.
const SMALL_BYTES: u64 = 4 << 20;
/// The number of places at which the cache is probed for chunks.
const PROBES: u64 = 8;

/// The files of a snapshot that is read once as a whole.
pub(crate) struct Behind<'a, R> {
    layers: Vec<Trail<'a, R>>,
    step_bytes: u64,
}

/// A file of which nothing was cached.
struct Trail<'a, R> {
    number: u16,
    layer: &'a Layer<R>,
    /// Chunks that were read and are not released yet. Some before them may be read again: equal pages, and pages of
    /// the working set.
    read: Range<u64>,
}

impl<'a, R: ReadAt> Behind<'a, R> {
    /// Checks which of the files are cached. Call this before any of their leaves and chunks are read.
    pub(crate) fn new(layers: &'a [Layer<R>]) -> Self {
        let cold = (0..).zip(layers).filter(|(_, layer)| nothing_cached(layer));
        let trail = |(number, layer): (u16, &'a Layer<R>)| {
            let start = layer.index.chunks().start;
            Trail { number, layer, read: start..start }
        };
        Self { layers: cold.map(trail).collect(), step_bytes: STEP_BYTES }
    }

    /// All up to this offset of a layer was read.
    pub(crate) fn reached(&mut self, layer: u16, offset: u64) {
        let of_layer = self.layers.iter_mut().find(|trail| trail.number == layer);
        let Some(trail) = of_layer else { return };
        trail.read.end = trail.read.end.max(offset);
        if trail.read.end - trail.read.start >= self.step_bytes {
            trail.layer.storage.release(trail.read.clone());
            trail.read.start = trail.read.end;
        }
    }

    /// The layers whose chunks can be released, because nothing more is read.
    pub(crate) fn finish(self) -> Vec<u16> {
        self.layers.into_iter().map(|trail| trail.number).collect()
    }
}

/// Whether no part of the file is cached, as far as a sample of offsets shows. An offset that is not cached is read for the
/// answer, and may be there before the answer is given. So a place counts as cached if its page and the next one are.
fn nothing_cached<R: ReadAt>(layer: &Layer<R>) -> bool {
    let chunks = layer.index.chunks();
    let len = chunks.end - chunks.start;
    if len < SMALL_BYTES {
        return false;
    }
    let places = (0..PROBES).map(|probe| chunks.start + (2 * probe + 1) * (len / (2 * PROBES)));
    let mut all = layer.index.first_leaf_offset().into_iter().chain(places);
    // The handle has no read-ahead. With read-ahead, the answer for one place could bring in the next places while this
    // thread waits for a CPU, and then they would look as if they had been cached before.
    let storage = layer.in_order();
    let missing = |offset| storage.is_cached(offset) == Some(false);
    all.all(|offset| missing(offset) || missing(offset + PAGE_BYTES as u64))
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::ops::ControlFlow;
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::{Codec, Contents, MemoryRegion, WriteOptions, write_snapshot};

    /// A file in memory of which only the pages with these offsets are cached.
    struct Cold {
        bytes: Vec<u8>,
        cached: Range<u64>,
        released: Mutex<Vec<Range<u64>>>,
    }

    impl ReadAt for Cold {
        fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
            self.bytes.read_exact_at(buf, offset)
        }
        fn len_bytes(&self) -> io::Result<u64> {
            self.bytes.len_bytes()
        }
        fn is_cached(&self, offset: u64) -> Option<bool> {
            Some(self.cached.contains(&offset))
        }
        fn release(&self, bytes: Range<u64>) {
            self.released.lock().unwrap().push(bytes);
        }
    }

    /// A file with some more than 4 MiB of chunks in four leaves.
    fn layer(cached: impl Fn(&Layer<Vec<u8>>) -> Range<u64>) -> Layer<Arc<Cold>> {
        let memory = vec![7; 6 << 20];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.snap");
        let regions = [MemoryRegion { gpa: 0, len: 6 << 20, source_offset: 0 }];
        let data = [0..6 << 20];
        let contents = Contents::new(&regions, &memory, &data);
        let options = WriteOptions::default().codec(Codec::Raw).dedupe(false);
        write_snapshot(&path, contents, &options, &|_| ControlFlow::Continue(())).unwrap();
        let bytes = std::fs::read(path).unwrap();
        let cached = cached(&Layer::open(bytes.clone(), None).unwrap());
        Layer::open(Arc::new(Cold { bytes, cached, released: Mutex::default() }), None).unwrap()
    }

    #[test]
    fn each_part_of_a_file_is_released_once() {
        let layers = [layer(|_| 0..0)];
        let chunks = layers[0].index.chunks();
        let mut behind = Behind { step_bytes: 1 << 20, ..Behind::new(&layers) };
        let released = || std::mem::take(&mut *layers[0].storage.released.lock().unwrap());
        behind.reached(0, chunks.start + (1 << 20) - 64);
        // A layer without pages to release, and one that does not exist.
        behind.reached(1, chunks.end);
        assert_eq!(released(), []);
        behind.reached(0, chunks.start + (1 << 20) + 64);
        // An equal page, far back.
        behind.reached(0, chunks.start + 4096);
        behind.reached(0, chunks.end);
        let middle = chunks.start + (1 << 20) + 64;
        assert_eq!(released(), [chunks.start..middle, middle..chunks.end]);
        assert_eq!(behind.finish(), [0]);
    }

    #[test]
    fn a_partly_cached_file_is_not_released() {
        let leaf = |layer: &Layer<Vec<u8>>| layer.index.first_leaf_offset().expect("it has leaves");
        // The last of the places.
        let place = |layer: &Layer<Vec<u8>>| {
            let chunks = layer.index.chunks();
            chunks.start + 15 * ((chunks.end - chunks.start) / 16)
        };
        let pages = |start, pages| start..start + pages * PAGE_BYTES as u64;
        let layers = [
            layer(|layer| pages(leaf(layer), 2)),
            layer(|_| 0..0),
            layer(|layer| pages(place(layer), 2)),
            // A page that came for the answer.
            layer(|layer| pages(leaf(layer), 1)),
            layer(|layer| pages(place(layer), 1)),
        ];
        assert_eq!(Behind::new(&layers).finish(), [1, 3, 4]);
    }
}
