//! Where the parent of a layer may be. A layer may come from an untrusted source, and must not choose the servers and files
//! that this host reads.

use snapfmt::ParentHint;

use crate::error::ObjectError;
use crate::options::Options;
use crate::url::{ObjectUrl, Scheme};

/// The address that a layer has for its parent, if it has one.
pub(crate) fn address_in(hint: &ParentHint) -> Option<ObjectUrl> {
    hint.path.to_str()?.parse().ok()
}

/// Checks that the parent of `layer` may be read at `parent`: it is in the same bucket as `child`, or the caller allows
/// it. `child` is `None` for a layer in a file, which is in no bucket.
pub(crate) fn check_place(
    layer: &str,
    child: Option<&ObjectUrl>,
    parent: &ObjectUrl,
    options: &Options,
) -> Result<(), ObjectError> {
    let is_allowed = child.is_some_and(|child| is_same_place(child, parent))
        || options.parents_from.iter().any(|prefix| prefix.has(parent));
    match is_allowed {
        true => Ok(()),
        false => Err(ObjectError::ParentElsewhere {
            layer: layer.to_owned(),
            parent: parent.to_string(),
        }),
    }
}

/// Whether two addresses are of the same bucket. Of files, the folder is the bucket; of a registry, which many users may
/// share, the repository.
fn is_same_place(child: &ObjectUrl, parent: &ObjectUrl) -> bool {
    let folder = |url: &ObjectUrl| {
        let folder = url.key().as_ref().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{folder}/")
    };
    (child.scheme(), child.host()) == (parent.scheme(), parent.host())
        && match child.scheme() {
            Scheme::File => folder(parent).starts_with(&folder(child)),
            Scheme::Oci => child.repository() == parent.repository(),
            _ => true,
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_a_server_a_folder_or_a_repository_is_one_place() {
        let same = |child: &str, parent: &str| {
            is_same_place(&child.parse().unwrap(), &parent.parse().unwrap())
        };
        assert!(same("s3://bucket/a/b", "s3://bucket/c"));
        assert!(!same("s3://bucket/a", "s3://other/a"));
        assert!(!same("s3://bucket/a", "gs://bucket/a"));
        assert!(same("https://host/a", "https://host/b/c"));
        assert!(!same("https://host/a", "https://host:8443/a"));
        assert!(!same("https://host/a", "http://host/a"));
        assert!(same("file:///srv/a", "file:///srv/b/c"));
        assert!(!same("file:///srv/a/b", "file:///srv/b"));
        assert!(!same("file:///srv/a/b", "file:///srv/ab/b"));
        assert!(same("oci://host/team/guest:a", "oci://host/team/guest:b"));
        assert!(!same("oci://host/team/guest:a", "oci://host/team/other:a"));
    }
}
