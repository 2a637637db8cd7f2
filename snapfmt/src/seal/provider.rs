//! Who has the keys: wraps the key of a file that is written, and unwraps that of a file that is read.

use std::fmt;

use uuid::Uuid;

use super::cipher::{Cipher, Domain};
use super::key::{KeyError, SecretKey};
use super::slots::{KeySlot, KeySlots};
use crate::layout::{SUITE_AES_256_GCM, TAG_BYTES};

/// Wraps and unwraps file keys. A [`SecretKey`] is one; a program that asks a key server is another.
pub trait KeyProvider: Send + Sync + fmt::Debug {
    /// The file key that one of the slots has. The slots come from a file that may be forged: the caller checks with
    /// the key that they were not.
    ///
    /// # Errors
    /// [`KeyError`]
    fn unwrap_key(&self, keys: &KeySlots) -> Result<SecretKey, KeyError>;

    /// Wraps the file key of a new file, once for each key that is to open it: 1 to 16 slots. `seal_id` is random, and of
    /// this file key only.
    ///
    /// # Errors
    /// [`KeyError`]
    fn wrap_key(&self, file_key: &SecretKey, seal_id: Uuid) -> Result<Vec<KeySlot>, KeyError>;
}

const WRAPPED_BYTES: usize = SecretKey::BYTES + TAG_BYTES;

impl KeyProvider for SecretKey {
    fn unwrap_key(&self, keys: &KeySlots) -> Result<SecretKey, KeyError> {
        let kinds = || keys.slots.iter().map(|slot| slot.kind);
        if kinds().all(|kind| kind != KeySlot::SECRET_KEY) {
            return Err(KeyError::NoSlot { wanted: "a key of 32 bytes", kinds: kinds().collect() });
        }
        let (cipher, associated) = wrapping(self, keys.seal_id);
        let of_kind = keys.slots.iter().filter(|slot| slot.kind == KeySlot::SECRET_KEY);
        let wrapped = of_kind.filter_map(|slot| {
            let (wrapped, tag) = slot.bytes.split_at_checked(SecretKey::BYTES)?;
            Some((wrapped.try_into().ok()?, tag.try_into().ok()?))
        });
        for (wrapped, tag) in wrapped {
            // In its place in memory, which is erased.
            let mut file_key = zeroize::Zeroizing::<[u8; SecretKey::BYTES]>::new(wrapped);
            let place = (Domain::FileKey, 0);
            if cipher.decrypt(place, &associated, &mut file_key[..], &tag).is_ok() {
                return Ok(SecretKey::new(*file_key));
            }
        }
        Err(KeyError::Wrong)
    }

    fn wrap_key(&self, file_key: &SecretKey, seal_id: Uuid) -> Result<Vec<KeySlot>, KeyError> {
        let (cipher, associated) = wrapping(self, seal_id);
        let mut wrapped = Vec::with_capacity(WRAPPED_BYTES);
        wrapped.extend_from_slice(file_key.bytes());
        let tag = cipher.encrypt((Domain::FileKey, 0), &associated, &mut wrapped)?;
        wrapped.extend_from_slice(&tag);
        Ok(vec![KeySlot::new(KeySlot::SECRET_KEY, wrapped)])
    }
}

/// The cipher that wraps the file key of one seal only: so one nonce is enough.
fn wrapping(key: &SecretKey, seal_id: Uuid) -> (Cipher, [u8; 8]) {
    let key =
        key.derive("snapvm snapfmt 2026-11 sealed file: wrap of the file key", seal_id.as_bytes());
    let mut associated = [0; 8];
    associated[..4].copy_from_slice(&SUITE_AES_256_GCM.to_le_bytes());
    associated[4..].copy_from_slice(&KeySlot::SECRET_KEY.to_le_bytes());
    (Cipher::new(&key), associated)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_key_unwraps() {
        let [key, other, file_key] = [(); 3].map(|()| SecretKey::random().unwrap());
        let seal_id = Uuid::new_v4();
        let [slot] = &key.wrap_key(&file_key, seal_id).unwrap()[..] else { panic!() };
        assert_eq!(slot.bytes.len(), WRAPPED_BYTES);
        let keys = |slots: Vec<KeySlot>| KeySlots { seal_id, slots };
        let [of_other] = &other.wrap_key(&file_key, seal_id).unwrap()[..] else { panic!() };
        let two = keys(vec![of_other.clone(), slot.clone()]);
        for key in [&key, &other] {
            assert_eq!(key.unwrap_key(&two).unwrap().bytes(), file_key.bytes());
        }
        let third = SecretKey::random().unwrap();
        assert!(matches!(third.unwrap_key(&two), Err(KeyError::Wrong)));
        let moved = KeySlots { seal_id: Uuid::new_v4(), slots: vec![slot.clone()] };
        assert!(matches!(key.unwrap_key(&moved), Err(KeyError::Wrong)));
        for bit in 0..slot.bytes.len() * 8 {
            let mut bytes = slot.bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let changed = keys(vec![KeySlot::new(KeySlot::SECRET_KEY, bytes)]);
            assert!(matches!(key.unwrap_key(&changed), Err(KeyError::Wrong)), "{bit}");
        }
        let short = keys(vec![KeySlot::new(KeySlot::SECRET_KEY, vec![1; 20])]);
        assert!(matches!(key.unwrap_key(&short), Err(KeyError::Wrong)));
        let external = keys(vec![KeySlot::new(KeySlot::EXTERNAL, slot.bytes.clone())]);
        assert!(matches!(key.unwrap_key(&external), Err(KeyError::NoSlot { .. })));
    }
}
