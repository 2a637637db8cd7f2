//! The capabilities that a role keeps.

use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use crate::role::Role;

/// Removes all capabilities of this thread that `role` does not keep. It gains none.
pub(crate) fn drop_for(role: Role) -> io::Result<()> {
    let held = capabilities(None)?;
    let kept = held.permitted & kept(role);
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
    match role {
        Role::Vcpu | Role::Pager | Role::Devices | Role::Signals | Role::Main => priorities,
        // Reading needs none: the files are open.
        Role::Mount => CapabilitySet::empty(),
        // A guest whose page cannot be loaded is killed, also that of another user (--allow-uid). Messages that are read
        // from a userfaultfd go to locked memory. A userfaultfd for memory that clones share needs SYS_PTRACE where there
        // is no /dev/userfaultfd.
        Role::Server => {
            priorities | CapabilitySet::KILL | CapabilitySet::IPC_LOCK | CapabilitySet::SYS_PTRACE
        }
        // Snapshots are written into folders of other users. A snapshot of a running guest needs a userfaultfd, too.
        Role::Writer => {
            priorities
                | CapabilitySet::DAC_OVERRIDE
                | CapabilitySet::DAC_READ_SEARCH
                | CapabilitySet::FOWNER
                | CapabilitySet::SYS_PTRACE
        }
    }
}
