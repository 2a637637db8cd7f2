//! `snap hash`: the root of a snapshot's file, and the tree that checks parts of it.

use std::path::Path;

use anyhow::{Context, Error, Result, bail};
use hashtree::{Root, Roots, TreeError, tree_path, write_tree};
use serde_json::json;
use snapfmt::{Existing, Output, Progress, ReadAt};

use crate::exit::Interrupted;
use crate::input::{Input, refuse_as_output, refuse_existing};
use crate::progress::Bar;
use crate::session::Session;
use crate::stdout::{print_json, print_text};
use crate::{path_text, trust};

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
  snap restore guest.snap --lazy --expect-root HEX       a hash that is known from elsewhere")]
pub(crate) struct Args {
    #[command(flatten)]
    input: Input,

    /// Replace FILE.b3sum if it exists. Trees are always replaced.
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
    let snapshot = args.input.open()?;
    refuse_as_output(&list, [&snapshot])?;
    let mut chain = Vec::new();
    for (storage, path) in snapshot.storages().zip(snapshot.paths()) {
        let path = path.filter(|_| storage.file().is_some());
        let path = path.context("a parent is an object in a bucket: only files have hash trees")?;
        refuse_as_output(&tree_path(path), [&snapshot])?;
        chain.push((storage, path));
    }
    let folder = file.parent().unwrap_or(Path::new(""));
    let name =
        |path: &Path| path.strip_prefix(folder).unwrap_or(path).to_string_lossy().into_owned();

    let bar = Bar::new("hashing", session.quiet, &session.interrupt);
    let total = snapshot.headers().map(|header| header.file_bytes).sum();
    let mut before = 0;
    let mut hashed = Vec::new();
    // The list comes last, so that there is none if this is interrupted.
    for (storage, path) in chain {
        let progress = |done, _| bar.update(Progress::new(before + done, total));
        let written = write_tree(storage, &tree_path(path), Existing::Replace, &progress);
        let root = written.map_err(|error| match error {
            TreeError::Cancelled => Interrupted.into(),
            error => Error::new(error).context(path.display().to_string()),
        })?;
        before += storage.len_bytes().with_context(|| path.display().to_string())?;
        hashed.push((root, path));
    }
    drop(bar);
    let mut roots = Roots::default();
    hashed.iter().for_each(|(root, path)| roots.push(*root, name(path)));
    let text = roots.to_string();
    let existing = if args.force { Existing::Replace } else { Existing::Keep };
    let mut output = Output::create(&list, existing)?;
    output.write_at(text.as_bytes(), 0)?;
    output.publish()?;

    if args.json {
        let layer = |(root, path): &(Root, &Path)| {
            let tree = tree_path(path);
            json!({ "file": path_text::of(path), "root": root.to_string(), "tree": path_text::of(&tree) })
        };
        let layers: Vec<_> = hashed.iter().map(layer).collect();
        let (file, list) = (path_text::of(file), path_text::of(&list));
        return print_json(&json!({ "file": file, "list": list, "layers": layers }));
    }
    print_text(&text)
}
