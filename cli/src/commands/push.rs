//! `snap push` and `snap pull`: copy snapshots to and from a bucket.

use std::path::PathBuf;

use anyhow::{Error, Result};
use objects::{ObjectError, Retry};
use serde_json::json;
use snapfmt::{ChainError, Existing, ReadError};

use crate::bucket;
use crate::exit::Interrupted;
use crate::input::{Input, refuse_existing};
use crate::progress::Bar;
use crate::session::Session;
use crate::size;
use crate::stdout::{print_json, print_line};

/// Copy a snapshot, and of a layer its parents, into a bucket, and give it a name there.
///
/// Objects that are there already are not sent again. The name appears last, when all of its objects are complete.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap push guest.snap s3://bucket/team/guest
  snap push layer.snap file:///srv/snapshots/guest-2")]
pub(crate) struct PushArgs {
    #[command(flatten)]
    input: Input,

    /// The name, as an address: s3://, gs://, az:// or file://.
    #[arg(value_name = "URL")]
    url: PathBuf,

    /// Replace the name if it is taken. Objects are never replaced.
    #[arg(short, long)]
    force: bool,

    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
}

/// Copy a snapshot out of a bucket, and of a layer its parents, and verify every byte.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap pull s3://bucket/team/guest guest.snap
  snap pull https://host/folder/guest.snap guest.snap --json")]
pub(crate) struct PullArgs {
    /// The address of the name, or of an object.
    #[arg(value_name = "URL")]
    url: PathBuf,

    /// The file to write. It appears when it is complete and verified. Parents are written beside it.
    #[arg(value_name = "FILE")]
    out: PathBuf,

    /// Replace the file if it exists. Parents are never replaced.
    #[arg(short, long)]
    force: bool,

    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn push(args: &PushArgs, session: &Session) -> Result<()> {
    let url = bucket::url(&args.url)?;
    let snapshot = match args.input.open() {
        // The parents of the layer may be in the bucket.
        Err(error) if lacks_parent(&error) => {
            objects::open_over(&args.input.file, &url, &bucket::options()?).map_err(|other| {
                Error::new(other).context(format!("{error:#}; and in the bucket"))
            })?
        }
        opened => opened?,
    };
    let bar = Bar::of_transfer("pushing", session.quiet, &session.interrupt);
    let retry = Retry::default();
    let pushed = objects::push(&snapshot, &url, args.force, retry, &|p| bar.update(p));
    let pushed = pushed.map_err(to_error)?;
    drop(bar);
    let layer = |(layer, header): (&objects::PushedLayer, &snapfmt::Header)| {
        json!({
            "url": layer.url.to_string(),
            "id": header.id.to_string(),
            "file_bytes": layer.file_bytes,
            "was_there": layer.was_there,
        })
    };
    let layers: Vec<_> = pushed.layers.iter().zip(snapshot.headers()).map(layer).collect();
    if args.json {
        let result = json!({ "name": url.to_string(), "layers": layers });
        print_json(&result)?;
    } else if !session.quiet {
        let sent = pushed.layers.iter().filter(|layer| !layer.was_there);
        let bytes = sent.clone().map(|layer| layer.file_bytes).sum();
        let (sent, all) = (sent.count(), pushed.layers.len());
        print_line(format_args!("{url}: {sent} of {all} files sent, {}", size::human(bytes)))?;
    }
    Ok(())
}

pub(crate) fn pull(args: &PullArgs, session: &Session) -> Result<()> {
    let url = bucket::url(&args.url)?;
    refuse_existing(&args.out, args.force)?;
    let bar = Bar::of_transfer("pulling", session.quiet, &session.interrupt);
    let existing = if args.force { Existing::Replace } else { Existing::Keep };
    let pulled = objects::pull(&url, &args.out, existing, &bucket::options()?, &|p| bar.update(p));
    let pulled = pulled.map_err(to_error)?;
    drop(bar);
    if args.json {
        let layer = |layer: &objects::Pulled| {
            json!({
                "file": layer.path,
                "file_bytes": layer.file_bytes,
                "was_there": layer.was_there,
            })
        };
        let layers: Vec<_> = pulled.iter().map(layer).collect();
        let result = json!({ "url": url.to_string(), "layers": layers });
        print_json(&result)?;
    } else if !session.quiet {
        for layer in &pulled {
            let (path, bytes) = (layer.path.display(), size::human(layer.file_bytes));
            match layer.was_there {
                true => print_line(format_args!("{path}: was there"))?,
                false => print_line(format_args!("{path}: {bytes}, verified"))?,
            }
        }
    }
    Ok(())
}

/// Whether a parent is not among the files.
fn lacks_parent(error: &Error) -> bool {
    let read = error.chain().find_map(|cause| cause.downcast_ref::<ReadError>());
    matches!(read.map(ReadError::root), Some(ReadError::Chain(ChainError::NotFound { .. })))
}

/// Converts an error, so that an interrupt has the exit code that it has in all commands.
fn to_error(error: ObjectError) -> Error {
    match error {
        ObjectError::Cancelled => Interrupted.into(),
        ObjectError::Write(error) => error.into(),
        error => error.into(),
    }
}
