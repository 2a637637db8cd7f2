//! Namespaces: what a process shares with the others of its host, and no more after this.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;

use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::process::{getegid, geteuid};
use rustix::thread::{CapabilitySet, UnshareFlags, capabilities, unshare_unsafe};

use crate::SetupError;

/// Gives this process mounts, System V IPC and a host name of its own. It must have only one thread. A process without
/// CAP_SYS_ADMIN gets a user namespace of its own, in which it has it. Mounts are the same as before until the root
/// changes.
///
/// # Errors
/// The kernel refuses it.
pub fn separate() -> Result<(), SetupError> {
    if needs_user_namespace()? {
        new_user_namespace()?;
    }
    unshare(UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS)
        .map_err(SetupError::of("make namespaces for mounts, IPC and the host name"))?;
    // What this process mounts is not mounted for others.
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(SetupError::of("make mounts private"))
}

/// Whether [`separate`] makes a user namespace. All other users and groups then have the same number in it, that of
/// /proc/sys/kernel/overflowuid: the process cannot tell them apart.
///
/// # Errors
/// The kernel does not tell the capabilities of the calling thread.
pub fn needs_user_namespace() -> Result<bool, SetupError> {
    let held = capabilities(None).map_err(SetupError::of("read capabilities"))?;
    Ok(!held.effective.contains(CapabilitySet::SYS_ADMIN))
}

/// The user keeps its ids in it.
fn new_user_namespace() -> Result<(), SetupError> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    unshare(UnshareFlags::NEWUSER).map_err(SetupError::of(
        "make a user namespace, which is needed without CAP_SYS_ADMIN (snap doctor says for which users this host allows one)",
    ))?;
    let write = |file: &str, text: &str| {
        fs::write(file, text).map_err(SetupError::of("map the user into its namespace"))
    };
    write("/proc/self/setgroups", "deny")?;
    write("/proc/self/uid_map", &format!("{uid} {uid} 1\n"))?;
    write("/proc/self/gid_map", &format!("{gid} {gid} 1\n"))
}

/// Makes a network namespace without any interface that is up. Threads move into it with [`crate::enter`].
///
/// # Errors
/// The kernel refuses it.
pub fn empty_network() -> Result<OwnedFd, SetupError> {
    // A thread of its own, because this one may still need the host's network: a tap belongs to one.
    let make = || {
        unshare(UnshareFlags::NEWNET)?;
        File::open("/proc/thread-self/ns/net").map(OwnedFd::from)
    };
    let started = std::thread::Builder::new().name("network".into()).spawn(make);
    let made = started.and_then(|thread| {
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread has panicked")))
    });
    made.map_err(SetupError::of("make a network namespace"))
}

fn unshare(namespaces: UnshareFlags) -> io::Result<()> {
    // SAFETY: the table of descriptors stays shared, because no caller gives UnshareFlags::FILES.
    unsafe { unshare_unsafe(namespaces) }.map_err(Into::into)
}
