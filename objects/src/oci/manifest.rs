//! The manifest of a pushed snapshot: it lists the blobs of a chain, the oldest parent first.

use std::collections::BTreeMap;

use oci_client::manifest::{OCI_IMAGE_MEDIA_TYPE, OciDescriptor, OciImageManifest};
use sha2::{Digest, Sha256};

use super::reference::is_digest;
use crate::fetch::MOST_OBJECT_BYTES;

/// The type of the artifact, and of each blob.
const ARTIFACT_TYPE: &str = "application/vnd.snap.snapshot.v1";
/// The configuration of an artifact that has none: an empty JSON object, which must be in the repository, too.
const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
pub(crate) const EMPTY_CONFIG: &[u8] = b"{}";
/// The name that other clients give to a pulled blob.
const TITLE: &str = "org.opencontainers.image.title";
const MOST_LAYERS: usize = 256;
/// The manifest of the longest chain is shorter.
pub(crate) const MOST_MANIFEST_BYTES: usize = 1 << 20;

/// One file of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layer {
    /// Its digest, `sha256:` and 64 hexadecimal digits.
    pub(crate) digest: String,
    pub(crate) len_bytes: u64,
    pub(crate) file_name: String,
}

/// The files of a chain: the snapshot, its parent, and so on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) layers: Vec<Layer>,
}

impl Manifest {
    /// The same chain gives the same bytes, and so the same digest.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let manifest = OciImageManifest {
            schema_version: 2,
            media_type: Some(OCI_IMAGE_MEDIA_TYPE.to_owned()),
            artifact_type: Some(ARTIFACT_TYPE.to_owned()),
            config: OciDescriptor {
                media_type: EMPTY_TYPE.to_owned(),
                digest: digest_of(EMPTY_CONFIG),
                size: EMPTY_CONFIG.len() as i64,
                ..OciDescriptor::default()
            },
            layers: self.layers.iter().rev().map(descriptor).collect(),
            subject: None,
            annotations: None,
        };
        // Numbers and strings always have a JSON form.
        serde_json::to_vec(&manifest).unwrap_or_default()
    }

    /// Reads a manifest. Its content comes from the registry and is not trusted.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let manifest: OciImageManifest = serde_json::from_slice(bytes)
            .map_err(|error| format!("it is not the manifest of an artifact: {error}"))?;
        if manifest.artifact_type.as_deref() != Some(ARTIFACT_TYPE) {
            return Err(format!("its artifact type is not {ARTIFACT_TYPE}"));
        }
        if !(1..=MOST_LAYERS).contains(&manifest.layers.len()) {
            let found = manifest.layers.len();
            return Err(format!("1 to {MOST_LAYERS} layers expected, found {found}"));
        }
        let layers = manifest.layers.into_iter().rev().map(layer);
        Ok(Self { layers: layers.collect::<Result<_, _>>()? })
    }
}

fn descriptor(layer: &Layer) -> OciDescriptor {
    OciDescriptor {
        media_type: ARTIFACT_TYPE.to_owned(),
        digest: layer.digest.clone(),
        size: layer.len_bytes.try_into().unwrap_or(i64::MAX),
        annotations: Some(BTreeMap::from([(TITLE.to_owned(), layer.file_name.clone())])),
        ..OciDescriptor::default()
    }
}

fn layer(found: OciDescriptor) -> Result<Layer, String> {
    let len_bytes =
        u64::try_from(found.size).ok().filter(|len| (1..=MOST_OBJECT_BYTES).contains(len));
    let len_bytes = len_bytes.ok_or_else(|| format!("{} is no length of a blob", found.size))?;
    if !is_digest(&found.digest) {
        return Err("the digest of a blob is not a SHA-256 digest".to_owned());
    }
    let file_name = found.annotations.unwrap_or_default().remove(TITLE).unwrap_or_default();
    Ok(Layer { digest: found.digest, len_bytes, file_name })
}

/// The digest of bytes in memory.
pub(crate) fn digest_of(bytes: &[u8]) -> String {
    named(&Sha256::digest(bytes))
}

/// The text of a SHA-256 hash.
pub(crate) fn named(hash: &[u8]) -> String {
    let digits = hash.iter().map(|byte| format!("{byte:02x}"));
    format!("sha256:{}", digits.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_layers() -> Manifest {
        let layer = |bytes: &[u8]| Layer {
            digest: digest_of(bytes),
            len_bytes: 4096,
            file_name: "0190b3a2.snap".to_owned(),
        };
        Manifest { layers: vec![layer(b"top"), layer(b"parent")] }
    }

    #[test]
    fn a_manifest_lists_parents_first_and_is_read_as_it_was_written() {
        let manifest = two_layers();
        let bytes = manifest.encode();
        assert_eq!(Manifest::parse(&bytes).unwrap(), manifest);
        let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(json["artifactType"], "application/vnd.snap.snapshot.v1");
        assert_eq!(json["layers"][0]["digest"], manifest.layers[1].digest);
        assert_eq!(json["config"]["size"], 2);
    }

    #[test]
    fn manifests_of_other_artifacts_and_bad_blobs_are_refused() {
        let text = String::from_utf8(two_layers().encode()).unwrap();
        let of = |from: &str, to: &str| {
            assert!(text.contains(from), "{text}");
            Manifest::parse(text.replace(from, to).as_bytes()).unwrap_err()
        };
        assert!(of("vnd.snap.snapshot.v1", "vnd.other").contains("artifact type"));
        assert!(of("\"size\":4096", "\"size\":-1").contains("-1 is no length"));
        assert!(of(&two_layers().layers[0].digest, "sha256:../..").contains("SHA-256"));
        assert!(Manifest::parse(b"{\"schemaVersion\":2,\"manifests\":[]}").is_err());
    }
}
