//! Why a migration file of QEMU cannot be imported.

use std::io;

/// What is wrong with a migration file of QEMU.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MappedRamError {
    /// It cannot be read.
    #[error("cannot read it")]
    Io(#[source] io::Error),
    /// QEMU wrote it without the capability `mapped-ram`: its pages have no places of their own.
    #[error(
        "it is a migration stream without mapped-ram; set this capability in QEMU (migrate_set_capability mapped-ram \
         on) and migrate to a file again"
    )]
    NotMappedRam,
    /// Where it should begin to list RAM blocks, it does not.
    #[error("it has no list of RAM blocks in its first {searched_bytes} bytes")]
    NoRam {
        /// How much of the file was searched.
        searched_bytes: u64,
    },
    /// The file ends too early.
    #[error("it is cut short: {len_bytes} bytes, but {needed_bytes} at least are needed")]
    CutShort {
        /// The length of the file.
        len_bytes: u64,
        /// The end of what is missing.
        needed_bytes: u64,
    },
    /// The end of the stream is missing.
    #[error("it has no end: QEMU was still writing it, or has failed to, or it was cut short")]
    Unfinished,
    /// A field has a value that QEMU does not write.
    #[error("RAM block {block}: {field} is {found:#x} (near offset {offset:#x})")]
    Field {
        /// The number of the RAM block in the file, from 0.
        block: usize,
        /// The field.
        field: &'static str,
        /// Its value.
        found: u64,
        /// Offset in the file.
        offset: u64,
    },
    /// The RAM blocks are together longer than the file says.
    #[error(
        "its RAM blocks have more than the {total_bytes} bytes that it says they have together"
    )]
    Total {
        /// The sum of their lengths, as the file gives it.
        total_bytes: u64,
    },
    /// There are more RAM blocks, or more pages in them, than are imported.
    #[error("its {what} are {found}, more than {most}")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How many there are, at least.
        found: u64,
        /// The limit.
        most: u64,
    },
    /// Guest memory was left out of the file (`x-ignore-shared`): it is in the files of the memory backends.
    #[error(
        "no RAM block has pages in it: memory was left out (x-ignore-shared), import the memory file itself"
    )]
    NoPages,
}
