//! The capabilities that a role keeps.

use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use crate::role::Role;

/// Those of this thread.
pub(crate) fn held() -> io::Result<CapabilitySets> {
    Ok(capabilities(None)?)
}

/// Removes all capabilities of this thread, but those that `role` keeps if it may keep any. It gains none.
pub(crate) fn drop_for(role: Role, may_keep: bool) -> io::Result<()> {
    let held = held()?;
    let kept = if may_keep { held.permitted & kept(role) } else { CapabilitySet::empty() };
    if held.permitted == kept {
        return Ok(());
    }
    let sets = CapabilitySets {
        effective: held.effective & kept,
        permitted: kept,
        inheritable: held.inheritable & kept,
    };
    Ok(set_capabilities(None, sets)?)
}

fn kept(role: Role) -> CapabilitySet {
    // Priorities of threads: SCHED_IDLE is left only with it.
    let priorities = CapabilitySet::SYS_NICE;
    // Sockets and hidden files are removed from folders of other users; the guest's vsock connects to sockets of theirs.
    let folders = CapabilitySet::DAC_OVERRIDE;
    match role {
        Role::Vcpu | Role::Pager => priorities,
        Role::Devices | Role::Signals | Role::Main => priorities | folders,
        // Reading needs none: the files are open.
        Role::Mount => CapabilitySet::empty(),
        // A guest whose page cannot be loaded is killed, also that of another user (--allow-uid). Messages that are read
        // from a userfaultfd go to locked memory. A userfaultfd for memory that clones share needs SYS_PTRACE where there
        // is no /dev/userfaultfd.
        Role::Server | Role::Fork => {
            priorities
                | folders
                | CapabilitySet::KILL
                | CapabilitySet::IPC_LOCK
                | CapabilitySet::SYS_PTRACE
        }
        // Snapshots are written into folders of other users. A snapshot of a running guest needs a userfaultfd, too.
        Role::Writer => {
            priorities
                | folders
                | CapabilitySet::DAC_READ_SEARCH
                | CapabilitySet::FOWNER
                | CapabilitySet::SYS_PTRACE
        }
    }
}
