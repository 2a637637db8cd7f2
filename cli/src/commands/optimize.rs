//! `snap optimize`: the same guest in another file, with the pages of its working set at the front.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use snapfmt::layout::PAGE_BYTES;
use snapfmt::{Codec, HotPages, Parent, Snapshot, WriteError, write_with_set};
use snapvm::path_of_parent;

use super::rewrite::Parts;
use super::summary::Written;
use crate::input::{Input, refuse_as_output, refuse_existing};
use crate::progress::Bar;
use crate::session::Session;
use crate::size;
use crate::stdout::{print_json, print_line};
use crate::storage::Storage;

/// Write a copy of a snapshot with the pages of its working set at the front.
///
/// They are stored together in the order in which the guest touches them, in a fast codec, so that a lazy restore loads
/// them with a few large reads. All other pages follow in the order of memory. Only the layout changes: memory, state
/// and, for a layer, the parent are the same; pages that are in a parent stay there.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap train guest.snap --until 'server ready' -o trained.snap
  snap optimize trained.snap -o fast.snap
  snap info fast.snap --map                   pages of the working set have their own colour")]
pub(crate) struct Args {
    #[command(flatten)]
    input: Input,

    /// The file to write. It appears when it is complete.
    #[arg(short, long, value_name = "OUT.snap")]
    out: PathBuf,

    /// How the pages at the front are stored: lz4, raw or zstd.
    #[arg(long, value_name = "CODEC", default_value = "lz4")]
    hot_codec: Codec,

    #[command(flatten)]
    storage: Storage,

    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Summary<'a> {
    #[serde(flatten)]
    written: Written<'a>,
    hot_pages: u64,
    hot_codec: &'static str,
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    let options = args.storage.options(&args.input.parents.keys)?;
    refuse_existing(&args.out, args.storage.force)?;
    let snapshot = args.input.open()?;
    refuse_as_output(&args.out, [&snapshot])?;
    let named = || args.input.file.display().to_string();
    let Some(set) = snapshot.working_set().with_context(named)? else {
        bail!("{} has no working set: make a copy with one by `snap train`", named());
    };
    let parent = open_parent(&snapshot, args)?;
    let parent_layer = match &parent {
        Some((snapshot, path)) => {
            let path = path_of_parent(snapshot.storage(), path, &args.out)?;
            Some(Parent::new(snapshot, path))
        }
        None => None,
    };
    let data: Vec<_> = snapshot.populated().collect();
    let memory = snapshot.memory();
    let parts = Parts::of(&snapshot).with_context(named)?;
    let contents = parts.contents(&snapshot, &memory, &data);
    let hot = HotPages::new(&set).front(args.hot_codec);
    let bar = Bar::new("optimizing", session.quiet, &session.interrupt);
    let progress = |p| bar.update(p);
    let written =
        write_with_set(&args.out, contents, parent_layer.as_ref(), &hot, &options, &progress);
    let (header, _) = written.map_err(|error| match error {
        WriteError::Snapshot { .. } => anyhow::Error::new(error).context(named()),
        _ => error.into(),
    })?;
    drop(bar);
    let written = Written::new(&args.out, &header, session.started);
    if args.json {
        let hot_codec = args.hot_codec.name();
        let summary = Summary { written, hot_pages: set.len(), hot_codec };
        return print_json(&summary);
    }
    if !session.quiet {
        print_line(format_args!(
            "{}: {} pages of the working set ({}) at the front, in {}; {} data pages in {}",
            args.out.display(),
            set.len(),
            size::human(set.len() * PAGE_BYTES as u64),
            args.hot_codec,
            written.pages.data,
            size::human(written.file_bytes),
        ))?;
    }
    Ok(())
}

/// For a layer: its parent, and the path of the parent.
fn open_parent<'a>(snapshot: &'a Snapshot, args: &Args) -> Result<Option<(Snapshot, &'a Path)>> {
    match snapshot.paths().nth(1) {
        None => Ok(None),
        Some(path) => {
            let path = path.context("the parent was not opened by path")?;
            Ok(Some((args.input.open_parent(path)?, path)))
        }
    }
}
