//! An object as storage: it is read through the cache, which fetches missing blocks.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::ops::Range;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures_util::future::{Either, select, try_join_all};
use snapfmt::layout::HEADER_BYTES;
use snapfmt::{Permanent, ReadAt, WhenHere};

use crate::ahead::Ahead;
use crate::cache::{BLOCK_BYTES, Cache};
use crate::error::ObjectError;
use crate::fetch::{Expected, Identity, Source};
use crate::fetcher::Fetcher;
use crate::flight::Flight;
use crate::runtime;
use crate::url::ObjectUrl;

/// Blocks of one request: 8 MiB.
const RUN_BLOCKS: u64 = (8 << 20) / BLOCK_BYTES;
/// Blocks of one request for announced blocks: 2 MiB. A reader needs them in their order, and the concurrent requests share
/// the link: with 8 MiB, the first of four took 0.25 s on a link of 1 Gbit/s, and the reader waited for it. Four of them
/// in 20 ms are 400 MB/s.
const AHEAD_RUN_BLOCKS: u64 = (2 << 20) / BLOCK_BYTES;
/// The limit of concurrent requests for announced blocks.
const AHEAD_REQUESTS: usize = 4;
/// While few of their blocks have not arrived, there may be more requests. Otherwise the link would be idle from the end of
/// a request to the first byte of the next one, and scattered chunks would take a round trip for each four of them. A
/// link of 1 Gbit/s sends 4 MiB in 34 ms.
const FEW_BLOCKS: u64 = (4 << 20) / BLOCK_BYTES;
const MOST_AHEAD_REQUESTS: usize = 16;
/// How far ahead of their reads readers announce: twice what a link of 5 Gbit/s sends in 20 ms.
const ANNOUNCED_BYTES: u64 = 32 << 20;
/// Announced runs that wait for their request. More are dropped, because they are only hints.
const MOST_QUEUED: usize = 1024;

/// An object that was opened: see [`open`](crate::open).
///
/// Clones share everything. All methods may be called from several threads.
#[derive(Clone)]
pub struct RemoteObject(Arc<Inner>);

struct Inner {
    fetcher: Fetcher,
    table: Mutex<Table>,
    ahead: Mutex<Ahead>,
}

/// Why a request is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// A thread waits for it.
    Read,
    /// A fault waits for it, in a thread that does other work meanwhile.
    Demand,
    /// It was announced.
    Ahead,
}

/// Requests under way, and announced ones.
#[derive(Default)]
struct Table {
    flights: HashMap<u64, Arc<Flight>>,
    queue: VecDeque<Range<u64>>,
    /// Those of the requests that are for announced blocks.
    ahead: Vec<Arc<Flight>>,
}

impl Table {
    fn has_room_ahead(&self) -> bool {
        let to_come: u64 = self.ahead.iter().map(|flight| flight.blocks_to_come()).sum();
        let most = match to_come < FEW_BLOCKS {
            true => MOST_AHEAD_REQUESTS,
            false => AHEAD_REQUESTS,
        };
        self.ahead.len() < most
    }
}

impl fmt::Debug for RemoteObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RemoteObject").field(&self.0.fetcher.source.url.to_string()).finish()
    }
}

impl RemoteObject {
    pub(crate) fn new(
        source: Source,
        identity: Identity,
        cache: Arc<Cache>,
    ) -> Result<Self, ObjectError> {
        Self::of(source, identity.expected(), cache)
    }

    /// An object that never changes, as the cache has it. No answer has given its version yet.
    pub(crate) fn cached(
        source: Source,
        identity: Identity,
        cache: Arc<Cache>,
    ) -> Result<Self, ObjectError> {
        Self::of(source, Expected { identity, is_answered: false }, cache)
    }

    fn of(source: Source, opened: Expected, cache: Arc<Cache>) -> Result<Self, ObjectError> {
        let fetcher = Fetcher::new(source, opened, cache)?;
        let (table, ahead) = Default::default();
        Ok(Self(Arc::new(Inner { fetcher, table, ahead })))
    }

    /// Its address.
    #[must_use]
    pub fn url(&self) -> &ObjectUrl {
        &self.0.fetcher.source.url
    }

    /// Bytes that this process has fetched since it opened the object.
    #[must_use]
    pub fn fetched_bytes(&self) -> u64 {
        self.0.fetcher.fetched_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn identity(&self) -> &Identity {
        &self.0.fetcher.identity
    }

    pub(crate) fn source(&self) -> &Source {
        &self.0.fetcher.source
    }

    /// Whether the blocks at both ends are cached. They are read to open the object.
    pub(crate) fn has_ends(&self) -> bool {
        let entry = &self.0.fetcher.entry;
        entry.has(0) && entry.has(entry.blocks() - 1)
    }

    /// Keeps the ends that a name has of it in memory: the header, and then bytes up to its end.
    pub(crate) fn hold_ends(&self, bytes: &Bytes) {
        let inner = &self.0.fetcher;
        let header = bytes.slice(..bytes.len().min(HEADER_BYTES));
        let tail = bytes.slice(header.len()..);
        inner.held.keep_header(&header);
        inner.held.keep_tail(inner.identity.len_bytes - tail.len() as u64, tail);
    }

    /// Bytes before this offset, but for the header, are read from the cache or requested, also if a name has them. So the
    /// server confirms the object before a guest gets a page of it.
    pub(crate) fn request_before(&self, offset: u64) {
        self.0.fetcher.held.drop_tail_before(offset);
    }

    /// Stores the bytes of the first answers. Incomplete blocks at the ends are left out.
    pub(crate) fn fill(&self, offset: u64, bytes: &[u8]) {
        let inner = &self.0.fetcher;
        inner.fetched_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if offset == 0 {
            inner.held.keep_header(bytes);
        }
        let end = offset + bytes.len() as u64;
        for block in offset.div_ceil(BLOCK_BYTES)..inner.entry.blocks() {
            let of_block = inner.entry.bytes_of(block..block + 1);
            if of_block.end > end {
                break;
            }
            let (from, to) = (of_block.start - offset, of_block.end - offset);
            if !inner.entry.has(block) {
                inner.store(block, &Bytes::copy_from_slice(&bytes[from as usize..to as usize]));
            }
        }
    }
}

impl ReadAt for RemoteObject {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let inner = &self.0.fetcher;
        let end = offset.checked_add(buf.len() as u64);
        let Some(end) = end.filter(|end| *end <= inner.identity.len_bytes) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let blocks = offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES);
        if buf.is_empty() || inner.held.read(offset, buf) {
            return Ok(());
        }
        self.read_ahead(blocks.clone());
        if inner.entry.read(offset, buf).map_err(cache_broken)? {
            return Ok(());
        }
        // All requests are sent first, so that those of a long read run concurrently.
        let mut flights: Vec<Arc<Flight>> = Vec::new();
        for block in blocks.clone() {
            let is_requested = flights.iter().any(|flight| flight.blocks().contains(&block));
            if !is_requested && !self.has(block) {
                flights.extend(self.request(block, blocks.end, Cause::Read)?);
            }
        }
        for block in blocks.clone() {
            let of_block = inner.entry.bytes_of(block..block + 1);
            let (from, to) = (of_block.start.max(offset), of_block.end.min(end));
            let part = &mut buf[(from - offset) as usize..(to - offset) as usize];
            // A request that has failed meanwhile is not sent again.
            let of_block = |flight: &&Arc<Flight>| flight.blocks().contains(&block);
            let sent = flights.iter().find(of_block).cloned();
            self.read_block(block, blocks.end, from, part, sent)?;
        }
        Ok(())
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.0.fetcher.identity.len_bytes)
    }

    fn expect(&self, bytes: Range<u64>) {
        let end = bytes.end.min(self.0.fetcher.identity.len_bytes);
        if bytes.start < end {
            let blocks = bytes.start / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES);
            self.0.ahead.lock().unwrap_or_else(PoisonError::into_inner).expect(blocks.clone());
            self.announce(blocks);
        }
    }

    fn ahead_bytes(&self) -> u64 {
        ANNOUNCED_BYTES
    }

    /// Whether it is in the cache on disk.
    fn is_cached(&self, offset: u64) -> Option<bool> {
        (offset < self.0.fetcher.identity.len_bytes)
            .then(|| self.0.fetcher.entry.has(offset / BLOCK_BYTES))
    }

    fn refetch(&self, bytes: Range<u64>) -> bool {
        let end = bytes.end.min(self.0.fetcher.identity.len_bytes);
        let blocks = bytes.start / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES);
        if bytes.start >= end {
            return false;
        }
        // A request for the damaged bytes may still be storing them. A new read would get them from it.
        let table = self.0.table();
        let flights: Vec<_> =
            blocks.clone().filter_map(|block| table.flights.get(&block).cloned()).collect();
        drop(table);
        flights.iter().for_each(|flight| flight.wait_for_end());
        self.0.fetcher.held.drop_damaged(&(bytes.start..end));
        self.0.fetcher.drop_blocks(blocks).is_ok()
    }

    fn is_remote(&self) -> bool {
        true
    }

    /// Whether some of them are neither in the cache nor in memory.
    fn would_wait(&self, bytes: Range<u64>) -> bool {
        let end = bytes.end.min(self.0.fetcher.identity.len_bytes);
        !self.0.fetcher.held.has(&(bytes.start..end))
            && (bytes.start / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES)).any(|block| !self.has(block))
    }

    /// If a request is late, it is sent a second time: see `docs/storage.md`.
    fn when_here(&self, bytes: Range<u64>, here: WhenHere) {
        let end = bytes.end.min(self.0.fetcher.identity.len_bytes);
        let blocks = bytes.start / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES);
        if self.0.fetcher.held.has(&(bytes.start..end)) {
            return here(Ok(()));
        }
        if let Err(error) = runtime::start() {
            return here(Err(error));
        }
        self.read_ahead(blocks.clone());
        let object = self.clone();
        // After `start` this does not fail.
        let _ = runtime::spawn(async move { here(object.arrive(blocks).await) });
    }
}

impl RemoteObject {
    /// Whether a read of a block needs no request.
    fn has(&self, block: u64) -> bool {
        let fetcher = &self.0.fetcher;
        fetcher.entry.has(block)
            || self.0.table().flights.get(&block).is_some_and(|flight| flight.next() > block)
            || fetcher.unstored.get(block).is_some()
    }

    /// Waits for blocks that faults need. The requests run concurrently.
    async fn arrive(&self, blocks: Range<u64>) -> io::Result<()> {
        let mut flights = Vec::new();
        for block in blocks.clone().filter(|block| !self.has(*block)) {
            flights.extend(self.request(block, blocks.end, Cause::Demand)?.map(|f| (block, f)));
        }
        let all = flights.iter().map(|(block, flight)| flight.demand(*block));
        try_join_all(all).await.map_err(|error| error.to_io())?;
        Ok(())
    }

    fn read_block(
        &self,
        block: u64,
        until: u64,
        from: u64,
        part: &mut [u8],
        mut sent: Option<Arc<Flight>>,
    ) -> io::Result<()> {
        let inner = &self.0.fetcher;
        let request = || self.request(block, until, Cause::Read);
        loop {
            if inner.entry.read(from, part).map_err(cache_broken)? {
                return Ok(());
            }
            let bytes = match inner.unstored.get(block) {
                Some(bytes) => bytes,
                None => match sent.take().map_or_else(request, |sent| Ok(Some(sent)))? {
                    Some(flight) => flight.wait(block).map_err(|error| error.to_io())?,
                    None => continue,
                },
            };
            let at = (from - block * BLOCK_BYTES) as usize;
            let bytes = bytes.get(at..at + part.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            part.copy_from_slice(bytes);
            return Ok(());
        }
    }

    /// The request for a block. If there is none, one is sent, also for further blocks up to `until`. `None`: the block
    /// has arrived meanwhile.
    fn request(&self, block: u64, until: u64, cause: Cause) -> io::Result<Option<Arc<Flight>>> {
        let mut table = self.0.table();
        if let Some(flight) = table.flights.get(&block) {
            return Ok(Some(Arc::clone(flight)));
        }
        // A request leaves the table when its blocks are stored.
        if self.0.fetcher.entry.has(block) {
            return Ok(None);
        }
        let run = self.run(&table, block..until);
        self.start(&mut table, run, cause).map(Some)
    }

    /// The longest run from the first block on that one request can fetch.
    fn run(&self, table: &Table, blocks: Range<u64>) -> Range<u64> {
        let most = blocks.end.min(blocks.start + RUN_BLOCKS).max(blocks.start + 1);
        let taken =
            |block: &u64| table.flights.contains_key(block) || self.0.fetcher.entry.has(*block);
        let end = (blocks.start + 1..most).find(taken).unwrap_or(most);
        blocks.start..end
    }

    fn start(&self, table: &mut Table, run: Range<u64>, cause: Cause) -> io::Result<Arc<Flight>> {
        let flight = Arc::new(Flight::new(run.clone(), cause == Cause::Demand));
        let is_ahead = cause == Cause::Ahead;
        // Dropping a landing here would deadlock on the table.
        runtime::start()?;
        let (object, error) = (self.clone(), None);
        let mut landing = Landing { object, flight: Arc::clone(&flight), is_ahead, error };
        runtime::spawn(async move {
            let result = {
                let (object, flight) = (&landing.object, &landing.flight);
                let fly = pin!(object.0.fetcher.fly(flight));
                let refill = pin!(object.refill(flight));
                match select(fly, refill).await {
                    Either::Left((result, _)) => result,
                    Either::Right(((), fly)) => fly.await,
                }
            };
            if let Err(error) = result {
                landing.fail(error);
            }
        })?;
        if is_ahead {
            table.ahead.push(Arc::clone(&flight));
        }
        table.flights.extend(run.map(|block| (block, Arc::clone(&flight))));
        Ok(flight)
    }

    fn read_ahead(&self, blocks: Range<u64>) {
        let mut ahead = self.0.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = ahead.read(blocks, self.0.fetcher.entry.blocks());
        drop(ahead);
        if let Some(wanted) = wanted {
            self.announce(wanted);
        }
    }

    fn announce(&self, blocks: Range<u64>) {
        let mut table = self.0.table();
        let is_full = table.queue.len() == MOST_QUEUED;
        match table.queue.back_mut() {
            Some(last) if (last.start..=last.end).contains(&blocks.start) => {
                last.end = last.end.max(blocks.end);
            }
            _ if is_full => return,
            _ => table.queue.push_back(blocks),
        }
        self.pump(&mut table);
    }

    /// Sends further requests for announced blocks as the blocks of this request arrive. Ends with them.
    async fn refill(&self, flight: &Flight) {
        let mut to_come = flight.blocks_to_come();
        while to_come > 0 {
            to_come = flight.fewer_to_come(to_come).await;
            self.pump(&mut self.0.table());
        }
    }

    /// Sends requests for announced blocks.
    fn pump(&self, table: &mut Table) {
        while table.has_room_ahead() {
            let Some(blocks) = table.queue.pop_front() else { return };
            let missing = |block: &u64| {
                !table.flights.contains_key(block) && !self.0.fetcher.entry.has(*block)
            };
            let Some(first) = blocks.clone().find(missing) else { continue };
            let run = self.run(table, first..blocks.end.min(first + AHEAD_RUN_BLOCKS));
            if run.end < blocks.end {
                table.queue.push_front(run.end..blocks.end);
            }
            if self.start(table, run, Cause::Ahead).is_err() {
                // They are only hints. A thread that reads these bytes gets the error.
                table.queue.clear();
            }
        }
    }
}

/// A request under way. Dropping this ends it, also in a panic, so that no thread waits for it any more.
struct Landing {
    object: RemoteObject,
    flight: Arc<Flight>,
    is_ahead: bool,
    error: Option<ObjectError>,
}

impl Landing {
    fn fail(&mut self, error: ObjectError) {
        self.error = Some(error);
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        let mut table = self.object.0.table();
        for block in self.flight.blocks() {
            table.flights.remove(&block);
        }
        if self.is_ahead {
            table.ahead.retain(|flight| !Arc::ptr_eq(flight, &self.flight));
        }
        // Only now: a read that begins after an error is a request of its own.
        if let Some(error) = self.error.take() {
            self.flight.fail(error);
        }
        self.flight.end();
        self.object.pump(&mut table);
    }
}

impl Inner {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The disk of the cache cannot be read.
fn cache_broken(error: io::Error) -> io::Error {
    Permanent::error(error.kind(), format!("the cache cannot be read: {error}"))
}
