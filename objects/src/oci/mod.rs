//! Snapshots in OCI registries: each file is a blob, and a manifest with a tag lists the files of a chain.
//!
//! `oci-client` pushes blobs and manifests. Reads have a client of their own, because each read of a guest's page needs
//! what that crate does not give: it follows a redirect with each request and does not return its target, so that each
//! read would take two round trips; it does not renew a token that the registry refuses; and it has no status for
//! every failure, which decides whether a read is retried.

mod credentials;
mod manifest;
mod push;
mod reference;
mod registry;
mod store;
mod token;

pub(crate) use manifest::{EMPTY_CONFIG, Layer, Manifest, digest_of, named};
pub(crate) use reference::{At, Reference};
pub(crate) use registry::Registry;
