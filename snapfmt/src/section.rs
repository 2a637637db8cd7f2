//! The section table: the parts of a file, their places and their checksums.

use std::fmt;

use crate::error::{Corruption, Part, Problem};
use crate::layout::{
    HEADER_BYTES, S_CRC, S_KIND, S_LEN, S_OFFSET, S_RESERVED, S_TAG, S_VERSION,
    SECTION_RECORD_BYTES, put, u32_at, u64_at,
};

/// Kind of a section. A number that this version does not know is kept, and ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectionKind(pub u32);

impl SectionKind {
    /// The pages' bytes, chunk after chunk.
    pub const CHUNKS: Self = Self(1);
    /// The leaves of the page index.
    pub const INDEX_LEAVES: Self = Self(2);
    /// The root of the page index: number and checksum of every leaf.
    pub const INDEX_ROOT: Self = Self(3);
    /// The guest's memory regions.
    pub const MEMORY_MAP: Self = Self(4);
    /// State of the virtual machine, opaque to this crate.
    pub const STATE: Self = Self(5);
    /// A description of the file and its origin, as JSON.
    pub const METADATA: Self = Self(6);
    /// Which pages a restored guest touches, and how soon: a hint.
    pub const WORKING_SET: Self = Self(7);
    /// Of a layer: checksum of the parent's header, and where the parent may be found.
    pub const PARENT_HINT: Self = Self(8);
    /// Of a sealed file: the file's key, wrapped with the keys that open it.
    pub const KEYS: Self = Self(9);

    fn is_known(self) -> bool {
        (Self::CHUNKS..=Self::KEYS).contains(&self)
    }
}

impl fmt::Display for SectionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match *self {
            Self::CHUNKS => "chunks",
            Self::INDEX_LEAVES => "index leaves",
            Self::INDEX_ROOT => "index root",
            Self::MEMORY_MAP => "memory map",
            Self::STATE => "state",
            Self::METADATA => "metadata",
            Self::WORKING_SET => "working set",
            Self::PARENT_HINT => "parent hint",
            Self::KEYS => "keys",
            Self(other) => return write!(f, "section {other}"),
        })
    }
}

/// One record of the section table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    /// What the section holds.
    pub kind: SectionKind,
    /// For a state section: the producer's number for this kind of state. Otherwise 0.
    pub tag: u32,
    /// For a state section: version of the producer's encoding. Otherwise 0.
    pub version: u32,
    /// CRC-32 of the section's bytes; 0 for chunks, and in a file that is not sealed for index leaves, which carry their
    /// own.
    pub crc: u32,
    /// Where it starts, in bytes from the start of the file.
    pub offset: u64,
    /// How long it is, in bytes.
    pub len: u64,
}

impl Section {
    /// Offset of the first byte after the section.
    pub fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// Whether the section's bytes are covered by [`Section::crc`] rather than by checksums of
    /// their own.
    pub fn has_crc(&self) -> bool {
        match self.kind {
            SectionKind::CHUNKS => false,
            // Those of a sealed file have one too, for readers without a key.
            SectionKind::INDEX_LEAVES => self.crc != 0,
            _ => true,
        }
    }

    pub(crate) fn encode(&self, record: &mut [u8]) {
        put(record, S_KIND, &self.kind.0.to_le_bytes());
        put(record, S_TAG, &self.tag.to_le_bytes());
        put(record, S_VERSION, &self.version.to_le_bytes());
        put(record, S_CRC, &self.crc.to_le_bytes());
        put(record, S_OFFSET, &self.offset.to_le_bytes());
        put(record, S_LEN, &self.len.to_le_bytes());
    }
}

/// Parses a table with a correct checksum. Sections must follow each other, without
/// overlap, between the header and the table.
pub(crate) fn parse_table(bytes: &[u8], table_offset: u64) -> Result<Vec<Section>, Corruption> {
    let mut sections = Vec::with_capacity(bytes.len() / SECTION_RECORD_BYTES);
    let mut free_from = HEADER_BYTES as u64;
    for (number, record) in bytes.chunks_exact(SECTION_RECORD_BYTES).enumerate() {
        let place = table_offset + (number * SECTION_RECORD_BYTES) as u64;
        let corrupt = |problem| Corruption::new(Part::SectionTable, place, problem);
        let section = Section {
            kind: SectionKind(u32_at(record, S_KIND)),
            tag: u32_at(record, S_TAG),
            version: u32_at(record, S_VERSION),
            crc: u32_at(record, S_CRC),
            offset: u64_at(record, S_OFFSET),
            len: u64_at(record, S_LEN),
        };
        let range = |field, min, max, found| corrupt(Problem::Range { field, min, max, found });
        if section.offset < free_from || section.offset > table_offset {
            return Err(range("section.offset", free_from, table_offset, section.offset));
        }
        let room = table_offset - section.offset;
        if section.len > room {
            return Err(range("section.len", 0, room, section.len));
        }
        let reserved = u64_at(record, S_RESERVED);
        if reserved != 0 {
            return Err(corrupt(Problem::Field {
                field: "section.reserved",
                expected: 0,
                found: reserved,
            }));
        }
        free_from = section.end();
        sections.push(section);
    }
    no_section_twice(&sections, table_offset)?;
    Ok(sections)
}

/// Of two sections of one kind, or two states with one tag, readers would find only one. Sections of kinds that this
/// version does not know are ignored, and may repeat.
fn no_section_twice(sections: &[Section], table_offset: u64) -> Result<(), Corruption> {
    let mut known: Vec<_> = sections
        .iter()
        .filter(|section| section.kind.is_known())
        .map(|section| {
            (section.kind, if section.kind == SectionKind::STATE { section.tag } else { 0 })
        })
        .collect();
    known.sort_unstable();
    let Some(twice) = known.windows(2).find(|pair| pair[0] == pair[1]) else { return Ok(()) };
    let found = known.iter().filter(|section| **section == twice[0]).count();
    let problem = Problem::SectionCount { kind: twice[0].0, found };
    Err(Corruption::new(Part::SectionTable, table_offset, problem))
}

/// The one section of a kind that every file has exactly once.
pub(crate) fn only(
    sections: &[Section],
    kind: SectionKind,
    table_offset: u64,
) -> Result<Section, Corruption> {
    let mut of_kind = sections.iter().filter(|section| section.kind == kind);
    match (of_kind.next(), of_kind.count()) {
        (Some(section), 0) => Ok(*section),
        (first, more) => Err(Corruption::new(
            Part::SectionTable,
            table_offset,
            Problem::SectionCount { kind, found: usize::from(first.is_some()) + more },
        )),
    }
}
