//! The roles of threads.

use std::fmt;

/// What a thread does, and so which system calls it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It runs a vCPU.
    Vcpu,
    /// It loads pages of guest memory: it answers faults, loads ahead, or watches the threads that do.
    Pager,
    /// It serves the guest's virtio devices.
    Devices,
    /// It waits for signals.
    Signals,
    /// It owns the guest, and may start all other threads, but opens no file for writing.
    Main,
    /// As [`Role::Main`], and it writes snapshots.
    Writer,
    /// It serves memory of guests in other processes, or keeps what another server needs for that.
    Server,
    /// As [`Role::Server`], and it connects to the guest that is forked.
    Fork,
    /// It answers readers of a mounted snapshot, by FUSE, or loads pages for them. It mounts and unmounts nothing.
    Mount,
}

impl Role {
    /// All roles.
    pub const ALL: [Role; 9] = [
        Role::Vcpu,
        Role::Pager,
        Role::Devices,
        Role::Signals,
        Role::Main,
        Role::Writer,
        Role::Server,
        Role::Fork,
        Role::Mount,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Role::Vcpu => "vCPU",
            Role::Pager => "pager",
            Role::Devices => "devices",
            Role::Signals => "signals",
            Role::Main => "main",
            Role::Writer => "writer",
            Role::Server => "server",
            Role::Fork => "fork",
            Role::Mount => "mount",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
