//! Pushes a snapshot to a registry: a blob for each file, and a manifest with a tag that lists them.

use std::io;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream;
use object_store::GetRange;
use sha2::{Digest, Sha256};
use snapfmt::layout::HEADER_BYTES;
use snapfmt::{Header, OnProgress, Progress, ReadAt, Snapshot, Storage};

use super::file::{File, OnBytes, unreadable};
use super::name::{give_name, holds};
use super::outcome::{Pushed, PushedLayer};
use crate::answer::{Meaning, meaning, watched};
use crate::cancel::unless_cancelled;
use crate::error::ObjectError;
use crate::fetch::{Source, Tries};
use crate::name::{Name, file_name};
use crate::oci::{At, EMPTY_CONFIG, Layer, Manifest, Reference, Registry, digest_of, named};
use crate::url::ObjectUrl;

/// Bytes that are read from a file and sent together.
const PART_BYTES: u64 = 1 << 20;
/// How long an upload may make no progress. At its end, the registry computes the digest of a blob of many GiB.
const STUCK: Duration = Duration::from_secs(120);

pub(super) async fn push_all(
    snapshot: &Snapshot,
    name: &Source,
    replace: bool,
    progress: OnProgress<'_>,
) -> Result<Pushed, ObjectError> {
    if !matches!(at(&name.url), Some(At::Tag(_))) {
        let what = "a push gives a tag to the snapshot: oci://HOST/REPOSITORY:TAG";
        return Err(ObjectError::Unsupported { url: name.url.to_string(), what });
    }
    let files: Vec<_> = snapshot.headers().zip(snapshot.storages()).zip(snapshot.paths()).collect();
    // Each byte is hashed, and then sent.
    let total_bytes = 2 * files.iter().map(|((header, _), _)| header.file_bytes).sum::<u64>();
    let mut done_bytes = 0;
    let mut layers = Vec::new();
    for ((header, storage), path) in &files {
        let before = done_bytes;
        let on_bytes = |bytes| progress(Progress::new(before + bytes, total_bytes));
        let there = digest_there(name, storage, *path);
        let digest = match unless_cancelled(&|| on_bytes(0), there).await?? {
            Some(digest) => digest,
            None => digest_of_file(header, storage, &name.url, &on_bytes)?,
        };
        let (len_bytes, file_name) = (header.file_bytes, file_name(header.id));
        layers.push(Layer { digest, len_bytes, file_name });
        done_bytes += len_bytes;
    }
    let manifest = Manifest { layers };
    let content = Bytes::from(manifest.encode());
    let begun = || progress(Progress::new(done_bytes, total_bytes));
    // This is checked before the upload, which may take hours.
    if !replace && unless_cancelled(&begun, holds(name, &content)).await?? == Some(false) {
        return Err(ObjectError::NameTaken { url: name.url.to_string() });
    }
    let mut pushed = Vec::new();
    for (((header, storage), _), layer) in files.iter().zip(&manifest.layers).rev() {
        let to = Source { url: name.url.with_digest(&layer.digest)?, ..name.clone() };
        let before = done_bytes;
        let on_bytes = |bytes| progress(Progress::new(before + bytes, total_bytes));
        let was_there = unless_cancelled(&|| on_bytes(0), is_there(&to, &layer.digest)).await??;
        if !was_there {
            upload(&File::of(header, storage, &to.url)?, &to, layer, &on_bytes).await?;
        }
        done_bytes += header.file_bytes;
        if progress(Progress::new(done_bytes, total_bytes)).is_break() {
            return Err(ObjectError::Cancelled);
        }
        pushed.push(PushedLayer { url: to.url, file_bytes: header.file_bytes, was_there });
    }
    pushed.reverse();
    let all = || progress(Progress::new(total_bytes, total_bytes));
    unless_cancelled(&all, push_config(name)).await??;
    unless_cancelled(&all, give_name(name, content, replace)).await??;
    Ok(Pushed { layers: pushed })
}

/// The digest of a parent that is a blob in the same repository. `None`: it is a file.
async fn digest_there(
    name: &Source,
    storage: &Storage,
    path: Option<&Path>,
) -> Result<Option<String>, ObjectError> {
    if storage.file().is_some() {
        return Ok(None);
    }
    let what = "a parent is in a bucket or in another repository: pull it first";
    let elsewhere = || ObjectError::Unsupported { url: name.url.to_string(), what };
    let url = path.and_then(Path::to_str).and_then(|text| text.parse::<ObjectUrl>().ok());
    let url = url.ok_or_else(elsewhere)?;
    let Some(At::Digest(digest)) = at(&url) else { return Err(elsewhere()) };
    if name.url.with_digest(digest).as_ref() != Ok(&url) {
        return Err(elsewhere());
    }
    // It is the digest of a blob, or that of a manifest, whose first blob it is then.
    let source = Source { url: url.clone(), ..name.clone() };
    match source.first(GetRange::Bounded(0..1)).await {
        Ok((_, _, byte)) if !Name::is_meant(&byte) => return Ok(Some(digest.to_owned())),
        Ok(_) | Err(ObjectError::NotFound { .. }) => {}
        Err(error) => return Err(error),
    }
    let (_, _, bytes) = source.first(GetRange::Offset(0)).await?;
    let manifest = Manifest::parse(&bytes)
        .map_err(|reason| ObjectError::Name { url: url.to_string(), reason })?;
    Ok(manifest.layers.into_iter().next().map(|layer| layer.digest))
}

fn at(url: &ObjectUrl) -> Option<At<'_>> {
    Reference::parse(url.key().as_ref()).map(|reference| reference.at)
}

/// The digest of a file.
fn digest_of_file(
    header: &Header,
    storage: &Storage,
    to: &ObjectUrl,
    on_bytes: OnBytes<'_>,
) -> Result<String, ObjectError> {
    let len_bytes = header.file_bytes;
    let file = File::of(header, storage, to)?;
    let mut hash = Sha256::new();
    let mut bytes = vec![0; PART_BYTES as usize];
    for offset in (0..len_bytes).step_by(PART_BYTES as usize) {
        let part = &mut bytes[..PART_BYTES.min(len_bytes - offset) as usize];
        let read = storage.read_exact_at(part, offset);
        read.map_err(|error| unreadable(to, offset, part.len(), error))?;
        hash.update(&*part);
        if on_bytes(offset + part.len() as u64).is_break() {
            return Err(ObjectError::Cancelled);
        }
    }
    file.check_unchanged(to)?;
    Ok(named(&hash.finalize()))
}

/// The registry to push to. The address is one in a registry.
fn registry(to: &Source, tries: &mut Tries<'_>) -> Result<Arc<Registry>, ObjectError> {
    let what = "it is not in a registry";
    let registry = tries.clients()?.registry;
    registry.ok_or_else(|| ObjectError::Unsupported { url: to.url.to_string(), what })
}

/// Whether the blob is there.
async fn is_there(to: &Source, digest: &str) -> Result<bool, ObjectError> {
    let mut tries = Tries::new(to);
    loop {
        let registry = registry(to, &mut tries)?;
        let (result, seen) = watched(registry.has_blob(digest)).await;
        match result {
            Ok(there) => return Ok(there),
            Err(error) => tries.after(meaning(&error, seen), None).await?,
        }
    }
}

/// Uploads a file as a blob. If that fails, the upload begins again with the first byte.
async fn upload(
    file: &File<'_>,
    to: &Source,
    layer: &Layer,
    on_bytes: OnBytes<'_>,
) -> Result<(), ObjectError> {
    // Not the file itself: the storage may check what is read.
    if file.storage.file().is_none() {
        let what = "a snapshot in a bucket or another repository is not pushed: pull it first";
        return Err(ObjectError::Unsupported { url: to.url.to_string(), what });
    }
    let failed = |error| unreadable(&to.url, 0, HEADER_BYTES, error);
    let mut tries = Tries::new(to);
    loop {
        let reading = Arc::new(Reading::default());
        let stream = reading.stream(own_handle(file).map_err(failed)?, layer.len_bytes);
        let registry = registry(to, &mut tries)?;
        let push = watched(registry.push_blob(&layer.digest, layer.len_bytes, stream));
        let sent = || reading.sent_bytes.load(Ordering::Relaxed);
        let (moved, begun) = (Mutex::new((Instant::now(), 0)), Instant::now());
        let stop = || {
            let mut moved = moved.lock().unwrap_or_else(PoisonError::into_inner);
            if moved.1 != sent() {
                *moved = (Instant::now(), sent());
            }
            match moved.0.elapsed() > STUCK {
                true => ControlFlow::Break(()),
                false => on_bytes(sent()),
            }
        };
        let failure = match unless_cancelled(&stop, push).await {
            Ok((Ok(()), _)) => return file.check_unchanged(&to.url),
            Ok((Err(error), seen)) => meaning(&error, seen).of_write(),
            Err(_) if on_bytes(sent()).is_break() => return Err(ObjectError::Cancelled),
            Err(_) => {
                let waited = begun.elapsed().as_secs();
                Meaning::Passing(format!("the upload makes no progress after {waited} s"))
            }
        };
        if let Some(error) = reading.error.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(failed(error));
        }
        file.check_unchanged(&to.url)?;
        tries.after(failure, None).await?;
    }
}

/// A handle to the same bytes for an upload, whose reads are checked if those of the storage are.
fn own_handle(file: &File<'_>) -> io::Result<Box<dyn ReadAt>> {
    match file.storage {
        Storage::File(file) => Ok(Box::new(file.try_clone()?)),
        storage => storage.in_order().ok_or(io::ErrorKind::Unsupported.into()),
    }
}

/// The file that an upload reads: how far it is, and its error.
#[derive(Default)]
struct Reading {
    sent_bytes: AtomicU64,
    error: Mutex<Option<io::Error>>,
}

impl Reading {
    fn stream(
        self: &Arc<Self>,
        file: Box<dyn ReadAt>,
        len_bytes: u64,
    ) -> impl stream::Stream<Item = io::Result<Bytes>> + Send + 'static {
        let reading = Arc::clone(self);
        stream::iter((0..len_bytes).step_by(PART_BYTES as usize).map(move |offset| {
            reading.sent_bytes.store(offset, Ordering::Relaxed);
            let mut bytes = vec![0; PART_BYTES.min(len_bytes - offset) as usize];
            // The disk may be slow. Other requests continue meanwhile.
            match tokio::task::block_in_place(|| file.read_exact_at(&mut bytes, offset)) {
                Ok(()) => Ok(bytes.into()),
                Err(error) => {
                    let kind = error.kind();
                    let mut place = reading.error.lock().unwrap_or_else(PoisonError::into_inner);
                    *place = Some(error);
                    Err(kind.into())
                }
            }
        }))
    }
}

/// Uploads the empty configuration that each manifest of an artifact refers to.
async fn push_config(name: &Source) -> Result<(), ObjectError> {
    let digest = digest_of(EMPTY_CONFIG);
    if is_there(name, &digest).await? {
        return Ok(());
    }
    let mut tries = Tries::new(name);
    loop {
        let registry = registry(name, &mut tries)?;
        let bytes = stream::iter([Ok(Bytes::from_static(EMPTY_CONFIG))]);
        let pushed = registry.push_blob(&digest, EMPTY_CONFIG.len() as u64, bytes);
        match watched(pushed).await {
            (Ok(()), _) => return Ok(()),
            (Err(error), seen) => tries.after(meaning(&error, seen), None).await?,
        }
    }
}
