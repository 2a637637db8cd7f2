//! Options of the pager that several commands have.

use clap::ValueEnum;
use pager::FailurePolicy;
use snapvm::Prefetch;

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum OnError {
    /// Poison the page: the guest stops with a message when it touches it.
    Poison,
    /// Kill the process that owns the memory immediately.
    Kill,
}

impl From<OnError> for FailurePolicy {
    fn from(policy: OnError) -> FailurePolicy {
        match policy {
            OnError::Poison => FailurePolicy::Poison,
            OnError::Kill => FailurePolicy::Kill,
        }
    }
}

/// What is loaded ahead of the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum PrefetchArg {
    /// Nothing.
    Off,
    /// The pages of the file's working set, if it has one.
    #[default]
    Hot,
    /// These, and then all other pages, as with `--populate full`.
    All,
}

impl From<PrefetchArg> for Prefetch {
    fn from(arg: PrefetchArg) -> Prefetch {
        match arg {
            PrefetchArg::Off => Prefetch::Off,
            PrefetchArg::Hot => Prefetch::Hot,
            PrefetchArg::All => Prefetch::All,
        }
    }
}
