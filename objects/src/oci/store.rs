//! A registry as a store of objects: a blob or manifest is the object of its address. So requests are retried, resumed
//! and cached as those to other stores.

use std::fmt;
use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload,
    ObjectMeta, ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult,
    Result,
};
use reqwest::Response;
use reqwest::header::CONTENT_RANGE;

use super::manifest::{MOST_MANIFEST_BYTES, digest_of};
use super::reference::{At, Reference};
use super::registry::{Registry, body, broken, failed, invalid};

impl fmt::Display for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "oci://{}/{}", self.host, self.repository)
    }
}

impl Registry {
    /// A manifest as a whole.
    async fn get_manifest(&self, location: &Path, at: At<'_>) -> Result<GetResult> {
        let (At::Tag(reference) | At::Digest(reference)) = at;
        let answer = self.manifest(reference).await?;
        if !answer.status().is_success() {
            return Err(failed("the registry gives no manifest"));
        }
        let bytes = body(answer, MOST_MANIFEST_BYTES).await?;
        let digest = digest_of(&bytes);
        if matches!(at, At::Digest(expected) if expected != digest) {
            return Err(invalid("the manifest has another digest"));
        }
        let len = bytes.len() as u64;
        let bytes = stream::once(async { Ok(Bytes::from(bytes)) }).boxed();
        Ok(result(location, digest, len, 0..len, bytes))
    }

    /// A range of a blob. A condition has no meaning: the content of a digest never changes.
    async fn get_blob(
        &self,
        location: &Path,
        digest: &str,
        wanted: &Range<u64>,
    ) -> Result<GetResult> {
        let range = format!("bytes={}-{}", wanted.start, wanted.end.saturating_sub(1));
        let answer = self.blob(digest, &range).await?;
        let found = match answer.status().as_u16() {
            206 => content_range(&answer),
            _ => return Err(failed("the registry does not give this range of a blob")),
        };
        let (range, len) = found.ok_or_else(|| invalid("the range of an answer is not valid"))?;
        // A shorter range would be taken for the whole answer.
        if range != (wanted.start..wanted.end.min(len)) {
            return Err(invalid("an answer has another range"));
        }
        let bytes = answer.bytes_stream().map(|part| part.map_err(broken)).boxed();
        Ok(result(location, digest.to_owned(), len, range, bytes))
    }
}

fn result(
    location: &Path,
    digest: String,
    len_bytes: u64,
    range: Range<u64>,
    bytes: BoxStream<'static, Result<Bytes>>,
) -> GetResult {
    GetResult {
        payload: GetResultPayload::Stream(bytes),
        meta: ObjectMeta {
            location: location.clone(),
            last_modified: Default::default(),
            size: len_bytes,
            e_tag: Some(digest),
            version: None,
        },
        range,
        attributes: Default::default(),
        extensions: Default::default(),
    }
}

/// The range of an answer, and the length of the blob: `bytes 0-99/1000`.
fn content_range(answer: &Response) -> Option<(Range<u64>, u64)> {
    let text = answer.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    let (range, len) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (start, last) = range.split_once('-')?;
    let range = start.parse().ok()?..last.parse::<u64>().ok()?.checked_add(1)?;
    let len = len.parse().ok()?;
    (range.start < range.end && range.end <= len).then_some((range, len))
}

#[async_trait]
impl ObjectStore for Registry {
    /// `GetOptions.range` is bounded for a blob, and does not matter for a manifest: [`GetOptions::head`] does not
    /// occur, because a manifest gives the length of each blob.
    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let reference = Reference::parse(location.as_ref());
        let at = reference.ok_or_else(|| invalid("it is no reference"))?.at;
        match (at, options.range) {
            (At::Digest(digest), Some(object_store::GetRange::Bounded(range))) => {
                self.get_blob(location, digest, &range).await
            }
            _ => self.get_manifest(location, at).await,
        }
    }

    /// Gives a tag to a manifest. A registry cannot do that only if the tag is free: so it is looked up before.
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        let reference = Reference::parse(location.as_ref());
        let Some(At::Tag(tag)) = reference.map(|reference| reference.at) else {
            return Err(invalid("only a tag can be given"));
        };
        if options.mode == PutMode::Create {
            let status = self.manifest(tag).await?.status();
            if status.is_success() {
                let (path, source) = (location.to_string(), "the tag is taken".into());
                return Err(Error::AlreadyExists { path, source });
            }
            if status.as_u16() != 404 {
                return Err(failed("the registry does not say whether the tag is free"));
            }
        }
        self.push_manifest(tag, payload.into()).await?;
        Ok(PutResult { e_tag: None, version: None, extensions: Default::default() })
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        Err(unsupported())
    }

    fn delete_stream(
        &self,
        _: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        stream::once(async { Err(unsupported()) }).boxed()
    }

    fn list(&self, _: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        stream::once(async { Err(unsupported()) }).boxed()
    }

    async fn list_with_delimiter(&self, _: Option<&Path>) -> Result<ListResult> {
        Err(unsupported())
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(unsupported())
    }
}

fn unsupported() -> Error {
    Error::NotSupported { source: "a registry only gives and takes blobs and manifests".into() }
}
