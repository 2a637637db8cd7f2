//! Sets of userfaultfd features.

use linux_raw_sys::general as kernel;

/// A set of `UFFD_FEATURE_*` bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub(super) u64);

impl Features {
    /// No feature.
    pub const NONE: Features = Features(0);
    /// [`super::Message::Remove`] is sent.
    pub const EVENT_REMOVE: Features = Features(kernel::UFFD_FEATURE_EVENT_REMOVE as u64);
    /// [`super::Message::Unmap`] is sent.
    pub const EVENT_UNMAP: Features = Features(kernel::UFFD_FEATURE_EVENT_UNMAP as u64);
    /// [`super::Message::Fork`] is sent.
    pub const EVENT_FORK: Features = Features(kernel::UFFD_FEATURE_EVENT_FORK as u64);
    /// [`super::Message::Remap`] is sent.
    pub const EVENT_REMAP: Features = Features(kernel::UFFD_FEATURE_EVENT_REMAP as u64);
    /// Page faults name the faulting thread.
    pub const THREAD_ID: Features = Features(kernel::UFFD_FEATURE_THREAD_ID as u64);
    /// Page faults carry the exact address and not that of the page.
    pub const EXACT_ADDRESS: Features = Features(kernel::UFFD_FEATURE_EXACT_ADDRESS as u64);
    /// [`super::Uffd::poison`] works (Linux 6.6).
    pub const POISON: Features = Features(kernel::UFFD_FEATURE_POISON as u64);
    /// Memory of hugetlbfs may be registered.
    pub const MISSING_HUGETLBFS: Features = Features(kernel::UFFD_FEATURE_MISSING_HUGETLBFS as u64);
    /// Shared memory (memfd) may be registered.
    pub const MISSING_SHMEM: Features = Features(kernel::UFFD_FEATURE_MISSING_SHMEM as u64);

    /// Faults of write-protected pages are reported, for anonymous memory (Linux 5.7).
    pub const WRITE_PROTECT: Features = Features(kernel::UFFD_FEATURE_PAGEFAULT_FLAG_WP as u64);
    /// The same for shared memory (memfd) and hugetlbfs (Linux 5.19).
    pub const WRITE_PROTECT_SHMEM: Features =
        Features(kernel::UFFD_FEATURE_WP_HUGETLBFS_SHMEM as u64);
    /// Pages of anonymous memory that are not there yet can be write-protected, too (Linux 6.4).
    pub const WRITE_PROTECT_UNPOPULATED: Features =
        Features(kernel::UFFD_FEATURE_WP_UNPOPULATED as u64);

    /// Whether all of `other` is in this set.
    pub const fn contains(self, other: Features) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both sets.
    #[must_use]
    pub const fn with(self, other: Features) -> Features {
        Features(self.0 | other.0)
    }

    /// What is in both sets.
    #[must_use]
    pub const fn common(self, other: Features) -> Features {
        Features(self.0 & other.0)
    }

    /// What is in this set and not in `other`.
    #[must_use]
    pub const fn without(self, other: Features) -> Features {
        Features(self.0 & !other.0)
    }

    /// The kernel's bits.
    pub const fn bits(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_behave_as_sets() {
        let both = Features::POISON.with(Features::THREAD_ID);
        assert!(both.contains(Features::POISON) && both.contains(Features::NONE));
        assert!(!Features::POISON.contains(both));
        assert_eq!(both.without(Features::POISON), Features::THREAD_ID);
        assert_eq!(both.common(Features::POISON), Features::POISON);
    }
}
