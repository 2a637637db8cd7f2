//! Takes from each thread of a VMM the system calls and the capabilities that it does not need.
//!
//! Each thread has a [`Role`], and each role a list of allowed calls: see `table.rs`, which also has the reason for each.
//! A thread calls [`enter`] before it begins its work. Threads that it starts later inherit its list, and may only make
//! it shorter. A call that is not on the list ends the process with [`EXIT_CODE`], after one line on stderr that names
//! the thread, its role and the call.
//!
//! The filters are written as a search tree, not as a chain of comparisons, because the kernel runs a new filter for
//! each number of a call when it is installed. Measured for a chain of 66 calls: 0.3 ms.
#![deny(missing_docs)]

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("jail knows the system calls of Linux on x86_64 only");

mod capabilities;
mod files;
mod filter;
mod identity;
mod install;
mod limits;
mod names;
mod namespaces;
mod role;
mod root;
mod support;
mod table;
mod trap;

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::thread::{CapabilitySet, LinkNameSpaceType, move_into_link_name_space};

pub use files::{Access, Files, Rules};
pub use identity::Identity;
pub use limits::lower_limits;
pub use namespaces::{empty_network, needs_user_namespace, separate};
pub use role::Role;
pub use root::Root;
pub use support::{Support, support};
pub use trap::EXIT_CODE;

/// A thread could not be jailed. It must not begin its work.
#[derive(Debug, thiserror::Error)]
#[error("cannot jail a thread of the role {role}: {step}")]
#[non_exhaustive]
pub struct JailError {
    /// The role that the thread was to have.
    pub role: Role,
    /// The step that failed: the name of a system call.
    pub step: &'static str,
    /// The error of the system.
    pub source: io::Error,
}

/// What comes before the jail of the threads has failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot prepare the jail: cannot {what}")]
#[non_exhaustive]
pub struct SetupError {
    /// What was to be done.
    pub what: String,
    /// The error of the system.
    pub source: io::Error,
}

impl SetupError {
    fn of<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |error| Self { what: what.into(), source: error.into() }
    }
}

/// Makes the filter of a role, which [`enter`] otherwise makes when it is called for the first time.
pub fn prepare(role: Role) {
    filter::program(role);
}

/// What a thread loses besides system calls and capabilities. The default is nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits<'a> {
    /// It may name only these files.
    pub files: Option<&'a Rules>,
    /// It moves into this network namespace, of [`empty_network`].
    pub network: Option<&'a OwnedFd>,
    /// It changes to this user and group.
    pub identity: Identity,
}

/// Jails the calling thread: no new privileges, what `limits` takes away, no capabilities but those that the role needs,
/// and only the role's system calls. This cannot be undone. The first call in a process also installs the handler of
/// SIGSYS, which writes the message and ends the process.
///
/// # Errors
/// [`JailError`], for example on a kernel without seccomp. The thread may then have lost capabilities.
pub fn enter(role: Role, limits: Limits<'_>) -> Result<(), JailError> {
    let failed = |step| move |source: io::Error| JailError { role, step, source };
    trap::install_handler().map_err(failed("sigaction(2)"))?;
    rustix::thread::set_no_new_privs(true)
        .map_err(|e| failed("prctl(2), PR_SET_NO_NEW_PRIVS")(e.into()))?;
    let held = capabilities::held().map_err(failed("capget(2)"))?;
    if let Some(network) = limits.network
        // A thread that is started by one that has moved is already there, and may not move.
        && held.permitted.contains(CapabilitySet::SYS_ADMIN)
    {
        move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|e| failed("setns(2)")(e.into()))?;
    }
    if let Some(files) = limits.files {
        files.apply().map_err(failed("landlock_restrict_self(2)"))?;
    }
    limits.identity.apply(held.permitted).map_err(failed("setresuid(2)"))?;
    // Another user than root keeps those that it had.
    let kept = limits.identity.uid.is_none();
    capabilities::drop_for(role, kept).map_err(failed("capset(2)"))?;
    install::install(filter::program(role)).map_err(failed("seccomp(2)"))?;
    trap::set_role(role);
    Ok(())
}
