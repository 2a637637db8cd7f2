//! Requests for bytes of one object. Each contains the ETag of the opened object, and is retried from the byte where
//! the last answer broke off.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use object_store::{GetOptions, GetRange, GetResult, ObjectStoreExt};

use crate::answer::{Meaning, meaning, watched};
use crate::error::ObjectError;
use crate::retry::{Attempts, Retry};
use crate::store::{Clients, Store};
use crate::url::ObjectUrl;
use crate::version::{Version, Wanted};

impl Identity {
    /// The version that an answer has given.
    pub(crate) fn expected(&self) -> Expected {
        Expected { identity: self.clone(), is_answered: true }
    }
}

/// The version of an object that was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) etag: String,
    pub(crate) len_bytes: u64,
    /// If the bucket keeps versions, as an answer says.
    pub(crate) version: Option<Version>,
}

/// Where an object is, and how it is requested.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub(crate) url: ObjectUrl,
    pub(crate) store: Arc<Store>,
    pub(crate) retry: Retry,
    /// Whether the credentials are read again when a request is refused.
    pub(crate) renews: bool,
}

/// The version of an object that was opened.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    pub(crate) identity: Identity,
    /// Whether an answer has given it. Otherwise it is from the cache, and a copy of the object may have another ETag.
    pub(crate) is_answered: bool,
}

impl Expected {
    /// What the next answer must match. A weak ETag never matches an `If-Match`. It is compared only with the ETag of
    /// each answer.
    fn strong_etag(&self) -> Option<String> {
        let is_strong = self.is_answered && !self.identity.etag.starts_with("W/");
        is_strong.then(|| self.identity.etag.clone())
    }
}

/// Called with the bytes of an answer, in order.
pub(crate) type OnBytes<'a> = &'a mut (dyn FnMut(Bytes) + Send);

impl Source {
    pub(crate) fn new(url: &ObjectUrl, store: Arc<Store>, retry: Retry) -> Self {
        Self { url: url.clone(), store, retry, renews: true }
    }

    /// The object's current version. This is one request without a body.
    pub(crate) async fn identity(&self) -> Result<Identity, ObjectError> {
        let mut tries = Tries::new(self);
        loop {
            let client = tries.clients()?.reading;
            let (result, seen) = watched(client.head(self.url.key())).await;
            match result {
                Ok(meta) => return self.identity_of(meta.e_tag, meta.size, meta.version),
                Err(error) => tries.after(meaning(&error, seen), None).await?,
            }
        }
    }

    /// The bytes of a range of an object that is not open yet, and its version.
    pub(crate) async fn first(
        &self,
        range: GetRange,
    ) -> Result<(Identity, u64, Vec<u8>), ObjectError> {
        let mut bytes = Vec::new();
        let (identity, start) = self.get(None, range, &mut |part| bytes.extend(part)).await?;
        Ok((identity, start, bytes))
    }

    /// The bytes of a range of the object that was opened. Returns its identity, with the id of the version if the answer
    /// gives it. If the object never changes and no answer has given its ETag yet, another ETag and the same length are
    /// those of a copy.
    pub(crate) async fn range(
        &self,
        opened: &Expected,
        range: Range<u64>,
        on_bytes: OnBytes<'_>,
    ) -> Result<Identity, ObjectError> {
        let answered = self.get(Some(opened.clone()), GetRange::Bounded(range), on_bytes);
        answered.await.map(|(identity, _)| identity)
    }

    async fn get(
        &self,
        mut opened: Option<Expected>,
        mut range: GetRange,
        on_bytes: OnBytes<'_>,
    ) -> Result<(Identity, u64), ObjectError> {
        let mut tries = Tries::new(self);
        let mut first_start = None;
        let version = opened.as_ref().and_then(|opened| opened.identity.version.clone());
        let mut wanted = Wanted::new(version);
        loop {
            let options = GetOptions {
                range: Some(range.clone()),
                if_match: opened.as_ref().and_then(Expected::strong_etag),
                version: wanted.id(),
                ..GetOptions::default()
            };
            let client = tries.clients()?.reading;
            let (result, seen) = watched(client.get_opts(self.url.key(), options)).await;
            let answer = match result {
                Ok(answer) => answer,
                Err(error) => {
                    if let Some(failure) = wanted.failed(meaning(&error, seen)) {
                        tries.after(failure, opened.as_ref().map(|one| &one.identity)).await?;
                    }
                    continue;
                }
            };
            let mut identity = self.check(&answer, opened.as_ref())?;
            // The cache may not know the version of an object that was opened from it.
            let known = opened.take().and_then(|opened| opened.identity.version);
            identity.version = known.or(identity.version);
            wanted.answered(identity.version.as_ref());
            opened = Some(identity.expected());
            let whole = answer.range.clone();
            let start = *first_start.get_or_insert(whole.start);
            let mut at = whole.start;
            let mut body = answer.into_stream();
            while let Some(Ok(bytes)) = body.next().await {
                at = at.saturating_add(bytes.len() as u64);
                if at > whole.end {
                    return Err(self.refused("more bytes than the answer announced"));
                }
                tries.attempts.progress();
                on_bytes(bytes);
            }
            if at == whole.end {
                return Ok((identity, start));
            }
            let got = at - whole.start;
            let reason =
                format!("an answer broke off after {got} of {} bytes", whole.end - whole.start);
            range = GetRange::Bounded(at..whole.end);
            tries.after(Meaning::Passing(reason), Some(&identity)).await?;
        }
    }

    /// Checks that an answer is of the opened version of the object.
    fn check(
        &self,
        answer: &GetResult,
        opened: Option<&Expected>,
    ) -> Result<Identity, ObjectError> {
        let found = self.identity_of(
            answer.meta.e_tag.clone(),
            answer.meta.size,
            answer.meta.version.clone(),
        )?;
        let binds = opened.is_some_and(|opened| opened.is_answered);
        match opened.map(|opened| &opened.identity) {
            Some(expected) if binds && expected.etag != found.etag => Err(ObjectError::Replaced {
                url: self.url.to_string(),
                expected: expected.etag.clone(),
                found: Some(found.etag),
            }),
            Some(expected) if expected.len_bytes != found.len_bytes => {
                Err(ObjectError::WrongLength {
                    url: self.url.to_string(),
                    expected: expected.len_bytes,
                    found: found.len_bytes,
                })
            }
            _ => Ok(found),
        }
    }

    fn identity_of(
        &self,
        etag: Option<String>,
        len_bytes: u64,
        version: Option<String>,
    ) -> Result<Identity, ObjectError> {
        let url = || self.url.to_string();
        if len_bytes == 0 {
            return Err(ObjectError::Empty { url: url() });
        }
        if len_bytes > MOST_OBJECT_BYTES {
            let most_bytes = MOST_OBJECT_BYTES;
            return Err(ObjectError::TooLong { url: url(), len_bytes, most_bytes });
        }
        let etag = etag.filter(|etag| !etag.is_empty() && etag.len() <= MOST_ETAG_BYTES);
        let version = Version::new(version);
        etag.map(|etag| Identity { etag, len_bytes, version })
            .ok_or_else(|| ObjectError::NoEtag { url: url() })
    }

    pub(crate) fn refused(&self, code: &str) -> ObjectError {
        ObjectError::Refused { url: self.url.to_string(), status: None, code: Some(code.into()) }
    }
}

/// No snapshot is longer: its chunks end before `snapfmt::layout::MAX_CHUNK_OFFSET`, and what is behind them takes much
/// less.
pub(crate) const MOST_OBJECT_BYTES: u64 = 2 * snapfmt::layout::MAX_CHUNK_OFFSET;

/// No store's ETag is longer.
pub(crate) const MOST_ETAG_BYTES: usize = 256;

/// The tries of one request.
pub(crate) struct Tries<'a> {
    source: &'a Source,
    attempts: Attempts,
    renewed: bool,
    /// Those of the last try.
    clients: Option<Clients>,
}

impl<'a> Tries<'a> {
    pub(crate) fn new(source: &'a Source) -> Self {
        Self { source, attempts: Attempts::default(), renewed: !source.renews, clients: None }
    }

    /// The clients for the next try.
    pub(crate) fn clients(&mut self) -> Result<Clients, ObjectError> {
        Ok(self.clients.insert(self.source.store.clients()?).clone())
    }

    /// Pauses before the next try after a failure, or returns why there is none.
    pub(crate) async fn after(
        &mut self,
        failure: Meaning,
        opened: Option<&Identity>,
    ) -> Result<(), ObjectError> {
        let url = || self.source.url.to_string();
        let empty = ObjectError::Empty { url: url() };
        Err(match failure {
            Meaning::Passing(reason) => match self.attempts.failed(&self.source.retry) {
                Some(pause) => {
                    tokio::time::sleep(pause).await;
                    return Ok(());
                }
                None => {
                    let (attempts, waited) = self.attempts.so_far();
                    ObjectError::Unavailable { url: url(), reason, attempts, waited }
                }
            },
            Meaning::Credentials(_) if !self.renewed => {
                self.renewed = true;
                if let Some(refused) = &self.clients {
                    self.source.store.renew(refused).await?;
                }
                return Ok(());
            }
            Meaning::Credentials(status) => {
                let hint = self.source.store.when_denied();
                ObjectError::Denied { url: url(), status, hint }
            }
            Meaning::NoCredentials(reason) => ObjectError::NoCredentials { url: url(), reason },
            Meaning::NotFound => ObjectError::NotFound { url: url() },
            Meaning::NoBucket => ObjectError::NoBucket { url: url() },
            Meaning::Replaced => match opened {
                Some(opened) => {
                    let expected = opened.etag.clone();
                    ObjectError::Replaced { url: url(), expected, found: None }
                }
                None => self.source.refused("a condition that was not set"),
            },
            Meaning::NoSuchRange => opened.map_or(empty, |opened| ObjectError::WrongLength {
                url: url(),
                expected: opened.len_bytes,
                found: 0,
            }),
            Meaning::NoRanges => ObjectError::NoRanges { url: url() },
            Meaning::Exists => ObjectError::NameTaken { url: url() },
            Meaning::Refused(status, code) => ObjectError::Refused { url: url(), status, code },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_that_no_snapshot_can_have_is_refused() {
        let url: ObjectUrl = "http://host/guest".parse().expect("an address");
        let store = Arc::new(Store::open(&url).expect("its settings are valid"));
        let source = Source::new(&url, store, Retry::default());
        let of = |len_bytes| source.identity_of(Some("1".into()), len_bytes, None);
        assert!(of(MOST_OBJECT_BYTES).is_ok());
        for len in [MOST_OBJECT_BYTES + 1, u64::MAX] {
            let error = of(len).expect_err("it is too long");
            assert!(matches!(error, ObjectError::TooLong { len_bytes, .. } if len_bytes == len));
        }
        assert!(matches!(of(0), Err(ObjectError::Empty { .. })));
    }
}
