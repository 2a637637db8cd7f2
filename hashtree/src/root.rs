//! The hash that a whole file is checked against.

use std::fmt;
use std::str::FromStr;

use blake3::Hash;

/// The BLAKE3 hash of a file: 32 bytes, written as 64 hexadecimal digits, as by `b3sum`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Root(pub(crate) Hash);

/// What was given as a root is none.
#[derive(Clone, Debug, thiserror::Error)]
#[error("a root is 64 hexadecimal digits, as b3sum prints them")]
pub struct WrongRoot;

impl Root {
    /// The root with these bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(Hash::from_bytes(bytes))
    }

    /// The bytes of the root.
    pub fn as_bytes(&self) -> &[u8; 32] {
        self.0.as_bytes()
    }
}

impl FromStr for Root {
    type Err = WrongRoot;

    fn from_str(text: &str) -> Result<Self, WrongRoot> {
        Hash::from_hex(text).map(Self).map_err(|_| WrongRoot)
    }
}

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.to_hex())
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Root({self})")
    }
}
