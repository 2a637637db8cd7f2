//! A file without checksums that is read over some time, and must be one file all the while.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use snapfmt::{ReadAt, Stamp};

/// Knows how long the file was when it was opened, and when it was written to.
pub(crate) struct Watched {
    file: File,
    opened: Option<Stamp>,
}

impl Watched {
    pub(crate) fn new(file: File) -> io::Result<Self> {
        Ok(Self { opened: file.stamp()?, file })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Fills `buf` with what was there when the file was opened.
    pub(crate) fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(&self.file, buf, offset)?;
        // Afterwards, or what is written in between would be missed.
        self.unchanged()
    }

    /// An error if the file may be another one by now. There is no telling a new name or mode from a write whose time was set back:
    /// all of these count.
    pub(crate) fn unchanged(&self) -> io::Result<()> {
        if self.file.stamp()? == self.opened {
            return Ok(());
        }
        Err(io::Error::other(
            "the file was changed after it was opened; try again with a file that stays as it is",
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_was_written_meanwhile_is_not_read() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"one").unwrap();
        let watched = Watched::new(file.reopen().unwrap()).unwrap();
        let mut found = [0; 3];
        watched.read_exact_at(&mut found, 0).unwrap();
        assert_eq!(&found, b"one");
        file.as_file().write_all_at(b"two", 0).unwrap();
        let error = watched.read_exact_at(&mut found, 0).unwrap_err();
        assert!(error.to_string().contains("changed after it was opened"), "{error}");
    }
}
