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

    /// As [`KeyProvider::wrap_key`], for a copy of a file. Others may have chosen both the file key and `seal_id`, and may
    /// have chosen those of another file of this key: what depends on them only must not be used twice.
    ///
    /// # Errors
    /// [`KeyError`]
    fn wrap_key_of_copy(
        &self,
        file_key: &SecretKey,
        seal_id: Uuid,
    ) -> Result<Vec<KeySlot>, KeyError> {
        self.wrap_key(file_key, seal_id)
    }
}

const WRAPPED_BYTES: usize = SecretKey::BYTES + TAG_BYTES;
const SALT_BYTES: usize = 16;

impl KeyProvider for SecretKey {
    fn unwrap_key(&self, keys: &KeySlots) -> Result<SecretKey, KeyError> {
        let kinds = || keys.slots.iter().map(|slot| slot.kind);
        if kinds().all(|kind| !matches!(kind, KeySlot::SECRET_KEY | KeySlot::SALTED_SECRET_KEY)) {
            return Err(KeyError::NoSlot { wanted: "a key of 32 bytes", kinds: kinds().collect() });
        }
        let wrapped = keys.slots.iter().filter_map(|slot| {
            let (wrapping, bytes) = match slot.kind {
                KeySlot::SECRET_KEY => (wrapping(self, keys.seal_id), &slot.bytes[..]),
                KeySlot::SALTED_SECRET_KEY => {
                    let (salt, bytes) = slot.bytes.split_at_checked(SALT_BYTES)?;
                    (salted_wrapping(self, salt.try_into().ok()?, keys.seal_id), bytes)
                }
                _ => return None,
            };
            let (wrapped, tag) = bytes.split_at_checked(SecretKey::BYTES)?;
            Some((wrapping, wrapped.try_into().ok()?, tag.try_into().ok()?))
        });
        for ((cipher, associated), wrapped, tag) in wrapped {
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
        let wrapped = wrap(wrapping(self, seal_id), file_key)?;
        Ok(vec![KeySlot::new(KeySlot::SECRET_KEY, wrapped)])
    }

    fn wrap_key_of_copy(
        &self,
        file_key: &SecretKey,
        seal_id: Uuid,
    ) -> Result<Vec<KeySlot>, KeyError> {
        let salt = Uuid::new_v4().into_bytes();
        let wrapped = wrap(salted_wrapping(self, salt, seal_id), file_key)?;
        let bytes = [&salt[..], &wrapped].concat();
        Ok(vec![KeySlot::new(KeySlot::SALTED_SECRET_KEY, bytes)])
    }
}

/// A cipher with a key for one text only, so that one nonce is enough, and associated data.
type Wrapping = (Cipher, Vec<u8>);

fn wrap((cipher, associated): Wrapping, file_key: &SecretKey) -> Result<Vec<u8>, KeyError> {
    let mut wrapped = Vec::with_capacity(WRAPPED_BYTES);
    wrapped.extend_from_slice(file_key.bytes());
    let tag = cipher.encrypt((Domain::FileKey, 0), &associated, &mut wrapped)?;
    wrapped.extend_from_slice(&tag);
    Ok(wrapped)
}

fn associated(kind: u32) -> Vec<u8> {
    [SUITE_AES_256_GCM.to_le_bytes(), kind.to_le_bytes()].concat()
}

/// For a new file key: its `seal_id` is random.
fn wrapping(key: &SecretKey, seal_id: Uuid) -> Wrapping {
    let key =
        key.derive("snapvm snapfmt 2026-11 sealed file: wrap of the file key", seal_id.as_bytes());
    (Cipher::new(&key), associated(KeySlot::SECRET_KEY))
}

/// For a file key that others may have chosen, with its `seal_id`.
fn salted_wrapping(key: &SecretKey, salt: [u8; SALT_BYTES], seal_id: Uuid) -> Wrapping {
    let key = key.derive("snapvm snapfmt 2026-11 sealed file: salted wrap of the file key", &salt);
    let associated = [&associated(KeySlot::SALTED_SECRET_KEY)[..], seal_id.as_bytes()].concat();
    (Cipher::new(&key), associated)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With one key and nonce, the difference of two slots would be that of their file keys: one that is known would
    /// tell the other one.
    #[test]
    fn two_file_keys_of_one_seal_id_are_wrapped_with_different_keys() {
        let [key, one, other] = [(); 3].map(|()| SecretKey::random().unwrap());
        let seal_id = Uuid::new_v4();
        let slot =
            |file_key: &SecretKey| key.wrap_key_of_copy(file_key, seal_id).unwrap().remove(0);
        let first = key.wrap_key(&one, seal_id).unwrap().remove(0);
        let slots = [slot(&one), slot(&other), slot(&one)];
        let text = |slot: &KeySlot| slot.bytes[slot.bytes.len() - WRAPPED_BYTES..].to_vec();
        let mut texts: Vec<_> = slots.iter().chain([&first]).map(text).collect();
        let difference = |a: &[u8], b: &[u8]| -> Vec<u8> {
            a.iter().zip(b).map(|(a, b)| a ^ b).take(SecretKey::BYTES).collect()
        };
        let of_keys = difference(one.bytes(), other.bytes());
        for (at, text) in texts.iter().enumerate() {
            for other in &texts[..at] {
                assert_ne!(difference(text, other), of_keys);
            }
        }
        texts.sort();
        texts.dedup();
        assert_eq!(texts.len(), 4);
        for (slot, file_key) in slots.into_iter().zip([&one, &other, &one]) {
            assert_eq!(slot.bytes.len(), SALT_BYTES + WRAPPED_BYTES);
            let keys = |seal_id, slot| KeySlots { seal_id, slots: vec![slot] };
            let opened = key.unwrap_key(&keys(seal_id, slot.clone())).unwrap();
            assert_eq!(opened.bytes(), file_key.bytes());
            let moved = key.unwrap_key(&keys(Uuid::new_v4(), slot.clone()));
            assert!(matches!(moved, Err(KeyError::Wrong)));
            for bit in 0..slot.bytes.len() * 8 {
                let mut changed = slot.clone();
                changed.bytes[bit / 8] ^= 1 << (bit % 8);
                let changed = key.unwrap_key(&keys(seal_id, changed));
                assert!(matches!(changed, Err(KeyError::Wrong)), "{bit}");
            }
        }
    }

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
