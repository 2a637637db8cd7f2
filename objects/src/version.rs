//! Versions of an object, in a bucket that keeps them: a guest continues with the opened version when the object is
//! replaced or deleted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::answer::Meaning;

/// The id of an object's version. The object is requested by it only after it was replaced or deleted, because a request
/// for a version needs a permission of its own.
#[derive(Clone, Debug)]
pub(crate) struct Version {
    id: String,
    is_past: Arc<AtomicBool>,
}

impl PartialEq for Version {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for Version {}

impl Version {
    /// `None`: the bucket keeps no versions, or does not say so.
    pub(crate) fn new(id: Option<String>) -> Option<Self> {
        // S3 gives this id to all objects that were written while the bucket kept no versions.
        let id = id.filter(|id| !id.is_empty() && id != "null")?;
        Some(Self { id, is_past: Arc::default() })
    }
}

/// The version that one request is for.
#[derive(Default)]
pub(crate) struct Wanted {
    version: Option<Version>,
    /// Why the current object is not the opened one. It is the result if its version cannot be read, either.
    gone: Option<Meaning>,
}

impl Wanted {
    pub(crate) fn new(version: Option<Version>) -> Self {
        Self { version, gone: None }
    }

    /// The id to request; `None`: the current object.
    pub(crate) fn id(&self) -> Option<String> {
        let version = self.version.as_ref()?;
        let is_past = self.gone.is_some() || version.is_past.load(Ordering::Relaxed);
        is_past.then(|| version.id.clone())
    }

    /// Notes a failure. `None`: the next request is for the version.
    pub(crate) fn failed(&mut self, failure: Meaning) -> Option<Meaning> {
        let is_gone = matches!(failure, Meaning::Replaced | Meaning::NotFound);
        if is_gone && self.version.is_some() && self.id().is_none() {
            self.gone = Some(failure);
            return None;
        }
        match failure {
            // The bucket has kept no version, or it may not be read.
            Meaning::NotFound | Meaning::Credentials(_) => self.gone.take().or(Some(failure)),
            failure => Some(failure),
        }
    }

    /// Notes a valid answer: further requests are for the version, too, if this one was.
    pub(crate) fn answered(&self) {
        if let (Some(version), Some(_)) = (&self.version, &self.gone) {
            version.is_past.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_requested_after_its_object_is_gone() {
        let version = Version::new(Some("v1".into()));
        let mut wanted = Wanted::new(version.clone());
        assert_eq!(wanted.id(), None);
        assert_eq!(wanted.failed(Meaning::Replaced), None);
        assert_eq!(wanted.id().as_deref(), Some("v1"));
        let busy = Meaning::Passing("busy".into());
        assert_eq!(wanted.failed(busy.clone()), Some(busy));
        assert_eq!(Wanted::new(version.clone()).id(), None);
        wanted.answered();
        assert_eq!(Wanted::new(version).id().as_deref(), Some("v1"));
    }

    #[test]
    fn without_the_version_the_first_failure_stays() {
        for second in [Meaning::NotFound, Meaning::Credentials(403)] {
            let mut wanted = Wanted::new(Version::new(Some("v1".into())));
            assert_eq!(wanted.failed(Meaning::Replaced), None);
            assert_eq!(wanted.failed(second), Some(Meaning::Replaced));
        }
        for id in [None, Some("null".to_owned())] {
            let mut wanted = Wanted::new(Version::new(id));
            assert_eq!(wanted.failed(Meaning::NotFound), Some(Meaning::NotFound));
        }
    }
}
