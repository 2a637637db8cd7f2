//! Fetches blocks of one object into the cache.

use std::io;
use std::ops::Range;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::{Either, pending, select};
use futures_util::try_join;
use object_store::GetRange;
use snapfmt::layout::HEADER_BYTES;
use tokio::sync::{OnceCell, Semaphore, SemaphorePermit};
use tokio::time::timeout;

use crate::cache::{Cache, Claim, Entry};
use crate::error::ObjectError;
use crate::fetch::{Expected, Identity, Source};
use crate::flight::{Blocks, Flight};
use crate::hedge::Hedges;
use crate::held::Held;
use crate::name;
use crate::retry::Retry;
use crate::unstored::Unstored;
use crate::url::ObjectUrl;

/// How long another process may take for a block, before this one fetches it too.
pub(crate) const OTHERS: Duration = Duration::from_secs(10);
/// The time between two looks at the cache for blocks that another process fetches.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// How often an object may be replaced by itself during one request: a server may give another ETag in each answer.
const MOST_COPIES: u32 = 3;
/// The limit of concurrent requests of this process. Each may need a connection, and so a descriptor. A guest can have
/// many more faults.
const MOST_REQUESTS: usize = 128;
static REQUESTS: Semaphore = Semaphore::const_new(MOST_REQUESTS);

/// One object, and where its blocks are kept.
pub(crate) struct Fetcher {
    pub(crate) source: Source,
    pub(crate) identity: Identity,
    /// The version that requests are for. It differs from the opened one after [`Fetcher::is_same_object`], and if the
    /// first answer gives another one than the cache.
    version: Mutex<Expected>,
    /// The version that the first answers have given, if the object was opened without a request.
    confirmed: OnceCell<Identity>,
    cache: Arc<Cache>,
    pub(crate) entry: Entry,
    pub(crate) unstored: Unstored,
    /// What is read without the cache.
    pub(crate) held: Held,
    hedges: Hedges,
    /// Bytes of all answers.
    pub(crate) fetched_bytes: AtomicU64,
}

impl Fetcher {
    pub(crate) fn new(
        source: Source,
        opened: Expected,
        cache: Arc<Cache>,
    ) -> Result<Self, ObjectError> {
        let identity = opened.identity.clone();
        let entry = cache.entry(&source.url, &identity)?;
        let (unstored, held, hedges, confirmed) = <(_, Held, _, _)>::default();
        let mut header = vec![0; identity.len_bytes.min(HEADER_BYTES as u64) as usize];
        if entry.read(0, &mut header).is_ok_and(|there| there) {
            held.keep_header(&header);
        }
        let fetched_bytes = AtomicU64::new(0);
        let version = Mutex::new(opened);
        Ok(Self {
            source,
            identity,
            version,
            confirmed,
            cache,
            entry,
            unstored,
            held,
            hedges,
            fetched_bytes,
        })
    }

    /// Fetches all blocks of a request, or reads them from the cache if another process fetches them.
    pub(crate) async fn fly(&self, flight: &Flight) -> Result<(), ObjectError> {
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
            let version = self.version().clone();
            match self.fetch(flight, first..last).await {
                Ok(()) if flight.next() == first => {
                    return Err(self.source.refused("an answer without a whole block"));
                }
                Ok(()) => {}
                Err(ObjectError::Replaced { .. })
                    if copies < MOST_COPIES && self.is_same_object(&version.identity).await? =>
                {
                    copies += 1;
                }
                Err(error) => return Err(error),
            }
        }
        drop(claim);
        Ok(())
    }

    /// Fetches the next blocks of a request. If nothing arrives for longer than usual while a fault waits, a second
    /// request is sent for what it waits for. The first answer is taken; after that of the second request there may be
    /// blocks left.
    async fn fetch(&self, flight: &Flight, blocks: Range<u64>) -> Result<(), ObjectError> {
        let _slot = slot(&REQUESTS, &self.source.retry, &self.source.url).await?;
        let started = Instant::now();
        let first = pin!(self.get(blocks, |block, bytes| self.landed(flight, block, bytes)));
        let second = pin!(self.second(flight));
        let result = match select(first, second).await {
            Either::Left((result, _)) => result,
            Either::Right((found, _)) => {
                found.into_iter().for_each(|(block, bytes)| self.landed(flight, block, bytes));
                Ok(())
            }
        };
        if flight.is_demand() && result.is_ok() {
            self.hedges.answered(started.elapsed());
        }
        result
    }

    /// The answer to a second request. Does not return if there is none, or it fails: then the first one decides.
    async fn second(&self, flight: &Flight) -> Vec<(u64, Bytes)> {
        let blocks = flight.late(|| self.hedges.delay()).await;
        let Some(slot) = REQUESTS.try_acquire().ok().filter(|_| self.hedges.take()) else {
            return pending().await;
        };
        let mut found = Vec::new();
        let result = self.get(blocks, |block, bytes| found.push((block, bytes))).await;
        // The first request may take longer.
        drop(slot);
        match result {
            Ok(()) => found,
            Err(_) => pending().await,
        }
    }

    /// Requests blocks, and passes each to `on_block`.
    async fn get(
        &self,
        blocks: Range<u64>,
        mut on_block: impl FnMut(u64, Bytes) + Send,
    ) -> Result<(), ObjectError> {
        let range = self.entry.bytes_of(blocks.clone());
        let (mut cut, mut at) = (Blocks::new(range.end - range.start), blocks.start);
        let mut on_bytes = |bytes: Bytes| {
            self.fetched_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            cut.push(bytes, &mut |block| {
                on_block(at, block);
                at += 1;
            });
        };
        let version = self.version().clone();
        if !version.is_answered {
            let mut parts = Vec::new();
            let mut keep = |bytes| parts.push(bytes);
            let data = self.source.range(&version, range, &mut keep);
            // A request of its own, at the same time, so that a copy of the object takes no further round trip.
            let both = try_join!(data, self.confirmed.get_or_try_init(|| self.confirm(&version)));
            if let Err(ObjectError::Replaced { .. } | ObjectError::WrongLength { .. }) = &both {
                // Otherwise it would be opened from the cache again, and fail again.
                self.cache.forget(&self.source.url, &self.identity);
            }
            let (found, confirmed) = both?;
            if found.etag != confirmed.etag {
                return Err(self.replaced(found));
            }
            parts.into_iter().for_each(on_bytes);
            return Ok(());
        }
        let found = self.source.range(&version, range, &mut on_bytes).await?;
        let mut version = self.version();
        let known = &version.identity;
        if known.version.is_none() && known.etag == found.etag {
            *version = found.expected();
        }
        Ok(())
    }

    /// The version of an object that was opened without a request, from the first answers. It has the header that was
    /// opened: its ETag may be another one, because the object may be a copy.
    async fn confirm(&self, opened: &Expected) -> Result<Identity, ObjectError> {
        let len = self.identity.len_bytes.min(HEADER_BYTES as u64);
        let mut bytes = Vec::new();
        let found = self.source.range(opened, 0..len, &mut |part| bytes.extend(part)).await?;
        let is_same = match self.held.header() {
            Some(header) => header == bytes,
            // It was damaged, and is requested again.
            None => found.etag == opened.identity.etag,
        };
        if !is_same {
            return Err(self.replaced(found));
        }
        *self.version() = found.expected();
        Ok(found)
    }

    fn replaced(&self, found: Identity) -> ObjectError {
        let (url, expected) = (self.source.url.to_string(), self.identity.etag.clone());
        ObjectError::Replaced { url, expected, found: Some(found.etag) }
    }

    /// Whether an object with an id in its key was replaced by itself, as a copy of a bucket does. Its header, which
    /// covers the rest, is compared; further requests are for the new version.
    async fn is_same_object(&self, replaced: &Identity) -> Result<bool, ObjectError> {
        let header = self.held.header();
        let Some(header) = header.filter(|_| name::id_of(&self.source.url).is_some()) else {
            return Ok(false);
        };
        let (found, _, bytes) =
            self.source.first(GetRange::Bounded(0..header.len() as u64)).await?;
        let same = found.len_bytes == self.identity.len_bytes && found != *replaced;
        if !same || bytes != header {
            return Ok(false);
        }
        *self.version() = found.expected();
        Ok(true)
    }

    fn version(&self) -> MutexGuard<'_, Expected> {
        self.version.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block of a request has arrived. It may have arrived before, by the other one of two requests.
    fn landed(&self, flight: &Flight, block: u64, bytes: Bytes) {
        if block == flight.next() {
            flight.push(bytes.clone());
            // The disk may be slow. Other requests continue meanwhile.
            tokio::task::block_in_place(|| self.store(block, &bytes));
        }
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
        if !self.entry.has(block) {
            return None;
        }
        let of_block = self.entry.bytes_of(block..block + 1);
        let mut bytes = vec![0; (of_block.end - of_block.start) as usize];
        let there = self.entry.read(of_block.start, &mut bytes).is_ok_and(|there| there);
        there.then(|| bytes.into())
    }

    /// Stores a block in the cache, or keeps it for a short time.
    pub(crate) fn store(&self, block: u64, bytes: &Bytes) {
        if block == 0 {
            self.held.keep_header(bytes);
        }
        match self.entry.store(block, bytes) {
            Ok(()) => self.cache.stored(bytes.len() as u64, &self.entry),
            Err(_) => self.unstored.keep(block, bytes.clone()),
        }
    }

    /// Drops blocks, so that they are fetched again.
    pub(crate) fn drop_blocks(&self, blocks: Range<u64>) -> io::Result<()> {
        self.unstored.drop_blocks(&blocks);
        self.entry.drop_blocks(blocks)
    }
}

/// The right to send a request. While a server does not answer, all of them may be taken for as long as the patience:
/// this wait does not last longer.
async fn slot<'a>(
    of: &'a Semaphore,
    retry: &Retry,
    url: &ObjectUrl,
) -> Result<SemaphorePermit<'a>, ObjectError> {
    match timeout(retry.patience, of.acquire()).await {
        Ok(Ok(slot)) => Ok(slot),
        Ok(Err(_)) => Err(ObjectError::Cancelled),
        Err(_) => Err(ObjectError::Unavailable {
            url: url.to_string(),
            reason: format!("{MOST_REQUESTS} other requests of this process wait"),
            attempts: 0,
            waited: retry.patience,
        }),
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream::BoxStream;
    use object_store::memory::InMemory;
    use object_store::path::Path;
    use object_store::{
        CopyOptions, Error as StoreError, GetOptions, GetResult, ListResult, MultipartUpload,
        ObjectMeta, ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload,
        PutResult, Result,
    };

    use super::*;
    use crate::cache::BLOCK_BYTES;
    use crate::runtime;
    use crate::store::Store;

    #[test]
    fn a_request_waits_for_others_only_as_long_as_the_patience() {
        static ONE: Semaphore = Semaphore::const_new(1);
        let retry = Retry { patience: Duration::from_millis(20), ..Retry::default() };
        let url = "s3://bucket/key".parse().expect("an address");
        let first = runtime::wait(slot(&ONE, &retry, &url)).expect("a runtime");
        let second = runtime::wait(slot(&ONE, &retry, &url)).expect("a runtime");
        assert!(
            matches!(second, Err(ObjectError::Unavailable { waited, .. }) if waited == retry.patience)
        );
        drop(first);
        assert!(runtime::wait(slot(&ONE, &retry, &url)).expect("a runtime").is_ok());
    }

    /// A bucket with an object that keeps its version when it is deleted.
    #[derive(Debug, Default)]
    struct Versions {
        current: InMemory,
        /// How requests for the current object fail, if it is deleted.
        deleted: Mutex<Option<fn() -> StoreError>>,
    }

    impl std::fmt::Display for Versions {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("versions")
        }
    }

    #[async_trait::async_trait]
    impl ObjectStore for Versions {
        async fn get_opts(&self, path: &Path, mut options: GetOptions) -> Result<GetResult> {
            let deleted = *self.deleted.lock().unwrap();
            match (options.version.take(), deleted) {
                (None, Some(error)) => return Err(error()),
                (Some(id), _) => assert_eq!(id, "v1"),
                (None, None) => {}
            }
            let mut found = self.current.get_opts(path, options).await?;
            found.meta.version = Some("v1".into());
            Ok(found)
        }

        async fn put_opts(
            &self,
            path: &Path,
            payload: PutPayload,
            options: PutOptions,
        ) -> Result<PutResult> {
            self.current.put_opts(path, payload, options).await
        }

        async fn put_multipart_opts(
            &self,
            path: &Path,
            options: PutMultipartOptions,
        ) -> Result<Box<dyn MultipartUpload>> {
            self.current.put_multipart_opts(path, options).await
        }

        fn delete_stream(
            &self,
            paths: BoxStream<'static, Result<Path>>,
        ) -> BoxStream<'static, Result<Path>> {
            self.current.delete_stream(paths)
        }

        fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
            self.current.list(prefix)
        }

        async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
            self.current.list_with_delimiter(prefix).await
        }

        async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
            self.current.copy_opts(from, to, options).await
        }
    }

    #[test]
    fn an_object_that_was_opened_from_the_cache_is_read_on_after_it_was_deleted() {
        let not_found = || StoreError::NotFound { path: "key".into(), source: "404".into() };
        let denied = || StoreError::PermissionDenied { path: "key".into(), source: "403".into() };
        for deleted in [not_found as fn() -> StoreError, denied] {
            let url: ObjectUrl = "s3://bucket/key".parse().expect("an address");
            let bucket = Arc::new(Versions::default());
            let bytes = Bytes::from(vec![7; 3 * BLOCK_BYTES as usize]);
            let put = bucket.current.put(url.key(), bytes.into());
            let etag = runtime::wait(put).expect("a runtime").expect("it is put").e_tag;
            // As the cache describes it: without a version.
            let (etag, len_bytes) = (etag.expect("an ETag"), 3 * BLOCK_BYTES);
            let identity = Identity { etag, len_bytes, version: None };
            let folder = tempfile::tempdir().expect("a folder");
            let cache = Arc::new(Cache::open(folder.path(), 1 << 30).expect("a cache"));
            let store = Arc::new(Store::of_client(&url, bucket.clone()));
            let source = Source::new(&url, store, Retry::default());
            let opened = Expected { identity, is_answered: false };
            let fetcher = Fetcher::new(source, opened, cache).expect("a cache");
            let fetch = |block| {
                let flight = Flight::new(block..block + 1, false);
                runtime::wait(fetcher.fly(&flight)).expect("a runtime")?;
                Ok::<_, ObjectError>(flight.wait(block).expect("it has arrived"))
            };
            fetch(0).expect("it is there");
            *bucket.deleted.lock().unwrap() = Some(deleted);
            for block in 1..3 {
                assert!(fetch(block).expect("its version is there").iter().all(|byte| *byte == 7));
            }
        }
    }
}
