//! Paths in JSON, which has only Unicode: other bytes of a path are replaced with U+FFFD.

use std::borrow::Cow;
use std::path::Path;

use serde::Serializer;

/// The text of a path.
pub(crate) fn of(path: &Path) -> Cow<'_, str> {
    path.to_string_lossy()
}

/// For `#[serde(serialize_with)]`: serde fails for paths that are not Unicode.
pub(crate) fn serialize<S: Serializer>(
    path: &impl AsRef<Path>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&of(path.as_ref()))
}
