//! Computes the root of a file and writes its tree.

use std::ops::ControlFlow;
use std::path::Path;

use blake3::hazmat::{Mode, merge_subtrees_root};
use snapfmt::{Existing, Output, ReadAt};

use crate::error::TreeError;
use crate::root::Root;
use crate::shape::{BLOCK_BYTES, BLOCK_NODES_BYTES, NODE_BYTES, Subtree};
use crate::values::{Pair, Value, value_of_group, value_of_node};

/// Called with the number of bytes that are hashed, and that of all; `Break` cancels.
pub type OnHashed<'a> = &'a dyn Fn(u64, u64) -> ControlFlow<()>;

/// Computes the root of a file and writes its tree to `tree`, which appears whole or not at all.
///
/// It reads the file once, in order, and takes 1 MiB of memory and 72 bytes for each MiB of the file.
///
/// # Errors
/// [`TreeError`]
pub fn write_tree(
    file: &dyn ReadAt,
    tree: &Path,
    existing: Existing,
    progress: OnHashed<'_>,
) -> Result<Root, TreeError> {
    let len = file.len_bytes().map_err(TreeError::File)?;
    let in_order = file.in_order();
    let mut builder = Builder {
        file: in_order.as_deref().unwrap_or(file),
        len,
        output: Output::create(tree, existing)?,
        upper: Vec::new(),
        progress,
        bytes: Vec::new(),
    };
    builder.output.write_at(&len.to_le_bytes(), 0)?;
    let whole = Subtree::whole(len);
    let root = if whole.is_group() {
        builder.read(whole)?;
        blake3::hash(&builder.bytes)
    } else {
        let (left, right) = builder.pair(whole)?;
        merge_subtrees_root(&left, &right, Mode::Hash)
    };
    for (offset, node) in std::mem::take(&mut builder.upper) {
        builder.output.write_at(&node, offset)?;
    }
    builder.output.publish()?;
    Ok(Root(root))
}

struct Builder<'a> {
    file: &'a dyn ReadAt,
    len: u64,
    output: Output,
    /// Nodes above the blocks, with their offsets. They are known only after those below them, and written last, so that
    /// the others are written in order.
    upper: Vec<(u64, [u8; NODE_BYTES as usize])>,
    progress: OnHashed<'a>,
    /// The data of the present block.
    bytes: Vec<u8>,
}

impl Builder<'_> {
    /// The values of the two halves of a subtree.
    fn pair(&mut self, subtree: Subtree) -> Result<Pair, TreeError> {
        if subtree.len <= BLOCK_BYTES {
            self.read(subtree)?;
            let mut nodes = Vec::with_capacity(BLOCK_NODES_BYTES);
            let pair = pair_in_block(&self.bytes, subtree, &mut nodes);
            self.output.write_at(&nodes, subtree.node_offset())?;
            return Ok(pair);
        }
        let (left, right) = subtree.halves();
        let pair = (self.value(left)?, self.value(right)?);
        self.upper.push((subtree.node_offset(), bytes_of(&pair)));
        Ok(pair)
    }

    fn value(&mut self, subtree: Subtree) -> Result<Value, TreeError> {
        if subtree.is_group() {
            self.read(subtree)?;
            return Ok(value_of_group(&self.bytes, subtree.start));
        }
        Ok(value_of_node(&self.pair(subtree)?))
    }

    fn read(&mut self, subtree: Subtree) -> Result<(), TreeError> {
        self.bytes.resize(subtree.len as usize, 0);
        self.file.read_exact_at(&mut self.bytes, subtree.start).map_err(TreeError::File)?;
        match (self.progress)(subtree.end(), self.len) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(TreeError::Cancelled),
        }
    }
}

/// The values of the halves of a subtree within a block whose data is `bytes`. Appends all of its nodes.
fn pair_in_block(bytes: &[u8], subtree: Subtree, nodes: &mut Vec<u8>) -> Pair {
    let place = nodes.len();
    nodes.resize(place + NODE_BYTES as usize, 0);
    let (left, right) = subtree.halves();
    let (of_left, of_right) = bytes.split_at(left.len as usize);
    let mut value = |bytes: &[u8], half: Subtree| match half.is_group() {
        true => value_of_group(bytes, half.start),
        false => value_of_node(&pair_in_block(bytes, half, nodes)),
    };
    let pair = (value(of_left, left), value(of_right, right));
    nodes[place..][..NODE_BYTES as usize].copy_from_slice(&bytes_of(&pair));
    pair
}

fn bytes_of((left, right): &Pair) -> [u8; NODE_BYTES as usize] {
    let mut node = [0; NODE_BYTES as usize];
    node[..32].copy_from_slice(left);
    node[32..].copy_from_slice(right);
    node
}
