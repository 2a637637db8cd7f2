//! Corrects the checksums of a damaged file, so that a fuzzer gets past them.

/// Which checksums: a bit each.
pub(crate) const CHUNKS: u8 = 1;
pub(crate) const LEAVES: u8 = 2;
pub(crate) const SECTIONS: u8 = 4;
pub(crate) const TABLE: u8 = 8;
pub(crate) const HEADER: u8 = 16;
/// Not a checksum: the length of the file and the place of the table, which ends it.
pub(crate) const LENGTHS: u8 = 32;

/// Where the parts of a good file begin: header, section table, sections in the table's order.
pub(crate) fn parts(file: &[u8]) -> Vec<usize> {
    let table = table(file).unwrap_or(0..0);
    let records = file[table.clone()].chunks_exact(40);
    let sections = records.map(|record| number(record, 16, 8).unwrap_or(0) as usize);
    [0, table.start].into_iter().chain(sections).collect()
}

/// From the inside out, because the outer checksums cover the inner ones.
pub(crate) fn seal(file: &mut [u8], which: u8) {
    if which & LENGTHS != 0 {
        seal_lengths(file);
    }
    let Some(table) = table(file) else { return };
    let records: Vec<Vec<u8>> = file[table.clone()].chunks_exact(40).map(<[u8]>::to_vec).collect();
    let of_kind = |kind| {
        let record = records.iter().find(|record| number(record, 0, 4) == Some(kind))?;
        Some((number(record, 16, 8)? as usize, number(record, 24, 8)? as usize))
    };
    if let (true, Some((offset, len))) = (which & CHUNKS != 0, of_kind(1)) {
        seal_chunks(file, offset, len, 0);
    }
    if let (true, Some((leaves, _)), Some((root, len))) =
        (which & LEAVES != 0, of_kind(2), of_kind(3))
    {
        for at in 0..(len / 8).min(file.len() / 4096) {
            put_crc(file, leaves.saturating_add(at * 4096), 4096, root.saturating_add(at * 8 + 4));
        }
    }
    if which & SECTIONS != 0 {
        for (at, record) in records.iter().enumerate() {
            let kind = number(record, 0, 4);
            if let (Some(3..), Some(offset), Some(len)) =
                (kind, number(record, 16, 8), number(record, 24, 8))
            {
                put_crc(file, offset as usize, len as usize, table.start + at * 40 + 12);
            }
        }
    }
    if which & TABLE != 0 {
        put_crc(file, table.start, table.len(), 108);
    }
    if which & HEADER != 0 {
        put_crc(file, 0, 4092, 4092);
    }
}

pub(crate) fn seal_lengths(file: &mut [u8]) {
    let len = file.len() as u64;
    let Some(records) = number(file, 104, 4) else { return };
    if len >= 4096 {
        file[88..96].copy_from_slice(&len.to_le_bytes());
        file[96..104].copy_from_slice(&len.saturating_sub(records * 40).to_le_bytes());
    }
}

/// Each chunk has `tag_bytes` behind its payload.
pub(crate) fn seal_chunks(file: &mut [u8], offset: usize, len: usize, tag_bytes: u64) {
    let (mut at, end) = (offset, offset.saturating_add(len).min(file.len()));
    let seed = seed(file);
    while at < end {
        let (Some(pages), Some(payload)) = (number(file, at + 6, 2), number(file, at + 8, 4))
        else {
            return;
        };
        let len = (32 + 4 * pages + payload + tag_bytes).next_multiple_of(64) as usize;
        put_crc_from(seed, file, at + 32, len - 32, at + 12);
        put_crc(file, at, 28, at + 28);
        at += len;
    }
}

/// Bytes of the section table, if header and file have one.
fn table(file: &[u8]) -> Option<std::ops::Range<usize>> {
    let start = number(file, 96, 8)? as usize;
    let end = start.checked_add(number(file, 104, 4)? as usize * 40)?;
    (start >= 4096 && end <= file.len()).then_some(start..end)
}

/// A little-endian number of `len` bytes.
pub(crate) fn number(bytes: &[u8], at: usize, len: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(len)?)?;
    Some(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

/// The start value of the checksums of chunks' bodies: in a file with the feature BOUND, the CRC of its chunks_id.
fn seed(file: &[u8]) -> u32 {
    let bound = number(file, 16, 8).is_some_and(|incompat| incompat & 2 != 0);
    file.get(152..168).filter(|_| bound).map_or(0, crc32fast::hash)
}

/// Puts the CRC of a part of the file at `to`, if both are in the file.
pub(crate) fn put_crc(file: &mut [u8], offset: usize, len: usize, to: usize) {
    put_crc_from(0, file, offset, len, to);
}

/// The same for a CRC that begins with `seed`.
fn put_crc_from(seed: u32, file: &mut [u8], offset: usize, len: usize, to: usize) {
    let crc_of = |bytes: &[u8]| {
        let mut hasher = crc32fast::Hasher::new_with_initial(seed);
        hasher.update(bytes);
        hasher.finalize()
    };
    let crc = offset.checked_add(len).and_then(|end| file.get(offset..end)).map(crc_of);
    if let (Some(crc), Some(target)) =
        (crc, to.checked_add(4).and_then(|end| file.get_mut(to..end)))
    {
        target.copy_from_slice(&crc.to_le_bytes());
    }
}
