//! Cloud Hypervisor: a folder with `config.json`, `state.json` and `memory-ranges`.
//!
//! `memory-ranges` is guest memory in the order of a table in `state.json`. The node
//! `memory-manager` of that file contains the state of the memory manager, as JSON in a string.
//! In it, `memory_ranges` lists guest-physical addresses and lengths (`MemoryManagerSnapshotData`
//! in Cloud Hypervisor's `vmm/src/memory_manager.rs`, `MemoryRangeTable` in
//! `vm-migration/src/protocol.rs`). The addresses are not always in ascending order.

use std::ops::Range;
use std::path::Path;

use serde::Deserialize;

use super::error::{ImportError, LayoutError};
use super::foreign_file::ForeignFile;
use super::layout::ImageLayout;

/// `config.json` of a Cloud Hypervisor snapshot.
pub const CONFIG: ForeignFile = ForeignFile {
    name: "config.json",
    tag: u32::from_le_bytes(*b"CHcf"),
    what: "Cloud Hypervisor config.json",
};

/// `state.json` of a Cloud Hypervisor snapshot.
pub const STATE: ForeignFile = ForeignFile {
    name: "state.json",
    tag: u32::from_le_bytes(*b"CHst"),
    what: "Cloud Hypervisor state.json",
};

pub(super) const MEMORY: &str = "memory-ranges";

// These types have only the needed fields of state.json. All others are skipped.

#[derive(Deserialize)]
struct State {
    snapshots: Nodes,
}

#[derive(Deserialize)]
struct Nodes {
    #[serde(rename = "memory-manager")]
    memory_manager: Node,
}

#[derive(Deserialize)]
struct Node {
    snapshot_data: Data,
}

#[derive(Deserialize)]
struct Data {
    /// JSON in a string.
    state: String,
}

#[derive(Deserialize)]
struct MemoryManager {
    memory_ranges: Table,
}

#[derive(Deserialize)]
struct Table {
    data: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    gpa: u64,
    length: u64,
}

/// The layout of `memory-ranges`, from the `state.json` at `path`.
pub(super) fn layout(path: &Path, state_json: &[u8]) -> Result<ImageLayout, ImportError> {
    let ranges = ranges(path, state_json)?;
    ImageLayout::new(&ranges).map_err(|error| ImportError::Layout { path: path.to_owned(), error })
}

/// The guest-physical ranges in `memory-ranges`, in the order of the file. The table may have empty ranges. They have
/// no bytes in the file and are left out.
fn ranges(path: &Path, state_json: &[u8]) -> Result<Vec<Range<u64>>, ImportError> {
    let bad = |what| move |error| ImportError::StateJson { path: path.to_owned(), what, error };
    let state: State = serde_json::from_slice(state_json)
        .map_err(bad("it has no memory manager in the form that Cloud Hypervisor writes now"))?;
    let manager: MemoryManager =
        serde_json::from_str(&state.snapshots.memory_manager.snapshot_data.state)
            .map_err(bad("the memory manager's state has no memory ranges"))?;
    let mut entries = manager.memory_ranges.data;
    entries.retain(|entry| entry.length > 0);
    if entries.is_empty() {
        return Err(ImportError::NoRanges { path: path.to_owned() });
    }
    let to_range = |entry: &Entry| Some(entry.gpa..entry.gpa.checked_add(entry.length)?);
    let ranges: Option<Vec<_>> = entries.iter().map(to_range).collect();
    ranges.ok_or_else(|| ImportError::Layout { path: path.to_owned(), error: LayoutError::TooLong })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(json: &[u8]) -> Result<Vec<Range<u64>>, ImportError> {
        super::ranges(Path::new("state.json"), json)
    }

    fn state(memory_manager: &str) -> Vec<u8> {
        let node = serde_json::json!({ "snapshot_data": { "state": memory_manager } });
        serde_json::json!({ "snapshots": { "memory-manager": node } }).to_string().into_bytes()
    }

    #[test]
    fn ranges_keep_the_order_of_the_file() {
        let table = r#"{"memory_ranges":{"data":[{"gpa":4294967296,"length":8192},
            {"gpa":0,"length":4096}]},"boot_ram":12288}"#;
        let four_gib = 4 << 30;
        assert_eq!(ranges(&state(table)).unwrap(), [four_gib..four_gib + 8192, 0..4096]);
    }

    #[test]
    fn empty_ranges_are_left_out() {
        let table = r#"{"memory_ranges":{"data":[{"gpa":4096,"length":0},{"gpa":0,"length":4096},
            {"gpa":18446744073709551615,"length":0}]}}"#;
        assert_eq!(ranges(&state(table)).unwrap(), [0..4096]);
    }

    #[test]
    fn other_json_is_refused() {
        for bad in [
            &b""[..],
            b"{}",
            b"[1]",
            &state("{}"),
            &state("not json"),
            &state(r#"{"memory_ranges":{"data":[]}}"#),
            &state(r#"{"memory_ranges":{"data":[{"gpa":0,"length":0}]}}"#),
            &state(r#"{"memory_ranges":{"data":[{"gpa":18446744073709551615,"length":2}]}}"#),
            &state(r#"{"memory_ranges":{"data":[{"gpa":-1,"length":2}]}}"#),
        ] {
            assert!(ranges(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }
}
