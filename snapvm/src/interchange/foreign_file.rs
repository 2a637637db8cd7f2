//! A file of another virtual machine monitor that is stored unchanged in a state section.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use snapfmt::layout::MAX_STATE_BYTES;
use snapfmt::{Snapshot, StateBlob};

use super::error::{ExportError, ImportError};

/// A kind of file that is stored whole in a state section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForeignFile {
    /// Its name in the other program's folder.
    pub(super) name: &'static str,
    pub(super) tag: u32,
    /// The kind of file, for messages.
    pub(super) what: &'static str,
}

/// The version of all these sections. Their bytes are stored unchanged, whatever version the other program gives them.
const OPAQUE: u32 = 1;

impl ForeignFile {
    /// Tag of its state section.
    #[must_use]
    pub fn tag(&self) -> u32 {
        self.tag
    }

    /// Reads the file, which must be small enough for a section.
    ///
    /// # Errors
    /// [`ImportError`]: it cannot be read, is not a regular file, or is longer than [`MAX_STATE_BYTES`].
    pub fn read(&self, path: &Path) -> Result<StateBlob, ImportError> {
        let file = open(path)?;
        let len_bytes = file.metadata().map_err(ImportError::io(path))?.len();
        let mut bytes = Vec::new();
        let most_bytes = MAX_STATE_BYTES;
        // One byte more than allowed is read, to find a file that grows meanwhile.
        file.take(most_bytes + 1).read_to_end(&mut bytes).map_err(ImportError::io(path))?;
        if bytes.len() as u64 > most_bytes {
            let (path, what) = (path.to_owned(), self.what);
            return Err(ImportError::StateTooLong { path, what, len_bytes, most_bytes });
        }
        Ok(self.blob(bytes))
    }

    pub(super) fn blob(&self, bytes: Vec<u8>) -> StateBlob {
        StateBlob { tag: self.tag, version: OPAQUE, bytes }
    }

    /// The file's bytes, from a snapshot that has them.
    ///
    /// # Errors
    /// [`ExportError::NoState`]; [`ExportError::StateVersion`]; [`ExportError::Read`].
    pub fn bytes_in(&self, snapshot: &Snapshot) -> Result<Vec<u8>, ExportError> {
        let Self { what, tag, .. } = *self;
        let state = snapshot.state(tag)?.ok_or(ExportError::NoState { what, tag })?;
        if state.version != OPAQUE {
            return Err(ExportError::StateVersion { what, found: state.version, expected: OPAQUE });
        }
        Ok(state.bytes)
    }
}

/// Opens a regular file; the error names it.
pub(super) fn open(path: &Path) -> Result<File, ImportError> {
    // The kind is checked first, because opening a named pipe would wait for its other end.
    let kind = path.metadata().map_err(ImportError::io(path))?.file_type();
    if kind.is_dir() {
        return Err(ImportError::Folder { path: path.to_owned() });
    }
    if kind.is_fifo() || kind.is_socket() || kind.is_char_device() || kind.is_block_device() {
        return Err(ImportError::NotRegular { path: path.to_owned() });
    }
    File::open(path).map_err(ImportError::io(path))
}
