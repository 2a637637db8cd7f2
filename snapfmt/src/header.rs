//! The file header: 4 KiB that describe the file independently of the rest of it.

use uuid::Uuid;

use crate::chunk;
use crate::error::{Corruption, Part, Problem, ReadError};
use crate::layout::{
    H_CHUNK_PAGES, H_CHUNKS, H_CHUNKS_ID, H_COMPAT, H_CRC, H_CREATED_UNIX_MS, H_DATA_PAGES,
    H_FILE_BYTES, H_HEADER_BYTES, H_ID, H_INCOMPAT, H_MAC, H_MAGIC, H_MEMORY_BYTES, H_PAGE_BYTES,
    H_PARENT_ID, H_PARENT_PAGES, H_RESERVED, H_RO_COMPAT, H_STORED_PAGES, H_TABLE_CRC,
    H_TABLE_OFFSET, H_TABLE_RECORDS, H_VERSION, HASH_BYTES, HEADER_BYTES, INCOMPAT_BOUND,
    INCOMPAT_KNOWN, INCOMPAT_SEALED, MAGIC, MAX_CHUNK_PAGES, MAX_MEMORY_BYTES, MAX_SECTIONS,
    PAGE_BYTES, SECTION_RECORD_BYTES, VERSION, put, u32_at, u64_at,
};

/// The header of a snapshot, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Header {
    /// Version of the format.
    pub version: u32,
    /// Features without which the file cannot be read.
    pub incompat: u64,
    /// Features without which the file can be read but not rewritten.
    pub ro_compat: u64,
    /// Features that may be ignored.
    pub compat: u64,
    /// Identity of this snapshot.
    pub id: Uuid,
    /// Identity of the parent snapshot, for a layer.
    pub parent_id: Option<Uuid>,
    /// Most pages in one chunk of this file.
    pub chunk_pages: u32,
    /// Guest memory, all regions together, in bytes.
    pub memory_bytes: u64,
    /// Length of the whole file in bytes.
    pub file_bytes: u64,
    /// Pages whose bytes are in this file; equal pages are counted separately.
    pub data_pages: u64,
    /// Pages stored in chunks, equal ones counted once.
    pub stored_pages: u64,
    /// Pages that are as in the parent.
    pub parent_pages: u64,
    /// Number of chunks.
    pub chunks: u64,
    /// When the snapshot was created, in milliseconds since 1970-01-01 UTC.
    pub created_unix_ms: u64,
    /// The id of the snapshot that the chunks were written for; their checksums begin with it. It is this snapshot or,
    /// in a copy, the snapshot that the chunks were copied from. `None` in older files, whose checksums begin with no
    /// id.
    pub chunks_id: Option<Uuid>,
    /// Checksum of the header itself.
    pub crc: u32,
    pub(crate) table_offset: u64,
    pub(crate) table_records: u32,
    pub(crate) table_crc: u32,
    /// Of a sealed file: the BLAKE3 hash of the whole header, by which its layers know it.
    pub(crate) hash: Option<[u8; HASH_BYTES]>,
}

impl Header {
    /// Whether the file is encrypted and authenticated with a key.
    pub fn is_sealed(&self) -> bool {
        self.incompat & INCOMPAT_SEALED != 0
    }

    /// Pages of guest memory.
    pub fn pages(&self) -> u64 {
        self.memory_bytes / PAGE_BYTES as u64
    }

    /// Pages of guest memory that are all zero and not stored.
    pub fn zero_pages(&self) -> u64 {
        self.pages() - self.data_pages - self.parent_pages
    }

    /// The start of the checksums of chunks' bodies.
    pub(crate) fn chunk_seed(&self) -> u32 {
        self.chunks_id.map_or(0, chunk::seed)
    }

    pub(crate) fn encode(&self) -> Box<[u8; HEADER_BYTES]> {
        let mut bytes = Box::new([0; HEADER_BYTES]);
        let b = &mut bytes[..];
        put(b, H_MAGIC, &MAGIC);
        put(b, H_VERSION, &self.version.to_le_bytes());
        put(b, H_HEADER_BYTES, &(HEADER_BYTES as u32).to_le_bytes());
        put(b, H_INCOMPAT, &self.incompat.to_le_bytes());
        put(b, H_RO_COMPAT, &self.ro_compat.to_le_bytes());
        put(b, H_COMPAT, &self.compat.to_le_bytes());
        put(b, H_ID, self.id.as_bytes());
        put(b, H_PARENT_ID, self.parent_id.unwrap_or(Uuid::nil()).as_bytes());
        put(b, H_PAGE_BYTES, &(PAGE_BYTES as u32).to_le_bytes());
        put(b, H_CHUNK_PAGES, &self.chunk_pages.to_le_bytes());
        put(b, H_MEMORY_BYTES, &self.memory_bytes.to_le_bytes());
        put(b, H_FILE_BYTES, &self.file_bytes.to_le_bytes());
        put(b, H_TABLE_OFFSET, &self.table_offset.to_le_bytes());
        put(b, H_TABLE_RECORDS, &self.table_records.to_le_bytes());
        put(b, H_TABLE_CRC, &self.table_crc.to_le_bytes());
        put(b, H_DATA_PAGES, &self.data_pages.to_le_bytes());
        put(b, H_STORED_PAGES, &self.stored_pages.to_le_bytes());
        put(b, H_PARENT_PAGES, &self.parent_pages.to_le_bytes());
        put(b, H_CHUNKS, &self.chunks.to_le_bytes());
        put(b, H_CREATED_UNIX_MS, &self.created_unix_ms.to_le_bytes());
        put(b, H_CHUNKS_ID, self.chunks_id.unwrap_or(Uuid::nil()).as_bytes());
        let crc = crc32fast::hash(&b[..H_CRC]);
        put(b, H_CRC, &crc.to_le_bytes());
        bytes
    }

    /// Checks the header of a file that is `file_bytes` long. The order gives the most useful
    /// error: magic, checksum, version, features, then the fields.
    pub(crate) fn decode(b: &[u8; HEADER_BYTES], file_bytes: u64) -> Result<Self, ReadError> {
        let (version, incompat) = checked_version(b)?;
        let exact = |field, at, expected, found: u64| match found == expected {
            true => Ok(()),
            false => Err(corrupt(at, Problem::Field { field, expected, found })),
        };
        let bounded = |field, at, min, max, found: u64| match (min..=max).contains(&found) {
            true => Ok(found),
            false => Err(corrupt(at, Problem::Range { field, min, max, found })),
        };
        exact(
            "header_bytes",
            H_HEADER_BYTES,
            HEADER_BYTES as u64,
            u32_at(b, H_HEADER_BYTES).into(),
        )?;
        exact("page_bytes", H_PAGE_BYTES, PAGE_BYTES as u64, u32_at(b, H_PAGE_BYTES).into())?;
        let declared_bytes = u64_at(b, H_FILE_BYTES);
        if declared_bytes != file_bytes {
            return Err(ReadError::WrongLength { expected: declared_bytes, found: file_bytes });
        }
        let memory_bytes = bounded(
            "memory_bytes",
            H_MEMORY_BYTES,
            PAGE_BYTES as u64,
            MAX_MEMORY_BYTES,
            u64_at(b, H_MEMORY_BYTES),
        )?;
        exact("memory_bytes % page_bytes", H_MEMORY_BYTES, 0, memory_bytes % PAGE_BYTES as u64)?;
        let chunk_pages = u32_at(b, H_CHUNK_PAGES);
        bounded("chunk_pages", H_CHUNK_PAGES, 1, MAX_CHUNK_PAGES as u64, chunk_pages.into())?;
        let table_records = u32_at(b, H_TABLE_RECORDS);
        bounded("table_records", H_TABLE_RECORDS, 1, MAX_SECTIONS as u64, table_records.into())?;
        let table_bytes = u64::from(table_records) * SECTION_RECORD_BYTES as u64;
        let table_offset = u64_at(b, H_TABLE_OFFSET);
        let expected = file_bytes.saturating_sub(table_bytes).max(HEADER_BYTES as u64);
        exact("table_offset", H_TABLE_OFFSET, expected, table_offset)?;

        let pages = memory_bytes / PAGE_BYTES as u64;
        let data_pages = bounded("data_pages", H_DATA_PAGES, 0, pages, u64_at(b, H_DATA_PAGES))?;
        let parent_pages = bounded(
            "parent_pages",
            H_PARENT_PAGES,
            0,
            pages - data_pages,
            u64_at(b, H_PARENT_PAGES),
        )?;
        let parent_id = uuid_at(b, H_PARENT_ID);
        Ok(Self {
            version,
            incompat,
            ro_compat: u64_at(b, H_RO_COMPAT),
            compat: u64_at(b, H_COMPAT),
            id: uuid_at(b, H_ID),
            parent_id: (!parent_id.is_nil()).then_some(parent_id),
            chunk_pages,
            memory_bytes,
            file_bytes,
            data_pages,
            stored_pages: u64_at(b, H_STORED_PAGES),
            parent_pages,
            chunks: u64_at(b, H_CHUNKS),
            created_unix_ms: u64_at(b, H_CREATED_UNIX_MS),
            chunks_id: is_bound(b).then(|| uuid_at(b, H_CHUNKS_ID)),
            table_offset,
            table_records,
            table_crc: u32_at(b, H_TABLE_CRC),
            crc: u32_at(b, H_CRC),
            hash: (incompat & INCOMPAT_SEALED != 0).then(|| *blake3::hash(b).as_bytes()),
        })
    }
}

fn corrupt(at: usize, problem: Problem) -> Corruption {
    Corruption::new(Part::Header, at as u64, problem)
}

/// The version and the incompatible features of a header with a correct magic and checksum.
fn checked_version(b: &[u8; HEADER_BYTES]) -> Result<(u32, u64), ReadError> {
    let mut found = [0; 8];
    found.copy_from_slice(&b[H_MAGIC..H_MAGIC + 8]);
    if found != MAGIC {
        return Err(ReadError::NotASnapshot { expected: MAGIC, found });
    }
    let (expected, found) = (u32_at(b, H_CRC), crc32fast::hash(&b[..H_CRC]));
    if expected != found {
        return Err(corrupt(H_CRC, Problem::Checksum { expected, found }).into());
    }
    let version = u32_at(b, H_VERSION);
    if version != VERSION {
        return Err(ReadError::UnsupportedVersion { found: version, supported: VERSION });
    }
    let incompat = u64_at(b, H_INCOMPAT);
    if incompat & !INCOMPAT_KNOWN != 0 {
        return Err(ReadError::UnsupportedFeatures { unknown: incompat & !INCOMPAT_KNOWN });
    }
    Ok((version, incompat))
}

/// Whether the bytes that the file's features do not use are zero, as writers make them.
pub(crate) fn reserved_is_zero(b: &[u8; HEADER_BYTES]) -> bool {
    let zero = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
    let sealed = u64_at(b, H_INCOMPAT) & INCOMPAT_SEALED != 0;
    (is_bound(b) || zero(&b[H_CHUNKS_ID..H_MAC]))
        && (sealed || zero(&b[H_MAC..H_RESERVED]))
        && zero(&b[H_RESERVED..H_CRC])
}

fn is_bound(b: &[u8; HEADER_BYTES]) -> bool {
    u64_at(b, H_INCOMPAT) & INCOMPAT_BOUND != 0
}

fn uuid_at(b: &[u8; HEADER_BYTES], at: usize) -> Uuid {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&b[at..at + 16]);
    Uuid::from_bytes(bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn header() -> Header {
        Header {
            version: VERSION,
            incompat: 0,
            ro_compat: 0,
            compat: 0,
            id: Uuid::from_u128(7),
            parent_id: None,
            chunk_pages: 16,
            memory_bytes: 1 << 21,
            file_bytes: 8192 + 40,
            data_pages: 3,
            stored_pages: 2,
            parent_pages: 0,
            chunks: 1,
            created_unix_ms: 1,
            chunks_id: None,
            table_offset: 8192,
            table_records: 1,
            table_crc: 5,
            crc: 0,
            hash: None,
        }
    }

    fn bound() -> Header {
        let chunks_id = Some(Uuid::from_u128(8));
        Header { incompat: INCOMPAT_BOUND, chunks_id, ..header() }
    }

    #[test]
    fn encode_and_decode_are_inverse() {
        for header in [header(), bound()] {
            let bytes = header.encode();
            let decoded = Header::decode(&bytes, header.file_bytes).unwrap();
            assert_eq!(Header { crc: header.crc, ..decoded }, header);
            assert!(reserved_is_zero(&bytes));
        }
    }

    /// Without the feature, the id of the chunks has no meaning: its bytes are reserved.
    #[test]
    fn the_id_of_the_chunks_needs_its_feature() {
        let stray = Header { incompat: 0, ..bound() };
        assert!(!reserved_is_zero(&stray.encode()));
        let decoded = Header::decode(&stray.encode(), stray.file_bytes).unwrap();
        assert_eq!((decoded.chunks_id, decoded.chunk_seed()), (None, 0));
        assert_eq!(bound().chunk_seed(), crc32fast::hash(Uuid::from_u128(8).as_bytes()));
    }

    #[test]
    fn any_flipped_bit_is_detected() {
        let bytes = header().encode();
        for bit in 0..HEADER_BYTES * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&damaged, 8192 + 40).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_future_version_and_an_unknown_feature_are_named() {
        let future = Header { version: 9, ..header() };
        assert!(matches!(
            Header::decode(&future.encode(), 8192 + 40),
            Err(ReadError::UnsupportedVersion { found: 9, supported: 1 })
        ));
        let unknown = Header { incompat: 1 << 40, ..header() };
        assert!(matches!(
            Header::decode(&unknown.encode(), 8192 + 40),
            Err(ReadError::UnsupportedFeatures { unknown: 0x100_0000_0000 })
        ));
        // Features of the two other kinds don't stop a reader.
        let compatible = Header { ro_compat: 1 << 3, compat: 1 << 4, ..header() };
        let decoded = Header::decode(&compatible.encode(), 8192 + 40).unwrap();
        assert_eq!((decoded.ro_compat, decoded.compat), (1 << 3, 1 << 4));
    }
}
