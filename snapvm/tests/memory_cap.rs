//! Files of other programs that claim large sizes: an import allocates no more than `docs/interchange.md` says.

#[path = "../../snapfmt/tests/allocations/mod.rs"]
mod allocations;
#[path = "../fuzz/harness/qemu_file.rs"]
#[allow(dead_code, reason = "shared with the fuzz targets")]
mod qemu_file;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use allocations::{alone, within};
use qemu_file::{Block, MIB, Places, REST, write};
use snapvm::interchange::{Import, ImportError, MappedRamError};

const TIB: u64 = 1 << 40;
/// The part of a file in which its list of RAM blocks begins, and what is small.
const HEAD_CAP: usize = 3 << 19;
/// The bitmaps of 2 TiB of memory.
const BITMAPS_CAP: usize = 64 << 20;
/// A state section. While it is put together a buffer of it grows, and then it is encoded.
const STATE_CAP: usize = 64 << 20;

struct Hostile {
    _folder: tempfile::TempDir,
    path: PathBuf,
    file: File,
}

impl Hostile {
    fn new(blocks: &[Block]) -> (Self, Places) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("m");
        let file = File::create(&path).expect("it is created");
        let places = write(&file, "pc-q35-10.0", blocks);
        (Self { _folder: folder, path, file }, places)
    }

    fn put(&self, offset: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, offset).expect("it is written");
    }

    fn import(&self) -> Result<Import, ImportError> {
        Import::qemu(&self.path, None)
    }
}

fn ram(len_bytes: u64) -> Block {
    Block::new("pc.ram", len_bytes, &[(0, 1)])
}

#[track_caller]
fn mapped_ram_error(result: Result<Import, ImportError>) -> MappedRamError {
    match result {
        Err(ImportError::MappedRam { error, .. }) => error,
        other => panic!("{:?}", other.map(drop)),
    }
}

/// A length that the file does not have is refused before anything of that length is allocated.
#[test]
fn claims_of_a_short_file_are_refused() {
    let _alone = alone();
    for len_bytes in [2 * TIB, 1 << 40, 1 << 32, 16 * MIB] {
        let (hostile, places) = Hostile::new(&[ram(MIB)]);
        let header = places.blocks[0].0;
        // The sum of all lengths, and the block's own.
        hostile.put(header - 8 - 7 - 8, &(len_bytes | 4).to_be_bytes());
        hostile.put(header - 8, &len_bytes.to_be_bytes());
        let refused = within(HEAD_CAP, || hostile.import());
        let error = mapped_ram_error(refused);
        assert!(matches!(error, MappedRamError::CutShort { .. }), "{error:?}");
    }
    let (hostile, places) = Hostile::new(&[ram(MIB)]);
    let header = places.blocks[0].0;
    // A machine type and a name may claim any length, too.
    hostile.put(9, &u32::MAX.to_be_bytes());
    hostile.put(header - 8 - 7, &[255]);
    within(HEAD_CAP, || hostile.import()).expect_err("the name is not printable");
}

/// More memory than 2 TiB is refused, however long the file is.
#[test]
fn claims_beyond_the_limit_are_refused() {
    let _alone = alone();
    let (hostile, places) = Hostile::new(&[ram(MIB)]);
    let header = places.blocks[0].0;
    hostile.file.set_len(4 * TIB).expect("it can be sized");
    hostile.put(header - 8 - 7 - 8, &((2 * TIB + 4096) | 4).to_be_bytes());
    hostile.put(header - 8, &(2 * TIB + 4096).to_be_bytes());
    let error = mapped_ram_error(within(HEAD_CAP, || hostile.import()));
    assert!(matches!(error, MappedRamError::TooMany { .. }), "{error:?}");
}

/// Such a file is 12 KiB of a disk, and a good one.
#[test]
fn two_tebibytes_take_their_bitmap() {
    let _alone = alone();
    let (hostile, places) = Hostile::new(&[ram(2 * TIB)]);
    let import = within(BITMAPS_CAP + HEAD_CAP, || hostile.import()).expect("it is a good file");
    drop(import);
    // Behind the pages anything may follow: its end is looked for in the last 64 MiB.
    hostile.put(places.rest + 3 * TIB, REST);
    within(BITMAPS_CAP + HEAD_CAP, || hostile.import()).expect("it is a good file");
}

/// What is kept beside memory is limited while it is read.
#[test]
fn more_than_a_state_takes_is_not_held() {
    let _alone = alone();
    let (hostile, places) = Hostile::new(&[ram(MIB)]);
    // In runs of different lengths, with a page of zeros behind each.
    let noise = vec![7; MIB as usize - 4096];
    for at in 0..80 {
        hostile.put(places.rest + REST.len() as u64 + at * MIB, &noise);
    }
    hostile.put(places.rest + 90 * MIB, REST);
    let refused = within(2 * STATE_CAP + HEAD_CAP, || hostile.import());
    assert!(matches!(refused, Err(ImportError::StateTooLong { .. })), "{:?}", refused.map(drop));
}
