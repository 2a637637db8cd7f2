//! Where the nodes of a tree are.
//!
//! The tree is BLAKE3's own, cut off at groups of 16 KiB. Its file is the length of the data in 8 bytes (little-endian),
//! then the nodes from the root down, each before its left subtree, and that before its right subtree. A node is the
//! chaining values of its two children, 32 bytes each. Bao's outboard encoding with groups of 16 chunks is the same.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use blake3::hazmat::left_subtree_len;

/// Bytes that are hashed together: the unit in which a file is checked.
pub const GROUP_BYTES: u64 = 16 << 10;
/// Bytes of data whose nodes are read together: those of 64 groups.
pub(crate) const BLOCK_BYTES: u64 = 1 << 20;
pub(crate) const NODE_BYTES: u64 = 64;
/// Most bytes of nodes in a block.
pub(crate) const BLOCK_NODES_BYTES: usize = (63 * NODE_BYTES) as usize;
/// Bytes before the first node.
pub(crate) const LENGTH_BYTES: u64 = 8;

/// The name of the tree of a file: its name with `.b3t` behind it.
pub fn tree_path(file: &Path) -> PathBuf {
    with_suffix(file, ".b3t")
}

pub(crate) fn with_suffix(file: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(file);
    name.push(suffix);
    name.into()
}

/// The length of the tree of a file of `len_bytes`.
pub fn tree_bytes(len_bytes: u64) -> u64 {
    LENGTH_BYTES + Subtree::whole(len_bytes).nodes() * NODE_BYTES
}

/// A part of the data that is one subtree.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subtree {
    /// Its first byte in the data.
    pub(crate) start: u64,
    /// Its length in bytes.
    pub(crate) len: u64,
    /// The number of its node, if it has one.
    pub(crate) node: u64,
}

impl Subtree {
    pub(crate) fn whole(len: u64) -> Self {
        Self { start: 0, len, node: 0 }
    }

    pub(crate) fn end(&self) -> u64 {
        self.start + self.len
    }

    pub(crate) fn is_group(&self) -> bool {
        self.len <= GROUP_BYTES
    }

    /// The number of nodes in it: one less than groups.
    pub(crate) fn nodes(&self) -> u64 {
        self.len.div_ceil(GROUP_BYTES).saturating_sub(1)
    }

    /// Where its node is in the file of the tree.
    pub(crate) fn node_offset(&self) -> u64 {
        LENGTH_BYTES + self.node * NODE_BYTES
    }

    /// Its two halves. It must have more than one group.
    pub(crate) fn halves(&self) -> (Self, Self) {
        let left = left_subtree_len(self.len);
        let left = Self { start: self.start, len: left, node: self.node + 1 };
        let right =
            Self { start: left.end(), len: self.len - left.len, node: left.node + left.nodes() };
        (left, right)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_nodes_have_their_own_place() {
        for len in [0, 1, GROUP_BYTES, GROUP_BYTES + 1, 5 * GROUP_BYTES, 3 * BLOCK_BYTES + 77] {
            let mut seen = Vec::new();
            let mut next_byte = 0;
            let mut left = vec![Subtree::whole(len)];
            while let Some(subtree) = left.pop() {
                if subtree.is_group() {
                    assert_eq!(subtree.start, next_byte);
                    next_byte = subtree.end();
                    continue;
                }
                seen.push(subtree.node);
                let (first, second) = subtree.halves();
                assert_eq!(first.len % GROUP_BYTES, 0);
                left.extend([second, first]);
            }
            assert_eq!(next_byte, len);
            assert_eq!(seen, (0..Subtree::whole(len).nodes()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn blocks_begin_at_their_multiples() {
        let mut left = vec![Subtree::whole(7 * BLOCK_BYTES + 12345)];
        while let Some(subtree) = left.pop() {
            if subtree.len <= BLOCK_BYTES {
                assert_eq!(subtree.start % BLOCK_BYTES, 0);
                assert!(subtree.nodes() * NODE_BYTES <= BLOCK_NODES_BYTES as u64);
            } else {
                left.extend(<[Subtree; 2]>::from(subtree.halves()));
            }
        }
    }
}
