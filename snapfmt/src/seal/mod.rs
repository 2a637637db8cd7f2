//! Sealed files: encrypted and authenticated with a key that is not in the file.
//!
//! Each written file has a random *file key*, from which its other keys are derived. The section KEYS has the file key
//! itself, *wrapped*: encrypted for those who may open the file. `docs/format.md` has the bytes, `docs/sealing.md` what
//! is protected and what is not.
//!
//! # Nonces
//! AES-GCM must never encrypt two texts with one key and one nonce. A nonce here is the offset of the part in the file
//! and its domain, so the keys ensure it: chunks have a key that only this written file and its copies have, and copies
//! have the same chunks at the same offsets; all other parts have a key that is derived from the file's id too, which is
//! random for every file that is written, copies included. A writer never writes to an offset twice.

mod cipher;
mod file_seal;
mod key;
mod outline;
mod provider;
mod slots;

pub(crate) use file_seal::Seal;
pub use key::{KeyError, SecretKey};
pub(crate) use outline::Parts;
pub use outline::{Outline, VerifiedOutline};
pub use provider::KeyProvider;
pub use slots::{KeySlot, KeySlots};
