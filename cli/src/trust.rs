//! What a snapshot must have to be used: a root, or a signature.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use hashtree::{Root, Roots, check_chain};
use snapfmt::{Snapshot, open_file};

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

    /// What is required of the parent of the layer in `file`.
    pub(crate) fn of_parent(&self, file: &Path) -> Result<Self> {
        let mut roots = self.roots_of(file)?;
        // None of them is that of a parent if the file is no layer: then it has none.
        roots.drain(..roots.len().min(1));
        Ok(Self { roots, key: None })
    }

    fn roots_of(&self, file: &Path) -> Result<Vec<Root>> {
        match &self.key {
            Some(key) => signed_roots(file, key),
            None => Ok(self.roots.clone()),
        }
    }

    /// The snapshot in `file` with all reads checked, if that is required.
    pub(crate) fn check(&self, snapshot: Snapshot, file: &Path) -> Result<Snapshot> {
        if !self.is_required() {
            return Ok(snapshot);
        }
        let roots = self.roots_of(file)?;
        check_chain(snapshot, &roots).map_err(|error| match &error {
            hashtree::ChainRootsError::NoTree { source, .. }
                if source.kind() == io::ErrorKind::NotFound =>
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
    // The key is the user's own, and may be a pipe. The other files come from the same place as the snapshot.
    let key_text = text(std::fs::File::open(key), key)?;
    let read = |path: &Path| text(open_file(path), path);
    let roots = read(&list).context("the list of roots (snap hash writes it)")?;
    let signature = read(&beside(&list, ".minisig")).context("the signature of the roots")?;
    let roots = Roots::parse_signed(&roots, &signature, &key_text)
        .with_context(|| format!("{}, key {}", list.display(), key.display()))?;
    Ok(roots.roots().collect())
}

/// Reads a small text.
fn text(opened: io::Result<std::fs::File>, path: &Path) -> Result<String> {
    const MOST_BYTES: u64 = 4 << 20;
    let mut text = String::new();
    opened
        .and_then(|file| file.take(MOST_BYTES + 1).read_to_string(&mut text))
        .with_context(|| path.display().to_string())?;
    if text.len() as u64 > MOST_BYTES {
        bail!("{} has more than {MOST_BYTES} bytes", path.display());
    }
    Ok(text)
}
