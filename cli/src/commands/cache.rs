//! `snap cache`: lists and prunes the cache of objects.

use std::time::{Duration, SystemTime};

use anyhow::Result;
use serde_json::json;

use crate::foreign_text::one_line;
use crate::session::Session;
use crate::stdout::{print_json, print_line};
use crate::{bucket, size};

/// Look at the cache of objects, and make it smaller.
///
/// The cache is in the folder $SNAP_CACHE, otherwise snap in $XDG_CACHE_HOME or ~/.cache, and takes $SNAP_CACHE_BYTES
/// at most, otherwise 10 GiB.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap cache ls
  snap cache prune --to 1G")]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// List the objects, the one that was used last first.
    Ls {
        /// Print the list as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Remove objects that no process has open, the one that was not used for longest first.
    Prune {
        /// Stop when the cache takes so much or less.
        #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size::parse)]
        to: u64,
    },
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    let cache = bucket::cache()?;
    match args.what {
        What::Ls { json: true } => {
            let objects = cache.list()?.into_iter().map(|cached| {
                let used = cached.used.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                json!({
                    "url": cached.url,
                    "etag": cached.etag,
                    "object_bytes": cached.object_bytes,
                    "cached_bytes": cached.cached_bytes,
                    "used_unix_s": used.as_secs(),
                    "in_use": cached.in_use,
                })
            });
            let objects: Vec<_> = objects.collect();
            let result = json!({ "folder": cache.folder(), "objects": objects });
            print_json(&result)
        }
        What::Ls { json: false } => {
            for cached in cache.list()? {
                let age = cached.used.elapsed().unwrap_or(Duration::ZERO);
                let age = humantime::format_duration(Duration::from_secs(age.as_secs()));
                let state = if cached.in_use { "  in use" } else { "" };
                print_line(format_args!(
                    "{:>10} of {:>10}  {age} ago  {}{state}",
                    size::human(cached.cached_bytes),
                    size::human(cached.object_bytes),
                    one_line(&cached.url),
                ))?;
            }
            Ok(())
        }
        What::Prune { to } => {
            let removed = cache.prune(to)?;
            match session.quiet {
                true => Ok(()),
                false => print_line(format_args!("{} removed", size::human(removed))),
            }
        }
    }
}
