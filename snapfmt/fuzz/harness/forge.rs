//! Builds files with any content that a test needs, with correct checksums, as an attacker would.
//!
//! Written from `docs/format.md`, not with the library's own writer or constants. The result may
//! be sparse: it can claim terabytes and holds only the bytes that are not zero.

use std::collections::BTreeMap;
use std::io;

use snapfmt::ReadAt;

/// A slot of a chunk, 0 to 511.
#[derive(Clone, Copy)]
pub(crate) struct Slot(pub(crate) u16);

/// Where a chunk is.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl Place {
    /// The page entry of one of its slots.
    pub(crate) fn entry(self, slot: Slot) -> u64 {
        (self.offset / 64) << 28 | (self.len / 64 - 1) << 12 | u64::from(slot.0) << 3 | 1
    }
}

/// With BOUND, the id of the snapshot of the chunks. Not the file's own id.
const CHUNKS_ID: [u8; 16] = [8; 16];

/// A file that is being built, part by part in the order of the methods.
pub(crate) struct Forge {
    pub(crate) memory_bytes: u64,
    /// Sets whether the file has BOUND. Call this before the first chunk.
    pub(crate) bound: bool,
    pub(crate) chunks: u64,
    pub(crate) stored_pages: u64,
    entries: BTreeMap<u32, u64>,
    table: Vec<u8>,
    file: Forged,
}

impl Forge {
    pub(crate) fn new(memory_bytes: u64) -> Self {
        Self {
            memory_bytes,
            bound: false,
            chunks: 0,
            stored_pages: 0,
            entries: BTreeMap::new(),
            table: Vec::new(),
            file: Forged { ranges: Vec::new(), len: 4096 },
        }
    }

    /// Appends a chunk; `change` may damage it before its checksums are made.
    pub(crate) fn chunk(
        &mut self,
        codec: u8,
        pages: u16,
        list: &[u32],
        payload: &[u8],
        change: impl FnOnce(&mut [u8]),
    ) -> Place {
        let offset = self.file.len;
        let mut chunk = b"CHNK".to_vec();
        chunk.extend([codec, 0]);
        chunk.extend(pages.to_le_bytes());
        chunk.extend((payload.len() as u32).to_le_bytes());
        chunk.extend([0; 4]);
        chunk.extend(offset.to_le_bytes());
        chunk.extend([0; 8]);
        chunk.extend(list.iter().flat_map(|page| page.to_le_bytes()));
        chunk.extend(payload);
        chunk.resize(chunk.len().next_multiple_of(64), 0);
        change(&mut chunk);
        let id: &[u8] = if self.bound { &CHUNKS_ID } else { &[] };
        let body_crc = crc32fast::hash(&[id, &chunk[32..]].concat());
        chunk[12..16].copy_from_slice(&body_crc.to_le_bytes());
        let chunk_crc = crc32fast::hash(&chunk[..28]);
        chunk[28..32].copy_from_slice(&chunk_crc.to_le_bytes());
        let len = chunk.len() as u64;
        self.chunks += 1;
        self.stored_pages += u64::from(pages);
        self.file.append(chunk);
        Place { offset, len }
    }

    /// Length of the file so far.
    pub(crate) fn len(&self) -> u64 {
        self.file.len
    }

    /// Appends zeros, which take no room.
    pub(crate) fn hole(&mut self, bytes: u64) {
        self.file.len += bytes;
    }

    /// Sets the entry of a page.
    pub(crate) fn entry(&mut self, page: u32, entry: u64) {
        self.entries.insert(page, entry);
    }

    /// A file with the leaves that the entries need, one region and empty metadata.
    pub(crate) fn finish(mut self) -> Forged {
        let mut leaves: BTreeMap<u32, [u8; 4096]> = BTreeMap::new();
        for (page, entry) in &self.entries {
            let leaf = leaves.entry(page / 512).or_insert([0; 4096]);
            let at = (page % 512) as usize * 8;
            leaf[at..at + 8].copy_from_slice(&entry.to_le_bytes());
        }
        self.end_chunks();
        let mut root = Vec::new();
        let offset = self.file.len;
        for (number, leaf) in leaves {
            root.extend(number.to_le_bytes());
            root.extend(crc32fast::hash(&leaf).to_le_bytes());
            self.file.append(leaf.to_vec());
        }
        self.record(2, 0, offset, self.file.len - offset);
        self.section(3, root);
        self.finish_with(b"{}")
    }

    /// Ends the chunks section, which began after the header.
    pub(crate) fn end_chunks(&mut self) {
        let len = self.file.len - 4096;
        self.record(1, 0, 4096, len);
        self.file.len = self.file.len.next_multiple_of(4096);
    }

    /// A record of the section table that may be wrong.
    pub(crate) fn record(&mut self, kind: u32, crc: u32, offset: u64, len: u64) {
        self.table.extend([kind, 0, 0, crc].iter().flat_map(|word| word.to_le_bytes()));
        self.table.extend([offset, len, 0].iter().flat_map(|word| word.to_le_bytes()));
    }

    pub(crate) fn section(&mut self, kind: u32, bytes: Vec<u8>) {
        self.record(kind, crc32fast::hash(&bytes), self.file.len, bytes.len() as u64);
        self.file.append(bytes);
    }

    /// Memory map, metadata, table and header.
    pub(crate) fn finish_with(mut self, metadata: &[u8]) -> Forged {
        let region = [0, self.memory_bytes, 0u64];
        self.section(4, region.iter().flat_map(|word| word.to_le_bytes()).collect());
        self.section(6, metadata.to_vec());
        let table = std::mem::take(&mut self.table);
        let (table_offset, table_crc) = (self.file.len, crc32fast::hash(&table));
        let table_records = (table.len() / 40) as u32;
        self.file.append(table);

        let mut header = b"\x89SNAP\r\n\x1a".to_vec();
        header.extend([1, 4096u32].iter().flat_map(|word| word.to_le_bytes()));
        let incompat = if self.bound { 2u64 } else { 0 };
        header.extend([incompat, 0, 0].iter().flat_map(|word| word.to_le_bytes()));
        header.extend([7; 16]);
        header.extend([0; 16]);
        header.extend([4096, 512u32].iter().flat_map(|word| word.to_le_bytes()));
        let words = [self.memory_bytes, self.file.len, table_offset];
        header.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        header.extend([table_records, table_crc].iter().flat_map(|word| word.to_le_bytes()));
        let counts = [self.entries.len() as u64, self.stored_pages, 0, self.chunks];
        header.extend(counts.iter().flat_map(|word| word.to_le_bytes()));
        if self.bound {
            header.extend([0; 8]);
            header.extend(CHUNKS_ID);
        }
        header.resize(4092, 0);
        let header_crc = crc32fast::hash(&header);
        header.extend(header_crc.to_le_bytes());
        self.file.ranges.insert(0, (0, header));
        self.file
    }
}

/// A forged file: zeros except some ranges.
pub(crate) struct Forged {
    /// Offset and bytes, ascending.
    ranges: Vec<(u64, Vec<u8>)>,
    len: u64,
}

impl Forged {
    fn append(&mut self, bytes: Vec<u8>) {
        let offset = self.len;
        self.len += bytes.len() as u64;
        self.ranges.push((offset, bytes));
    }
}

impl ReadAt for Forged {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.len);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.fill(0);
        let first = self.ranges.partition_point(|(at, bytes)| at + bytes.len() as u64 <= offset);
        for (at, bytes) in self.ranges[first..].iter().take_while(|(at, _)| *at < end) {
            let (from, until) = (offset.max(*at), end.min(at + bytes.len() as u64));
            buf[(from - offset) as usize..(until - offset) as usize]
                .copy_from_slice(&bytes[(from - at) as usize..(until - at) as usize]);
        }
        Ok(())
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.len)
    }
}
