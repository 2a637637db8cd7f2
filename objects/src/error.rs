//! Errors of objects. No variant contains a text of the server or of the HTTP client that could hold a credential.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use snapfmt::{Permanent, ReadError, WriteError};

use crate::url::UrlError;

/// Why an object cannot be read or written. Addresses are given in full.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ObjectError {
    /// The text is not an address.
    #[error(transparent)]
    Url(#[from] UrlError),
    /// There is no such object (404), or it was deleted.
    #[error("{url}: there is no such object")]
    NotFound {
        /// Its address.
        url: String,
    },
    /// There is no such bucket, or the registry has no such repository and does not create it.
    #[error("{url}: there is no such bucket or repository")]
    NoBucket {
        /// The address of an object in it.
        url: String,
    },
    /// The environment has no credentials, and neither has the metadata service of this host.
    #[error("{url}: the environment has no credentials; {reason}")]
    NoCredentials {
        /// The address of the object.
        url: String,
        /// Why the metadata service gives none.
        reason: String,
    },
    /// Its key has another object now (412, or another ETag in an answer).
    #[error(
        "{url}: the object was replaced while it was read: ETag {expected} then, {} now",
        found.as_deref().unwrap_or("another")
    )]
    Replaced {
        /// Its address.
        url: String,
        /// The ETag when it was opened.
        expected: String,
        /// The ETag of the answer, if there was one.
        found: Option<String>,
    },
    /// The object has another length than when it was opened, or than its name gives.
    #[error("{url}: the object is {found} bytes long, expected {expected}")]
    WrongLength {
        /// Its address.
        url: String,
        /// The length when it was opened, in bytes.
        expected: u64,
        /// The length by an answer, in bytes.
        found: u64,
    },
    /// The object is longer than a snapshot can be.
    #[error("{url}: the object is {len_bytes} bytes long, but a snapshot has at most {most_bytes}")]
    TooLong {
        /// Its address.
        url: String,
        /// Its length in bytes.
        len_bytes: u64,
        /// The greatest length of a snapshot, in bytes.
        most_bytes: u64,
    },
    /// A blob of a registry has other bytes than its digest says.
    #[error("{url}: its bytes have the digest {found}")]
    WrongDigest {
        /// Its address, with the digest.
        url: String,
        /// The digest of the received bytes.
        found: String,
    },
    /// The object is empty.
    #[error("{url}: the object is empty")]
    Empty {
        /// Its address.
        url: String,
    },
    /// The server gives no ETag, so that a replaced object could not be noticed.
    #[error("{url}: the server gives no ETag: whether the object is replaced could not be noticed")]
    NoEtag {
        /// Its address.
        url: String,
    },
    /// The server does not answer ranges.
    #[error("{url}: the server does not give a range of an object")]
    NoRanges {
        /// Its address.
        url: String,
    },
    /// The store does not accept the credentials (401, 403), also after they were read again, or it got none.
    #[error("{url}: access is denied (HTTP {status}){hint}")]
    Denied {
        /// Its address.
        url: String,
        /// The HTTP status.
        status: u16,
        /// What may be the reason, as the end of a sentence.
        hint: &'static str,
    },
    /// The store refuses the request.
    #[error("{url}: the store refuses the request{}{}", status.map_or(String::new(), |status| format!(" (HTTP {status})")), code.as_deref().map_or(String::new(), |code| format!(": {code}")))]
    Refused {
        /// Its address.
        url: String,
        /// The HTTP status, if there was an answer.
        status: Option<u16>,
        /// The store's code for the error.
        code: Option<String>,
    },
    /// The store could not be reached, or did not answer, during all tries.
    #[error("{url}: {reason}; tried {attempts} times in {waited:.1?}")]
    Unavailable {
        /// Its address.
        url: String,
        /// The last failure.
        reason: String,
        /// How often it was tried.
        attempts: u32,
        /// For how long.
        waited: Duration,
    },
    /// The environment does not configure this store.
    #[error("{url}: the store is not configured: {reason}")]
    Configuration {
        /// The address.
        url: String,
        /// The missing or wrong setting.
        reason: String,
    },
    /// The store cannot do this.
    #[error("{url}: {what}")]
    Unsupported {
        /// The address.
        url: String,
        /// What it cannot do.
        what: &'static str,
    },
    /// The name is taken.
    #[error("{url}: the name is taken")]
    NameTaken {
        /// The name.
        url: String,
    },
    /// There is an object with the id of the snapshot and other content.
    #[error("{url}: there is an object with the id of the snapshot, and its content differs")]
    Differs {
        /// Its address.
        url: String,
    },
    /// The object is neither a snapshot nor a valid name.
    #[error("{url}: neither a snapshot nor the name of one: {reason}")]
    Name {
        /// Its address.
        url: String,
        /// The error.
        reason: String,
    },
    /// The parent of a layer is in another bucket or on another server, and the caller does not allow that.
    #[error(
        "{layer}: its parent is in another place, {parent}, which is not read unless that is allowed"
    )]
    ParentElsewhere {
        /// The path or address of the layer.
        layer: String,
        /// The address of its parent.
        parent: String,
    },
    /// The cache on disk cannot be used.
    #[error("cannot use the cache: {what} {}", path.display())]
    Cache {
        /// The operation.
        what: &'static str,
        /// The folder or file.
        path: PathBuf,
        /// How it failed.
        #[source]
        error: io::Error,
    },
    /// The folder of a bucket in `file://` cannot be made.
    #[error("cannot make the folder {}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The error.
        #[source]
        error: io::Error,
    },
    /// The thread for requests cannot be started.
    #[error("cannot start the thread for requests")]
    Runtime(#[source] io::Error),
    /// The snapshot in the object, or one that is pushed.
    #[error("{name}")]
    Snapshot {
        /// Its address or path.
        name: String,
        /// The error.
        #[source]
        error: ReadError,
    },
    /// The file that a snapshot is pulled to.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The caller's progress function has requested a stop.
    #[error("cancelled")]
    Cancelled,
}

impl ObjectError {
    /// Converts to an I/O error. It is permanent, because the retries are over.
    pub(crate) fn to_io(self: &Arc<Self>) -> io::Error {
        let kind = match **self {
            Self::NotFound { .. } | Self::NoBucket { .. } => io::ErrorKind::NotFound,
            Self::Denied { .. } | Self::NoCredentials { .. } => io::ErrorKind::PermissionDenied,
            Self::Unavailable { .. } => io::ErrorKind::TimedOut,
            _ => io::ErrorKind::Other,
        };
        Permanent::error(kind, Arc::clone(self))
    }
}
