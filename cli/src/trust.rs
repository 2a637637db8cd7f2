//! What a snapshot must have to be used: a root, or a signature.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use hashtree::{Root, Roots, check_chain};
use snapfmt::Snapshot;

/// What is required of a snapshot. Its own checksums detect accidents, not forgery.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct TrustArgs {
    /// Check every read of the snapshot against this BLAKE3 hash of its file, by the tree that snap hash has written. Of
    /// a layer, give it once for the layer, then for its parent, and so on.
    #[arg(long = "expect-root", value_name = "HEX", conflicts_with = "key")]
    roots: Vec<Root>,

    /// Check every read of the snapshot against the hashes in FILE.b3sum, which must be signed with this public key of
    /// minisign: FILE.b3sum.minisig. See docs/integrity.md.
    #[arg(long = "require-signature", value_name = "KEYFILE")]
    key: Option<PathBuf>,
}

impl TrustArgs {
    /// Whether something is required.
    pub(crate) fn is_required(&self) -> bool {
        !self.roots.is_empty() || self.key.is_some()
    }

    /// Whether it is required of one snapshot only.
    pub(crate) fn is_of_one(&self) -> bool {
        !self.roots.is_empty()
    }

    /// The snapshot in `file` with all reads checked, if that is required.
    pub(crate) fn check(&self, snapshot: Snapshot, file: &Path) -> Result<Snapshot> {
        let roots = match &self.key {
            Some(key) => signed_roots(file, key)?,
            None if self.roots.is_empty() => return Ok(snapshot),
            None => self.roots.clone(),
        };
        check_chain(snapshot, &roots).map_err(|error| match &error {
            hashtree::ChainRootsError::NoTree { source, .. }
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                anyhow::Error::new(error).context(format!(
                    "{}: run snap hash on it where it can be trusted",
                    file.display()
                ))
            }
            _ => anyhow::Error::new(error).context(file.display().to_string()),
        })
    }
}

/// The list of the roots of a chain.
pub(crate) fn list_path(file: &Path) -> PathBuf {
    beside(file, ".b3sum")
}

fn beside(file: &Path, suffix: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn signed_roots(file: &Path, key: &Path) -> Result<Vec<Root>> {
    let list = list_path(file);
    let read = |path: &Path| read_text(path).with_context(|| path.display().to_string());
    let key_text = read(key)?;
    let text = read(&list).context("the list of roots (snap hash writes it)")?;
    let signature = read(&beside(&list, ".minisig")).context("the signature of the roots")?;
    let roots = Roots::parse_signed(&text, &signature, &key_text)
        .with_context(|| format!("{}, key {}", list.display(), key.display()))?;
    Ok(roots.roots().collect())
}

/// Reads a small text. It may be anything: it comes from the same place as the snapshot.
fn read_text(path: &Path) -> Result<String> {
    use std::io::Read;
    const MOST_BYTES: u64 = 4 << 20;
    if !path.metadata()?.is_file() {
        bail!("it is not a regular file");
    }
    let mut text = String::new();
    std::fs::File::open(path)?.take(MOST_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MOST_BYTES {
        bail!("it has more than {MOST_BYTES} bytes");
    }
    Ok(text)
}
