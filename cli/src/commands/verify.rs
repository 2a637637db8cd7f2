//! `snap verify`: check every byte of a snapshot.

use std::num::NonZeroUsize;

use anyhow::{Context, Result};
use serde_json::json;

use super::stdout::print_line;
use super::{Input, Session};
use crate::progress::Bar;
use crate::size;

/// Check every byte of a snapshot: checksums, index, padding.
///
/// Of a layer's parents only that they are the right ones: verify each on its own.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    input: Input,

    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    let file = &args.input.file;
    let snapshot = args.input.open()?;
    let bar = Bar::new("verifying", session.quiet, &session.interrupt);
    let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let verified = snapshot
        .verify(threads, &|progress| bar.update(progress))
        .and_then(|verified| snapshot.metadata().map(|_| verified))
        .with_context(|| file.display().to_string())?;
    drop(bar);
    if args.json {
        let result = json!({
            "file": file,
            "ok": true,
            "file_bytes": verified.file_bytes,
            "chunks": verified.chunks,
            "stored_pages": verified.stored_pages,
            "data_pages": verified.data_pages,
        });
        print_line(serde_json::to_string_pretty(&result)?)?;
    } else if !session.quiet {
        print_line(format_args!(
            "{}: ok, {} in {} chunks",
            file.display(),
            size::human(verified.file_bytes),
            verified.chunks
        ))?;
    }
    Ok(())
}
