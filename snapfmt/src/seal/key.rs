//! A key of 32 bytes: read from text or bytes, erased from memory when it is dropped, never printed.

use std::fmt;
use std::io;

use rustix::rand::{GetRandomFlags, getrandom};
use zeroize::Zeroizing;

/// Bytes of every key.
const KEY_BYTES: usize = 32;

/// A secret key of 32 bytes. It is erased from memory when it is dropped, and its `Debug` shows no byte of it.
///
/// It is on the heap: a move of the key copies only its address.
pub struct SecretKey(Box<Zeroizing<[u8; KEY_BYTES]>>);

impl SecretKey {
    /// Length of a key in bytes.
    pub const BYTES: usize = KEY_BYTES;

    /// Most bytes of a file with a key: 64 hex digits and a line end.
    pub const MOST_FILE_BYTES: usize = 2 * KEY_BYTES + 2;

    /// A key of these bytes.
    #[must_use]
    pub fn new(bytes: [u8; Self::BYTES]) -> Self {
        Self(Box::new(Zeroizing::new(bytes)))
    }

    /// A random key, from the kernel.
    ///
    /// # Errors
    /// [`KeyError::Random`]
    pub fn random() -> Result<Self, KeyError> {
        let mut key = Self::new([0; Self::BYTES]);
        let filled = getrandom(&mut key.0[..], GetRandomFlags::empty())
            .map_err(|errno| KeyError::Random(errno.into()))?;
        match filled == Self::BYTES {
            true => Ok(key),
            false => Err(KeyError::Random(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// The key in a file: 32 bytes, or 64 hex digits that a line end may follow.
    ///
    /// # Errors
    /// [`KeyError::NotAKey`]
    pub fn parse(content: &[u8]) -> Result<Self, KeyError> {
        let mut key = Self::new([0; Self::BYTES]);
        if content.len() == Self::BYTES {
            key.0.copy_from_slice(content);
            return Ok(key);
        }
        let digits = content.trim_ascii_end();
        let wrong = || KeyError::NotAKey { len_bytes: content.len() };
        if digits.len() != 2 * Self::BYTES || content.len() > Self::MOST_FILE_BYTES {
            return Err(wrong());
        }
        for (byte, pair) in key.0.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |digit: u8| char::from(digit).to_digit(16).ok_or_else(wrong);
            *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
        }
        Ok(key)
    }

    /// The bytes of the key, to give it to a program that wraps it.
    pub fn bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// A key for one purpose, which says nothing about this one: BLAKE3's key derivation of this key and `salt`.
    pub(crate) fn derive(&self, purpose: &str, salt: &[u8; 16]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(purpose);
        hasher.update(&self.0[..]).update(salt);
        let mut derived = hasher.finalize();
        let mut key = Self::new([0; Self::BYTES]);
        key.0.copy_from_slice(derived.as_bytes());
        zeroize::Zeroize::zeroize(&mut derived);
        zeroize::Zeroize::zeroize(&mut hasher);
        key
    }
}

impl Clone for SecretKey {
    fn clone(&self) -> Self {
        let mut key = Self::new([0; Self::BYTES]);
        key.0.copy_from_slice(&self.0[..]);
        key
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(..)")
    }
}

/// Why a sealed file cannot be opened or written with a key. No message has a byte of a key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// What should be a key has another form.
    #[error("a key is 32 bytes, or 64 hex digits; these {len_bytes} bytes are neither")]
    NotAKey {
        /// Length of the content.
        len_bytes: usize,
    },
    /// The key is not the one that the file is sealed with.
    #[error(
        "the key does not open the snapshot: it is sealed with another key, or its list of keys was changed"
    )]
    Wrong,
    /// The file has no slot that this key could open.
    #[error(
        "the snapshot is sealed with keys of other kinds ({}), not with {wanted}",
        listed(kinds)
    )]
    NoSlot {
        /// What was given.
        wanted: &'static str,
        /// The kinds of the slots that the file has.
        kinds: Vec<u32>,
    },
    /// A file cannot have these slots.
    #[error(
        "the snapshot would have {found} wrapped keys of {len_bytes} bytes in all; allowed are 1 to {most}, and {most_bytes} \
         bytes"
    )]
    Slots {
        /// How many there would be.
        found: usize,
        /// The most that a file has.
        most: usize,
        /// How long they would be.
        len_bytes: usize,
        /// The most that they may be.
        most_bytes: usize,
    },
    /// The file has no slot with this number.
    #[error("the snapshot has no wrapped key {number}; it has {slots}")]
    NoSuchSlot {
        /// The number, counted from 1.
        number: usize,
        /// How many slots it has.
        slots: usize,
    },
    /// The kernel gave no random bytes.
    #[error("no random bytes for a key")]
    Random(#[source] io::Error),
    /// The cipher refused its input.
    #[error("{len_bytes} bytes are more than the cipher takes")]
    TooLong {
        /// Length of the input.
        len_bytes: usize,
    },
    /// A key provider of the caller failed.
    #[error(transparent)]
    Provider(Box<dyn std::error::Error + Send + Sync>),
}

fn listed(kinds: &[u32]) -> String {
    kinds.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_bytes_or_hex() {
        let raw: [u8; 32] = std::array::from_fn(|at| at as u8 * 7);
        let hex: String = raw.iter().map(|byte| format!("{byte:02x}")).collect();
        for content in [
            raw.to_vec(),
            hex.clone().into_bytes(),
            format!("{hex}\n").into_bytes(),
            format!("{}\r\n", hex.to_uppercase()).into_bytes(),
        ] {
            assert_eq!(SecretKey::parse(&content).unwrap().bytes(), &raw);
        }
        for content in [
            &b""[..],
            &raw[..31],
            &hex.as_bytes()[..63],
            format!("{hex}0").as_bytes(),
            format!("{hex}\n\n\n").as_bytes(),
            hex.replace('0', "g").as_bytes(),
            format!(" {hex}").as_bytes(),
        ] {
            let error = SecretKey::parse(content).unwrap_err();
            assert!(matches!(error, KeyError::NotAKey { len_bytes } if len_bytes == content.len()));
        }
    }

    #[test]
    fn debug_output_has_no_byte_of_the_key() {
        let text = format!("{:?}", SecretKey::new([0xa7; 32]));
        assert_eq!(text, "SecretKey(..)");
    }

    #[test]
    fn derived_keys_differ_by_purpose_and_salt() {
        let key = SecretKey::random().unwrap();
        let derived = [("a", [0; 16]), ("b", [0; 16]), ("a", [1; 16])]
            .map(|(purpose, salt)| *key.derive(purpose, &salt).bytes());
        assert!(derived[0] != derived[1] && derived[0] != derived[2] && derived[1] != derived[2]);
        assert!(!derived.contains(key.bytes()));
    }
}
