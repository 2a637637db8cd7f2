//! Kernel structures, encoded as bytes whose number never changes.
//!
//! `kvm-bindings` encodes a structure as its raw bytes. When it decodes, it silently truncates what is too long
//! and pads what is too short with zeros. [`Frozen`] refuses both: a structure is decoded from exactly as many
//! bytes as it has.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::BytesDeserializer;
use serde::de::{Deserialize, Deserializer, Error, Visitor};
use serde::ser::{Serialize, Serializer};

/// A kernel structure `T`, encoded as its length in bytes and its bytes.
#[derive(Clone, Copy)]
pub struct Frozen<T>(pub T);

impl<T> fmt::Debug for Frozen<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frozen<{}>", std::any::type_name::<T>())
    }
}

impl<T: Serialize> Serialize for Frozen<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Frozen<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ExactBytes<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for ExactBytes<T> {
            type Value = Frozen<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "the {} bytes of {}", size_of::<T>(), std::any::type_name::<T>())
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Self::Value, E> {
                if bytes.len() != size_of::<T>() {
                    return Err(E::invalid_length(bytes.len(), &self));
                }
                T::deserialize(BytesDeserializer::new(bytes)).map(Frozen)
            }
        }

        deserializer.deserialize_bytes(ExactBytes(PhantomData))
    }
}
