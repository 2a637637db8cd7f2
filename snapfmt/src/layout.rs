//! The frozen numbers of format version 1: every size, offset and magic in one place.
//!
//! `docs/format.md` is the normative text; the assertions at the end of this file fail the build
//! when one of the numbers moves. All integers in the file are little-endian.

/// First eight bytes of every snapshot. Like PNG's: a byte above 0x7f, the name, a DOS line end
/// and a DOS end-of-file, so that text-mode transfers and `type` are detected immediately.
pub const MAGIC: [u8; 8] = *b"\x89SNAP\r\n\x1a";

/// Version of the format that this crate writes and the only one it reads.
pub const VERSION: u32 = 1;

/// Bytes of one guest page, the unit of the index.
pub const PAGE_BYTES: usize = 4096;

/// Entries of one index leaf; a leaf describes `LEAF_PAGES * PAGE_BYTES` = 2 MiB of guest memory.
pub const LEAF_PAGES: usize = 512;

/// Bytes of one index leaf in the file.
pub const LEAF_BYTES: usize = LEAF_PAGES * ENTRY_BYTES;

/// Guest memory described by one leaf, in bytes.
pub const LEAF_SPAN_BYTES: u64 = (LEAF_PAGES * PAGE_BYTES) as u64;

/// Bytes of one page entry in a leaf.
pub const ENTRY_BYTES: usize = 8;

/// Bytes of one record of the index root.
pub const ROOT_RECORD_BYTES: usize = 8;

/// Bytes of the file header, which is at offset 0.
pub const HEADER_BYTES: usize = 4096;

/// Bytes of one record of the section table.
pub const SECTION_RECORD_BYTES: usize = 40;

/// Bytes of one record of the memory map.
pub const REGION_RECORD_BYTES: usize = 24;

/// Bytes of the header at the start of every chunk.
pub const CHUNK_HEADER_BYTES: usize = 32;

/// First four bytes of every chunk.
pub const CHUNK_MAGIC: [u8; 4] = *b"CHNK";

/// Chunks start at multiples of this many bytes and are padded to it with zeros.
pub const CHUNK_ALIGN: usize = 64;

/// Most pages that one chunk may hold (2 MiB).
pub const MAX_CHUNK_PAGES: usize = 512;

/// Most bytes that one chunk may take in the file: header, page list, payload and padding.
pub const MAX_CHUNK_EXTENT_BYTES: usize =
    (CHUNK_HEADER_BYTES + MAX_CHUNK_PAGES * (4 + PAGE_BYTES)).next_multiple_of(CHUNK_ALIGN);

/// Most guest memory that one snapshot may describe: page numbers are 32 bits wide.
pub const MAX_MEMORY_BYTES: u64 = 1 << 44;

/// Largest offset of a chunk that a page entry can name, exclusive (36 bits of 64-byte units).
pub const MAX_CHUNK_OFFSET: u64 = 1 << 42;

/// Most sections that a file may have.
pub const MAX_SECTIONS: usize = 64;

/// Every memory map may have this many regions. Those of large memory may have more: see [`max_regions`].
pub const REGIONS_OF_ANY_MEMORY: usize = 1024;

/// Large memory may have a region for each block of this many bytes: the length of the blocks in which hypervisors plug
/// memory (virtio-mem). Every second block may be missing.
pub const BYTES_PER_REGION: u64 = 2 << 20;

/// Most regions in the memory map of this much memory.
pub const fn max_regions(memory_bytes: u64) -> u64 {
    let blocks = memory_bytes / BYTES_PER_REGION;
    if blocks > REGIONS_OF_ANY_MEMORY as u64 { blocks } else { REGIONS_OF_ANY_MEMORY as u64 }
}

/// Most bytes of one state section.
pub const MAX_STATE_BYTES: u64 = 64 << 20;

/// Most bytes of the metadata section.
pub const MAX_METADATA_BYTES: u64 = 1 << 20;
/// Most values in the metadata, counted as its commas and opening brackets outside of strings.
pub const MAX_METADATA_VALUES: u64 = 16 << 10;

/// Most bytes of the parent hint.
pub const MAX_PARENT_HINT_BYTES: u64 = 4 + 4096;

/// Most bytes of the parent hint of a sealed file, without its tag.
pub const MAX_SEALED_PARENT_HINT_BYTES: u64 = MAX_PARENT_HINT_BYTES + HASH_BYTES as u64;

/// Most bytes of the section with the keys of a sealed file.
pub const MAX_KEYS_BYTES: u64 = 64 << 10;

/// Most keys that the file key of a sealed file may be wrapped with.
pub const MAX_KEY_SLOTS: usize = 16;

/// The cipher suite of sealed files: AES-256-GCM, with keys that BLAKE3 derives.
pub const SUITE_AES_256_GCM: u32 = 1;

/// Bytes of the tag that the cipher adds to each sealed part.
pub const TAG_BYTES: usize = 16;

/// Bytes of one record of the root of a sealed file's index: the record, and the tag of its leaf.
pub const SEALED_ROOT_RECORD_BYTES: usize = ROOT_RECORD_BYTES + TAG_BYTES;

/// Most bytes of the working set.
pub const MAX_WORKING_SET_BYTES: u64 = 4 << 20;

/// Version of the working set's encoding that this crate writes, and the only one it understands.
pub const WORKING_SET_VERSION: u32 = 1;

/// Bytes in front of the records of the working set.
pub const WORKING_SET_HEADER_BYTES: usize = 16;

/// Bytes of one record of the working set.
pub const WORKING_SET_RECORD_BYTES: usize = 8;

/// Feature bit (incompatible): pages may be in a parent snapshot.
pub const INCOMPAT_LAYERED: u64 = 1 << 0;

/// Feature bit (incompatible): the checksums of chunks begin with the id of their snapshot.
pub const INCOMPAT_BOUND: u64 = 1 << 1;

/// Feature bit (incompatible): the file is encrypted and authenticated with a key.
pub const INCOMPAT_SEALED: u64 = 1 << 2;

/// Incompatible features that this crate understands; any other set bit refuses the file.
pub const INCOMPAT_KNOWN: u64 = INCOMPAT_LAYERED | INCOMPAT_BOUND | INCOMPAT_SEALED;

// Byte offsets of the header's fields. The first four and the CRC stay where they are in every
// future version, so that any tool can identify the file.
pub(crate) const H_MAGIC: usize = 0;
pub(crate) const H_VERSION: usize = 8;
pub(crate) const H_HEADER_BYTES: usize = 12;
pub(crate) const H_INCOMPAT: usize = 16;
pub(crate) const H_RO_COMPAT: usize = 24;
pub(crate) const H_COMPAT: usize = 32;
pub(crate) const H_ID: usize = 40;
pub(crate) const H_PARENT_ID: usize = 56;
pub(crate) const H_PAGE_BYTES: usize = 72;
pub(crate) const H_CHUNK_PAGES: usize = 76;
pub(crate) const H_MEMORY_BYTES: usize = 80;
pub(crate) const H_FILE_BYTES: usize = 88;
pub(crate) const H_TABLE_OFFSET: usize = 96;
pub(crate) const H_TABLE_RECORDS: usize = 104;
pub(crate) const H_TABLE_CRC: usize = 108;
pub(crate) const H_DATA_PAGES: usize = 112;
pub(crate) const H_STORED_PAGES: usize = 120;
pub(crate) const H_PARENT_PAGES: usize = 128;
pub(crate) const H_CHUNKS: usize = 136;
pub(crate) const H_CREATED_UNIX_MS: usize = 144;
/// Also reserved without [`INCOMPAT_BOUND`].
pub(crate) const H_CHUNKS_ID: usize = 152;
/// Also reserved without [`INCOMPAT_SEALED`].
pub(crate) const H_MAC: usize = 168;
pub(crate) const H_RESERVED: usize = 200;
pub(crate) const H_CRC: usize = HEADER_BYTES - 4;

// Byte offsets of the chunk header's fields.
pub(crate) const C_MAGIC: usize = 0;
pub(crate) const C_CODEC: usize = 4;
pub(crate) const C_RESERVED_A: usize = 5;
pub(crate) const C_PAGES: usize = 6;
pub(crate) const C_PAYLOAD_BYTES: usize = 8;
pub(crate) const C_BODY_CRC: usize = 12;
pub(crate) const C_OFFSET: usize = 16;
pub(crate) const C_RESERVED_B: usize = 24;
pub(crate) const C_CRC: usize = 28;

// Byte offsets of a section record's fields.
pub(crate) const S_KIND: usize = 0;
pub(crate) const S_TAG: usize = 4;
pub(crate) const S_VERSION: usize = 8;
pub(crate) const S_CRC: usize = 12;
pub(crate) const S_OFFSET: usize = 16;
pub(crate) const S_LEN: usize = 24;
pub(crate) const S_RESERVED: usize = 32;

// Byte offsets of the fields of the working set's header, and of its records.
pub(crate) const W_VERSION: usize = 0;
pub(crate) const W_RESTORES: usize = 4;
pub(crate) const W_RECORDS: usize = 8;
pub(crate) const W_RESERVED: usize = 12;
pub(crate) const W_FIRST_PAGE: usize = 0;
pub(crate) const W_PAGES: usize = 4;
pub(crate) const W_PHASE: usize = 6;
pub(crate) const W_SEEN: usize = 7;

// Byte offsets of the fields of the section with the keys, and of its slots.
pub(crate) const K_SUITE: usize = 0;
pub(crate) const K_SLOTS: usize = 4;
pub(crate) const K_SEAL_ID: usize = 8;
pub(crate) const KEYS_HEADER_BYTES: usize = 24;
pub(crate) const K_KIND: usize = 0;
pub(crate) const K_LEN: usize = 4;
pub(crate) const KEY_SLOT_HEADER_BYTES: usize = 8;

/// Bytes of the message authentication code in the header of a sealed file.
pub(crate) const MAC_BYTES: usize = 32;

/// Bytes of a BLAKE3 hash.
pub(crate) const HASH_BYTES: usize = 32;

// A page entry: kind in bits 0..3, slot in 3..12, extent units - 1 in 12..28, offset in 28..64.
pub(crate) const E_KIND_BITS: u32 = 3;
pub(crate) const E_SLOT_SHIFT: u32 = 3;
pub(crate) const E_SLOT_BITS: u32 = 9;
pub(crate) const E_UNITS_SHIFT: u32 = 12;
pub(crate) const E_UNITS_BITS: u32 = 16;
pub(crate) const E_OFFSET_SHIFT: u32 = 28;

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    let mut raw = [0; 2];
    raw.copy_from_slice(&bytes[at..at + 2]);
    u16::from_le_bytes(raw)
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(raw)
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(raw)
}

pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

// Tripwires: a change of one of these is a change of the format.
const _: () = {
    assert!(LEAF_BYTES == 4096);
    assert!(LEAF_SPAN_BYTES == 2 << 20);
    assert!(H_CREATED_UNIX_MS + 8 == H_CHUNKS_ID);
    assert!(H_CHUNKS_ID + 16 == H_MAC);
    assert!(H_MAC + MAC_BYTES == H_RESERVED);
    assert!(K_SEAL_ID + 16 == KEYS_HEADER_BYTES);
    assert!(K_LEN + 4 == KEY_SLOT_HEADER_BYTES);
    // The longest chunk has room for its tag.
    assert!(
        CHUNK_HEADER_BYTES + MAX_CHUNK_PAGES * (4 + PAGE_BYTES) + TAG_BYTES
            <= MAX_CHUNK_EXTENT_BYTES
    );
    assert!(H_CRC == 4092);
    assert!(C_CRC + 4 == CHUNK_HEADER_BYTES);
    assert!(S_RESERVED + 8 == SECTION_RECORD_BYTES);
    assert!(W_RESERVED + 4 == WORKING_SET_HEADER_BYTES);
    assert!(W_SEEN + 1 == WORKING_SET_RECORD_BYTES);
    assert!(E_KIND_BITS == E_SLOT_SHIFT);
    assert!(E_SLOT_SHIFT + E_SLOT_BITS == E_UNITS_SHIFT);
    assert!(E_UNITS_SHIFT + E_UNITS_BITS == E_OFFSET_SHIFT);
    assert!(MAX_CHUNK_PAGES == 1 << E_SLOT_BITS);
    assert!(MAX_CHUNK_EXTENT_BYTES / CHUNK_ALIGN <= 1 << E_UNITS_BITS);
    assert!(MAX_CHUNK_OFFSET == (1 << (64 - E_OFFSET_SHIFT)) * CHUNK_ALIGN as u64);
    assert!(MAX_MEMORY_BYTES / PAGE_BYTES as u64 == 1 << 32);
    assert!(HEADER_BYTES.is_multiple_of(CHUNK_ALIGN));
};
