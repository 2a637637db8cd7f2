//! The hashes inside of a tree: BLAKE3's chaining values.

use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root,
};

use crate::root::Root;
use crate::shape::NODE_BYTES;

/// The value of a subtree that is not the whole file.
pub(crate) type Value = ChainingValue;
/// The values of the halves of a subtree: its node.
pub(crate) type Pair = (Value, Value);

/// What a subtree must have.
#[derive(Clone, Copy)]
pub(crate) enum Expected {
    /// The whole file.
    Root(Root),
    /// A part of it.
    Value(Value),
}

impl Expected {
    pub(crate) fn is_group(&self, bytes: &[u8], start: u64) -> bool {
        match self {
            Self::Root(root) => blake3::hash(bytes) == root.0,
            Self::Value(value) => value_of_group(bytes, start) == *value,
        }
    }

    /// The values of its halves, if the node is right.
    pub(crate) fn halves(&self, node: &[u8; NODE_BYTES as usize]) -> Option<Pair> {
        let (mut left, mut right) = ([0; 32], [0; 32]);
        left.copy_from_slice(&node[..32]);
        right.copy_from_slice(&node[32..]);
        let pair = (left, right);
        let right = match self {
            Self::Root(root) => merge_subtrees_root(&pair.0, &pair.1, Mode::Hash) == root.0,
            Self::Value(value) => value_of_node(&pair) == *value,
        };
        right.then_some(pair)
    }
}

/// The value of a group that begins at this offset of a file of more than one.
pub(crate) fn value_of_group(bytes: &[u8], start: u64) -> Value {
    blake3::Hasher::new().set_input_offset(start).update(bytes).finalize_non_root()
}

pub(crate) fn value_of_node((left, right): &Pair) -> Value {
    merge_subtrees_non_root(left, right, Mode::Hash)
}
