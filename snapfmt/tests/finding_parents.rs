//! A renamed parent is found by its id in the folders that are searched, with any other files in them.

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use snapfmt::layout::PAGE_BYTES as PAGE;
use snapfmt::{
    ChainError, Contents, MemoryRegion, Parent, Parents, ReadError, Snapshot, WriteOptions,
    write_layer, write_snapshot,
};

fn go_on(_: snapfmt::Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A snapshot of four pages with this byte, or a layer of another one.
fn store(path: &Path, byte: u8, parent: Option<&Path>) {
    let memory = vec![byte; 4 * PAGE];
    let regions = [MemoryRegion { gpa: 0, len: memory.len() as u64, source_offset: 0 }];
    let data = [0..memory.len() as u64];
    let contents = Contents::new(&regions, &memory, &data);
    let options = WriteOptions::default();
    match parent {
        None => write_snapshot(path, contents, &options, &go_on).unwrap(),
        Some(file) => {
            let snapshot = Snapshot::open(file).unwrap();
            let parent = Parent::new(&snapshot, file.file_name().unwrap());
            write_layer(path, contents, &parent, &options, &go_on).unwrap()
        }
    };
}

/// A chain of three files, top last; and a folder elsewhere.
struct Chain {
    folder: tempfile::TempDir,
    elsewhere: tempfile::TempDir,
    files: [PathBuf; 3],
}

impl Chain {
    fn new() -> Chain {
        let folder = tempfile::tempdir().unwrap();
        let files = ["base.snap", "middle.snap", "top.snap"].map(|name| folder.path().join(name));
        store(&files[0], 1, None);
        store(&files[1], 2, Some(&files[0]));
        store(&files[2], 3, Some(&files[1]));
        Chain { folder, elsewhere: tempfile::tempdir().unwrap(), files }
    }

    fn elsewhere(&self, name: &str) -> PathBuf {
        self.elsewhere.path().join(name)
    }

    /// Opens the top, with the folder elsewhere among those that are searched.
    fn open(&self) -> Result<Snapshot, ReadError> {
        let nowhere = self.folder.path().join("nowhere");
        let folders = vec![nowhere, self.elsewhere.path().to_owned()];
        Snapshot::open_with(&self.files[2], &Parents { folders, ..Parents::default() })
    }

    fn paths(&self) -> Vec<PathBuf> {
        let snapshot = self.open().unwrap();
        snapshot.paths().map(|path| path.unwrap().to_owned()).collect()
    }
}

fn not_found(opened: Result<Snapshot, ReadError>) -> String {
    match opened.map(drop).unwrap_err() {
        ReadError::Chain(error @ ChainError::NotFound { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn parents_that_were_renamed_are_found_by_their_ids() {
    let chain = Chain::new();
    let [base, middle] = [chain.elsewhere("2024-01-01"), chain.elsewhere("renamed.snap")];
    std::fs::rename(&chain.files[0], &base).unwrap();
    std::fs::rename(&chain.files[1], &middle).unwrap();
    // Others of the same kind, before and behind.
    store(&chain.elsewhere("a.snap"), 1, None);
    store(&chain.elsewhere("z"), 1, None);
    assert_eq!(chain.paths(), [chain.files[2].clone(), middle.clone(), base.clone()]);

    // The path in the layer, and its name, are tried first.
    std::fs::copy(&middle, chain.elsewhere("middle.snap")).unwrap();
    assert_eq!(chain.paths()[1], chain.elsewhere("middle.snap"));
    std::fs::copy(&middle, &chain.files[1]).unwrap();
    assert_eq!(chain.paths()[1], chain.files[1]);
    // Another snapshot at its path is skipped.
    store(&chain.files[0], 1, None);
    assert_eq!(chain.paths()[2], base);

    // Of two that are the same, the first by name: files called `.snap` before others.
    std::fs::copy(&base, chain.elsewhere("y.snap")).unwrap();
    assert_eq!(chain.paths()[2], chain.elsewhere("y.snap"));
    std::fs::copy(&base, chain.elsewhere("b.snap")).unwrap();
    assert_eq!(chain.paths()[2], chain.elsewhere("b.snap"));
}

/// Only the folders that the user names are searched, and not those in them.
#[test]
fn a_parent_outside_of_the_folders_is_not_found() {
    let chain = Chain::new();
    let deeper = chain.elsewhere("deeper");
    std::fs::create_dir(&deeper).unwrap();
    std::fs::rename(&chain.files[1], deeper.join("middle.snap")).unwrap();
    std::fs::copy(deeper.join("middle.snap"), chain.folder.path().join("beside.snap")).unwrap();
    let text = not_found(chain.open());
    let folder = chain.elsewhere.path().display().to_string();
    assert!(text.contains("middle.snap") && text.contains("by its id, in the files of"), "{text}");
    assert!(text.contains(&folder) && text.ends_with("give its path"), "{text}");
    let text = not_found(Snapshot::open(&chain.files[2]));
    assert!(!text.contains("by its id"), "{text}");
}

/// The files in such a folder are not trusted. Opening them never blocks, and no other file is mistaken for the parent.
#[test]
fn other_files_in_a_folder_do_no_harm() {
    let chain = Chain::new();
    let good = std::fs::read(&chain.files[1]).unwrap();
    std::fs::remove_file(&chain.files[1]).unwrap();
    std::fs::rename(&chain.files[0], chain.elsewhere("base.snap")).unwrap();
    // Without a writer, opening it would wait.
    let fifo = std::process::Command::new("mkfifo").arg(chain.elsewhere("a0.snap")).status();
    assert!(fifo.unwrap().success());
    let _socket = UnixListener::bind(chain.elsewhere("a1.snap")).unwrap();
    std::fs::create_dir(chain.elsewhere("a2.snap")).unwrap();
    symlink("a3.snap", chain.elsewhere("a3.snap")).unwrap();
    symlink("/nonexistent", chain.elsewhere("a4.snap")).unwrap();
    symlink("/dev/zero", chain.elsewhere("a5.snap")).unwrap();
    std::fs::write(chain.elsewhere("a6.snap"), b"").unwrap();
    std::fs::write(chain.elsewhere("a7.snap"), &good[..4000]).unwrap();
    File::create(chain.elsewhere("a8.snap")).unwrap().set_len(1 << 40).unwrap();
    // Its header, and nothing behind it; its id, and another header.
    let cut = [&good[..4096], &vec![0; good.len() - 4096][..]].concat();
    let mut other = good.clone();
    other[144] ^= 1;
    let crc = crc32fast::hash(&other[..4092]);
    other[4092..4096].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(chain.elsewhere("b0.snap"), &other).unwrap();
    assert!(not_found(chain.open()).contains("by its id"));
    std::fs::write(chain.elsewhere("b1.snap"), &cut).unwrap();
    // It would be the parent if it were complete: the error reports that.
    let error = chain.open().map(drop).unwrap_err();
    let ReadError::Chain(ChainError::Parent { path, source }) = error else { panic!("{error:?}") };
    assert_eq!(path, chain.elsewhere("b1.snap"));
    assert!(matches!(*source, ReadError::Corrupt(_)), "{source:?}");
    // A complete one behind it is the parent, also through a link.
    let by_hash = chain.folder.path().join("by-hash");
    std::fs::write(&by_hash, &good).unwrap();
    symlink(&by_hash, chain.elsewhere("link")).unwrap();
    assert_eq!(chain.paths()[1], chain.elsewhere("link"));
}

#[test]
fn the_number_of_files_read_is_limited() {
    let chain = Chain::new();
    for number in 0..4096 {
        std::fs::write(chain.elsewhere(&format!("{number:04}")), b"nothing").unwrap();
    }
    std::fs::rename(&chain.files[0], chain.elsewhere("x")).unwrap();
    let text = not_found(chain.open());
    assert!(text.contains("in the first 4096 files of"), "{text}");
    // It is found by its name, and so is one with the extension `.snap`.
    std::fs::rename(chain.elsewhere("x"), chain.elsewhere("x.snap")).unwrap();
    assert_eq!(chain.paths()[2], chain.elsewhere("x.snap"));
    std::fs::rename(chain.elsewhere("x.snap"), chain.elsewhere("base.snap")).unwrap();
    assert_eq!(chain.paths()[2], chain.elsewhere("base.snap"));
}
