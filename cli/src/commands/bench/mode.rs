//! The ways to restore a guest that are measured against each other.

use std::fmt;

use clap::ValueEnum;
use serde::{Serialize, Serializer};

/// A way to restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(super) enum Mode {
    /// Read and decode all memory, then run.
    Eager,
    /// Map a raw image of the memory privately; the kernel reads what is touched.
    Mmap,
    /// Run at once; pages come from the snapshot when they are touched.
    Lazy,
    /// As a clone of a `snap serve` that has served another one before (with --cold: none).
    Shared,
}

impl Mode {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Eager => "eager",
            Self::Mmap => "mmap",
            Self::Lazy => "lazy",
            Self::Shared => "shared",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for Mode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}
