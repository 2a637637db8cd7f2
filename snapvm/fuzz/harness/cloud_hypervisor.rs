//! Cloud Hypervisor: any bytes as `state.json`.

use std::os::unix::fs::FileExt;

use serde_json::json;
use snapvm::interchange::{Export, ExportFormat, Import, ImportError, imported_from};

use super::place::{self, MOST_BYTES};

/// Input: one byte, of which bit 0 says whether the rest is the state of the memory manager, which is JSON in a string,
/// or all of `state.json`.
pub(crate) fn cloud_hypervisor(input: &[u8]) {
    let Some((flags, state)) = input.split_first() else { return };
    let mut state = state.to_vec();
    if flags & 1 == 1 {
        let Ok(inner) = std::str::from_utf8(&state) else { return };
        let node = json!({"snapshot_data": {"state": inner}});
        state = json!({"snapshots": {"memory-manager": node}}).to_string().into_bytes();
    }
    place::empty("state.json").write_all_at(&state, 0).expect("it can be written");
    place::empty("config.json").write_all_at(b"{}", 0).expect("it can be written");
    let import = match import(4096) {
        Err(ImportError::Length { expected_bytes, .. }) if expected_bytes <= MOST_BYTES => {
            import(expected_bytes)
        }
        other => other,
    };
    let Ok(import) = import else { return };
    let snapshot = place::written(&import);
    assert_eq!(imported_from(&snapshot), Some("Cloud Hypervisor"));
    let export = Export::new(&snapshot, ExportFormat::CloudHypervisor).expect("it has all data");
    for name in Import::cloud_hypervisor_files() {
        let original = std::fs::read(place::path(name)).expect("it can be read");
        assert!(place::content(&export, &snapshot, name) == original, "{name} differs");
    }
}

fn import(memory_bytes: u64) -> Result<Import, ImportError> {
    place::fill(&place::empty("memory-ranges"), memory_bytes);
    let state = place::path("state.json");
    Import::cloud_hypervisor(state.parent().expect("it has a folder"))
}
