//! In place of `age.rs` in a build without the feature `age`: it has no options.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Result, bail};
use snapfmt::KeyProvider;

#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct AgeArgs {}

impl AgeArgs {
    pub(super) fn is_given(&self) -> bool {
        false
    }

    pub(super) fn is_given_to_write(&self) -> bool {
        false
    }

    pub(super) fn provider(&self) -> Result<Arc<dyn KeyProvider>> {
        bail!("this build has no feature `age`")
    }

    pub(super) fn check_writes(&self) -> Result<()> {
        Ok(())
    }

    pub(super) fn files(&self) -> impl Iterator<Item = &PathBuf> {
        std::iter::empty()
    }

    pub(super) fn check_children_can_read(&self) -> Result<()> {
        Ok(())
    }

    pub(super) fn options(&self) -> impl Iterator<Item = (&'static str, OsString)> {
        std::iter::empty()
    }
}

#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct NewAgeArgs {}

impl NewAgeArgs {
    pub(super) fn args(&self) -> AgeArgs {
        AgeArgs::default()
    }
}

pub(crate) fn is_age_file(_: &[u8]) -> bool {
    false
}
