//! The name of a pushed snapshot: a small JSON object that lists the objects of its layers.

use serde::{Deserialize, Serialize};
use snapfmt::layout::HEADER_BYTES;

use crate::ends::{Ends, FRONT_BYTES, SUFFIX_BYTES};
use crate::fetch::MOST_OBJECT_BYTES;
use crate::url::ObjectUrl;

/// The content of a name. The objects are in the folder `objects` beside it; their keys are the ids of their snapshots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Name {
    /// The version of this form.
    snap_name: u32,
    /// The snapshot, its parent, and so on.
    pub(crate) layers: Vec<LayerName>,
    /// The bytes of the first object that follow this text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ends: Option<Ends>,
}

/// One of the objects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerName {
    /// The id of the snapshot.
    pub(crate) id: String,
    /// The checksum of its header.
    pub(crate) header_crc: u32,
    /// Its length.
    pub(crate) file_bytes: u64,
}

/// The version of a text without ends, and of one with them.
const VERSION: u32 = 1;
const WITH_ENDS: u32 = 2;
/// The text of the longest chain is shorter.
pub(crate) const MOST_TEXT_BYTES: u64 = 64 << 10;
/// The first answers contain all of it.
const MOST_BYTES: u64 = FRONT_BYTES + SUFFIX_BYTES;
const MOST_LAYERS: usize = 256;

impl LayerName {
    /// The last part of the object's key.
    pub(crate) fn file_name(&self) -> String {
        file_name(&self.id)
    }

    /// The key of the object, relative to that of the name.
    pub(crate) fn key(&self) -> String {
        format!("objects/{}", self.file_name())
    }

    /// The key of the list of its layers, relative to that of the name.
    pub(crate) fn list_key(&self) -> String {
        format!("objects/{}", list_name(&self.id))
    }
}

/// The last part of the key of a snapshot with this id.
pub(crate) fn file_name(id: impl std::fmt::Display) -> String {
    format!("{id}.snap")
}

/// The last part of the key of the list of a snapshot and its parents. It has the form of a name.
pub(crate) fn list_name(id: impl std::fmt::Display) -> String {
    format!("{id}.layers")
}

/// The id of the snapshot with this address, if its key is an id. Such an object never changes.
pub(crate) fn id_of(url: &ObjectUrl) -> Option<&str> {
    let (_, file_name) = url.key().as_ref().rsplit_once('/')?;
    file_name.strip_suffix(".snap").filter(|id| is_id(id))
}

fn is_id(id: &str) -> bool {
    id.len() == 36 && id.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
}

impl Name {
    pub(crate) fn new(layers: Vec<LayerName>) -> Self {
        Self { snap_name: VERSION, layers, ends: None }
    }

    /// The content of the object, with the ends of the first object of the list if they are given.
    pub(crate) fn encode(mut self, ends: Option<(Ends, Vec<u8>)>) -> Vec<u8> {
        let mut ends_bytes = Vec::new();
        if let Some((ends, bytes)) = ends {
            (self.snap_name, self.ends, ends_bytes) = (WITH_ENDS, Some(ends), bytes);
        }
        // Numbers and strings always have a JSON form.
        let mut text = serde_json::to_vec_pretty(&self).unwrap_or_default();
        text.extend(ends_bytes);
        text
    }

    /// Whether an object with these first bytes is a name.
    pub(crate) fn is_meant(first_bytes: &[u8]) -> bool {
        first_bytes.first() == Some(&b'{')
    }

    /// Reads a name, and the bytes that follow its text. Its content comes from the bucket and is not trusted: an id must
    /// have the form of one.
    pub(crate) fn parse(bytes: &[u8], len_bytes: u64) -> Result<(Self, &[u8]), String> {
        if len_bytes > MOST_BYTES || bytes.len() as u64 != len_bytes {
            return Err(format!("{len_bytes} bytes are too many for a name"));
        }
        let (name, text_bytes) = Self::parse_text(bytes)?;
        let rest = &bytes[text_bytes..];
        match &name.ends {
            Some(ends) => ends.check(name.layers[0].file_bytes, rest)?,
            None if rest.iter().all(u8::is_ascii_whitespace) => {}
            None => return Err(format!("{} bytes follow it", rest.len())),
        }
        Ok((name, rest))
    }

    /// Reads the text at the front of a name. Returns also its length.
    pub(crate) fn parse_text(bytes: &[u8]) -> Result<(Self, usize), String> {
        let text = &bytes[..bytes.len().min(MOST_TEXT_BYTES as usize)];
        let mut texts = serde_json::Deserializer::from_slice(text).into_iter::<Self>();
        let name = texts.next().ok_or("it is empty")?.map_err(|error| error.to_string())?;
        let version = if name.ends.is_some() { WITH_ENDS } else { VERSION };
        if name.snap_name != version {
            return Err(format!("version {version} expected, found {}", name.snap_name));
        }
        if !(1..=MOST_LAYERS).contains(&name.layers.len()) {
            return Err(format!("1 to {MOST_LAYERS} layers expected, found {}", name.layers.len()));
        }
        for LayerName { id, file_bytes, .. } in &name.layers {
            if !is_id(id) {
                return Err(format!("{id:?} is no id"));
            }
            if !(HEADER_BYTES as u64..=MOST_OBJECT_BYTES).contains(file_bytes) {
                return Err(format!("no snapshot has a length of {file_bytes} bytes"));
            }
        }
        Ok((name, texts.byte_offset()))
    }

    /// Whether two names are of the same snapshot.
    pub(crate) fn are_same(one: &[u8], other: &[u8]) -> bool {
        match (Self::parse_text(one), Self::parse_text(other)) {
            (Ok((one, _)), Ok((other, _))) => one.layers == other.layers,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(id: &str) -> LayerName {
        LayerName { id: id.into(), header_crc: 7, file_bytes: 4096 }
    }

    #[test]
    fn a_name_is_read_as_it_was_written() {
        let name = Name::new(vec![layer("0190b3a2-5c1e-7d5f-8a60-123456789abc")]);
        let bytes = name.clone().encode(None);
        assert!(Name::is_meant(&bytes));
        assert_eq!(Name::parse(&bytes, bytes.len() as u64).unwrap(), (name.clone(), &[][..]));
        assert_eq!(name.layers[0].key(), "objects/0190b3a2-5c1e-7d5f-8a60-123456789abc.snap");
    }

    #[test]
    fn lengths_that_no_snapshot_can_have_are_refused() {
        for file_bytes in [0, 4095, MOST_OBJECT_BYTES + 1, u64::MAX] {
            let layer = LayerName { file_bytes, ..layer("0190b3a2-5c1e-7d5f-8a60-123456789abc") };
            let bytes = Name::new(vec![layer]).encode(None);
            let error = Name::parse(&bytes, bytes.len() as u64).unwrap_err();
            assert!(error.contains("no snapshot has a length"), "{error}");
        }
    }

    #[test]
    fn ids_that_lead_elsewhere_are_refused() {
        for id in ["../../other/secret", "0190b3a2-5c1e-7d5f-8a60-123456789ab/", ""] {
            let bytes = Name::new(vec![layer(id)]).encode(None);
            let error = Name::parse(&bytes, bytes.len() as u64).unwrap_err();
            assert!(error.contains("is no id"), "{error}");
        }
        let none = Name::new(Vec::new()).encode(None);
        assert!(Name::parse(&none, none.len() as u64).is_err());
        assert!(Name::parse(b"{", 1).is_err());
        assert!(Name::parse(b"{}", 1 << 30).is_err());
    }
}
