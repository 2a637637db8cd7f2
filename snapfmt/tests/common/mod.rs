//! Functions of several tests for the bytes of a file.

use snapfmt::{PageEntry, Snapshot};

/// The bytes with zeros in the fields that differ in each file: its id, its time, their checksum, and the checksums of
/// chunks, which begin with its id.
pub(crate) fn without_id(mut bytes: Vec<u8>) -> Vec<u8> {
    let mut chunks = Vec::new();
    let snapshot = Snapshot::new(&bytes[..]).unwrap();
    snapshot
        .for_each_entry(0..snapshot.leaf_count(), |_, entry| {
            if let PageEntry::Data { chunk, .. } = entry {
                chunks.push(chunk.offset() as usize);
            }
            Ok(())
        })
        .unwrap();
    for at in chunks {
        bytes[at + 12..at + 16].fill(0);
        bytes[at + 28..at + 32].fill(0);
    }
    for own in [40..56, 144..168, 4092..4096] {
        bytes[own].fill(0);
    }
    bytes
}
