//! The result of a push.

use crate::url::ObjectUrl;

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
