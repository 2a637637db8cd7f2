//! Another user and group for the threads of a process.
//!
//! Each thread changes its own: setresuid(3) would interrupt all others to do it for them, and those that are jailed already
//! may not.

use std::io;

use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, Gid, Uid, capabilities, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

/// The user and the group that a thread changes to. Supplementary groups are dropped with either.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The user id, if it changes.
    pub uid: Option<u32>,
    /// The group id, if it changes.
    pub gid: Option<u32>,
}

impl Identity {
    /// Whether the calling thread may change to it.
    ///
    /// # Errors
    /// The kernel does not tell the thread's capabilities, or it lacks CAP_SETUID or CAP_SETGID.
    pub fn check(self) -> io::Result<()> {
        let lacks = |name| {
            let message =
                format!("this process lacks {name}: start it as root, or without --uid and --gid");
            Err(io::Error::new(io::ErrorKind::PermissionDenied, message))
        };
        let held = capabilities(None)?.effective;
        match self {
            Self { uid: None, gid: None } => Ok(()),
            // Groups are dropped with it, too.
            _ if !held.contains(CapabilitySet::SETGID) => lacks("CAP_SETGID"),
            Self { uid: Some(_), .. } if !held.contains(CapabilitySet::SETUID) => {
                lacks("CAP_SETUID")
            }
            _ => Ok(()),
        }
    }

    /// Changes the calling thread, which has the capabilities `held`. One that has been started by a thread that has
    /// changed lacks those for it, and is already as it should be.
    pub(crate) fn apply(self, held: CapabilitySet) -> io::Result<()> {
        if self == Self::default() || !held.contains(CapabilitySet::SETGID) {
            return Ok(());
        }
        set_thread_groups(&[])?;
        if let Some(gid) = self.gid.map(Gid::from_raw) {
            set_thread_res_gid(gid, gid, gid)?;
        }
        if let Some(uid) = self.uid.map(Uid::from_raw) {
            set_thread_res_uid(uid, uid, uid)?;
        }
        // The change has cleared it, and then files of /proc/self would belong to root.
        set_dumpable_behavior(DumpableBehavior::Dumpable)?;
        Ok(())
    }
}
