//! Bad files: each gives a message with file, place, expected and found, and exit code 3.

use std::path::{Path, PathBuf};

use snapfmt::layout::{HEADER_BYTES, PAGE_BYTES};
use snapfmt::{Contents, MemoryRegion, Snapshot, StateBlob, WriteOptions, write_snapshot};

use crate::support::{Ran, snap};

/// A folder with a valid snapshot, written by the library: no guest, no KVM.
fn sample() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("sample.snap");
    let memory: Vec<u8> = (0..64 * PAGE_BYTES).map(|at| (at / 300) as u8).collect();
    let len = memory.len() as u64;
    let regions = [MemoryRegion { gpa: 0, len, source_offset: 0 }];
    let data = [0..len];
    let states = [StateBlob { tag: vmm::state::STATE_KIND, version: 1, bytes: vec![1; 200] }];
    let contents = Contents::new(&regions, &memory, &data).states(&states);
    let go_on = |_| std::ops::ControlFlow::Continue(());
    write_snapshot(&file, contents, &WriteOptions::default(), &go_on).expect("it is written");
    (folder, file)
}

/// Every command that reads a file must refuse this one in the same way.
#[track_caller]
fn all_refuse(file: &Path, code: i32, messages: &[&str]) {
    let name = file.to_string_lossy();
    for command in [&["info"][..], &["verify"], &["restore"], &["restore", "--lazy"]] {
        let ran: Ran = snap(command.iter().copied().chain([&*name]));
        assert!(ran.stdout.is_empty(), "{}", ran.stdout);
        ran.failed(code, messages).failed(code, &[&*name]);
    }
}

/// Writes `bytes` with a corrected checksum of the header.
fn write_sealed(file: &Path, mut bytes: Vec<u8>) {
    let crc = crc32(&bytes[..HEADER_BYTES - 4]);
    bytes[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(file, bytes).expect("it can be written");
}

/// CRC-32 as in zlib, bit by bit: independent of the library that the program uses.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

#[test]
fn a_missing_file_and_a_folder() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    all_refuse(&folder.path().join("none.snap"), 1, &["No such file"]);
    all_refuse(folder.path(), 1, &["directory"]);
}

#[test]
fn a_pipe_is_refused_and_not_waited_for() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pipe = folder.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.expect("mkfifo runs").success());
    all_refuse(&pipe, 1, &["not a regular file"]);
}

#[test]
fn an_empty_file_and_one_of_text() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("a.snap");
    std::fs::write(&file, b"").expect("it can be written");
    all_refuse(&file, 3, &["0 bytes long", "expected 4096"]);
    std::fs::write(&file, b"#!/bin/sh\necho hello\n").expect("it can be written");
    all_refuse(&file, 3, &["not a snapshot"]);
    std::fs::write(&file, vec![b'x'; 10_000]).expect("it can be written");
    all_refuse(&file, 3, &["not a snapshot"]);
}

#[test]
fn a_future_version_and_an_unknown_feature() {
    let (_folder, file) = sample();
    let bytes = std::fs::read(&file).expect("it can be read");
    let mut future = bytes.clone();
    future[8] = 2;
    write_sealed(&file, future);
    all_refuse(&file, 3, &["format version 2", "reads version 1", "newer"]);
    let mut unknown = bytes;
    unknown[16] = 0x80;
    write_sealed(&file, unknown);
    all_refuse(&file, 3, &["features 0x80", "newer"]);
}

#[test]
fn a_file_cut_at_every_section_border() {
    let (_folder, file) = sample();
    let bytes = std::fs::read(&file).expect("it can be read");
    let snapshot = Snapshot::open(&file).expect("it opens");
    let borders: Vec<_> =
        snapshot.sections().iter().flat_map(|section| [section.offset, section.end()]).collect();
    for border in borders {
        std::fs::write(&file, &bytes[..border as usize]).expect("it can be written");
        let (found, expected) =
            (format!("{border} bytes long"), format!("expected {}", bytes.len()));
        all_refuse(&file, 3, &[&found, &expected]);
    }
}

#[test]
fn one_flipped_bit_in_what_opening_reads() {
    let (_folder, file) = sample();
    let bytes = std::fs::read(&file).expect("it can be read");
    let snapshot = Snapshot::open(&file).expect("it opens");
    let section = |name: &str| {
        let found = snapshot.sections().iter().find(|section| section.kind.to_string() == name);
        found.expect(name).offset as usize
    };
    for (part, at) in [
        ("header", 50),
        ("index root", section("index root") + 1),
        ("memory map", section("memory map") + 1),
        ("section table", bytes.len() - 20),
    ] {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1;
        std::fs::write(&file, damaged).expect("it can be written");
        all_refuse(&file, 3, &["corrupt", part, "offset", "expected", "found"]);
    }
}

#[test]
fn one_flipped_bit_in_what_a_restore_reads() {
    let (_folder, file) = sample();
    let bytes = std::fs::read(&file).expect("it can be read");
    let snapshot = Snapshot::open(&file).expect("it opens");
    for section in snapshot.sections() {
        let name = section.kind.to_string();
        let command: &[&str] = match &*name {
            "state" => &["restore", "--lazy"],
            "metadata" => &["info"],
            "chunks" | "index leaves" => &["verify"],
            _ => continue,
        };
        let mut damaged = bytes.clone();
        damaged[section.offset as usize + 40] ^= 1;
        std::fs::write(&file, damaged).expect("it can be written");
        let ran = snap(command.iter().copied().chain([&*file.to_string_lossy()]));
        ran.failed(3, &["corrupt", &name, "offset", "expected", "found", "sample.snap"]);
    }
}

#[test]
fn a_state_that_is_not_one() {
    // Well-formed as a file, but the state is 200 bytes of ones.
    let (_folder, file) = sample();
    let ran = snap(["restore".as_ref(), file.as_os_str()]);
    ran.failed(3, &["sample.snap"]);
}

/// Commands that copy a file would pass both on to a file that `verify` refuses.
#[test]
fn a_state_that_is_there_twice_is_refused_by_every_command() {
    const TABLE_OFFSET: usize = 96;
    const TABLE_CRC: usize = 108;
    const RECORD_BYTES: usize = snapfmt::layout::SECTION_RECORD_BYTES;
    let (folder, file) = sample();
    let mut bytes = std::fs::read(&file).expect("it can be read");
    let table =
        u64::from_le_bytes(bytes[TABLE_OFFSET..][..8].try_into().expect("8 bytes")) as usize;
    let record = |kind: u32| {
        let mut records = (table..bytes.len()).step_by(RECORD_BYTES);
        records.find(|at| bytes[*at..*at + 4] == kind.to_le_bytes()).expect("it has one")
    };
    let (state, metadata) = (record(5), record(6));
    // Kind, tag and version.
    bytes.copy_within(state..state + 12, metadata);
    let crc = crc32(&bytes[table..]);
    bytes[TABLE_CRC..][..4].copy_from_slice(&crc.to_le_bytes());
    write_sealed(&file, bytes);
    let message = "section state expected once, found 2 times";
    all_refuse(&file, 3, &[message]);
    let (name, out) = (file.to_string_lossy(), folder.path().join("out.snap"));
    let out_name = out.to_string_lossy();
    for command in [
        &["flatten", &name, "-o", &out_name][..],
        &["export", "--format", "raw", &name, "-o", &out_name],
        &["optimize", &name, "-o", &out_name],
        &["rebase", &name, "--onto", &name, "-o", &out_name],
        &["pages", &name],
        &["diff", &name, &name],
        &["cat", "--gpa", "0", &name],
    ] {
        snap(command.iter().copied()).failed(3, &[message]);
        assert!(!out.exists(), "{command:?}");
    }
}
