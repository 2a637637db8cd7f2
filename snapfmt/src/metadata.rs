//! The metadata of a snapshot, as JSON that can be printed without KVM.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::codec::Codec;
use crate::error::{Corruption, Part, Problem};
use crate::layout::MAX_METADATA_VALUES;
use crate::section::SectionKind;

/// The metadata section: a JSON object. It is for information only; a restore does not need it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Metadata {
    /// Name of the program that wrote the file.
    #[serde(default)]
    pub tool: String,
    /// Its version.
    #[serde(default)]
    pub tool_version: String,
    /// The stored chunks by codec name; filled in by the writer.
    #[serde(default)]
    pub storage: BTreeMap<String, CodecUse>,
    /// All other information that the producer adds: host CPU, guest, devices.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

impl Metadata {
    /// Sets [`Metadata::tool`].
    #[must_use]
    pub fn tool(mut self, tool: impl Into<String>) -> Self {
        self.tool = tool.into();
        self
    }

    /// Sets [`Metadata::tool_version`].
    #[must_use]
    pub fn tool_version(mut self, tool_version: impl Into<String>) -> Self {
        self.tool_version = tool_version.into();
        self
    }

    /// Sets [`Metadata::other`].
    #[must_use]
    pub fn other(mut self, other: serde_json::Map<String, serde_json::Value>) -> Self {
        self.other = other;
        self
    }
}

/// How much of a file is stored in one codec.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CodecUse {
    /// Chunks in this codec.
    pub chunks: u64,
    /// Pages in those chunks.
    pub pages: u64,
    /// Bytes that those chunks take in the file, headers and padding with them.
    pub stored_bytes: u64,
}

/// The same by codec, as the writer counts it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StorageUse([CodecUse; Codec::ALL.len()]);

impl StorageUse {
    pub(crate) fn add(&mut self, codec: Codec, pages: usize, stored_bytes: u32) {
        let slot = &mut self.0[codec as usize];
        slot.chunks += 1;
        slot.pages += pages as u64;
        slot.stored_bytes += u64::from(stored_bytes);
    }

    pub(crate) fn total(&self) -> CodecUse {
        self.0.iter().fold(CodecUse::default(), |sum, slot| CodecUse {
            chunks: sum.chunks + slot.chunks,
            pages: sum.pages + slot.pages,
            stored_bytes: sum.stored_bytes + slot.stored_bytes,
        })
    }

    pub(crate) fn by_name(&self) -> BTreeMap<String, CodecUse> {
        let used = Codec::ALL.iter().zip(self.0).filter(|(_, slot)| slot.chunks > 0);
        used.map(|(codec, slot)| (codec.name().to_owned(), slot)).collect()
    }
}

/// Parses metadata with a correct checksum.
pub(crate) fn parse(bytes: &[u8], offset: u64) -> Result<Metadata, Corruption> {
    // A value of a few bytes of text takes some hundred bytes of memory. So values are counted before they are parsed.
    let (max, found) = (MAX_METADATA_VALUES, values(bytes));
    if found > max {
        let problem = Problem::Range { field: "metadata values", min: 0, max, found };
        return Err(Corruption::new(Part::Section(SectionKind::METADATA), offset, problem));
    }
    serde_json::from_slice(bytes).map_err(|error| {
        let problem = Problem::Json { line: error.line(), column: error.column() };
        Corruption::new(Part::Section(SectionKind::METADATA), offset, problem)
    })
}

/// An upper bound of the number of values in a JSON text: its commas, brackets and braces outside of strings, plus one.
pub(crate) fn values(json: &[u8]) -> u64 {
    let (mut in_string, mut escaped, mut values) = (false, false, 1);
    for byte in json {
        match (in_string, byte) {
            (true, _) if escaped => escaped = false,
            (true, b'\\') => escaped = true,
            (_, b'"') => in_string = !in_string,
            (false, b',' | b'[' | b'{') => values += 1,
            _ => {}
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted_outside_of_strings() {
        for (json, count) in [
            (&b"{}"[..], 2),
            (br#"{"a":[1,2,{"b":null}]}"#, 6),
            (br#"{"[,{":"\"[,{\\"}"#, 2),
            (br#"["\\",1]"#, 3),
        ] {
            assert_eq!(values(json), count, "{}", json.escape_ascii());
        }
    }
}
