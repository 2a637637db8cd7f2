//! Uploads the files of a snapshot as objects of a bucket, and writes a name for it.

use std::fs::DirBuilder;
use std::ops::ControlFlow;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use object_store::{GetRange, ObjectStoreExt, PutMode, PutOptions};
use snapfmt::layout::HEADER_BYTES;
use snapfmt::{Header, OnProgress, Progress, ReadAt, ReadError, Snapshot, Storage};

use crate::answer::{Meaning, meaning, watched};
use crate::cancel::unless_cancelled;
use crate::error::ObjectError;
use crate::fetch::{Source, Tries};
use crate::name::{LayerName, Name};
use crate::retry::Retry;
use crate::runtime;
use crate::store::Store;
use crate::url::{ObjectUrl, Scheme};

/// Bytes of a part. Files of more than 70 GiB have larger parts, because an upload has 10,000 parts at most.
const PART_BYTES: u64 = 8 << 20;
const MOST_PARTS: u64 = 9000;
/// Parts under way at the same time.
const PARTS: usize = 4;
/// The time that a server gets to drop the parts of a cancelled upload.
const ABORT: Duration = Duration::from_secs(1);

/// Called with the uploaded bytes of a file; `Break` cancels.
type OnBytes<'a> = &'a (dyn Fn(u64) -> ControlFlow<()> + Sync);

/// The result of a push.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Pushed {
    /// The objects of the snapshot, its parent, and so on.
    pub layers: Vec<PushedLayer>,
}

/// One object.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PushedLayer {
    /// Its address.
    pub url: ObjectUrl,
    /// Its length in bytes.
    pub file_bytes: u64,
    /// Whether it was there already.
    pub was_there: bool,
}

/// Uploads the files of a snapshot that are not in the bucket yet, parents first, and then writes its name. The objects
/// are in the folder `objects` beside the name. An interrupted push leaves no name.
///
/// A name that is taken is an error, unless `replace` is set, or the name is already that of this snapshot.
///
/// # Errors
/// [`ObjectError`]
pub fn push(
    snapshot: &Snapshot,
    name: &ObjectUrl,
    replace: bool,
    retry: Retry,
    progress: OnProgress<'_>,
) -> Result<Pushed, ObjectError> {
    if matches!(name.scheme(), Scheme::Http | Scheme::Https) {
        let what = "a snapshot is not pushed to an HTTP server, only read from one";
        return Err(ObjectError::Unsupported { url: name.to_string(), what });
    }
    if name.scheme() == Scheme::File {
        make_private_folder(&name.beside("objects")?)?;
    }
    let store = Arc::new(Store::open_to_write(name, retry)?);
    let source = Source::new(name, store, retry);
    runtime::wait(push_all(snapshot, &source, replace, progress)).map_err(ObjectError::Runtime)?
}

async fn push_all(
    snapshot: &Snapshot,
    name: &Source,
    replace: bool,
    progress: OnProgress<'_>,
) -> Result<Pushed, ObjectError> {
    let layer_name = |header: &Header| LayerName {
        id: header.id.to_string(),
        header_crc: header.crc,
        file_bytes: header.file_bytes,
    };
    let named = Name::new(snapshot.headers().map(layer_name).collect());
    let content = Bytes::from(named.encode());
    let total_bytes = snapshot.headers().map(|header| header.file_bytes).sum();
    let mut done_bytes = 0;
    let begun = || progress(Progress::new(0, total_bytes));
    // This is checked before the upload, which may take hours.
    if !replace && unless_cancelled(&begun, holds(name, &content)).await?? == Some(false) {
        return Err(ObjectError::NameTaken { url: name.url.to_string() });
    }
    let mut layers = Vec::new();
    let files: Vec<_> = snapshot.headers().zip(snapshot.storages()).zip(&named.layers).collect();
    for (at, ((header, storage), layer)) in files.into_iter().enumerate().rev() {
        let to = Source { url: name.url.beside(&layer.key())?, ..name.clone() };
        let file = File::of(header, storage, &to.url)?;
        let before = done_bytes;
        let progress_of = |bytes| progress(Progress::new(before + bytes, total_bytes));
        let was_there = unless_cancelled(&|| progress_of(0), file.is_at(&to)).await??;
        if !was_there {
            // Before the object, so that each object that is complete has its list.
            if at + 1 < named.layers.len() {
                let list = Bytes::from(Name::new(named.layers[at..].to_vec()).encode());
                let to = Source { url: name.url.beside(&layer.list_key())?, ..name.clone() };
                unless_cancelled(&|| progress_of(0), give_name(&to, list, true)).await??;
            }
            file.upload(&to, &progress_of).await?;
        }
        done_bytes += header.file_bytes;
        if progress(Progress::new(done_bytes, total_bytes)).is_break() {
            return Err(ObjectError::Cancelled);
        }
        layers.push(PushedLayer { url: to.url, file_bytes: header.file_bytes, was_there });
    }
    layers.reverse();
    let all = || progress(Progress::new(total_bytes, total_bytes));
    unless_cancelled(&all, give_name(name, content, replace)).await??;
    Ok(Pushed { layers })
}

/// Whether the object there has this content; `None` if there is none.
async fn holds(source: &Source, content: &Bytes) -> Result<Option<bool>, ObjectError> {
    match source.first(GetRange::Bounded(0..content.len() as u64 + 1)).await {
        Ok((_, _, found)) => Ok(Some(found == content[..])),
        Err(ObjectError::NotFound { .. }) => Ok(None),
        Err(ObjectError::Empty { .. }) => Ok(Some(false)),
        Err(error) => Err(error),
    }
}

/// Writes a name, after all objects, or the list of a layer's parents.
async fn give_name(name: &Source, content: Bytes, replace: bool) -> Result<(), ObjectError> {
    let mode = if replace { PutMode::Overwrite } else { PutMode::Create };
    let mut tries = Tries::new(name);
    loop {
        let options = PutOptions { mode: mode.clone(), ..PutOptions::default() };
        let client = name.store.client()?;
        let put = client.put_opts(name.url.key(), content.clone().into(), options);
        let (result, seen) = watched(put).await;
        let Err(error) = result else { return Ok(()) };
        match meaning(&error, seen) {
            // A try whose answer was lost may have written it.
            Meaning::Exists | Meaning::Replaced => {
                return match holds(name, &content).await? {
                    Some(true) => Ok(()),
                    _ => Err(ObjectError::NameTaken { url: name.url.to_string() }),
                };
            }
            failure => tries.after(failure, None).await?,
        }
    }
}

/// A file that is pushed. It must not change meanwhile.
struct File<'a> {
    header: &'a Header,
    storage: &'a Storage,
    stamp: Option<snapfmt::Stamp>,
    first_bytes: Box<[u8; HEADER_BYTES]>,
}

impl<'a> File<'a> {
    fn of(header: &'a Header, storage: &'a Storage, to: &ObjectUrl) -> Result<Self, ObjectError> {
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
    fn check_unchanged(&self, to: &ObjectUrl) -> Result<(), ObjectError> {
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

    /// Whether the object is there. The header covers the index, and with the id the chunks.
    async fn is_at(&self, to: &Source) -> Result<bool, ObjectError> {
        match to.first(GetRange::Bounded(0..HEADER_BYTES as u64)).await {
            Ok((identity, _, found)) => {
                let same =
                    found == self.first_bytes[..] && identity.len_bytes == self.header.file_bytes;
                match same {
                    true => Ok(true),
                    false => Err(ObjectError::Differs { url: to.url.to_string() }),
                }
            }
            Err(ObjectError::NotFound { .. }) => Ok(false),
            Err(ObjectError::Empty { .. }) => Err(ObjectError::Differs { url: to.url.to_string() }),
            Err(error) => Err(error),
        }
    }

    async fn upload(&self, to: &Source, progress: OnBytes<'_>) -> Result<(), ObjectError> {
        if self.storage.file().is_none() {
            let what = "a snapshot in a bucket is not pushed to another one: pull it first";
            return Err(ObjectError::Unsupported { url: to.url.to_string(), what });
        }
        let failed = |(error, seen)| failure(to, &error, seen);
        let client = to.store.client()?;
        if self.header.file_bytes <= PART_BYTES {
            let bytes = self.part(to, 0, self.header.file_bytes)?;
            self.check_unchanged(&to.url)?;
            let put = watched(client.put(to.url.key(), bytes.into()));
            let (put, seen) = unless_cancelled(&|| progress(0), put).await?;
            return put.map(drop).map_err(|error| failed((error, seen)));
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
        complete.map(drop).map_err(|error| failed((error, seen)))
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
fn failure(to: &Source, error: &object_store::Error, seen: crate::answer::Seen) -> ObjectError {
    let url = to.url.to_string();
    match meaning(error, seen) {
        Meaning::Passing(reason) => {
            let waited = to.retry.patience;
            ObjectError::Unavailable { url, reason, attempts: 1, waited }
        }
        Meaning::Credentials(status) => ObjectError::Denied { url, status },
        Meaning::NotFound => ObjectError::NotFound { url },
        Meaning::Exists => ObjectError::NameTaken { url },
        Meaning::Refused(status, code) => ObjectError::Refused { url, status, code },
        Meaning::Replaced | Meaning::NoSuchRange | Meaning::NoRanges => {
            ObjectError::Refused { url, status: None, code: None }
        }
    }
}

fn unreadable(to: &ObjectUrl, offset: u64, len: usize, source: std::io::Error) -> ObjectError {
    let part = snapfmt::Part::Header;
    let error = ReadError::Io { part, offset, len: len as u64, source };
    ObjectError::Snapshot { name: to.to_string(), error }
}

/// Guest memory contains secrets, and the client would create a folder that all users can read.
fn make_private_folder(url: &ObjectUrl) -> Result<(), ObjectError> {
    let folder = Path::new("/").join(url.key().as_ref());
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&folder);
    made.map_err(|error| ObjectError::Cache { what: "make", path: folder, error })
}
