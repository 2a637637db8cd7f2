//! `snap verify`: checks every byte of a snapshot and of its parents.

use std::fs::File;
use std::num::NonZeroUsize;

use anyhow::{Context, Result};
use serde_json::json;
use snapfmt::Outline;

use crate::input::Input;
use crate::path_text;
use crate::progress::Bar;
use crate::session::Session;
use crate::size;
use crate::stdout::{print_json, print_line};

/// Check every byte of a snapshot, and of a layer's parents: checksums, index, padding.
///
/// Of a sealed file without its key, only the checksums are checked, and not its parents.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap verify guest.snap
  snap verify layer.snap --parent base.snap --json")]
pub(crate) struct Args {
    #[command(flatten)]
    input: Input,

    /// Check only the identity of a layer's parents, not their content.
    #[arg(long)]
    this_file_only: bool,

    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Checks a sealed file without its key.
fn verify_outline(outline: &Outline<File>, args: &Args, session: &Session) -> Result<()> {
    let file = &args.input.file;
    let bar = Bar::new("verifying", session.quiet, &session.interrupt);
    let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let verified = outline.verify(threads, &|progress| bar.update(progress));
    let verified = verified.with_context(|| file.display().to_string())?;
    drop(bar);
    if args.json {
        let layer = json!({
            "file": path_text::of(file),
            "id": outline.header().id.to_string(),
            "file_bytes": verified.file_bytes,
            "chunks": verified.chunks,
            "stored_pages": verified.stored_pages,
            "data_pages": null,
        });
        print_json(&json!({
            "file": path_text::of(file),
            "ok": true,
            "file_bytes": verified.file_bytes,
            "chunks": verified.chunks,
            "layers": [layer],
            "sealed": true,
        }))?;
    } else if !session.quiet {
        let (bytes, chunks) = (size::human(verified.file_bytes), verified.chunks);
        print_line(format_args!(
            "{}: sealed, checksums ok, {bytes} in {chunks} chunks; only the key can show that it is authentic",
            file.display()
        ))?;
        if outline.header().parent_id.is_some() {
            print_line("its parents were not checked: only the key shows which file they are in")?;
        }
    }
    Ok(())
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    if let Some(outline) = args.input.outline()? {
        return verify_outline(&outline, args, session);
    }
    let file = &args.input.file;
    let snapshot = args.input.open_to_verify()?;
    let bar = Bar::new("verifying", session.quiet, &session.interrupt);
    let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let update = |progress| bar.update(progress);
    let verified = match args.this_file_only {
        true => snapshot.verify(threads, &update).map(|verified| vec![verified]),
        false => snapshot.verify_chain(threads, &update),
    };
    let verified = verified
        .and_then(|verified| snapshot.metadata().map(|_| verified))
        .with_context(|| file.display().to_string())?;
    drop(bar);
    if args.json {
        let layers = verified.iter().zip(snapshot.headers()).zip(snapshot.paths());
        let layers = layers.map(|((verified, header), path)| {
            json!({
                "file": path.map(path_text::of),
                "id": header.id.to_string(),
                "file_bytes": verified.file_bytes,
                "chunks": verified.chunks,
                "stored_pages": verified.stored_pages,
                "data_pages": verified.data_pages,
            })
        });
        let result = json!({
            "file": path_text::of(file),
            "ok": true,
            "file_bytes": verified.iter().map(|layer| layer.file_bytes).sum::<u64>(),
            "chunks": verified.iter().map(|layer| layer.chunks).sum::<u64>(),
            "layers": layers.collect::<Vec<_>>(),
        });
        print_json(&result)?;
    } else if !session.quiet {
        for (verified, path) in verified.iter().zip(snapshot.paths()) {
            print_line(format_args!(
                "{}: ok, {} in {} chunks",
                path.unwrap_or(file).display(),
                size::human(verified.file_bytes),
                verified.chunks
            ))?;
        }
    }
    Ok(())
}
