//! A snapshot file with different, compressible pages. Each begins with its stamp.
#![allow(dead_code, missing_docs, unreachable_pub)]

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use snapfmt::{Codec, Contents, MemoryRegion, Snapshot, WriteOptions};

use super::support::{PAGE, stamp};

/// The pages. Two of eight words are random, the others are small numbers.
pub fn content(pages: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut word = |page: usize, at: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        match at {
            0 => stamp(page),
            at if at % 8 < 2 => state,
            _ => state >> 58,
        }
    };
    let words = (0..pages).flat_map(|page| (0..PAGE / 8).map(move |at| (page, at)));
    words.flat_map(|(page, at)| word(page, at).to_ne_bytes()).collect()
}

/// A snapshot of `content` in chunks of 64 KiB.
pub fn stored(folder: &Path, content: &[u8], codec: Codec) -> Arc<Snapshot> {
    let path = folder.join(format!("{codec}.snap"));
    let len = content.len() as u64;
    let regions = [MemoryRegion { gpa: 0, len, source_offset: 0 }];
    let data = [0..len];
    let contents = Contents::new(&regions, &content, &data);
    let options = WriteOptions::default().codec(codec).chunk_pages(16);
    snapfmt::write_snapshot(&path, contents, &options, &|_| ControlFlow::Continue(()))
        .expect("it is written");
    Arc::new(Snapshot::open(&path).expect("it opens"))
}
