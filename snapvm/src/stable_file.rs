//! A file without checksums, which must not change while it is read.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use snapfmt::{ReadAt, Stamp};

/// A file, with the size and the times that it had when it was opened.
#[derive(Debug)]
pub struct StableFile {
    file: File,
    opened: Option<Stamp>,
}

impl StableFile {
    /// Takes a file that was just opened.
    ///
    /// # Errors
    /// The error of fstat(2).
    pub fn new(file: File) -> io::Result<Self> {
        Ok(Self { opened: file.stamp()?, file })
    }

    /// The file itself.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Fills `buf` with bytes of the file as it was when it was opened.
    ///
    /// # Errors
    /// The error of pread(2), or the file has changed.
    pub fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(&self.file, buf, offset)?;
        // The check comes after the read, so that it finds a write before or during the read.
        self.check_unchanged()
    }

    /// Compares the file's size and times with those at the opening. A new name or mode also counts as a change,
    /// because a write whose time was set back looks the same.
    ///
    /// # Errors
    /// The error of fstat(2), or the file has changed.
    pub fn check_unchanged(&self) -> io::Result<()> {
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
    fn a_file_that_was_written_to_is_refused() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(b"one").expect("it is written");
        let stable = StableFile::new(file.reopen().expect("it opens")).expect("a stamp");
        let mut found = [0; 3];
        stable.read_exact_at(&mut found, 0).expect("it has not changed");
        assert_eq!(&found, b"one");
        file.as_file().write_all_at(b"two", 0).expect("it is written");
        let error = stable.read_exact_at(&mut found, 0).expect_err("it has changed");
        assert!(error.to_string().contains("changed after it was opened"), "{error}");
    }
}
