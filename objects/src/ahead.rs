//! Reads ahead of sequential readers: an eager restore, a verifier, a loader in the background.

use std::collections::VecDeque;
use std::ops::Range;

use crate::cache::BLOCK_BYTES;

/// The limit of streams that are followed at the same time: threads, and a guest's faults in between.
const STREAMS: usize = 4;
/// A stream must have this length before blocks are read ahead of it, because a guest's faults are often close
/// together.
const PROVEN_BLOCKS: u64 = (1 << 20) / BLOCK_BYTES;
/// The first window, and the largest one: twice what a link of 10 Gbit/s sends in 20 ms.
const FIRST_BLOCKS: u64 = (2 << 20) / BLOCK_BYTES;
const MOST_BLOCKS: u64 = (32 << 20) / BLOCK_BYTES;
/// The largest window of a reader that announces what it will read. Without one, a loader would wait between the parts
/// of memory that it announces; a larger one fetches bytes behind the end of a working set.
const ANNOUNCED_BLOCKS: u64 = (4 << 20) / BLOCK_BYTES;
/// The limit of announced runs that are remembered.
const ANNOUNCED_RUNS: usize = 256;
/// The largest distance of a thread from the front of a stream that it shares.
const NEAR_BLOCKS: u64 = (4 << 20) / BLOCK_BYTES;

/// Detects sequential readers.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    /// The most recently used one is first.
    streams: Vec<Stream>,
    /// Blocks that readers have announced, the last ones at the end.
    expected: VecDeque<Range<u64>>,
}

#[derive(Clone, Debug)]
struct Stream {
    start: u64,
    /// The block after the last one that was read.
    front: u64,
    /// The end of the announced blocks.
    announced: u64,
    window: u64,
}

impl Ahead {
    /// Notes that a reader has announced these blocks.
    pub(crate) fn expect(&mut self, blocks: Range<u64>) {
        match self.expected.back_mut() {
            Some(last) if (last.start..=last.end).contains(&blocks.start) => {
                last.end = last.end.max(blocks.end);
            }
            _ => {
                if self.expected.len() == ANNOUNCED_RUNS {
                    self.expected.pop_front();
                }
                self.expected.push_back(blocks);
            }
        }
    }

    /// Notes a read of these blocks, of an object of `of` blocks. Returns the blocks to fetch ahead.
    pub(crate) fn read(&mut self, blocks: Range<u64>, of: u64) -> Option<Range<u64>> {
        let near = |stream: &Stream| {
            blocks.start + NEAR_BLOCKS >= stream.front
                && blocks.start <= stream.front
                && blocks.start >= stream.start
        };
        let Some(at) = self.streams.iter().position(near) else {
            self.streams.truncate(STREAMS - 1);
            let (start, front) = (blocks.start, blocks.end);
            self.streams.insert(0, Stream { start, front, announced: 0, window: FIRST_BLOCKS });
            return None;
        };
        let mut stream = self.streams.remove(at);
        let is_expected = self.expected.iter().any(|run| run.contains(&blocks.start));
        let most = if is_expected { ANNOUNCED_BLOCKS } else { MOST_BLOCKS };
        let wanted = stream.advance(blocks.end, of, most);
        self.streams.insert(0, stream);
        wanted
    }
}

impl Stream {
    fn advance(&mut self, end: u64, of: u64, most: u64) -> Option<Range<u64>> {
        if end <= self.front {
            return None;
        }
        self.front = end;
        if self.front - self.start < PROVEN_BLOCKS {
            return None;
        }
        let window = self.window.min(most);
        // One half of the window is fetched while the other half is being read.
        if self.announced.saturating_sub(self.front) > window / 2 {
            return None;
        }
        let start = self.announced.max(self.front);
        let wanted = start..(self.front + window).min(of);
        self.announced = self.announced.max(wanted.end);
        self.window = (window * 2).min(most);
        (!wanted.is_empty()).then_some(wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_fetched_ahead_each_block_once() {
        let mut ahead = Ahead::default();
        let (mut announced, mut most) = (PROVEN_BLOCKS, 0);
        for block in 0..1000 {
            if let Some(wanted) = ahead.read(block..block + 1, 1000) {
                assert!(wanted.start >= announced, "{wanted:?} was announced");
                announced = wanted.end;
                most = most.max(wanted.end - block);
            }
            assert!(block < PROVEN_BLOCKS || announced > block, "{block} was not announced");
        }
        assert_eq!((announced, most), (1000, MOST_BLOCKS + 1));
    }

    #[test]
    fn two_streams_and_faults_in_between_do_not_disturb_each_other() {
        let mut ahead = Ahead::default();
        let (mut first, mut second) = (0, 0);
        for step in 0..100 {
            first += ahead.read(step..step + 1, 100_000).map_or(0, |w| w.end - w.start);
            let at = 50_000 + step;
            second += ahead.read(at..at + 1, 100_000).map_or(0, |w| w.end - w.start);
            let fault = 10_000 + (step * 7919) % 30_000;
            assert_eq!(ahead.read(fault..fault + 1, 100_000), None);
        }
        assert!(first >= 100 && second >= 100, "{first} {second}");
    }

    #[test]
    fn little_is_fetched_behind_the_end_of_what_was_announced() {
        let (mut ahead, mut last) = (Ahead::default(), 0);
        ahead.expect(0..1000);
        for block in 0..1000 {
            last = ahead.read(block..block + 1, 10_000).map_or(last, |wanted| wanted.end);
        }
        assert!((1000..=1000 + ANNOUNCED_BLOCKS).contains(&last), "{last}");
    }

    #[test]
    fn scattered_reads_fetch_nothing_ahead() {
        let mut ahead = Ahead::default();
        for step in 0..200u64 {
            let at = (step * 7919) % 100_000;
            assert_eq!(ahead.read(at..at + 1, 100_000), None);
        }
    }
}
