//! AES-256-GCM for the parts of one file.

use std::alloc::{Layout, handle_alloc_error};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

use super::key::{KeyError, SecretKey};
use crate::layout::TAG_BYTES;

/// What is encrypted. Parts of two domains may stand at the same offset.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(super) enum Domain {
    /// The payload of a chunk.
    Chunk = 0,
    /// A leaf of the index.
    Leaf = 1,
    /// A whole section.
    Section = 2,
    /// A file key, in a slot of KEYS.
    FileKey = 3,
}

/// The bytes do not have their tag: they were changed, moved, or encrypted with another key.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NotAuthentic;

/// A cipher with its key, which is erased when this is dropped: the library does so with all memory that it frees.
pub(super) struct Cipher(LessSafeKey);

impl Cipher {
    pub(super) fn new(key: &SecretKey) -> Self {
        // The length is right, so only memory for the key can be missing.
        let key = UnboundKey::new(&AES_256_GCM, key.bytes())
            .unwrap_or_else(|_| handle_alloc_error(Layout::new::<UnboundKey>()));
        Self(LessSafeKey::new(key))
    }

    /// Encrypts `bytes` in place. The caller must not use the same offset and domain for other bytes.
    pub(super) fn encrypt(
        &self,
        (domain, offset): (Domain, u64),
        associated: &[u8],
        bytes: &mut [u8],
    ) -> Result<[u8; TAG_BYTES], KeyError> {
        let len_bytes = bytes.len();
        self.0
            .seal_in_place_separate_tag(nonce(domain, offset), Aad::from(associated), bytes)
            .ok()
            .and_then(|tag| tag.as_ref().try_into().ok())
            .ok_or(KeyError::TooLong { len_bytes })
    }

    /// Checks the tag of `bytes` and decrypts them in place. After an error they must not be used.
    pub(super) fn decrypt(
        &self,
        (domain, offset): (Domain, u64),
        associated: &[u8],
        bytes: &mut [u8],
        tag: &[u8; TAG_BYTES],
    ) -> Result<(), NotAuthentic> {
        self.0
            .open_in_place_separate_tag(nonce(domain, offset), Aad::from(associated), tag, bytes)
            .map(|_| ())
            .map_err(|_| NotAuthentic)
    }

    /// Checks the tag of `from` and decrypts them into `to`, which is as long. After an error `to` must not be used.
    pub(super) fn decrypt_into(
        &self,
        (domain, offset): (Domain, u64),
        associated: &[u8],
        (from, to): (&[u8], &mut [u8]),
        tag: &[u8; TAG_BYTES],
    ) -> Result<(), NotAuthentic> {
        self.0
            .open_separate_gather(nonce(domain, offset), Aad::from(associated), from, tag, to)
            .map_err(|_| NotAuthentic)
    }
}

fn nonce(domain: Domain, offset: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&offset.to_le_bytes());
    nonce[8..].copy_from_slice(&(domain as u32).to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Test case 14 of "The Galois/Counter Mode of Operation" (McGrew, Viega): a key, a nonce and a block of zeros.
    #[test]
    fn the_cipher_is_aes_256_gcm() {
        let cipher = Cipher::new(&SecretKey::new([0; 32]));
        let mut block = [0; 16];
        let tag = cipher.encrypt((Domain::Chunk, 0), &[], &mut block).unwrap();
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!(hex(&block), "cea7403d4d606b6e074ec5d3baf39d18");
        assert_eq!(hex(&tag), "d0d1c8a799996bf0265b98b5d48ab919");
    }

    /// Both ways: a caller that forgets the error must find no part of the text.
    #[test]
    fn what_is_not_authentic_is_not_decrypted() {
        let cipher = Cipher::new(&SecretKey::random().unwrap());
        let text = [3; 100_000];
        let mut bytes = text;
        let mut tag = cipher.encrypt((Domain::Chunk, 64), &[], &mut bytes).unwrap();
        tag[15] ^= 1;
        let mut opened = vec![0; bytes.len()];
        let place = (Domain::Chunk, 64);
        assert!(cipher.decrypt_into(place, &[], (&bytes, &mut opened), &tag).is_err());
        assert!(!opened.contains(&3), "{:?}", &opened[..64]);
        assert!(cipher.decrypt(place, &[], &mut bytes, &tag).is_err());
        assert!(bytes[..64] != text[..64] && bytes[99_936..] != text[99_936..]);
    }

    #[test]
    fn only_the_same_place_and_associated_bytes_open_it() {
        let cipher = Cipher::new(&SecretKey::random().unwrap());
        let text = [3; 100];
        let mut bytes = text;
        let tag = cipher.encrypt((Domain::Leaf, 4096), b"leaf 7", &mut bytes).unwrap();
        let open = |place, associated: &[u8], cipher: &Cipher| {
            let mut opened = bytes;
            cipher.decrypt(place, associated, &mut opened, &tag).map(|()| opened)
        };
        assert_eq!(open((Domain::Leaf, 4096), b"leaf 7", &cipher), Ok(text));
        assert!(open((Domain::Leaf, 4097), b"leaf 7", &cipher).is_err());
        assert!(open((Domain::Section, 4096), b"leaf 7", &cipher).is_err());
        assert!(open((Domain::Leaf, 4096), b"leaf 8", &cipher).is_err());
        let other = Cipher::new(&SecretKey::random().unwrap());
        assert!(open((Domain::Leaf, 4096), b"leaf 7", &other).is_err());
    }
}
