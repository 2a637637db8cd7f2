//! Snapshots in object storage: S3, Google Cloud Storage, Azure, HTTP servers, OCI registries, and folders as
//! buckets.
//!
//! - [`open`] opens a snapshot in a bucket, to be read or restored like a file;
//! - [`push`] copies a snapshot file into a bucket or registry, and [`pull`] copies it back;
//! - [`Cache`] holds the blocks that were fetched, on disk, for all processes of a user;
//! - [`ObjectUrl`] is the address of an object.
//!
//! All requests run on one thread of this library. Reads of cached blocks never wait for it.
//!
//! ```no_run
//! # fn main() -> Result<(), objects::ObjectError> {
//! let cache = objects::Cache::open("/var/cache/snap", objects::DEFAULT_CACHE_BYTES)?;
//! let url = "s3://bucket/team/guest".parse()?;
//! let opened = objects::open(&url, &objects::Options::new(cache))?;
//! println!("{}", opened.snapshot.header().id);
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod ahead;
mod answer;
mod blobs;
mod cache;
mod cancel;
mod ends;
mod error;
mod fetch;
mod fetcher;
mod flight;
mod hedge;
mod held;
mod lineage;
mod look;
mod name;
mod oci;
mod open;
mod options;
mod place;
mod prefix;
mod pull;
mod push;
mod remote;
mod retry;
mod runtime;
mod store;
mod unstored;
mod url;
mod version;
mod watching;

pub use cache::{Cache, Cached, DEFAULT_CACHE_BYTES, default_cache_folder};
pub use error::ObjectError;
pub use open::{Opened, open, open_over};
pub use options::Options;
pub use prefix::UrlPrefix;
pub use pull::{Pulled, pull};
pub use push::{Pushed, PushedLayer, check_parents, is_taken, push};
pub use remote::RemoteObject;
pub use retry::Retry;
pub use url::{ObjectUrl, UrlError};
