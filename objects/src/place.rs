//! Where the parent of a layer may be. A layer may come from somebody else, and must not choose the servers and files
//! that this host reads.

use snapfmt::ParentHint;

use crate::error::ObjectError;
use crate::options::Options;
use crate::url::{ObjectUrl, Scheme};

/// The address that a layer has for its parent, if it has one.
pub(crate) fn address_in(hint: &ParentHint) -> Option<ObjectUrl> {
    hint.path.to_str()?.parse().ok()
}

/// Checks that the parent of `layer` may be read at `parent`: it is in the same bucket or registry as `child`, or the
/// caller allows it. `child` is `None` for a layer in a file, which is in no bucket.
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

/// Whether two addresses are of the same bucket or registry. Of files, the folder is the bucket.
fn is_same_place(child: &ObjectUrl, parent: &ObjectUrl) -> bool {
    let folder = |url: &ObjectUrl| {
        let folder = url.key().as_ref().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{folder}/")
    };
    (child.scheme(), child.host()) == (parent.scheme(), parent.host())
        && (child.scheme() != Scheme::File || folder(parent).starts_with(&folder(child)))
}
