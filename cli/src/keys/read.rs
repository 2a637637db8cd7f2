//! Files with keys: only their owner may use them. Keys are read into memory that is erased.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use snapfmt::{KeyError, SecretKey};
use zeroize::Zeroizing;

/// Why a file with keys is not used.
#[derive(Debug, thiserror::Error)]
pub(super) enum PrivateFileError {
    #[error("cannot open it")]
    Open(#[from] io::Error),
    #[error("other users can use this key (mode {mode:04o}): chmod 600")]
    NotPrivate { mode: u32 },
}

/// Opens a file that only its owner can use.
pub(super) fn open_private(path: &Path) -> Result<File, PrivateFileError> {
    let file = File::open(path)?;
    let mode = file.metadata()?.permissions().mode() & 0o777;
    match mode & 0o077 {
        0 => Ok(file),
        _ => Err(PrivateFileError::NotPrivate { mode }),
    }
}

/// Reads a key of either form. All of what was read is erased from memory.
pub(super) fn read_key(mut from: impl Read) -> Result<SecretKey, ReadKeyError> {
    let mut content = Zeroizing::new([0; SecretKey::MOST_FILE_BYTES + 1]);
    let mut len = 0;
    while len < content.len() {
        match from.read(&mut content[len..]) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(SecretKey::parse(&content[..len])?)
}

/// Why no key was read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadKeyError {
    #[error("cannot read the key")]
    Read(#[from] io::Error),
    #[error(transparent)]
    Key(#[from] KeyError),
}
