//! Firecracker: any bytes as a vmstate.

use std::os::unix::fs::FileExt;

use crc::{CRC_64_REDIS, Crc};
use snapvm::interchange::{
    Export, ExportFormat, Import, ImportError, MemoryImage, VMSTATE, has_async_page_faults,
    imported_from,
};

use super::place::{self, MOST_BYTES};

/// Input: one byte, of which bit 0 says whether the right checksum follows the rest; then the vmstate.
pub(crate) fn firecracker(input: &[u8]) {
    let Some((flags, vmstate)) = input.split_first() else { return };
    let mut vmstate = vmstate.to_vec();
    if flags & 1 == 1 {
        let crc = Crc::<u64>::new(&CRC_64_REDIS).checksum(&vmstate);
        vmstate.extend(crc.to_le_bytes());
    }
    place::empty("state").write_all_at(&vmstate, 0).expect("it can be written");
    let import = match import(1 << 20) {
        Err(ImportError::OtherVmstate { expected_bytes, .. }) if expected_bytes <= MOST_BYTES => {
            import(expected_bytes)
        }
        other => other,
    };
    let Ok(import) = import else { return };
    let snapshot = place::written(&import);
    assert_eq!(imported_from(&snapshot), Some("Firecracker"));
    let export = Export::new(&snapshot, ExportFormat::Firecracker).expect("it has all data");
    assert!(place::content(&export, &snapshot, "vmstate") == vmstate, "the export differs");
    let on = has_async_page_faults(&snapshot).expect("it is readable");
    let Ok(without) = export.without_async_page_faults() else { return };
    let changed = place::content(&without, &snapshot, "vmstate");
    assert_eq!(changed.len(), vmstate.len());
    assert_eq!(changed != vmstate, on, "it changes what is on, and nothing else");
}

fn import(memory_bytes: u64) -> Result<Import, ImportError> {
    place::fill(&place::empty("memory"), memory_bytes);
    let vmstate = VMSTATE.read(&place::path("state"))?;
    Import::firecracker(MemoryImage::open(&place::path("memory"))?, vmstate, None)
}
