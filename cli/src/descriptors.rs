//! The limit of open files.

/// Each guest needs up to nine descriptors: as many as may be had without asking anybody.
pub(crate) fn allow_many_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // Refused: then fewer guests fit, and the others are told so.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}
