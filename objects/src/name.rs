//! The name of a pushed snapshot: a small JSON object that lists the objects of its layers.

use serde::{Deserialize, Serialize};

use crate::url::ObjectUrl;

/// The content of a name. The objects are in the folder `objects` beside it; their keys are the ids of their snapshots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Name {
    /// The version of this form.
    snap_name: u32,
    /// The snapshot, its parent, and so on.
    pub(crate) layers: Vec<LayerName>,
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

const VERSION: u32 = 1;
/// The name of the longest chain is shorter.
pub(crate) const MOST_BYTES: u64 = 64 << 10;
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
        Self { snap_name: VERSION, layers }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        // Numbers and strings always have a JSON form.
        serde_json::to_vec_pretty(self).unwrap_or_default()
    }

    /// Whether an object with these first bytes is a name.
    pub(crate) fn is_meant(first_bytes: &[u8]) -> bool {
        first_bytes.first() == Some(&b'{')
    }

    /// Reads a name. Its content comes from the bucket and is not trusted: an id must have the form of one.
    pub(crate) fn parse(bytes: &[u8], len_bytes: u64) -> Result<Self, String> {
        if len_bytes > MOST_BYTES || bytes.len() as u64 != len_bytes {
            return Err(format!("{len_bytes} bytes are too many for a name"));
        }
        let name: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if name.snap_name != VERSION {
            return Err(format!("version {} expected, found {}", VERSION, name.snap_name));
        }
        if !(1..=MOST_LAYERS).contains(&name.layers.len()) {
            return Err(format!("1 to {MOST_LAYERS} layers expected, found {}", name.layers.len()));
        }
        match name.layers.iter().find(|layer| !is_id(&layer.id)) {
            Some(layer) => Err(format!("{:?} is no id", layer.id)),
            None => Ok(name),
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
        let bytes = name.encode();
        assert!(Name::is_meant(&bytes));
        assert_eq!(Name::parse(&bytes, bytes.len() as u64).unwrap(), name);
        assert_eq!(name.layers[0].key(), "objects/0190b3a2-5c1e-7d5f-8a60-123456789abc.snap");
    }

    #[test]
    fn ids_that_lead_elsewhere_are_refused() {
        for id in ["../../other/secret", "0190b3a2-5c1e-7d5f-8a60-123456789ab/", ""] {
            let bytes = Name::new(vec![layer(id)]).encode();
            let error = Name::parse(&bytes, bytes.len() as u64).unwrap_err();
            assert!(error.contains("is no id"), "{error}");
        }
        let none = Name::new(Vec::new()).encode();
        assert!(Name::parse(&none, none.len() as u64).is_err());
        assert!(Name::parse(b"{", 1).is_err());
        assert!(Name::parse(b"{}", 1 << 30).is_err());
    }
}
