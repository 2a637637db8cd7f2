//! Limits of resources.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::SetupError;

/// Lowers limits of this process for good: no core dumps, and no more open files than the present limit allows.
///
/// The length of files is not limited, because stdout may be one, and memory that is shared counts as one. Nor is the
/// number of processes: the limit counts all of the user, and the lists of calls allow only threads.
///
/// # Errors
/// As setrlimit(2).
pub fn lower_limits() -> Result<(), SetupError> {
    let lower = || -> io::Result<()> {
        setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
        let files = getrlimit(Resource::Nofile).current;
        setrlimit(Resource::Nofile, Rlimit { current: files, maximum: files })?;
        Ok(())
    };
    lower().map_err(SetupError::of("lower the limits of resources"))
}
