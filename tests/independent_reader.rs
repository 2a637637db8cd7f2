//! `docs/format.md` is enough to write a reader: one in Python, written from that text alone, gives
//! every page of a golden file the same hash as `snapfmt`.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use snapfmt::layout::PAGE_BYTES;
use snapfmt::{ChunkBuffer, PageEntry, PageIndex, ReadAt, Snapshot};

use crate::support::{Ran, run, skip};

/// A file of this folder.
fn here(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests").join(name)
}

/// The output of the Python reader for a file; `None` without Python.
fn python_reads(file: &Path) -> Option<Ran> {
    if Command::new("python3").arg("--version").output().is_err() {
        skip("independent_reader", "python3 cannot be run");
        return None;
    }
    let mut command = Command::new("python3");
    command.arg(here("reader.py")).arg(file);
    Some(run(command))
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The hash of every page that is not zero, by `snapfmt`.
fn page_hashes<R: ReadAt>(snapshot: &Snapshot<R>) -> Map<String, Value> {
    let (mut buffer, mut page) = (ChunkBuffer::new(), [0; PAGE_BYTES]);
    let mut hashes = Map::new();
    for number in 0..snapshot.header().pages() as u32 {
        snapshot.read_page(PageIndex(number), &mut buffer, &mut page).expect("a good page");
        if snapshot.entry(PageIndex(number)).expect("a good leaf") != PageEntry::Zero {
            hashes.insert(number.to_string(), hex(&page).into());
        } else {
            assert!(page.iter().all(|byte| *byte == 0));
        }
    }
    hashes
}

#[test]
fn python_and_snapfmt_agree_on_every_page_of_a_golden_file() {
    for file in [here("golden/v1-raw.snap"), here("golden/v1-bound-raw.snap")] {
        let Some(ran) = python_reads(&file) else { return };
        agree(&file, &ran.ok().json());
    }
}

fn agree(file: &Path, by_python: &Value) {
    let snapshot = Snapshot::open(file).expect("the golden file opens");
    assert_eq!(by_python["pages"], Value::Object(page_hashes(&snapshot)));
    assert_eq!(by_python["pages"].as_object().map(Map::len), Some(570));
    assert_eq!(by_python["not_decoded"], json!({}));
    assert_eq!(by_python["id"], snapshot.header().id.to_string());
    let chunks_id = snapshot.header().chunks_id.map(|id| id.to_string());
    assert_eq!(by_python["chunks_id"], json!(chunks_id));
    assert_eq!(by_python["memory_bytes"], snapshot.header().memory_bytes);
    let regions = snapshot.regions().iter().map(|r| json!({ "gpa": r.gpa, "len": r.len }));
    assert_eq!(by_python["regions"], Value::Array(regions.collect()));
    let state = snapshot.state(7).expect("a good state").expect("the state is there");
    let states = json!([{ "tag": 7, "version": state.version, "sha256": hex(&state.bytes) }]);
    assert_eq!(by_python["states"], states);
    let metadata = snapshot.metadata().expect("good metadata");
    assert_eq!(by_python["metadata"], json!(metadata));
}

/// Without their codecs it still finds every page and checks every checksum.
#[test]
fn python_checks_files_of_other_codecs() {
    for (name, codec) in
        [("lz4", "lz4"), ("zstd", "zstd"), ("bound-zstd", "zstd"), ("bound-copy", "zstd")]
    {
        let file = here(&format!("golden/v1-{name}.snap"));
        let Some(ran) = python_reads(&file) else { return };
        let by_python = ran.ok().json();
        let hashes = page_hashes(&Snapshot::open(&file).expect("the golden file opens"));
        let mut expected: Vec<u64> =
            hashes.keys().map(|page| page.parse().expect("a number")).collect();
        expected.sort_unstable();
        assert_eq!(by_python["not_decoded"], json!({ codec: expected }));
    }
}

/// Both detect damage of any part: the text has all checksums and their places.
#[test]
fn python_and_snapfmt_refuse_the_same_files() {
    for name in ["golden/v1-raw.snap", "golden/v1-bound-raw.snap"] {
        refuse_alike(&std::fs::read(here(name)).expect("the golden file is there"));
    }
}

fn refuse_alike(good: &[u8]) {
    let snapshot = Snapshot::new(good).expect("the golden file opens");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let sections: Vec<_> = snapshot.sections().iter().filter(|section| section.len > 0).collect();
    let table_end = good.len() as u64 - 1;
    let places = sections.iter().flat_map(|section| [section.offset, section.end() - 1]);
    // The id of the chunks, or the reserved bytes in its place, is among them.
    for place in places.chain([8, 16, 155, 200, 4095, table_end]) {
        let mut damaged = good.to_vec();
        damaged[place as usize] ^= 0x10;
        let file = folder.path().join(format!("{place}.snap"));
        std::fs::write(&file, &damaged).expect("it can be written");
        let Some(ran) = python_reads(&file) else { return };
        ran.failed(1, &["broken rule"]);
        let verified = Snapshot::open(&file).and_then(|snapshot| {
            let go_on = |_| std::ops::ControlFlow::Continue(());
            snapshot.verify(std::num::NonZeroUsize::MIN, &go_on)
        });
        assert!(verified.is_err(), "byte {place}");
    }
}
