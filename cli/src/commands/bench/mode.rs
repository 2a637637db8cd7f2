//! The ways to restore a guest that are compared.

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
    /// Run immediately; pages are loaded when they are touched, and ahead of that while the guest waits for them.
    Lazy,
    /// The same, but nothing is loaded ahead.
    #[value(name = "lazy-off")]
    LazyOff,
    /// The same, of a file with the working set at the front, which is loaded before it is touched.
    #[value(name = "lazy+hot")]
    LazyHot,
    /// The same, of a file that was trained on other work, which is a wrong hint. For the demo guest.
    #[value(name = "lazy+other")]
    LazyOther,
    /// As a clone of a `snap serve` that has served another one before (with --cold: none).
    Shared,
}

impl Mode {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Eager => "eager",
            Self::Mmap => "mmap",
            Self::Lazy => "lazy",
            Self::LazyOff => "lazy-off",
            Self::LazyHot => "lazy+hot",
            Self::LazyOther => "lazy+other",
            Self::Shared => "shared",
        }
    }

    /// Whether pages are loaded before they are touched.
    pub(super) fn prefetches(self) -> bool {
        matches!(self, Self::LazyHot | Self::LazyOther)
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
