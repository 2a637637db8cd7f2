//! Storage whose bytes are checked against a root whenever they are read.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use snapfmt::{Permanent, ReadAt, Stamp, WhenHere};

use crate::error::{HashError, TreeError};
use crate::root::Root;
use crate::shape::{BLOCK_BYTES, BLOCK_NODES_BYTES, GROUP_BYTES, NODE_BYTES, Subtree, tree_bytes};
use crate::values::{Expected, Value};

/// Reads of up to this many bytes, with the rest of their groups, are read elsewhere and copied from there: that is
/// cheaper than a second system call.
const MOST_COPIED_BYTES: u64 = 128 << 10;

thread_local! {
    /// Where a thread reads small parts to check them.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Storage of which every read is checked against a root.
///
/// A read takes the groups of 16 KiB that it touches, hashes them, and compares them with the tree: also bytes that were
/// read before, because the storage may have been changed since. The tree may be changed too: of it only the values of
/// blocks of 1 MiB are kept, about 50 bytes for each block that was read.
///
/// A wrong byte or node is an [`io::Error`] of kind `InvalidData` with a [`HashError`] inside, for which no retry helps:
/// see [`Permanent`].
pub struct HashedStorage<R> {
    storage: R,
    tree: Arc<Tree>,
}

impl<R: ReadAt> HashedStorage<R> {
    /// Storage, its tree and its root. This reads the length in the tree, and the last group of the storage with the nodes
    /// above it: so the length is checked too.
    ///
    /// # Errors
    /// [`TreeError`]
    pub fn open(storage: R, tree: impl ReadAt + 'static, root: Root) -> Result<Self, TreeError> {
        let found = storage.len_bytes().map_err(TreeError::File)?;
        let mut len = [0; 8];
        tree.read_exact_at(&mut len, 0).map_err(TreeError::Tree)?;
        let len = u64::from_le_bytes(len);
        if len != found {
            return Err(TreeError::Length { expected: len, found });
        }
        let (expected, found) = (tree_bytes(len), tree.len_bytes().map_err(TreeError::Tree)?);
        if expected != found {
            return Err(TreeError::TreeLength { file_bytes: len, expected, found });
        }
        let tree = Tree { nodes: Box::new(tree), root, len, blocks: RwLock::default() };
        let opened = Self { storage, tree: Arc::new(tree) };
        // A wrong length is possible only with a wrong last group: the length of the data is part of its hash.
        opened.read(&mut [], len.saturating_sub(1)).map_err(TreeError::File)?;
        Ok(opened)
    }

    /// The storage below, whose reads are not checked.
    pub fn unchecked(&self) -> &R {
        &self.storage
    }

    /// Reads within the length. An empty read checks the group at `offset`.
    fn read(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        loop {
            let block = self.tree.block(offset)?;
            let len = (block.subtree.end() - offset).min(buf.len() as u64);
            let (now, rest) = buf.split_at_mut(len as usize);
            self.read_in(&block, now, offset)?;
            if rest.is_empty() {
                return Ok(());
            }
            (buf, offset) = (rest, offset + len);
        }
    }

    /// Reads within a block.
    fn read_in(&self, block: &Block, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset + buf.len() as u64;
        // An empty read checks a group too.
        let span = self.groups_of(&(offset..end.max(offset + 1)));
        if span.end - span.start <= MOST_COPIED_BYTES {
            // It is taken and not borrowed: the storage below may need it too.
            let mut scratch = SCRATCH.take();
            scratch.resize((span.end - span.start) as usize, 0);
            let read = self.read_groups(block, &mut scratch, span.start);
            if read.is_ok() {
                buf.copy_from_slice(part(&mut scratch, span.start, &(offset..end)));
            }
            SCRATCH.set(scratch);
            return read;
        }
        // Large reads are not copied, except for the groups at their ends.
        let whole = whole_groups(offset..end, self.tree.len);
        self.read_groups(block, part(buf, offset, &whole), whole.start)?;
        for edge in [offset..whole.start, whole.end..end] {
            if !edge.is_empty() {
                self.read_in(block, part(buf, offset, &edge), edge.start)?;
            }
        }
        Ok(())
    }

    /// Reads whole groups of a block and checks them.
    fn read_groups(&self, block: &Block, bytes: &mut [u8], start: u64) -> io::Result<()> {
        let nodes = self.tree.nodes_of(block.subtree)?;
        self.storage.read_exact_at(bytes, start)?;
        let wanted = start..start + bytes.len() as u64;
        self.tree.groups(block, &nodes, &wanted, &mut |group, expected| {
            self.check(group, expected, part(bytes, start, &(group.start..group.end())))
        })
    }

    /// Checks the bytes of a group. If they are wrong and only a copy of other storage, they are read once more.
    fn check(&self, group: Subtree, expected: Expected, bytes: &mut [u8]) -> io::Result<()> {
        if expected.is_group(bytes, group.start) {
            return Ok(());
        }
        if self.storage.refetch(group.start..group.end()) {
            self.storage.read_exact_at(bytes, group.start)?;
            if expected.is_group(bytes, group.start) {
                return Ok(());
            }
        }
        Err(wrong(HashError::Data { start: group.start, len: group.len, root: self.tree.root }))
    }

    /// The groups that bytes are in.
    fn groups_of(&self, bytes: &Range<u64>) -> Range<u64> {
        let start = bytes.start / GROUP_BYTES * GROUP_BYTES;
        let end = bytes.end.checked_next_multiple_of(GROUP_BYTES).unwrap_or(u64::MAX);
        start..end.min(self.tree.len).max(start)
    }
}

/// The whole groups in a range; the last group of the data may be shorter than others.
fn whole_groups(bytes: Range<u64>, len: u64) -> Range<u64> {
    let start = bytes.start.next_multiple_of(GROUP_BYTES);
    let end = if bytes.end == len { len } else { bytes.end / GROUP_BYTES * GROUP_BYTES };
    start..end.max(start)
}

/// The part of a buffer, which begins at `offset` of the data, with these bytes of the data. They must be in it.
fn part<'b>(buf: &'b mut [u8], offset: u64, bytes: &Range<u64>) -> &'b mut [u8] {
    &mut buf[(bytes.start - offset) as usize..(bytes.end - offset) as usize]
}

fn wrong(error: HashError) -> io::Error {
    Permanent::error(io::ErrorKind::InvalidData, error)
}

/// A tree in a file that is not trusted, and its root.
struct Tree {
    nodes: Box<dyn ReadAt>,
    root: Root,
    len: u64,
    /// The values of blocks whose paths to the root were checked, by their starts.
    blocks: RwLock<HashMap<u64, Value>>,
}

/// At most 1 MiB of the data: a subtree whose nodes are read together.
struct Block {
    subtree: Subtree,
    expected: Expected,
}

impl Tree {
    /// The block with this byte, and its value.
    fn block(&self, offset: u64) -> io::Result<Block> {
        let start = offset / BLOCK_BYTES * BLOCK_BYTES;
        let known = self.blocks.read().unwrap_or_else(PoisonError::into_inner).get(&start).copied();
        let (mut subtree, mut expected) = (Subtree::whole(self.len), Expected::Root(self.root));
        if subtree.len <= BLOCK_BYTES {
            return Ok(Block { subtree, expected });
        }
        while subtree.len > BLOCK_BYTES {
            let (left, right) = subtree.halves();
            let is_left = offset < right.start;
            if known.is_none() {
                let mut node = [0; NODE_BYTES as usize];
                self.read(&mut node, subtree.node_offset())?;
                let values = self.halves(&expected, &node, subtree)?;
                expected = Expected::Value(if is_left { values.0 } else { values.1 });
            }
            subtree = if is_left { left } else { right };
        }
        match (known, expected) {
            (Some(value), _) => expected = Expected::Value(value),
            (None, Expected::Value(value)) => {
                self.blocks.write().unwrap_or_else(PoisonError::into_inner).insert(start, value);
            }
            (None, Expected::Root(_)) => {}
        }
        Ok(Block { subtree, expected })
    }

    /// The nodes of a block.
    fn nodes_of(&self, block: Subtree) -> io::Result<[u8; BLOCK_NODES_BYTES]> {
        let mut nodes = [0; BLOCK_NODES_BYTES];
        let len = (block.nodes() * NODE_BYTES) as usize;
        if len > 0 {
            self.read(&mut nodes[..len], block.node_offset())?;
        }
        Ok(nodes)
    }

    fn read(&self, node: &mut [u8], offset: u64) -> io::Result<()> {
        let read = self.nodes.read_exact_at(node, offset);
        read.map_err(|error| io::Error::new(error.kind(), format!("the hash tree: {error}")))
    }

    /// Calls `of_group` with the groups that have bytes of `wanted`, and their values.
    fn groups(
        &self,
        block: &Block,
        nodes: &[u8; BLOCK_NODES_BYTES],
        wanted: &Range<u64>,
        of_group: &mut dyn FnMut(Subtree, Expected) -> io::Result<()>,
    ) -> io::Result<()> {
        // At most one subtree of each of the six levels waits here.
        let mut left = vec![(block.subtree, block.expected)];
        while let Some((subtree, expected)) = left.pop() {
            if subtree.is_group() {
                of_group(subtree, expected)?;
                continue;
            }
            let place = ((subtree.node - block.subtree.node) * NODE_BYTES) as usize;
            let mut node = [0; NODE_BYTES as usize];
            node.copy_from_slice(&nodes[place..][..NODE_BYTES as usize]);
            let values = self.halves(&expected, &node, subtree)?;
            let (first, second) = subtree.halves();
            for (half, value) in [(second, values.1), (first, values.0)] {
                if half.start < wanted.end && wanted.start < half.end() {
                    left.push((half, Expected::Value(value)));
                }
            }
        }
        Ok(())
    }

    fn halves(
        &self,
        expected: &Expected,
        node: &[u8; NODE_BYTES as usize],
        subtree: Subtree,
    ) -> io::Result<(Value, Value)> {
        expected.halves(node).ok_or_else(|| {
            wrong(HashError::Node { offset: subtree.node_offset(), root: self.root })
        })
    }
}

impl<R: ReadAt> ReadAt for HashedStorage<R> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.tree.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if buf.is_empty() { Ok(()) } else { self.read(buf, offset) }
    }

    /// The length that was checked when it was opened.
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.tree.len)
    }

    fn file(&self) -> Option<&File> {
        self.storage.file()
    }

    fn stamp(&self) -> io::Result<Option<Stamp>> {
        self.storage.stamp()
    }

    fn expect(&self, bytes: Range<u64>) {
        self.storage.expect(self.groups_of(&bytes));
    }

    fn ahead_bytes(&self) -> u64 {
        self.storage.ahead_bytes()
    }

    fn expect_random(&self) {
        self.storage.expect_random();
    }

    fn is_cached(&self, offset: u64) -> Option<bool> {
        self.storage.is_cached(offset)
    }

    fn is_remote(&self) -> bool {
        self.storage.is_remote()
    }

    fn would_wait(&self, bytes: Range<u64>) -> bool {
        self.storage.would_wait(self.groups_of(&bytes))
    }

    fn when_here(&self, bytes: Range<u64>, here: WhenHere) {
        self.storage.when_here(self.groups_of(&bytes), here);
    }

    fn release(&self, bytes: Range<u64>) {
        self.storage.release(bytes);
    }

    fn in_order(&self) -> Option<Box<dyn ReadAt>> {
        let storage: Arc<dyn ReadAt> = Arc::from(self.storage.in_order()?);
        Some(Box::new(HashedStorage { storage, tree: Arc::clone(&self.tree) }))
    }

    fn refetch(&self, bytes: Range<u64>) -> bool {
        self.storage.refetch(self.groups_of(&bytes))
    }
}
