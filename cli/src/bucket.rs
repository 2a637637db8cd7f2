//! Snapshots in object storage: addresses with `s3://`, `gs://`, `az://`, `http://`, `https://`, `file://` and
//! `oci://`.

use std::path::Path;

use anyhow::{Context, Result};
use snapfmt::{ReadError, Snapshot};

use crate::keys::KeyArgs;

/// The schemes of addresses, also in a build that cannot read them.
const SCHEMES: [&str; 7] = ["s3", "gs", "az", "http", "https", "file", "oci"];

/// How addresses begin.
pub(crate) const BEGINNINGS: &str = "s3://, gs://, az://, http://, https://, oci:// or file://";

/// Whether this is the address of an object, and not a path.
pub(crate) fn is_meant(path: &Path) -> bool {
    let text = path.to_str().unwrap_or_default();
    text.split_once("://").is_some_and(|(scheme, _)| SCHEMES.contains(&scheme))
}

/// Opens the snapshot at an address, whose parents may also be in `from`.
#[cfg(feature = "objects")]
pub(crate) fn open(path: &Path, from: &[String], keys: &KeyArgs) -> Result<Snapshot> {
    let opened = objects::open(&url(path)?, &options_from(from)?.keys(keys.provider()?));
    Ok(opened.map_err(to_error)?.snapshot)
}

/// As [`open`]. The objects must be in the bucket, even if all of them is cached.
#[cfg(feature = "objects")]
pub(crate) fn open_to_verify(path: &Path, from: &[String], keys: &KeyArgs) -> Result<Snapshot> {
    let options = options_from(from)?.keys(keys.provider()?).asks_server(true);
    let opened = objects::open(&url(path)?, &options);
    Ok(opened.map_err(to_error)?.snapshot)
}

#[cfg(not(feature = "objects"))]
pub(crate) use open as open_to_verify;

#[cfg(not(feature = "objects"))]
pub(crate) fn open(path: &Path, _: &[String], _: &KeyArgs) -> Result<Snapshot> {
    Err(missing()).with_context(|| path.display().to_string())
}

/// Opens a layer in a file whose parent is no file, as `error` says, but perhaps an object in `from`.
#[cfg(feature = "objects")]
pub(crate) fn open_layer(
    path: &Path,
    from: &[String],
    keys: &KeyArgs,
    error: ReadError,
) -> Result<Snapshot> {
    let keys = keys.provider()?;
    let failed = || anyhow::Error::new(error).context(path.display().to_string());
    let address = || {
        let file = std::fs::File::open(path).ok()?;
        let hint =
            Snapshot::parent_hint_of(snapfmt::Storage::from(file), keys.as_deref()).ok()??;
        hint.path.to_str()?.parse::<objects::ObjectUrl>().ok()
    };
    match address() {
        None => Err(failed()),
        Some(url) if from.is_empty() => Err(failed().context(format!(
            "{}: its parent is an object, {url}: --allow-parents-from URL lets it be read there",
            path.display()
        ))),
        Some(_) => {
            objects::open_over(path, None, &options_from(from)?.keys(keys)).map_err(to_error)
        }
    }
}

#[cfg(not(feature = "objects"))]
pub(crate) fn open_layer(
    path: &Path,
    _: &[String],
    _: &KeyArgs,
    error: ReadError,
) -> Result<Snapshot> {
    Err(error).with_context(|| path.display().to_string())
}

/// Converts an error: an interrupt has the exit code that it has in all commands, and the option that helps is named.
#[cfg(feature = "objects")]
pub(crate) fn to_error(error: objects::ObjectError) -> anyhow::Error {
    use objects::ObjectError;
    match error {
        ObjectError::Cancelled => crate::exit::Interrupted.into(),
        ObjectError::Write(error) => error.into(),
        ObjectError::ParentElsewhere { .. } => anyhow::Error::new(error)
            .context("a parent in another place is only read with --allow-parents-from URL"),
        error => error.into(),
    }
}

/// The error of a build without object storage.
#[cfg(not(feature = "objects"))]
pub(crate) fn missing() -> anyhow::Error {
    anyhow::anyhow!("this build of snap has no object storage (cargo feature `objects`)")
}

/// The address in an argument. Its error does not repeat the argument, which may have a password in it.
#[cfg(feature = "objects")]
pub(crate) fn url(path: &Path) -> Result<objects::ObjectUrl> {
    let text = path.to_str().context("an address is UTF-8")?;
    Ok(text.parse()?)
}

/// As [`options`], with other places of parents.
#[cfg(feature = "objects")]
pub(crate) fn options_from(from: &[String]) -> Result<objects::Options> {
    let prefix = |text: &String| text.parse().context("--allow-parents-from");
    Ok(options()?.parents_from(from.iter().map(prefix).collect::<Result<_>>()?))
}

/// How objects are read. `$SNAP_CACHE` is the folder of the cache, `$SNAP_CACHE_BYTES` its limit.
#[cfg(feature = "objects")]
pub(crate) fn options() -> Result<objects::Options> {
    Ok(objects::Options::new(cache()?))
}

#[cfg(feature = "objects")]
pub(crate) fn cache() -> Result<objects::Cache> {
    let folder = objects::default_cache_folder();
    let folder = folder.context("there is no folder for the cache: set SNAP_CACHE or HOME")?;
    let limit = match std::env::var("SNAP_CACHE_BYTES") {
        Ok(text) => crate::size::parse(&text)
            .map_err(|error| anyhow::anyhow!("SNAP_CACHE_BYTES={text}: {error}"))?,
        Err(std::env::VarError::NotPresent) => objects::DEFAULT_CACHE_BYTES,
        Err(error) => return Err(error).context("SNAP_CACHE_BYTES"),
    };
    Ok(objects::Cache::open(folder, limit)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(feature = "objects")]
    fn the_library_has_the_same_schemes() {
        for scheme in SCHEMES {
            let host = if scheme == "file" { "" } else { "host" };
            let tag = if scheme == "oci" { ":tag" } else { "" };
            format!("{scheme}://{host}/key{tag}").parse::<objects::ObjectUrl>().expect(scheme);
        }
    }

    #[test]
    fn addresses_are_distinguished_from_paths() {
        assert!(is_meant(Path::new("s3://bucket/guest")));
        assert!(is_meant(Path::new("https://host/guest.snap")));
        for path in ["guest.snap", "s3:/bucket", "folder/s3://x", "c://x"] {
            assert!(!is_meant(Path::new(path)), "{path}");
        }
    }
}
