//! The keys of one sealed file, and the parts that they protect.

use std::sync::Arc;

use uuid::Uuid;
use zeroize::Zeroize;

use super::cipher::{Cipher, Domain, NotAuthentic};
use super::key::{KeyError, SecretKey};
use super::provider::KeyProvider;
use super::slots::KeySlots;
use crate::error::Problem;
use crate::layout::{
    C_BODY_CRC, C_OFFSET, CHUNK_HEADER_BYTES, H_CRC, H_MAC, HEADER_BYTES, LEAF_BYTES, MAC_BYTES,
    MAX_CHUNK_PAGES, MAX_KEY_SLOTS, MAX_KEYS_BYTES, TAG_BYTES, put,
};
use crate::section::Section;

/// The purposes of the keys that are derived from a file key. A change of one is a change of the format.
const CHUNKS: &str = "snapvm snapfmt 2026-11 sealed file: chunks";
const SECTIONS: &str = "snapvm snapfmt 2026-11 sealed file: sections and leaves";
const HEADER: &str = "snapvm snapfmt 2026-11 sealed file: header, table and keys";

/// Bytes at the start of a chunk's header that are authenticated with its payload.
const CHUNK_AUTHENTICATED_BYTES: usize = C_BODY_CRC;
const MOST_CHUNK_ASSOCIATED_BYTES: usize = 16 + CHUNK_AUTHENTICATED_BYTES + 8 + 4 * MAX_CHUNK_PAGES;

/// Seals and opens the parts of one file.
pub(crate) struct Seal {
    file_key: SecretKey,
    keys: KeySlots,
    /// Of this file and the copies that have its chunks.
    chunks: Cipher,
    /// Of this file only: its id is one of the things that the key is derived from.
    sections: Cipher,
    header: SecretKey,
}

impl Seal {
    /// For a new file with this id: a new file key, wrapped by `provider`.
    pub(crate) fn create(provider: &dyn KeyProvider, id: Uuid) -> Result<Self, KeyError> {
        let (file_key, seal_id) = (SecretKey::random()?, Uuid::new_v4());
        let slots = KeySlots::new(seal_id, provider.wrap_key(&file_key, seal_id)?)?;
        Ok(Self::of(file_key, slots, id))
    }

    /// For a file with this id that is read.
    pub(crate) fn open(
        provider: &dyn KeyProvider,
        keys: KeySlots,
        id: Uuid,
    ) -> Result<Self, KeyError> {
        Ok(Self::of(provider.unwrap_key(&keys)?, keys, id))
    }

    /// For a copy with another id, which has the same chunks at the same offsets.
    pub(crate) fn of_copy(&self, id: Uuid) -> Self {
        Self::of(self.file_key.clone(), self.keys.clone(), id)
    }

    /// As [`Seal::of_copy`], for a copy that other keys open: some of the present slots, counted from 1, and those of the
    /// providers.
    pub(crate) fn of_rekeyed_copy(
        &self,
        id: Uuid,
        keep: &[usize],
        add: &[Arc<dyn KeyProvider>],
    ) -> Result<Self, KeyError> {
        let present = &self.keys.slots;
        let kept = keep.iter().map(|&number| {
            let slot = number.checked_sub(1).and_then(|at| present.get(at));
            slot.cloned().ok_or(KeyError::NoSuchSlot { number, slots: present.len() })
        });
        let mut slots = kept.collect::<Result<Vec<_>, _>>()?;
        for provider in add {
            slots.extend(provider.wrap_key_of_copy(&self.file_key, self.keys.seal_id)?);
        }
        Ok(Self::of(self.file_key.clone(), KeySlots::new(self.keys.seal_id, slots)?, id))
    }

    /// The keys of a file with these slots, if it has the chunks of this one: it is a copy, or this one is a copy of it.
    pub(super) fn of_other_copy(&self, keys: KeySlots, id: Uuid) -> Option<Self> {
        let same = keys.seal_id == self.keys.seal_id;
        same.then(|| Self::of(self.file_key.clone(), keys, id))
    }

    fn of(file_key: SecretKey, keys: KeySlots, id: Uuid) -> Self {
        let cipher = |purpose, salt: Uuid| Cipher::new(&file_key.derive(purpose, salt.as_bytes()));
        Self {
            chunks: cipher(CHUNKS, keys.seal_id),
            sections: cipher(SECTIONS, id),
            header: file_key.derive(HEADER, id.as_bytes()),
            file_key,
            keys,
        }
    }

    /// The content of KEYS.
    pub(crate) fn keys(&self) -> Vec<u8> {
        self.keys.encode()
    }

    /// Encrypts the payload of a chunk, which has its place, and fills in the tag behind it.
    pub(crate) fn seal_chunk(
        &self,
        chunk: &mut [u8],
        pages: usize,
        payload_bytes: usize,
    ) -> Result<(), KeyError> {
        let list_end = CHUNK_HEADER_BYTES + 4 * pages;
        let (front, rest) = chunk.split_at_mut(list_end);
        let (payload, rest) = rest.split_at_mut(payload_bytes);
        let mut associated = [0; MOST_CHUNK_ASSOCIATED_BYTES];
        let (associated, offset) = self.of_chunk(front, &mut associated);
        let tag = self.chunks.encrypt((Domain::Chunk, offset), associated, payload)?;
        put(rest, 0, &tag);
        Ok(())
    }

    /// Checks and decrypts the payload of a chunk into `to`. `front` is the chunk's header and its page list.
    pub(crate) fn open_chunk(
        &self,
        front: &[u8],
        payload: &[u8],
        tag: &[u8; TAG_BYTES],
        to: &mut [u8],
    ) -> Result<(), Problem> {
        let mut associated = [0; MOST_CHUNK_ASSOCIATED_BYTES];
        let (associated, offset) = self.of_chunk(front, &mut associated);
        self.chunks
            .decrypt_into((Domain::Chunk, offset), associated, (payload, to), tag)
            .map_err(problem)
    }

    /// What is authenticated with a chunk's payload: the seal's id, the beginning of its header, its offset and its page
    /// list. Also returns the offset.
    fn of_chunk<'b>(
        &self,
        front: &[u8],
        bytes: &'b mut [u8; MOST_CHUNK_ASSOCIATED_BYTES],
    ) -> (&'b [u8], u64) {
        let list = &front[CHUNK_HEADER_BYTES..];
        let offset = crate::layout::u64_at(front, C_OFFSET);
        let mut len = 0;
        for part in [
            &self.keys.seal_id.as_bytes()[..],
            &front[..CHUNK_AUTHENTICATED_BYTES],
            &offset.to_le_bytes(),
            list,
        ] {
            put(bytes, len, part);
            len += part.len();
        }
        (&bytes[..len], offset)
    }

    /// Encrypts a leaf in place.
    pub(crate) fn seal_leaf(
        &self,
        number: u32,
        offset: u64,
        leaf: &mut [u8],
    ) -> Result<[u8; TAG_BYTES], KeyError> {
        self.sections.encrypt((Domain::Leaf, offset), &number.to_le_bytes(), leaf)
    }

    /// Checks and decrypts a leaf in place.
    pub(crate) fn open_leaf(
        &self,
        number: u32,
        offset: u64,
        leaf: &mut [u8; LEAF_BYTES],
        tag: &[u8; TAG_BYTES],
    ) -> Result<(), Problem> {
        let place = (Domain::Leaf, offset);
        self.sections.decrypt(place, &number.to_le_bytes(), leaf, tag).map_err(problem)
    }

    /// Encrypts the content of a section, and appends the tag. Of `section`, kind, tag, version and offset are used.
    pub(crate) fn seal_section(
        &self,
        section: &Section,
        content: &mut Vec<u8>,
    ) -> Result<(), KeyError> {
        let place = (Domain::Section, section.offset);
        let tag = self.sections.encrypt(place, &of_section(section), content)?;
        content.extend_from_slice(&tag);
        Ok(())
    }

    /// Checks and decrypts the bytes of a section, and removes the tag.
    pub(crate) fn open_section(
        &self,
        section: &Section,
        bytes: &mut Vec<u8>,
    ) -> Result<(), Problem> {
        let content_bytes = bytes.len().checked_sub(TAG_BYTES).ok_or(Problem::NotAuthentic)?;
        let mut tag = [0; TAG_BYTES];
        tag.copy_from_slice(&bytes[content_bytes..]);
        bytes.truncate(content_bytes);
        let place = (Domain::Section, section.offset);
        self.sections.decrypt(place, &of_section(section), bytes, &tag).map_err(problem)
    }

    /// Writes the authentication code of the header, the section table and KEYS into the header, and then its checksum.
    pub(crate) fn sign(&self, header: &mut [u8; HEADER_BYTES], table: &[u8]) {
        let mac = self.mac(header, table);
        put(&mut header[..], H_MAC, mac.as_bytes());
        let crc = crc32fast::hash(&header[..H_CRC]);
        put(&mut header[..], H_CRC, &crc.to_le_bytes());
    }

    /// Checks the authentication code of a header.
    pub(crate) fn check_header(
        &self,
        header: &[u8; HEADER_BYTES],
        table: &[u8],
    ) -> Result<(), Problem> {
        let mut found = [0; MAC_BYTES];
        found.copy_from_slice(&header[H_MAC..H_MAC + MAC_BYTES]);
        // Hashes of blake3 are compared in constant time.
        match self.mac(header, table) == blake3::Hash::from_bytes(found) {
            true => Ok(()),
            false => Err(Problem::NotAuthentic),
        }
    }

    fn mac(&self, header: &[u8; HEADER_BYTES], table: &[u8]) -> blake3::Hash {
        let mut unsigned = *header;
        unsigned[H_MAC..H_MAC + MAC_BYTES].fill(0);
        unsigned[H_CRC..].fill(0);
        let mut hasher = blake3::Hasher::new_keyed(self.header.bytes());
        hasher.update(&unsigned).update(table).update(&self.keys.encode());
        let mac = hasher.finalize();
        hasher.zeroize();
        mac
    }
}

/// What is authenticated with the content of a section.
fn of_section(section: &Section) -> [u8; 12] {
    let mut bytes = [0; 12];
    put(&mut bytes, 0, &section.kind.0.to_le_bytes());
    put(&mut bytes, 4, &section.tag.to_le_bytes());
    put(&mut bytes, 8, &section.version.to_le_bytes());
    bytes
}

fn problem(NotAuthentic: NotAuthentic) -> Problem {
    Problem::NotAuthentic
}

const _: () = {
    // One slot of each kind in use fits.
    assert!(MAX_KEYS_BYTES as usize / MAX_KEY_SLOTS > 1024);
    assert!(C_OFFSET > CHUNK_AUTHENTICATED_BYTES);
};
