//! A source whose pages seem to come from another host.
#![allow(missing_docs, unreachable_pub)]

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use pager::{Load, PageReader, PageSequence, PageSource, SourceError, WhenReady};

use super::support::Random;

/// Half of the questions whether a page would wait are answered with yes. Each wait ends on a thread of this source
/// after up to a millisecond. Some end with an error.
pub struct Deferred {
    source: Arc<dyn PageSource>,
    waits: Sender<WhenReady>,
    seed: u64,
}

impl Deferred {
    pub fn new(source: Arc<dyn PageSource>, seed: u64) -> Deferred {
        let (waits, begun) = channel::<WhenReady>();
        thread::spawn(move || {
            let mut random = Random::new(seed);
            let mut waiting = Vec::new();
            while let Ok(ready) = begun.recv() {
                waiting.push(ready);
                thread::sleep(Duration::from_micros(random.below(1000) as u64));
                waiting.extend(begun.try_iter());
                while !waiting.is_empty() {
                    let ready = waiting.swap_remove(random.below(waiting.len()));
                    match random.below(64) {
                        0 => ready(Err(SourceError::transient("injected"))),
                        _ => ready(Ok(())),
                    }
                }
            }
        });
        Deferred { source, waits, seed }
    }
}

impl PageSource for Deferred {
    fn reader(&self, page_bytes: usize) -> Result<Box<dyn PageReader>, SourceError> {
        let reader = self.source.reader(page_bytes)?;
        let random = Random::new(self.seed);
        Ok(Box::new(DeferredReader { reader, waits: self.waits.clone(), random }))
    }

    fn len_bytes(&self) -> u64 {
        self.source.len_bytes()
    }

    fn sequence(
        &self,
        page_bytes: usize,
        pages: Vec<Range<u64>>,
    ) -> Result<Box<dyn PageSequence>, SourceError> {
        self.source.sequence(page_bytes, pages)
    }
}

struct DeferredReader {
    reader: Box<dyn PageReader>,
    waits: Sender<WhenReady>,
    random: Random,
}

impl PageReader for DeferredReader {
    fn load(&mut self, source_offset: u64) -> Result<Load<'_>, SourceError> {
        self.reader.load(source_offset)
    }

    fn would_wait(&mut self, _source_offset: u64) -> bool {
        self.random.below(2) == 0
    }

    fn when_ready(&mut self, _source_offset: u64, ready: WhenReady) {
        match self.random.below(4) {
            // It has come since the question.
            0 => ready(Ok(())),
            _ => self.waits.send(ready).expect("the thread runs"),
        }
    }
}
