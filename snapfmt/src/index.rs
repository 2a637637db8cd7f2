//! One file's page index: a root that lists the leaves, and leaves of 512 page entries.
//!
//! A leaf that is not listed means 2 MiB of zeros, or in a layer 2 MiB that are as in the
//! parent. Leaves are read and checked when they are first needed; [`PageTable`] keeps them.
//!
//! [`PageTable`]: crate::page_table::PageTable

use std::ops::Range;

use crate::entry::{PageEntry, PageIndex};
use crate::error::{Corruption, Part, Problem, ReadError};
use crate::header::Header;
use crate::layer;
use crate::layout::{
    ENTRY_BYTES, INCOMPAT_LAYERED, LEAF_BYTES, LEAF_PAGES, LEAF_SPAN_BYTES, ROOT_RECORD_BYTES,
    SEALED_ROOT_RECORD_BYTES, TAG_BYTES, put, u32_at, u64_at,
};
use crate::read_at::ReadAt;
use crate::seal::{KeyError, Seal};
use crate::section::{Section, SectionKind};

/// Reader's side of one file's index.
pub(crate) struct Index {
    /// Number and checksum of the existing leaves, by ascending number.
    leaves: Vec<(u32, u32)>,
    /// Of a sealed file: the tag of each leaf.
    tags: Vec<[u8; TAG_BYTES]>,
    /// Offset of the first leaf in the file; the others follow in the order of the root.
    leaves_offset: u64,
    /// The bytes of the file that chunks may be in.
    chunks: Range<u64>,
    layered: bool,
}

impl Index {
    /// Bytes of a record of the root.
    pub(crate) fn record_bytes(sealed: bool) -> usize {
        if sealed { SEALED_ROOT_RECORD_BYTES } else { ROOT_RECORD_BYTES }
    }

    /// Parses a root with a correct checksum; that of a sealed file is decrypted.
    pub(crate) fn parse(
        root: &[u8],
        root_section: &Section,
        leaves_section: &Section,
        chunks_section: &Section,
        header: &Header,
    ) -> Result<Self, Corruption> {
        let (sealed, layered) = (header.is_sealed(), header.incompat & INCOMPAT_LAYERED != 0);
        let possible = header.memory_bytes.div_ceil(LEAF_SPAN_BYTES);
        let record_bytes = Self::record_bytes(sealed);
        let expected = (root.len() / record_bytes * LEAF_BYTES) as u64;
        if leaves_section.len != expected {
            let field = "length of index leaves";
            let problem = Problem::Field { field, expected, found: leaves_section.len };
            return Err(Corruption::new(Part::SectionTable, leaves_section.offset, problem));
        }
        let count = root.len() / record_bytes;
        let mut leaves = Vec::with_capacity(count);
        let mut tags = Vec::with_capacity(if sealed { count } else { 0 });
        let mut least = 0;
        for (position, record) in root.chunks_exact(record_bytes).enumerate() {
            let number = u32_at(record, 0);
            if !(least..possible).contains(&u64::from(number)) {
                let (field, max) = ("root.leaf", possible - 1);
                let problem = Problem::Range { field, min: least, max, found: number.into() };
                let at = root_section.offset + (position * record_bytes) as u64;
                let part = Part::Section(SectionKind::INDEX_ROOT);
                return Err(Corruption::new(part, at, problem));
            }
            least = u64::from(number) + 1;
            leaves.push((number, u32_at(record, 4)));
            if sealed {
                let mut tag = [0; TAG_BYTES];
                tag.copy_from_slice(&record[ROOT_RECORD_BYTES..]);
                tags.push(tag);
            }
        }
        let chunks = chunks_section.offset..chunks_section.end();
        Ok(Self { leaves, tags, leaves_offset: leaves_section.offset, chunks, layered })
    }

    /// The bytes of the file that chunks may be in.
    pub(crate) fn chunks(&self) -> Range<u64> {
        self.chunks.clone()
    }

    /// The offset of the first leaf in the file, if there is one.
    pub(crate) fn first_leaf_offset(&self) -> Option<u64> {
        self.leaves.first().map(|_| self.leaf_offset(0))
    }

    /// Numbers of the existing leaves, ascending.
    pub(crate) fn leaf_numbers(&self) -> impl ExactSizeIterator<Item = u32> {
        self.leaves.iter().map(|(number, _)| *number)
    }

    /// The entry of pages without a leaf.
    pub(crate) fn absent(&self) -> PageEntry {
        if self.layered { PageEntry::Parent } else { PageEntry::Zero }
    }

    /// Reads a leaf, decrypts it in a sealed file, and checks all of its entries; `None` if it does not exist.
    pub(crate) fn leaf(
        &self,
        storage: &dyn ReadAt,
        seal: Option<&Seal>,
        number: u32,
    ) -> Result<Option<Box<[u8; LEAF_BYTES]>>, ReadError> {
        let Some(position) = self.position(number) else { return Ok(None) };
        let (offset, part) = (self.leaf_offset(position), Part::Section(SectionKind::INDEX_LEAVES));
        let mut leaf = Box::new([0; LEAF_BYTES]);
        layer::healed(storage, offset..offset + LEAF_BYTES as u64, || {
            storage
                .read_exact_at(&mut leaf[..], offset)
                .map_err(|source| ReadError::io(part, offset, LEAF_BYTES as u64, source))?;
            let (expected, found) = (self.leaves[position].1, crc32fast::hash(&leaf[..]));
            if expected != found {
                return Err(
                    Corruption::new(part, offset, Problem::Checksum { expected, found }).into()
                );
            }
            let Some(seal) = seal else { return Ok(()) };
            // A sealed file that is opened has a tag for each leaf.
            let tag = self.tags.get(position).copied().unwrap_or_default();
            let opened = seal.open_leaf(number, offset, &mut leaf, &tag);
            Ok(opened.map_err(|problem| Corruption::new(part, offset, problem))?)
        })?;
        for at in (0..LEAF_BYTES).step_by(ENTRY_BYTES) {
            self.check(u64_at(&leaf[..], at))
                .map_err(|problem| Corruption::new(part, offset + at as u64, problem))?;
        }
        Ok(Some(leaf))
    }

    /// The offset of a leaf in the file.
    pub(crate) fn leaf_bytes(&self, number: u32) -> Option<Range<u64>> {
        let offset = self.leaf_offset(self.position(number)?);
        Some(offset..offset + LEAF_BYTES as u64)
    }

    /// Offset in the file of one page's entry, for messages.
    pub(crate) fn entry_offset(&self, page: PageIndex) -> u64 {
        let position = self.position(page.leaf()).unwrap_or(0);
        self.leaf_offset(position) + (page.position() * ENTRY_BYTES) as u64
    }

    fn position(&self, number: u32) -> Option<usize> {
        self.leaves.binary_search_by_key(&number, |(number, _)| *number).ok()
    }

    fn leaf_offset(&self, position: usize) -> u64 {
        self.leaves_offset + (position * LEAF_BYTES) as u64
    }

    fn check(&self, raw: u64) -> Result<(), Problem> {
        match PageEntry::decode(raw) {
            Ok(PageEntry::Zero) => Ok(()),
            Ok(PageEntry::Parent) if self.layered => Ok(()),
            Ok(PageEntry::Data { chunk, .. }) => {
                if self.chunks.start <= chunk.offset() && chunk.end() <= self.chunks.end {
                    return Ok(());
                }
                let Range { start: min, end: max } = self.chunks;
                Err(Problem::Range { field: "entry.chunk", min, max, found: chunk.offset() })
            }
            Ok(PageEntry::Parent) | Err(_) => Err(Problem::Entry { raw }),
        }
    }
}

/// Writer's side of the index: leaves in ascending order.
pub(crate) struct IndexBuilder {
    numbers: Vec<u32>,
    leaves: Vec<u8>,
    absent: PageEntry,
}

impl IndexBuilder {
    /// An index without leaves, in which every page is `absent`: zero or as in the parent.
    pub(crate) fn new(absent: PageEntry) -> Self {
        Self { numbers: Vec::new(), leaves: Vec::new(), absent }
    }

    /// Adds the leaf that holds the given entries, unless they are all equal to the entry of pages without a leaf. Leaf
    /// numbers must ascend.
    pub(crate) fn push_leaf(
        &mut self,
        number: u32,
        entries: impl IntoIterator<Item = (PageIndex, PageEntry)>,
    ) {
        let start = self.leaves.len();
        let absent = self.absent.encode().to_le_bytes();
        for _ in 0..LEAF_PAGES {
            self.leaves.extend_from_slice(&absent);
        }
        let leaf = &mut self.leaves[start..];
        let mut all_absent = true;
        for (page, entry) in entries {
            debug_assert_eq!(page.leaf(), number);
            all_absent &= entry == self.absent;
            put(leaf, page.position() * ENTRY_BYTES, &entry.encode().to_le_bytes());
        }
        if all_absent {
            self.leaves.truncate(start);
        } else {
            self.numbers.push(number);
        }
    }

    /// The entry that a page got.
    pub(crate) fn entry(&self, page: PageIndex) -> PageEntry {
        let Ok(position) = self.numbers.binary_search(&page.leaf()) else { return self.absent };
        let at = position * LEAF_BYTES + page.position() * ENTRY_BYTES;
        // Its own encoding.
        PageEntry::decode(u64_at(&self.leaves, at)).unwrap_or(self.absent)
    }

    /// Adds a leaf as it stands in another file.
    pub(crate) fn push_encoded(&mut self, number: u32, leaf: &[u8; LEAF_BYTES]) {
        self.leaves.extend_from_slice(leaf);
        self.numbers.push(number);
    }

    /// Encrypts the leaves in place. They will stand at `offset` of the file. Returns their tags.
    pub(crate) fn seal(
        &mut self,
        seal: &Seal,
        offset: u64,
    ) -> Result<Vec<[u8; TAG_BYTES]>, KeyError> {
        let leaves = self.leaves.chunks_exact_mut(LEAF_BYTES).zip(&self.numbers);
        let sealed = leaves.enumerate().map(|(position, (leaf, number))| {
            seal.seal_leaf(*number, offset + (position * LEAF_BYTES) as u64, leaf)
        });
        sealed.collect()
    }

    /// Bytes of the leaves section.
    pub(crate) fn leaves(&self) -> &[u8] {
        &self.leaves
    }

    /// Bytes of the root section. `tags`: of each leaf, or none in a file that is not sealed.
    pub(crate) fn root(&self, tags: &[[u8; TAG_BYTES]]) -> Vec<u8> {
        let leaves = self.leaves.chunks_exact(LEAF_BYTES).map(crc32fast::hash);
        let mut root =
            Vec::with_capacity(self.numbers.len() * Index::record_bytes(!tags.is_empty()));
        for (position, (number, crc)) in self.numbers.iter().zip(leaves).enumerate() {
            root.extend_from_slice(&number.to_le_bytes());
            root.extend_from_slice(&crc.to_le_bytes());
            root.extend_from_slice(tags.get(position).map_or(&[], |tag| &tag[..]));
        }
        root
    }
}
