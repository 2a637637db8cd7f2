//! How objects are read.

use std::sync::Arc;

use snapfmt::KeyProvider;

use crate::cache::Cache;
use crate::prefix::UrlPrefix;
use crate::retry::Retry;

/// How objects are read.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where blocks are kept.
    pub cache: Arc<Cache>,
    /// How temporary errors are retried.
    pub retry: Retry,
    /// Whether [`open`](crate::open) asks the server for the version of each object, also of one with an id in its key.
    /// Such an object never changes, so otherwise it is opened from the cache without a request, also if it was deleted.
    pub asks_server: bool,
    /// Where the parents of a layer may be, besides the bucket or repository of the layer.
    pub parents_from: Vec<UrlPrefix>,
    /// Who has the keys of sealed snapshots. With it only sealed ones are opened, without it only others.
    pub keys: Option<Arc<dyn KeyProvider>>,
}

impl Options {
    /// With this cache, and 30 seconds of patience.
    #[must_use]
    pub fn new(cache: Cache) -> Self {
        Self {
            cache: Arc::new(cache),
            retry: Retry::default(),
            asks_server: false,
            parents_from: Vec::new(),
            keys: None,
        }
    }

    /// Sets [`Options::retry`].
    #[must_use]
    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }

    /// Sets [`Options::asks_server`].
    #[must_use]
    pub fn asks_server(mut self, asks: bool) -> Self {
        self.asks_server = asks;
        self
    }

    /// Sets [`Options::parents_from`].
    #[must_use]
    pub fn parents_from(mut self, places: Vec<UrlPrefix>) -> Self {
        self.parents_from = places;
        self
    }

    /// Sets [`Options::keys`].
    #[must_use]
    pub fn keys(mut self, keys: Option<Arc<dyn KeyProvider>>) -> Self {
        self.keys = keys;
        self
    }
}
