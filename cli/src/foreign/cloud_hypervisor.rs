//! Cloud Hypervisor: a folder with `config.json`, `state.json` and `memory-ranges`.
//!
//! `memory-ranges` is guest memory as it is, in the order of a table in `state.json`: its node
//! `memory-manager` has the state of the memory manager as JSON in a string, and in it
//! `memory_ranges`, a list of guest-physical addresses and lengths (`MemoryManagerSnapshotData`
//! in Cloud Hypervisor's `vmm/src/memory_manager.rs`, `MemoryRangeTable` in
//! `vm-migration/src/protocol.rs`). The order is not always that of the addresses.

use std::ops::Range;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::state::ForeignState;

pub(crate) const CONFIG: ForeignState = ForeignState {
    name: "config.json",
    tag: u32::from_le_bytes(*b"CHcf"),
    what: "Cloud Hypervisor config.json",
};

pub(crate) const STATE: ForeignState = ForeignState {
    name: "state.json",
    tag: u32::from_le_bytes(*b"CHst"),
    what: "Cloud Hypervisor state.json",
};

pub(crate) const MEMORY: &str = "memory-ranges";

// Only what is needed of state.json; everything else in it is skipped.

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

/// The guest-physical ranges in `memory-ranges`, in the order of the file. Empty ones, which a table may have, have no bytes
/// there and are left out.
pub(crate) fn ranges(state_json: &[u8]) -> Result<Vec<Range<u64>>> {
    let state: State = serde_json::from_slice(state_json)
        .context("no memory manager in it, in the shape that Cloud Hypervisor writes now")?;
    let manager: MemoryManager =
        serde_json::from_str(&state.snapshots.memory_manager.snapshot_data.state)
            .context("the memory manager's state has no memory ranges")?;
    let mut entries = manager.memory_ranges.data;
    entries.retain(|entry| entry.length > 0);
    if entries.is_empty() {
        bail!("its table of memory ranges is empty: guest memory was not stored with it");
    }
    let to_range = |entry: &Entry| {
        let end = entry.gpa.checked_add(entry.length).context("a memory range ends above 2^64")?;
        Ok(entry.gpa..end)
    };
    entries.iter().map(to_range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn empty_ranges_are_passed_over() {
        let table = r#"{"memory_ranges":{"data":[{"gpa":4096,"length":0},{"gpa":0,"length":4096},
            {"gpa":18446744073709551615,"length":0}]}}"#;
        assert_eq!(ranges(&state(table)).unwrap(), [0..4096]);
    }

    #[test]
    fn what_is_no_state_is_refused() {
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
