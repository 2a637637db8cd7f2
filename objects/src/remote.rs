//! An object as storage: it is read through the cache, which fetches missing blocks.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use object_store::GetRange;
use snapfmt::layout::HEADER_BYTES;
use snapfmt::{Permanent, ReadAt};

use crate::ahead::Ahead;
use crate::cache::{BLOCK_BYTES, Cache, Claim, Entry};
use crate::error::ObjectError;
use crate::fetch::{Identity, Source};
use crate::flight::{Blocks, Flight};
use crate::name;
use crate::runtime;
use crate::url::ObjectUrl;

/// Blocks of one request: 8 MiB.
const RUN_BLOCKS: u64 = (8 << 20) / BLOCK_BYTES;
/// The limit of concurrent requests for announced blocks.
const AHEAD_REQUESTS: usize = 4;
/// While all of them are for few blocks, there may be more requests: otherwise scattered chunks take a round trip for
/// each four of them.
const FEW_BLOCKS: u64 = 16;
const MOST_AHEAD_REQUESTS: usize = 16;
/// How far ahead of their reads readers announce: twice what a link of 5 Gbit/s sends in 20 ms.
const ANNOUNCED_BYTES: u64 = 32 << 20;
/// Announced runs that wait for their request. More are dropped, because they are only hints.
const MOST_QUEUED: usize = 1024;
/// How long another process may take for a block, before this one fetches it too.
pub(crate) const OTHERS: Duration = Duration::from_secs(10);
/// How often an object may be replaced by itself during one request: a server may give another ETag in each answer.
const MOST_COPIES: u32 = 3;
/// The time between two looks at the cache for blocks that another process fetches.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// An object that was opened: see [`open`](crate::open).
///
/// Clones share everything. All methods may be called from several threads.
#[derive(Clone)]
pub struct RemoteObject(Arc<Inner>);

pub(crate) struct Inner {
    source: Source,
    identity: Identity,
    /// The version that requests are for. It differs from the opened one only after [`Inner::is_same_object`].
    version: Mutex<Identity>,
    cache: Arc<Cache>,
    entry: Entry,
    table: Mutex<Table>,
    ahead: Mutex<Ahead>,
    fetched_bytes: AtomicU64,
}

/// Requests under way, and announced ones.
#[derive(Default)]
struct Table {
    flights: HashMap<u64, Arc<Flight>>,
    queue: VecDeque<Range<u64>>,
    ahead_requests: usize,
    /// The blocks of those requests.
    ahead_blocks: u64,
}

impl Table {
    fn has_room_ahead(&self) -> bool {
        let most = match self.ahead_blocks < FEW_BLOCKS {
            true => MOST_AHEAD_REQUESTS,
            false => AHEAD_REQUESTS,
        };
        self.ahead_requests < most
    }
}

impl fmt::Debug for RemoteObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RemoteObject").field(&self.0.source.url.to_string()).finish()
    }
}

impl RemoteObject {
    pub(crate) fn new(
        source: Source,
        identity: Identity,
        cache: Arc<Cache>,
    ) -> Result<Self, ObjectError> {
        let entry = cache.entry(&source.url, &identity)?;
        Ok(Self(Arc::new(Inner {
            source,
            version: Mutex::new(identity.clone()),
            identity,
            cache,
            entry,
            table: Mutex::default(),
            ahead: Mutex::default(),
            fetched_bytes: AtomicU64::new(0),
        })))
    }

    /// Its address.
    #[must_use]
    pub fn url(&self) -> &ObjectUrl {
        &self.0.source.url
    }

    /// Bytes that this process has fetched since it opened the object.
    #[must_use]
    pub fn fetched_bytes(&self) -> u64 {
        self.0.fetched_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn identity(&self) -> &Identity {
        &self.0.identity
    }

    pub(crate) fn source(&self) -> &Source {
        &self.0.source
    }

    /// Whether the blocks at both ends are cached. They are read to open the object.
    pub(crate) fn has_ends(&self) -> bool {
        let entry = &self.0.entry;
        entry.has(0) && entry.has(entry.blocks() - 1)
    }

    /// Stores the bytes of the first answers. Incomplete blocks at the ends are left out.
    pub(crate) fn fill(&self, offset: u64, bytes: &[u8]) {
        let inner = &self.0;
        inner.fetched_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let end = offset + bytes.len() as u64;
        for block in offset.div_ceil(BLOCK_BYTES)..inner.entry.blocks() {
            let of_block = inner.entry.bytes_of(block..block + 1);
            if of_block.end > end {
                break;
            }
            let (from, to) = (of_block.start - offset, of_block.end - offset);
            if !inner.entry.has(block) {
                inner.store(block, &bytes[from as usize..to as usize]);
            }
        }
    }
}

impl ReadAt for RemoteObject {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let inner = &self.0;
        let end = offset.checked_add(buf.len() as u64);
        let Some(end) = end.filter(|end| *end <= inner.identity.len_bytes) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let blocks = offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES);
        if buf.is_empty() {
            return Ok(());
        }
        self.read_ahead(blocks.clone());
        if inner.entry.read(offset, buf).map_err(cache_broken)? {
            return Ok(());
        }
        // All requests are sent first, so that those of a long read run concurrently.
        for block in blocks.clone() {
            self.request(block, blocks.end)?;
        }
        for block in blocks.clone() {
            let of_block = inner.entry.bytes_of(block..block + 1);
            let (from, to) = (of_block.start.max(offset), of_block.end.min(end));
            let part = &mut buf[(from - offset) as usize..(to - offset) as usize];
            self.read_block(block, blocks.end, from, part)?;
        }
        Ok(())
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.0.identity.len_bytes)
    }

    fn expect(&self, bytes: Range<u64>) {
        let end = bytes.end.min(self.0.identity.len_bytes);
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
        (offset < self.0.identity.len_bytes).then(|| self.0.entry.has(offset / BLOCK_BYTES))
    }

    fn refetch(&self, bytes: Range<u64>) -> bool {
        let end = bytes.end.min(self.0.identity.len_bytes);
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
        self.0.entry.drop_blocks(blocks).is_ok()
    }
}

impl RemoteObject {
    fn read_block(&self, block: u64, until: u64, from: u64, part: &mut [u8]) -> io::Result<()> {
        let inner = &self.0;
        loop {
            if inner.entry.read(from, part).map_err(cache_broken)? {
                return Ok(());
            }
            if let Some(flight) = self.request(block, until)? {
                let bytes = flight.wait(block).map_err(|error| error.to_io())?;
                let at = (from - block * BLOCK_BYTES) as usize;
                let bytes = bytes.get(at..at + part.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
                part.copy_from_slice(bytes);
                return Ok(());
            }
        }
    }

    /// The request for a block. If there is none, one is sent, also for further blocks up to `until`. `None`: the block
    /// has arrived meanwhile.
    fn request(&self, block: u64, until: u64) -> io::Result<Option<Arc<Flight>>> {
        let mut table = self.0.table();
        if let Some(flight) = table.flights.get(&block) {
            return Ok(Some(Arc::clone(flight)));
        }
        // A request leaves the table when its blocks are stored.
        if self.0.entry.has(block) {
            return Ok(None);
        }
        let run = self.run(&table, block..until);
        self.start(&mut table, run, false).map(Some)
    }

    /// The longest run from the first block on that one request can fetch.
    fn run(&self, table: &Table, blocks: Range<u64>) -> Range<u64> {
        let most = blocks.end.min(blocks.start + RUN_BLOCKS).max(blocks.start + 1);
        let taken = |block: &u64| table.flights.contains_key(block) || self.0.entry.has(*block);
        let end = (blocks.start + 1..most).find(taken).unwrap_or(most);
        blocks.start..end
    }

    fn start(&self, table: &mut Table, run: Range<u64>, is_ahead: bool) -> io::Result<Arc<Flight>> {
        let flight = Arc::new(Flight::new(run.clone()));
        // Dropping a landing here would deadlock on the table.
        runtime::start()?;
        let (object, error) = (self.clone(), None);
        let mut landing = Landing { object, flight: Arc::clone(&flight), is_ahead, error };
        runtime::spawn(async move {
            if let Err(error) = landing.object.0.fly(&landing.flight).await {
                landing.fail(error);
            }
        })?;
        if is_ahead {
            table.ahead_requests += 1;
            table.ahead_blocks += run.end - run.start;
        }
        table.flights.extend(run.map(|block| (block, Arc::clone(&flight))));
        Ok(flight)
    }

    fn read_ahead(&self, blocks: Range<u64>) {
        let mut ahead = self.0.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = ahead.read(blocks, self.0.entry.blocks());
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

    /// Sends requests for announced blocks.
    fn pump(&self, table: &mut Table) {
        while table.has_room_ahead() {
            let Some(blocks) = table.queue.pop_front() else { return };
            let missing =
                |block: &u64| !table.flights.contains_key(block) && !self.0.entry.has(*block);
            let Some(first) = blocks.clone().find(missing) else { continue };
            let run = self.run(table, first..blocks.end);
            if run.end < blocks.end {
                table.queue.push_front(run.end..blocks.end);
            }
            if self.start(table, run, true).is_err() {
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
            let blocks = self.flight.blocks();
            table.ahead_requests -= 1;
            table.ahead_blocks -= blocks.end - blocks.start;
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

    /// Fetches all blocks of a request, or reads them from the cache if another process fetches them.
    async fn fly(&self, flight: &Flight) -> Result<(), ObjectError> {
        let end = flight.blocks().end;
        let claim = self.claim(flight).await;
        let mut copies = 0;
        while flight.next() < end {
            if let Some(bytes) = self.cached(flight.next()) {
                flight.push(bytes);
                continue;
            }
            let first = flight.next();
            let last = (first + 1..end).find(|block| self.entry.has(*block)).unwrap_or(end);
            let range = self.entry.bytes_of(first..last);
            let mut blocks = Blocks::new(range.end - range.start);
            let mut at = first;
            let mut on_bytes = |bytes: Bytes| {
                self.fetched_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                blocks.push(bytes, &mut |block| {
                    flight.push(block.clone());
                    // The disk may be slow. Other requests continue meanwhile.
                    tokio::task::block_in_place(|| self.store(at, &block));
                    at += 1;
                });
            };
            let version = self.version().clone();
            match self.source.range(&version, range, &mut on_bytes).await {
                Ok(()) => {}
                Err(ObjectError::Replaced { .. })
                    if copies < MOST_COPIES && self.is_same_object(&version).await? =>
                {
                    copies += 1;
                }
                Err(error) => return Err(error),
            }
        }
        drop(claim);
        Ok(())
    }

    /// Whether an object with an id in its key was replaced by itself, as a copy of a bucket does. Its header, which
    /// covers the rest, is compared; further requests are for the new version.
    async fn is_same_object(&self, replaced: &Identity) -> Result<bool, ObjectError> {
        let Some(header) = self.cached(0).filter(|_| name::id_of(&self.source.url).is_some())
        else {
            return Ok(false);
        };
        let header = header.slice(..header.len().min(HEADER_BYTES));
        let (found, _, bytes) =
            self.source.first(GetRange::Bounded(0..header.len() as u64)).await?;
        let same = found.len_bytes == self.identity.len_bytes && found != *replaced;
        if !same || bytes != header {
            return Ok(false);
        }
        *self.version() = found;
        Ok(true)
    }

    fn version(&self) -> MutexGuard<'_, Identity> {
        self.version.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while another process fetches these blocks. After some time they are fetched without a claim, because the
    /// other process may be stopped.
    async fn claim(&self, flight: &Flight) -> Option<Claim<'_>> {
        let started = Instant::now();
        while started.elapsed() < OTHERS {
            match self.entry.claim(flight.next()..flight.blocks().end) {
                Ok(Some(claim)) => return Some(claim),
                Ok(None) => {}
                // A file system without locks.
                Err(_) => return None,
            }
            match self.cached(flight.next()) {
                Some(bytes) => flight.push(bytes),
                None => tokio::time::sleep(LOOK_AGAIN).await,
            }
            if flight.next() == flight.blocks().end {
                return None;
            }
        }
        None
    }

    fn cached(&self, block: u64) -> Option<Bytes> {
        let of_block = self.entry.bytes_of(block..block + 1);
        let mut bytes = vec![0; (of_block.end - of_block.start) as usize];
        let there = self.entry.has(block)
            && self.entry.read(of_block.start, &mut bytes).is_ok_and(|there| there);
        there.then(|| bytes.into())
    }

    /// A block that cannot be stored, for example on a full disk, is fetched each time it is needed.
    fn store(&self, block: u64, bytes: &[u8]) {
        if self.entry.store(block, bytes).is_ok() {
            self.cache.stored(bytes.len() as u64, &self.entry);
        }
    }
}

/// The disk of the cache cannot be read.
fn cache_broken(error: io::Error) -> io::Error {
    Permanent::error(error.kind(), format!("the cache cannot be read: {error}"))
}
