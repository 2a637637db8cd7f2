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

    pub(crate) fn id(&self) -> &str {
        &self.id
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
        // Without the right to list a bucket, the answer for a deleted object is 403.
        let is_gone =
            matches!(failure, Meaning::Replaced | Meaning::NotFound | Meaning::Credentials(403));
        if is_gone && self.version.is_some() && self.id().is_none() {
            self.gone = Some(failure);
            return None;
        }
        match failure {
            // The bucket has kept no version, or it may not be read. After 403 the credentials may have expired, and
            // the current object is requested again.
            Meaning::NotFound | Meaning::Credentials(_) => self.gone.take().or(Some(failure)),
            failure => Some(failure),
        }
    }

    /// Notes a valid answer of this version: further requests are for the version, too, if this one was.
    pub(crate) fn answered(&mut self, opened: Option<&Version>) {
        if self.version.is_none() {
            self.version = opened.cloned();
        }
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
        wanted.answered(version.as_ref());
        assert_eq!(Wanted::new(version).id().as_deref(), Some("v1"));
    }

    #[test]
    fn a_version_that_an_answer_gives_is_known_for_the_next_request() {
        let mut wanted = Wanted::new(None);
        wanted.answered(Version::new(Some("v1".into())).as_ref());
        assert_eq!(wanted.id(), None);
        assert_eq!(wanted.failed(Meaning::NotFound), None);
        assert_eq!(wanted.id().as_deref(), Some("v1"));
    }

    #[test]
    fn a_refused_object_may_be_deleted_or_the_credentials_may_have_expired() {
        let version = Version::new(Some("v1".into()));
        let mut wanted = Wanted::new(version.clone());
        for _ in 0..2 {
            assert_eq!(wanted.failed(Meaning::Credentials(403)), None);
            assert_eq!(wanted.id().as_deref(), Some("v1"));
            // The version is refused, too: the caller reads the credentials again, and requests the current object.
            let refused = Meaning::Credentials(403);
            assert_eq!(wanted.failed(refused.clone()), Some(refused));
            assert_eq!(wanted.id(), None);
        }
        // Neither is a deleted object.
        for expired in [Meaning::Credentials(400), Meaning::Credentials(401)] {
            let mut wanted = Wanted::new(version.clone());
            assert_eq!(wanted.failed(expired.clone()), Some(expired));
        }
        // An expired token is also noticed when the version is requested already.
        assert_eq!(wanted.failed(Meaning::Credentials(403)), None);
        wanted.answered(version.as_ref());
        let mut wanted = Wanted::new(version);
        let expired = Meaning::Credentials(403);
        assert_eq!(wanted.failed(expired.clone()), Some(expired));
        assert_eq!(wanted.id().as_deref(), Some("v1"));
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
