//! Descriptors of the crate `userfaultfd`.

use std::os::fd::{AsFd, OwnedFd};

use super::descriptor::Uffd;
use super::foreign::{ForeignUffd, ForeignUffdError};

impl TryFrom<userfaultfd::Uffd> for Uffd {
    type Error = ForeignUffdError;

    /// As [`Uffd::from_fd`], for [`PagerBuilder::userfaultfd`](crate::PagerBuilder::userfaultfd).
    fn try_from(uffd: userfaultfd::Uffd) -> Result<Uffd, ForeignUffdError> {
        Uffd::from_fd(duplicate(&uffd)?)
    }
}

impl ForeignUffd {
    /// As [`ForeignUffd::new`], for [`PagerBuilder::foreign`](crate::PagerBuilder::foreign).
    ///
    /// # Errors
    /// [`ForeignUffdError`].
    ///
    /// # Safety
    /// As for [`ForeignUffd::new`].
    pub unsafe fn from_userfaultfd(
        uffd: userfaultfd::Uffd,
    ) -> Result<ForeignUffd, ForeignUffdError> {
        let duplicate = duplicate(&uffd)?;
        // SAFETY: the contract is the same.
        unsafe { ForeignUffd::new(duplicate) }
    }
}

/// A duplicate of the descriptor: `into_raw_fd` of release 0.9 returns one that its `Drop` has closed.
fn duplicate(uffd: &userfaultfd::Uffd) -> Result<OwnedFd, ForeignUffdError> {
    uffd.as_fd()
        .try_clone_to_owned()
        .map_err(|error| ForeignUffdError::System { what: "duplicate", error })
}
