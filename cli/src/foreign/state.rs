//! A file of another virtual machine monitor that is stored as it is, in a state section.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use snapfmt::layout::MAX_STATE_BYTES;
use snapfmt::{Snapshot, StateBlob};

use crate::exit::BadInput;
use crate::input::reading;

/// A file that is kept whole in a state section.
pub(crate) struct ForeignState {
    /// What it is called in the other program's folder.
    pub(crate) name: &'static str,
    pub(crate) tag: u32,
    /// What it is, for messages.
    pub(crate) what: &'static str,
}

/// Version of all kept files: the bytes as they are, whatever version their producer gives them.
const OPAQUE: u32 = 1;

impl ForeignState {
    /// Reads the file, which must be small enough for a section.
    pub(crate) fn read(&self, path: &Path) -> Result<StateBlob> {
        let _reading = reading(path);
        let file = open(path)?;
        let len = file.metadata().with_context(|| path.display().to_string())?.len();
        let mut bytes = Vec::new();
        // One byte more than allowed shows a file that grows while it is read.
        let most = MAX_STATE_BYTES;
        file.take(most + 1)
            .read_to_end(&mut bytes)
            .with_context(|| format!("cannot read {}", path.display()))?;
        if bytes.len() as u64 > most {
            let what = self.what;
            let problem = anyhow!("{}: {len} bytes; a {what} has at most {most}", path.display());
            return Err(BadInput::of(problem));
        }
        Ok(StateBlob { tag: self.tag, version: OPAQUE, bytes })
    }

    /// The file's bytes, from a snapshot that has them.
    pub(crate) fn of(&self, snapshot: &Snapshot) -> Result<Vec<u8>> {
        let Some(state) = snapshot.state(self.tag)? else {
            let tag = self.tag.to_le_bytes();
            let tag = tag.escape_ascii();
            bail!("it holds no {} (state section {tag}); it was not imported from one", self.what);
        };
        if state.version != OPAQUE {
            bail!("its {} is kept in version {}, expected {OPAQUE}", self.what, state.version);
        }
        Ok(state.bytes)
    }
}

/// Opens a regular file; the error names it.
pub(crate) fn open(path: &Path) -> Result<File> {
    let named = || path.display().to_string();
    // Looked at before it is opened: opening a named pipe would wait for its other end.
    let kind = path.metadata().with_context(named)?.file_type();
    if kind.is_dir() {
        bail!("{} is a folder, expected a file", named());
    }
    if kind.is_fifo() || kind.is_socket() || kind.is_char_device() || kind.is_block_device() {
        bail!("{} is not a regular file", named());
    }
    File::open(path).with_context(named)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_text_names_the_same_tags() {
        use crate::foreign::{cloud_hypervisor as ch, firecracker};
        let text = include_str!("../../../docs/interchange.md");
        for kept in [firecracker::VMSTATE, ch::CONFIG, ch::STATE] {
            let letters = kept.tag.to_le_bytes().escape_ascii().to_string();
            let line = format!("`{letters}` ({:#010x})", kept.tag);
            assert!(text.contains(&line), "{line}");
        }
    }
}
