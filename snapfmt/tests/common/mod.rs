//! What several tests do with the bytes of a file.

use snapfmt::{PageEntry, Snapshot};

/// All but what differs with each writing: the header, and the checksums of chunks, which begin with the file's id.
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
    bytes.split_off(4096)
}
