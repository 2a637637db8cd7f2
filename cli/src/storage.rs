//! How a snapshot is to be stored: the options that all writing commands share.

use std::num::NonZeroUsize;

use anyhow::{Result, bail};
use snapfmt::{Codec, Existing, WriteOptions};

use crate::keys::KeyArgs;

/// How the new file is stored.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Storage {
    /// How pages are stored: zstd, lz4 or raw.
    #[arg(long, default_value = "zstd")]
    pub(crate) codec: Codec,

    /// Level of zstd, from -7 (fast) to 22 (small); 1 by default.
    #[arg(long, allow_negative_numbers = true,
          value_parser = clap::value_parser!(i32).range(-7..=22))]
    pub(crate) level: Option<i32>,

    /// Pages stored together: small chunks are read fast, large ones compress better.
    #[arg(long, value_name = "PAGES", default_value_t = 8,
          value_parser = clap::value_parser!(u16).range(1..=512))]
    pub(crate) chunk_pages: u16,

    /// Store every page, also equal ones.
    #[arg(long)]
    pub(crate) no_dedupe: bool,

    /// Threads that compress; as many as CPUs by default.
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,

    /// Replace the output if it exists.
    #[arg(long, short)]
    pub(crate) force: bool,
}

impl Storage {
    /// The writer's options; refuses a level for a codec that has none. With keys, the file is sealed.
    pub(crate) fn options(&self, keys: &KeyArgs) -> Result<WriteOptions> {
        if self.level.is_some() && self.codec != Codec::Zstd {
            bail!("--level goes with --codec zstd: {} has no levels", self.codec);
        }
        keys.check_writes()?;
        let defaults = WriteOptions::default();
        let existing = if self.force { Existing::Replace } else { Existing::Keep };
        Ok(defaults
            .clone()
            .codec(self.codec)
            .level(self.level.unwrap_or(defaults.level))
            .chunk_pages(self.chunk_pages.into())
            .dedupe(!self.no_dedupe)
            .threads(self.threads.unwrap_or(defaults.threads))
            .existing(existing)
            .seal(keys.provider()?))
    }
}

impl Default for Storage {
    fn default() -> Self {
        Self {
            codec: Codec::Zstd,
            level: None,
            chunk_pages: 8,
            no_dedupe: false,
            threads: None,
            force: false,
        }
    }
}
