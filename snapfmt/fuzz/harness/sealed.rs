//! Sealed files: a template is opened, so that patches change what is in it, and then encrypted and authenticated again, as
//! an attacker with the key could.
//!
//! Written from `docs/format.md`, not with the library's own code.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

use super::seal::{HEADER, LEAVES, SECTIONS, TABLE, number, put_crc, seal_chunks, seal_lengths};

/// The key of the templates.
pub(crate) const KEY: [u8; 32] = [0x5e; 32];

/// In the byte that says which checksums are corrected: the authentication code of the header, the table and KEYS.
pub(crate) const MAC: u8 = 64;

const TAG: usize = 16;
const CHUNK: u32 = 0;
const LEAF: u32 = 1;
const SECTION: u32 = 2;
const FILE_KEY: u32 = 3;

/// A sealed file, with its parts decrypted. Tags have their places, and are zeros.
pub(crate) struct Opened {
    pub(crate) plain: Vec<u8>,
    keys: Keys,
    /// Offset, pages and payload of each chunk.
    chunks: Vec<(usize, usize, usize)>,
    /// Offset and length.
    chunks_section: (usize, usize),
    leaves: usize,
    root: usize,
    leaf_count: usize,
    /// Kind, offset in the table, offset and length of the content.
    sections: Vec<(u64, usize, usize, usize)>,
    keys_section: (usize, usize),
}

struct Keys {
    seal_id: [u8; 16],
    chunks: LessSafeKey,
    sections: LessSafeKey,
    header: [u8; 32],
}

impl Opened {
    /// Opens a good file.
    pub(crate) fn new(template: &[u8]) -> Self {
        let number = |at, len| number(template, at, len).expect("a good file") as usize;
        let (table, records) = (number(96, 8), number(104, 4));
        let records = (0..records).map(|at| table + 40 * at);
        let sections: Vec<_> = records
            .map(|at| (number(at, 4) as u64, at, number(at + 16, 8), number(at + 24, 8)))
            .collect();
        let of_kind = |kind| {
            let mut found = sections.iter().filter(move |section| section.0 == kind);
            found.next().map(|section| (section.2, section.3)).expect("a good file")
        };
        let keys_section = of_kind(9);
        let keys = Keys::new(template, keys_section.0);
        let (chunks_section, leaves, root) = (of_kind(1), of_kind(2), of_kind(3));
        let mut chunks = Vec::new();
        let mut at = chunks_section.0;
        while at < chunks_section.0 + chunks_section.1 {
            let (pages, payload) = (number(at + 6, 2), number(at + 8, 4));
            chunks.push((at, pages, payload));
            at += (32 + 4 * pages + payload + TAG).next_multiple_of(64);
        }
        let mut opened = Self {
            plain: template.to_vec(),
            keys,
            chunks,
            chunks_section,
            leaves: leaves.0,
            root: root.0,
            leaf_count: leaves.1 / 4096,
            sections,
            keys_section,
        };
        opened.decrypt();
        opened
    }

    fn decrypt(&mut self) {
        let Self { plain, keys, .. } = self;
        for (_, record, offset, len) in
            self.sections.iter().filter(|section| section.0 > 2 && section.0 != 9)
        {
            let associated = plain[*record..record + 12].to_vec();
            let (content, tag) = plain[*offset..offset + len].split_at_mut(len - TAG);
            decrypt(&keys.sections, (SECTION, *offset), &associated, content, tag);
        }
        for at in 0..self.leaf_count {
            let (record, offset) = (self.root + 24 * at, self.leaves + 4096 * at);
            let associated = plain[record..record + 4].to_vec();
            let mut tag = plain[record + 8..record + 24].to_vec();
            let leaf = &mut plain[offset..offset + 4096];
            decrypt(&keys.sections, (LEAF, offset), &associated, leaf, &mut tag);
        }
        for &(offset, pages, payload) in &self.chunks {
            let associated = keys.of_chunk(&plain[offset..], pages);
            let start = offset + 32 + 4 * pages;
            let (content, tag) = plain[start..start + payload + TAG].split_at_mut(payload);
            decrypt(&keys.chunks, (CHUNK, offset), &associated, content, tag);
        }
    }

    /// Encrypts a changed copy of [`Opened::plain`], in the layout of the template, and corrects the checksums and the
    /// authentication code that `which` names.
    pub(crate) fn sealed(&self, mut file: Vec<u8>, which: u8) -> Vec<u8> {
        if which & super::seal::LENGTHS != 0 {
            seal_lengths(&mut file);
        }
        for &(offset, pages, payload) in &self.chunks {
            let start = offset + 32 + 4 * pages;
            if start + payload + TAG <= file.len() {
                let associated = self.keys.of_chunk(&file[offset..], pages);
                let (content, tag) = file[start..start + payload + TAG].split_at_mut(payload);
                encrypt(&self.keys.chunks, (CHUNK, offset), &associated, content, tag);
            }
        }
        if which & super::seal::CHUNKS != 0 {
            seal_chunks(&mut file, self.chunks_section.0, self.chunks_section.1, TAG as u64);
        }
        for at in 0..self.leaf_count {
            let (record, offset) = (self.root + 24 * at, self.leaves + 4096 * at);
            if record + 24 <= file.len() && offset + 4096 <= file.len() {
                let associated = file[record..record + 4].to_vec();
                let mut tag = [0; TAG];
                let leaf = &mut file[offset..offset + 4096];
                encrypt(&self.keys.sections, (LEAF, offset), &associated, leaf, &mut tag);
                if which & LEAVES != 0 {
                    file[record + 8..record + 24].copy_from_slice(&tag);
                    put_crc(&mut file, offset, 4096, record + 4);
                }
            }
        }
        for &(kind, record, offset, len) in &self.sections {
            if offset + len > file.len() || record + 40 > file.len() {
                continue;
            }
            if kind > 2 && kind != 9 {
                let associated = file[record..record + 12].to_vec();
                let (content, tag) = file[offset..offset + len].split_at_mut(len - TAG);
                encrypt(&self.keys.sections, (SECTION, offset), &associated, content, tag);
            }
            if kind > 1 && which & SECTIONS != 0 {
                put_crc(&mut file, offset, len, record + 12);
            }
        }
        let table = self.sections[0].1;
        let table_bytes = 40 * self.sections.len();
        if which & TABLE != 0 {
            put_crc(&mut file, table, table_bytes, 108);
        }
        let (keys, keys_bytes) = self.keys_section;
        let parts = [file.get(table..table + table_bytes), file.get(keys..keys + keys_bytes)];
        if let (true, [Some(table), Some(keys)], Some(header)) =
            (which & MAC != 0, parts, file.get(..4096))
        {
            let mut header = header.to_vec();
            header[168..200].fill(0);
            header[4092..].fill(0);
            let mut hasher = blake3::Hasher::new_keyed(&self.keys.header);
            hasher.update(&header).update(table).update(keys);
            let mac = hasher.finalize();
            file[168..200].copy_from_slice(mac.as_bytes());
        }
        if which & HEADER != 0 {
            put_crc(&mut file, 0, 4092, 4092);
        }
        file
    }
}

impl Keys {
    /// Unwraps the file key in the first slot, and derives the others.
    fn new(template: &[u8], keys: usize) -> Self {
        let seal_id = template[keys + 8..keys + 24].try_into().expect("16 bytes");
        let id = template[40..56].try_into().expect("16 bytes");
        let mut file_key: [u8; 32] = template[keys + 32..keys + 64].try_into().expect("32 bytes");
        let mut tag = template[keys + 64..keys + 80].to_vec();
        let associated = [&template[keys..keys + 4], &template[keys + 24..keys + 28]].concat();
        let wrap = cipher(&derive(&KEY, "wrap of the file key", &seal_id));
        decrypt(&wrap, (FILE_KEY, 0), &associated, &mut file_key, &mut tag);
        Self {
            seal_id,
            chunks: cipher(&derive(&file_key, "chunks", &seal_id)),
            sections: cipher(&derive(&file_key, "sections and leaves", &id)),
            header: derive(&file_key, "header, table and keys", &id),
        }
    }

    /// What is authenticated with a chunk.
    fn of_chunk(&self, chunk: &[u8], pages: usize) -> Vec<u8> {
        [&self.seal_id, &chunk[..12], &chunk[16..24], &chunk[32..32 + 4 * pages]].concat()
    }
}

fn derive(key: &[u8; 32], purpose: &str, salt: &[u8; 16]) -> [u8; 32] {
    let context = format!("snapvm snapfmt 2026-11 sealed file: {purpose}");
    let mut hasher = blake3::Hasher::new_derive_key(&context);
    *hasher.update(key).update(salt).finalize().as_bytes()
}

fn cipher(key: &[u8; 32]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).expect("the length is right"))
}

fn nonce((domain, offset): (u32, usize)) -> Nonce {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&(offset as u64).to_le_bytes());
    nonce[8..].copy_from_slice(&domain.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

/// Decrypts a part of a good file, and clears its tag.
fn decrypt(
    cipher: &LessSafeKey,
    place: (u32, usize),
    associated: &[u8],
    bytes: &mut [u8],
    tag: &mut [u8],
) {
    let opened = cipher.open_in_place_separate_tag(nonce(place), Aad::from(associated), tag, bytes);
    opened.expect("a template is a good file");
    tag.fill(0);
}

fn encrypt(
    cipher: &LessSafeKey,
    place: (u32, usize),
    associated: &[u8],
    bytes: &mut [u8],
    tag: &mut [u8],
) {
    let made = cipher.seal_in_place_separate_tag(nonce(place), Aad::from(associated), bytes);
    tag.copy_from_slice(made.expect("it is short").as_ref());
}
