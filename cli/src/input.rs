//! Snapshots that are read, and outputs that must not be one of them.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use snapfmt::{ChainError, Outline, Parents, ReadError, Snapshot, open_file};

use crate::keys::KeyArgs;
use crate::trust::TrustArgs;
use crate::waits::{Wait, Waiting};
use crate::{bucket, checkpoints, snap_path, stdio};

/// Opens a snapshot, and the parents of a layer; the error names the file.
pub(crate) fn open(path: &Path, parents: &ParentArgs) -> Result<Snapshot> {
    open_with(path, parents, bucket::open)
}

fn open_with(path: &Path, parents: &ParentArgs, open_object: OpenObject) -> Result<Snapshot> {
    let checkpoint = checkpoints::resolve(path, &parents.keys)?;
    let path = checkpoint.as_deref().unwrap_or(path);
    let _opening = reading(path);
    if parents.trust.is_required() && bucket::is_meant(path) {
        bail!("only a file can be checked against a root: get the snapshot with snap pull");
    }
    let snapshot = open_unchecked(path, parents, open_object)?;
    parents.trust.check(snapshot, path)
}

/// Opens the snapshot at an address. Its parents may be at other addresses.
type OpenObject = fn(&Path, &[String], &KeyArgs) -> Result<Snapshot>;

fn open_unchecked(path: &Path, parents: &ParentArgs, open_object: OpenObject) -> Result<Snapshot> {
    if bucket::is_meant(path) {
        if !parents.files.is_empty() {
            bail!("--parent: the parents of a snapshot in a bucket are in the same bucket");
        }
        return open_object(path, &parents.from, &parents.keys);
    }
    let local = Parents {
        files: parents.files.clone(),
        folders: snap_path::folders(),
        keys: parents.keys.provider()?,
    };
    Snapshot::open_with(path, &local).or_else(|error| match error {
        // It is repeated only if it is a path: an address may have a password in it.
        ReadError::Open { source, .. }
            if source.kind() == ErrorKind::NotFound && path.to_string_lossy().contains("://") =>
        {
            bail!("it is no file, and an address begins with {}", bucket::BEGINNINGS)
        }
        // This error names the file itself.
        ReadError::Open { .. } => Err(error.into()),
        // A parent in a bucket could not be checked.
        _ if lacks_parent(&error) && !parents.trust.is_required() => {
            bucket::open_layer(path, &parents.from, &parents.keys, error)
        }
        _ => Err(anyhow::Error::new(error).context(path.display().to_string())),
    })
}

/// Whether a parent is not among the files.
pub(crate) fn lacks_parent(error: &ReadError) -> bool {
    matches!(error.root(), ReadError::Chain(ChainError::NotFound { .. }))
}

/// Waits for a file that may be on a slow disk.
pub(crate) fn reading(path: &Path) -> Waiting {
    let path = path.to_owned();
    Wait::new(move || format!("{} to be read", path.display())).begin()
}

/// Refuses an output of a snapshot that exists already, or is stdout, before any useless work.
pub(crate) fn refuse_existing(out: &Path, force: bool) -> Result<()> {
    refuse_address(out)?;
    if stdio::is_meant(out) {
        bail!(
            "a snapshot is not written from front to back, as stdout would have it; give a file (one whose name is `-` \
             is ./-)"
        );
    }
    if !force && out.symlink_metadata().is_ok() {
        bail!("{} exists; give --force to replace it", out.display());
    }
    Ok(())
}

/// Refuses an output that is the address of an object. The error does not repeat it: it may have a password in it.
fn refuse_address(out: &Path) -> Result<()> {
    if bucket::is_meant(out) {
        bail!(
            "the output is an address, to which only snap create and snap push write: give a file"
        );
    }
    Ok(())
}

/// Refuses an output that is a file of one of these snapshots, or no file.
pub(crate) fn refuse_as_output<'a>(
    out: &Path,
    snapshots: impl IntoIterator<Item = &'a Snapshot>,
) -> Result<()> {
    refuse_address(out)?;
    snapshots.into_iter().try_for_each(|snapshot| Ok(snapvm::refuse_as_output(out, snapshot)?))
}

/// A snapshot to be read.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Input {
    /// The snapshot: a file, or the address of an object (s3://bucket/name; see docs/storage.md).
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,

    #[command(flatten)]
    pub(crate) parents: ParentArgs,
}

/// Where the parents of a layer are, and what is required of all files.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct ParentArgs {
    /// For a layer: a file that may be its parent, or its parent's parent. It is used if no parent is found at the path in
    /// the layer. Then the folders of $SNAP_PATH are searched, by name and by id.
    #[arg(long = "parent", value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,

    /// For a layer with the address of its parent: read it there if the address begins with this (s3://bucket/folder).
    /// Without this option, only addresses in the bucket or repository of the layer are read.
    #[arg(long = "allow-parents-from", value_name = "URL")]
    pub(crate) from: Vec<String>,

    #[command(flatten)]
    pub(crate) trust: TrustArgs,

    #[command(flatten)]
    pub(crate) keys: KeyArgs,
}

impl From<KeyArgs> for ParentArgs {
    /// Parents that are found without options.
    fn from(keys: KeyArgs) -> Self {
        Self { keys, ..Self::default() }
    }
}

impl Input {
    pub(crate) fn open(&self) -> Result<Snapshot> {
        open(&self.file, &self.parents)
    }

    /// As [`Input::open`]. An object must be in its bucket, even if all of it is cached.
    pub(crate) fn open_to_verify(&self) -> Result<Snapshot> {
        open_with(&self.file, &self.parents, bucket::open_to_verify)
    }

    /// A sealed file as far as it can be read without a key, if none is given.
    pub(crate) fn outline(&self) -> Result<Option<Outline<File>>> {
        let checks = self.parents.trust.is_required();
        if self.parents.keys.is_given() || checks || bucket::is_meant(&self.file) {
            return Ok(None);
        }
        let _reading = reading(&self.file);
        // What is wrong with it, opening it will say.
        let Ok(outline) = open_file(&self.file)
            .map_err(anyhow::Error::from)
            .and_then(|file| Ok(Outline::open(file)?))
        else {
            return Ok(None);
        };
        Ok(Some(outline).filter(|outline| outline.header().is_sealed()))
    }

    /// Opens the parent, at `path`, of a layer that was opened before.
    pub(crate) fn open_parent(&self, path: &Path) -> Result<Snapshot> {
        let trust = self.parents.trust.of_parent(&self.file)?;
        open(path, &ParentArgs { trust, ..self.parents.clone() })
    }

    /// Opens another snapshot, whose parents may be the same.
    pub(crate) fn beside(&self, path: &Path) -> Result<Snapshot> {
        if self.parents.trust.is_of_one() {
            bail!(
                "--expect-root is the root of one snapshot, and this command reads two: --require-signature checks both"
            );
        }
        open(path, &self.parents)
    }
}
