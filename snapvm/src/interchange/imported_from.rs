//! Which virtual machine monitor a snapshot is of.

use snapfmt::{SectionKind, Snapshot};

use super::cloud_hypervisor::STATE;
use super::firecracker::VMSTATE;
use super::qemu::MAPPED_RAM;

/// The virtual machine monitor that the snapshot was imported from, and that can run it: `Firecracker`,
/// `Cloud Hypervisor` or `QEMU`. `None` for a snapshot of this library, and for a flat image of memory.
#[must_use]
pub fn imported_from(snapshot: &Snapshot) -> Option<&'static str> {
    let kept = [(VMSTATE, "Firecracker"), (STATE, "Cloud Hypervisor"), (MAPPED_RAM, "QEMU")];
    let has = |tag| {
        snapshot
            .sections()
            .iter()
            .any(|section| (section.kind, section.tag) == (SectionKind::STATE, tag))
    };
    kept.into_iter().find(|(file, _)| has(file.tag())).map(|(_, program)| program)
}
