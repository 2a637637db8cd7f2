//! `snap hash`: the root of a snapshot's file, and the tree that checks parts of it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use hashtree::{Roots, TreeError, tree_path, write_tree};
use serde_json::json;
use snapfmt::{Existing, Output, Progress, ReadAt};

use crate::exit::Interrupted;
use crate::input::{Input, refuse_existing};
use crate::progress::Bar;
use crate::session::Session;
use crate::stdout::{print_json, print_text};
use crate::trust;

/// Hash a snapshot and a layer's parents, so that later reads can be checked one by one.
///
/// The hashes are those of b3sum. They are printed, and written to FILE.b3sum, to be signed with minisign. Beside each file,
/// its tree of hashes is written (.b3t), a 250th of the size.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap hash guest.snap
  minisign -Sm guest.snap.b3sum
  snap restore guest.snap --lazy --require-signature minisign.pub
  snap restore guest.snap --lazy --expect-root $(cut -c-64 guest.snap.b3sum)")]
pub(crate) struct Args {
    #[command(flatten)]
    input: Input,

    /// Replace FILE.b3sum and FILE.b3t if they exist. Trees of parents are always replaced.
    #[arg(long, short)]
    force: bool,

    /// Print the roots as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    let file = &args.input.file;
    if crate::bucket::is_meant(file) {
        bail!("only files have hash trees: get the snapshot with snap pull");
    }
    let list = trust::list_path(file);
    refuse_existing(&list, args.force)?;
    refuse_existing(&tree_path(file), args.force)?;
    let snapshot = args.input.open()?;
    let folder = file.parent().unwrap_or(Path::new(""));

    let bar = Bar::new("hashing", session.quiet, &session.interrupt);
    let total = snapshot.headers().map(|header| header.file_bytes).sum();
    let mut before = 0;
    let mut roots = Roots::default();
    let mut hashed: Vec<(PathBuf, PathBuf)> = Vec::new();
    for (number, (storage, path)) in snapshot.storages().zip(snapshot.paths()).enumerate() {
        let path = path.filter(|_| storage.file().is_some()).with_context(|| {
            "a parent is an object in a bucket: only files have hash trees".to_owned()
        })?;
        let tree = tree_path(path);
        let existing = if number == 0 && !args.force { Existing::Keep } else { Existing::Replace };
        let progress = |done, _| bar.update(Progress::new(before + done, total));
        let root =
            write_tree(storage, &tree, existing, &progress).map_err(|error| match error {
                TreeError::Cancelled => Interrupted.into(),
                error => anyhow::Error::new(error).context(path.display().to_string()),
            })?;
        before += storage.len_bytes().with_context(|| path.display().to_string())?;
        roots.push(root, path.strip_prefix(folder).unwrap_or(path).to_string_lossy());
        hashed.push((path.to_owned(), tree));
    }
    drop(bar);
    let text = roots.to_string();
    let existing = if args.force { Existing::Replace } else { Existing::Keep };
    let mut output = Output::create(&list, existing)?;
    output.write_at(text.as_bytes(), 0)?;
    output.publish()?;

    if args.json {
        let layers = roots.roots().zip(&hashed).map(
            |(root, (path, tree))| json!({ "file": path, "root": root.to_string(), "tree": tree }),
        );
        let layers: Vec<_> = layers.collect();
        return print_json(&json!({ "file": file, "list": list, "layers": layers }));
    }
    print_text(&text)
}
