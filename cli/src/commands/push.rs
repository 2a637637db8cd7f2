//! `snap push` and `snap pull`: copy snapshots to and from a bucket.

use std::path::{Path, PathBuf};

use anyhow::{Error, Result, anyhow};
use objects::{ObjectError, ObjectUrl, Pushed, Retry};
use serde_json::json;
use snapfmt::{Existing, ReadError, Snapshot};

use crate::bucket::{self, to_error};
use crate::input::{self, Input, ParentArgs, lacks_parent, refuse_existing};
use crate::keys::KeyArgs;
use crate::progress::Bar;
use crate::session::Session;
use crate::size;
use crate::stdout::{print_json, print_line};

/// Copy a snapshot, and of a layer its parents, into a bucket or registry, and give it a name there.
///
/// Objects that are there already are not sent again. The name appears last, when all of its objects are complete.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap push guest.snap s3://bucket/team/guest
  snap push guest.snap oci://registry.example/team/guest:v1
  snap push layer.snap file:///srv/snapshots/guest-2")]
pub(crate) struct PushArgs {
    #[command(flatten)]
    input: Input,

    /// The name, as an address: s3://, gs://, az://, oci:// or file://.
    #[arg(value_name = "URL")]
    url: PathBuf,

    /// Replace the name if it is taken. Objects are never replaced.
    #[arg(short, long)]
    force: bool,

    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
}

/// Copy a snapshot out of a bucket or registry, and of a layer its parents, and verify every byte.
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

    /// Read a parent in another bucket or repository if its address begins with this.
    #[arg(long = "allow-parents-from", value_name = "URL")]
    parents_from: Vec<String>,

    #[command(flatten)]
    keys: KeyArgs,

    /// Replace the file if it exists. Parents are never replaced.
    #[arg(short, long)]
    force: bool,

    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn push(args: &PushArgs, session: &Session) -> Result<()> {
    let url = bucket::url(&args.url)?;
    let input = &args.input;
    let (snapshot, pushed) = send(&input.file, &input.parents, &url, args.force, session)?;
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
    let options = bucket::options_from(&args.parents_from)?.keys(args.keys.provider()?);
    let pulled = objects::pull(&url, &args.out, existing, &options, &|p| bar.update(p));
    let pulled = pulled.map_err(to_error)?;
    drop(bar);
    if args.json {
        let layer = |layer: &objects::Pulled| {
            json!({
                "file": crate::path_text::of(&layer.path),
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

/// Pushes a file, and the parents of a layer, which may be in the bucket.
pub(crate) fn send(
    file: &Path,
    parents: &ParentArgs,
    url: &ObjectUrl,
    force: bool,
    session: &Session,
) -> Result<(Snapshot, Pushed)> {
    let snapshot = match input::open(file, parents) {
        // Its parents would be read in the bucket, unchecked.
        Err(error) if is_incomplete(&error) && !parents.trust.is_required() => {
            let options = bucket::options_from(&parents.from)?.keys(parents.keys.provider()?);
            let failed = |other| match other {
                ObjectError::ParentElsewhere { layer, parent, .. } => anyhow!(
                    "{layer}: its parent is in another place, {parent}: pull it with snap pull, and give it with \
                     --parent"
                ),
                other => to_error(other).context(format!("{error:#}; and in the bucket")),
            };
            objects::open_over(file, Some(url), &options).map_err(failed)?
        }
        opened => opened?,
    };
    let bar = Bar::of_transfer("pushing", session.quiet, &session.interrupt);
    let pushed = objects::push(&snapshot, url, force, Retry::default(), &|p| bar.update(p));
    let pushed = pushed.map_err(|error| match error {
        ObjectError::NameTaken { url } => {
            anyhow!("{url}: the name is taken; give --force to replace it")
        }
        other => to_error(other),
    });
    Ok((snapshot, pushed?))
}

/// Whether a parent is not among the files, or is an object in a place that is not allowed.
fn is_incomplete(error: &Error) -> bool {
    error.chain().any(|cause| {
        let elsewhere = matches!(cause.downcast_ref(), Some(ObjectError::ParentElsewhere { .. }));
        elsewhere || cause.downcast_ref::<ReadError>().is_some_and(lacks_parent)
    })
}
