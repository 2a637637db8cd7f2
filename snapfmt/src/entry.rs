//! One page entry of the index: eight bytes with the place of a page.

use crate::layout::{
    CHUNK_ALIGN, CHUNK_HEADER_BYTES, E_KIND_BITS, E_OFFSET_SHIFT, E_SLOT_BITS, E_SLOT_SHIFT,
    E_UNITS_BITS, E_UNITS_SHIFT, HEADER_BYTES, LEAF_PAGES, PAGE_BYTES,
};

/// Number of a guest page in the snapshot's source space: its source offset divided by 4096.
///
/// The source space is the guest's memory regions laid end to end, in the order of the memory
/// map; it has no holes, guest-physical space has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u32);

impl PageIndex {
    /// The page that contains byte `source_offset`; `None` above 16 TiB.
    pub fn containing(source_offset: u64) -> Option<Self> {
        u32::try_from(source_offset / PAGE_BYTES as u64).ok().map(Self)
    }

    /// Offset of the page's first byte in the source space.
    pub fn source_offset(self) -> u64 {
        u64::from(self.0) * PAGE_BYTES as u64
    }

    /// Number of the leaf that holds this page's entry.
    pub(crate) fn leaf(self) -> u32 {
        self.0 / LEAF_PAGES as u32
    }

    /// Position of this page's entry in its leaf.
    pub(crate) fn position(self) -> usize {
        self.0 as usize % LEAF_PAGES
    }
}

/// The place of a chunk: the file of the snapshot, the multiple of 64 bytes, and the length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkExtent {
    layer: u16,
    offset: u64,
    len: u32,
}

impl ChunkExtent {
    pub(crate) fn new(offset: u64, len: u32) -> Self {
        debug_assert!(offset.is_multiple_of(CHUNK_ALIGN as u64));
        debug_assert!(len as usize >= CHUNK_ALIGN && (len as usize).is_multiple_of(CHUNK_ALIGN));
        Self { layer: 0, offset, len }
    }

    pub(crate) fn in_layer(self, layer: u16) -> Self {
        Self { layer, ..self }
    }

    /// Which file of the snapshot it is in: 0 the file itself, 1 its parent, and so on.
    pub fn layer(self) -> u16 {
        self.layer
    }

    /// Offset of the chunk's header in the file, in bytes.
    pub fn offset(self) -> u64 {
        self.offset
    }

    /// Length of header, page list, payload and padding together, in bytes.
    pub fn len_bytes(self) -> u32 {
        self.len
    }

    /// Offset of the first byte after the chunk.
    pub fn end(self) -> u64 {
        self.offset + u64::from(self.len)
    }
}

/// The entry of one page in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageEntry {
    /// All bytes are zero; nothing is stored.
    Zero,
    /// The page's bytes are in a chunk of this file.
    Data {
        /// The chunk.
        chunk: ChunkExtent,
        /// Which of the chunk's pages it is, from 0.
        slot: u16,
    },
    /// The page is as in the parent. This occurs only in the index of one layer: a
    /// [`Snapshot`](crate::Snapshot) has all of its layers and returns the parent's entry instead.
    Parent,
}

/// An entry whose bits no writer of version 1 produces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MalformedEntry;

const KIND_ZERO: u64 = 0;
const KIND_DATA: u64 = 1;
const KIND_PARENT: u64 = 2;

impl PageEntry {
    pub(crate) fn encode(self) -> u64 {
        match self {
            Self::Zero => 0,
            Self::Parent => KIND_PARENT,
            Self::Data { chunk, slot } => {
                let units = u64::from(chunk.len) / CHUNK_ALIGN as u64 - 1;
                let offset = chunk.offset / CHUNK_ALIGN as u64;
                KIND_DATA
                    | (u64::from(slot) << E_SLOT_SHIFT)
                    | (units << E_UNITS_SHIFT)
                    | (offset << E_OFFSET_SHIFT)
            }
        }
    }

    pub(crate) fn decode(raw: u64) -> Result<Self, MalformedEntry> {
        let field = |shift: u32, bits: u32| (raw >> shift) & ((1 << bits) - 1);
        match field(0, E_KIND_BITS) {
            KIND_ZERO if raw == 0 => Ok(Self::Zero),
            KIND_PARENT if raw == KIND_PARENT => Ok(Self::Parent),
            KIND_DATA => {
                let units = field(E_UNITS_SHIFT, E_UNITS_BITS) + 1;
                let chunk = ChunkExtent {
                    layer: 0,
                    offset: (raw >> E_OFFSET_SHIFT) * CHUNK_ALIGN as u64,
                    len: (units * CHUNK_ALIGN as u64) as u32,
                };
                if chunk.offset < HEADER_BYTES as u64 || (chunk.len as usize) < CHUNK_HEADER_BYTES {
                    return Err(MalformedEntry);
                }
                Ok(Self::Data { chunk, slot: field(E_SLOT_SHIFT, E_SLOT_BITS) as u16 })
            }
            _ => Err(MalformedEntry),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_worked_example_of_the_format_text() {
        // Chunk at 4096, 192 bytes long, slot 5: offset unit 64, three units.
        let entry = PageEntry::Data { chunk: ChunkExtent::new(4096, 192), slot: 5 };
        assert_eq!(entry.encode(), (64 << 28) | (2 << 12) | (5 << 3) | 1);
    }

    #[test]
    fn every_reserved_kind_and_stray_bit_is_refused() {
        for kind in 3..8 {
            assert_eq!(PageEntry::decode(kind), Err(MalformedEntry));
        }
        assert_eq!(PageEntry::decode(1 << 63), Err(MalformedEntry));
        assert_eq!(PageEntry::decode(KIND_PARENT | 1 << 20), Err(MalformedEntry));
        // A chunk inside the header.
        assert_eq!(PageEntry::decode(KIND_DATA), Err(MalformedEntry));
    }

    proptest! {
        #[test]
        fn encode_and_decode_are_inverse(unit in 64u64..1 << 36, units in 1u32..=1 << 16, slot in 0u16..512) {
            let chunk = ChunkExtent::new(unit * 64, units * 64);
            let entry = PageEntry::Data { chunk, slot };
            prop_assert_eq!(PageEntry::decode(entry.encode()), Ok(entry));
        }

        #[test]
        fn decoded_entries_encode_to_the_same_bits(raw: u64) {
            if let Ok(entry) = PageEntry::decode(raw) {
                prop_assert_eq!(entry.encode(), raw);
            }
        }
    }
}
