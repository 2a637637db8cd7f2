//! The section KEYS of a sealed file: the file key, wrapped in one slot or several.

use uuid::Uuid;

use super::key::KeyError;
use crate::error::{Corruption, Part, Problem};
use crate::layout::{
    K_KIND, K_LEN, K_SEAL_ID, K_SLOTS, K_SUITE, KEY_SLOT_HEADER_BYTES, KEYS_HEADER_BYTES,
    MAX_KEY_SLOTS, MAX_KEYS_BYTES, SUITE_AES_256_GCM, put, u32_at,
};
use crate::section::SectionKind;

/// The file key in one wrapped form.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeySlot {
    /// Which form it is: [`KeySlot::SECRET_KEY`], [`KeySlot::SALTED_SECRET_KEY`], [`KeySlot::EXTERNAL`], or another one,
    /// which this version ignores.
    pub kind: u32,
    /// The wrapped key.
    pub bytes: Vec<u8>,
}

impl KeySlot {
    /// The kind of slots that a [`SecretKey`](crate::SecretKey) opens.
    pub const SECRET_KEY: u32 = 1;
    /// The same, with a random salt in the slot: in copies with other keys.
    pub const SALTED_SECRET_KEY: u32 = 3;
    /// The kind of slots that another program opens.
    pub const EXTERNAL: u32 = 2;

    /// A slot with these bytes.
    #[must_use]
    pub fn new(kind: u32, bytes: Vec<u8>) -> Self {
        Self { kind, bytes }
    }
}

/// The content of the section KEYS. It is not secret.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeySlots {
    /// Identifies the file key. Copies of the file that have the same chunks have the same.
    pub seal_id: Uuid,
    /// The wrapped keys, 1 to 16.
    pub slots: Vec<KeySlot>,
}

impl KeySlots {
    /// Most bytes of a wrapped key if there is no other slot.
    pub const MOST_BYTES: usize =
        MAX_KEYS_BYTES as usize - KEYS_HEADER_BYTES - KEY_SLOT_HEADER_BYTES;

    /// These slots, if a file can have them.
    ///
    /// # Errors
    /// [`KeyError::Slots`]
    pub fn new(seal_id: Uuid, slots: Vec<KeySlot>) -> Result<Self, KeyError> {
        let len_bytes = slots.iter().map(|slot| KEY_SLOT_HEADER_BYTES + slot.bytes.len()).sum();
        let found = slots.len();
        let most_bytes = MAX_KEYS_BYTES as usize - KEYS_HEADER_BYTES;
        if !(1..=MAX_KEY_SLOTS).contains(&found) || len_bytes > most_bytes {
            let most = MAX_KEY_SLOTS;
            return Err(KeyError::Slots { found, most, len_bytes, most_bytes });
        }
        Ok(Self { seal_id, slots })
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; KEYS_HEADER_BYTES];
        put(&mut bytes, K_SUITE, &SUITE_AES_256_GCM.to_le_bytes());
        put(&mut bytes, K_SLOTS, &(self.slots.len() as u32).to_le_bytes());
        put(&mut bytes, K_SEAL_ID, self.seal_id.as_bytes());
        for slot in &self.slots {
            bytes.extend_from_slice(&slot.kind.to_le_bytes());
            bytes.extend_from_slice(&(slot.bytes.len() as u32).to_le_bytes());
            bytes.extend_from_slice(&slot.bytes);
        }
        bytes
    }

    /// Parses a section with a correct checksum, of at most [`MAX_KEYS_BYTES`].
    pub(crate) fn parse(bytes: &[u8], offset: u64) -> Result<Self, Corruption> {
        let corrupt = |at: usize, problem| {
            Corruption::new(Part::Section(SectionKind::KEYS), offset + at as u64, problem)
        };
        let range = |at, field, min: usize, max: usize, found: usize| {
            let (min, max, found) = (min as u64, max as u64, found as u64);
            corrupt(at, Problem::Range { field, min, max, found })
        };
        if bytes.len() < KEYS_HEADER_BYTES {
            let max = MAX_KEYS_BYTES as usize;
            return Err(range(0, "section.len", KEYS_HEADER_BYTES, max, bytes.len()));
        }
        let (expected, found) = (SUITE_AES_256_GCM.into(), u32_at(bytes, K_SUITE).into());
        if expected != found {
            let problem = Problem::Field { field: "keys.suite", expected, found };
            return Err(corrupt(K_SUITE, problem));
        }
        let count = u32_at(bytes, K_SLOTS) as usize;
        if !(1..=MAX_KEY_SLOTS).contains(&count) {
            return Err(range(K_SLOTS, "keys.slots", 1, MAX_KEY_SLOTS, count));
        }
        let mut seal_id = [0; 16];
        seal_id.copy_from_slice(&bytes[K_SEAL_ID..K_SEAL_ID + 16]);
        let mut slots = Vec::with_capacity(count);
        let mut at = KEYS_HEADER_BYTES;
        for _ in 0..count {
            let Some(header) = bytes.get(at..at + KEY_SLOT_HEADER_BYTES) else {
                return Err(range(at, "keys.slot", KEY_SLOT_HEADER_BYTES, usize::MAX, 0));
            };
            let (kind, len) = (u32_at(header, K_KIND), u32_at(header, K_LEN) as usize);
            let start = at + KEY_SLOT_HEADER_BYTES;
            let room = bytes.len() - start;
            if len > room {
                return Err(range(at + K_LEN, "keys.slot.len", 0, room, len));
            }
            slots.push(KeySlot { kind, bytes: bytes[start..start + len].to_vec() });
            at = start + len;
        }
        if at != bytes.len() {
            let (expected, found) = (at as u64, bytes.len() as u64);
            return Err(corrupt(0, Problem::Field { field: "section.len", expected, found }));
        }
        Ok(Self { seal_id: Uuid::from_bytes(seal_id), slots })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_as_many_slots_as_a_file_can_have_are_taken() {
        let of = |count: usize, len: usize| {
            KeySlots::new(Uuid::nil(), vec![KeySlot::new(2, vec![1; len]); count])
        };
        for (count, len) in [(1, 1), (16, 4085), (1, KeySlots::MOST_BYTES)] {
            let keys = of(count, len).unwrap();
            assert_eq!(KeySlots::parse(&keys.encode(), 0).unwrap(), keys);
        }
        for (count, len) in [(0, 1), (17, 1), (16, 4087), (1, KeySlots::MOST_BYTES + 1)] {
            let Err(KeyError::Slots { found, .. }) = of(count, len) else { panic!() };
            assert_eq!(found, count);
        }
    }

    #[test]
    fn slots_are_encoded_and_parsed() {
        let slots = [(1, vec![7; 48]), (9, vec![]), (2, vec![1; 1000])]
            .map(|(kind, bytes)| KeySlot { kind, bytes });
        let keys = KeySlots { seal_id: Uuid::from_u128(5), slots: slots.to_vec() };
        let bytes = keys.encode();
        assert_eq!(KeySlots::parse(&bytes, 64).unwrap(), keys);
        for len in 0..bytes.len() {
            assert!(KeySlots::parse(&bytes[..len], 64).is_err(), "{len}");
        }
        assert!(KeySlots::parse(&[&bytes[..], &[0]].concat(), 64).is_err());
        let mut suite = bytes.clone();
        suite[0] = 2;
        assert_eq!(
            KeySlots::parse(&suite, 64).unwrap_err().to_string(),
            "corrupt keys at offset 64: keys.suite expected 0x1, found 0x2"
        );
        let mut none = bytes[..KEYS_HEADER_BYTES].to_vec();
        none[K_SLOTS..K_SLOTS + 4].fill(0);
        assert!(KeySlots::parse(&none, 64).is_err());
    }

    proptest! {
        /// Whatever the bytes are, parsing ends, and what it accepts is encoded as it was.
        #[test]
        fn any_bytes_are_refused_or_kept(
            mut bytes in prop::collection::vec(any::<u8>(), 0..200),
            count in 0u8..18,
            len in 0u8..60,
        ) {
            for (at, byte) in [0, 1, 2, 3, 4, 5, 6, 7, 28, 29, 30, 31].into_iter().zip(
                [1, 0, 0, 0, count, 0, 0, 0, len, 0, 0, 0],
            ) {
                if let Some(place) = bytes.get_mut(at) {
                    *place = byte;
                }
            }
            if let Ok(keys) = KeySlots::parse(&bytes, 0) {
                prop_assert_eq!(keys.encode(), bytes);
            }
        }
    }
}
