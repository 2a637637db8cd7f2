//! Uploads one file to a bucket.

use std::ops::ControlFlow;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use object_store::{GetRange, ObjectStoreExt};
use snapfmt::layout::HEADER_BYTES;
use snapfmt::{Header, ReadAt, ReadError, Storage};

use crate::answer::{Meaning, meaning, watched};
use crate::cancel::unless_cancelled;
use crate::error::ObjectError;
use crate::fetch::Source;
use crate::url::ObjectUrl;

/// Bytes of a part. Files of more than 70 GiB have larger parts, because an upload has 10,000 parts at most.
const PART_BYTES: u64 = 8 << 20;
const MOST_PARTS: u64 = 9000;
/// Parts under way at the same time.
const PARTS: usize = 4;
/// The time that a server gets to drop the parts of a cancelled upload.
const ABORT: Duration = Duration::from_secs(1);

/// Called with the uploaded bytes of a file; `Break` cancels.
pub(super) type OnBytes<'a> = &'a (dyn Fn(u64) -> ControlFlow<()> + Sync);

/// A file that is pushed. It must not change meanwhile.
pub(super) struct File<'a> {
    pub(super) header: &'a Header,
    pub(super) storage: &'a Storage,
    stamp: Option<snapfmt::Stamp>,
    first_bytes: Box<[u8; HEADER_BYTES]>,
}

impl<'a> File<'a> {
    pub(super) fn of(
        header: &'a Header,
        storage: &'a Storage,
        to: &ObjectUrl,
    ) -> Result<Self, ObjectError> {
        let mut first_bytes = Box::new([0; HEADER_BYTES]);
        let stamp = storage.stamp().map_err(|error| unreadable(to, 0, HEADER_BYTES, error))?;
        storage
            .read_exact_at(&mut first_bytes[..], 0)
            .map_err(|error| unreadable(to, 0, HEADER_BYTES, error))?;
        let file = Self { header, storage, stamp, first_bytes };
        file.check_unchanged(to)?;
        Ok(file)
    }

    /// Checks that the header and the stamp are still those of the opened snapshot.
    pub(super) fn check_unchanged(&self, to: &ObjectUrl) -> Result<(), ObjectError> {
        let found = self.storage.stamp().map_err(|error| unreadable(to, 0, HEADER_BYTES, error))?;
        let same_header = self.first_bytes.ends_with(&self.header.crc.to_le_bytes());
        match (self.stamp, found) {
            (Some(opened), Some(found)) if opened != found || !same_header => {
                let error = ReadError::Changed { opened, found, source: None };
                Err(ObjectError::Snapshot { name: to.to_string(), error })
            }
            _ => Ok(()),
        }
    }

    /// The ETag of the object, if it is there. The header covers the index, and with the id the chunks.
    pub(super) async fn is_at(&self, to: &Source) -> Result<Option<String>, ObjectError> {
        match to.first(GetRange::Bounded(0..HEADER_BYTES as u64)).await {
            Ok((identity, _, found)) => {
                let same =
                    found == self.first_bytes[..] && identity.len_bytes == self.header.file_bytes;
                match same {
                    true => Ok(Some(identity.etag)),
                    false => Err(ObjectError::Differs { url: to.url.to_string() }),
                }
            }
            Err(ObjectError::NotFound { .. }) => Ok(None),
            Err(ObjectError::Empty { .. }) => Err(ObjectError::Differs { url: to.url.to_string() }),
            Err(error) => Err(error),
        }
    }

    /// Returns the ETag of the object, if the answer gives it.
    pub(super) async fn upload(
        &self,
        to: &Source,
        progress: OnBytes<'_>,
    ) -> Result<Option<String>, ObjectError> {
        if self.storage.file().is_none() {
            let what =
                "a snapshot in a bucket is not pushed to another bucket or folder: pull it first";
            return Err(ObjectError::Unsupported { url: to.url.to_string(), what });
        }
        let failed = |(error, seen)| failure(to, &error, seen);
        let client = to.store.clients()?.uploading;
        if self.header.file_bytes <= PART_BYTES {
            let bytes = self.part(to, 0, self.header.file_bytes)?;
            self.check_unchanged(&to.url)?;
            let put = watched(client.put(to.url.key(), bytes.into()));
            let (put, seen) = unless_cancelled(&|| progress(0), put).await?;
            return put.map(|put| put.e_tag).map_err(|error| failed((error, seen)));
        }
        let started = watched(client.put_multipart(to.url.key()));
        let (upload, seen) = unless_cancelled(&|| progress(0), started).await?;
        let mut upload = upload.map_err(|error| failed((error, seen)))?;
        let parts = self.upload_parts(to, &mut *upload, progress).await;
        let whole = parts.and_then(|()| self.check_unchanged(&to.url));
        if let Err(error) = whole {
            // If that fails, the bucket's rule for incomplete uploads removes the parts.
            let _ = tokio::time::timeout(ABORT, upload.abort()).await;
            return Err(error);
        }
        let all = || progress(self.header.file_bytes);
        let (complete, seen) = unless_cancelled(&all, watched(upload.complete())).await?;
        complete.map(|put| put.e_tag).map_err(|error| failed((error, seen)))
    }

    async fn upload_parts(
        &self,
        to: &Source,
        upload: &mut dyn object_store::MultipartUpload,
        progress: OnBytes<'_>,
    ) -> Result<(), ObjectError> {
        let len = self.header.file_bytes;
        let part_bytes = PART_BYTES.max((len / MOST_PARTS).next_multiple_of(1 << 20));
        let mut under_way = FuturesUnordered::new();
        let (mut at, mut done_bytes) = (0, 0);
        while at < len || !under_way.is_empty() {
            if at < len && under_way.len() < PARTS {
                let now = part_bytes.min(len - at);
                let put = upload.put_part(self.part(to, at, now)?.into());
                under_way.push(async move { (watched(put).await, now) });
                at += now;
                continue;
            }
            let next = unless_cancelled(&|| progress(done_bytes), under_way.next()).await?;
            let Some(((put, seen), bytes)) = next else { break };
            put.map_err(|error| failure(to, &error, seen))?;
            done_bytes += bytes;
            if progress(done_bytes).is_break() {
                return Err(ObjectError::Cancelled);
            }
        }
        Ok(())
    }

    fn part(&self, to: &Source, offset: u64, len: u64) -> Result<Bytes, ObjectError> {
        let mut bytes = vec![0; len as usize];
        let read = self.storage.read_exact_at(&mut bytes, offset);
        read.map_err(|error| unreadable(&to.url, offset, len as usize, error))?;
        Ok(bytes.into())
    }
}

/// The error of a failed upload. The client has retried it until the patience was over.
pub(super) fn failure(
    to: &Source,
    error: &object_store::Error,
    seen: crate::answer::Seen,
) -> ObjectError {
    let url = to.url.to_string();
    match meaning(error, seen).of_write() {
        Meaning::Passing(reason) => {
            let waited = to.retry.patience;
            ObjectError::Unavailable { url, reason, attempts: 1, waited }
        }
        Meaning::Credentials(status) => {
            ObjectError::Denied { url, status, hint: to.store.when_denied() }
        }
        Meaning::NoCredentials(reason) => ObjectError::NoCredentials { url, reason },
        Meaning::NoBucket | Meaning::NotFound => ObjectError::NoBucket { url },
        Meaning::Exists => ObjectError::NameTaken { url },
        Meaning::Refused(status, code) => ObjectError::Refused { url, status, code },
        Meaning::Replaced | Meaning::NoSuchRange | Meaning::NoRanges => {
            ObjectError::Refused { url, status: None, code: None }
        }
    }
}

pub(super) fn unreadable(
    to: &ObjectUrl,
    offset: u64,
    len: usize,
    source: std::io::Error,
) -> ObjectError {
    let part = snapfmt::Part::Header;
    let error = ReadError::Io { part, offset, len: len as u64, source };
    ObjectError::Snapshot { name: to.to_string(), error }
}
