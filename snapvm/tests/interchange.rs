//! Files of other programs are imported and exported bit for bit. A file that cannot be imported is a typed error.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use snapfmt::{Progress, ReadError, Snapshot, WriteError, WriteOptions};
use snapvm::interchange::{
    CONFIG, Export, ExportError, ExportFormat, Import, ImportError, LayoutError, MemoryImage,
    NotMemory, STATE, VMSTATE, has_async_page_faults,
};
use snapvm::{OutputError, OutputShape, StagedOutput};

const PAGE: u64 = snapfmt::layout::PAGE_BYTES as u64;
const MIB: u64 = 1 << 20;

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        fs::write(self.path(name), bytes).expect("it is written");
        self.path(name)
    }

    /// Memory in which every third page is zero, and every other page has its own byte.
    fn memory(&self, name: &str, len: u64) -> PathBuf {
        let page =
            |number: u64| [number as u8 * u8::from(!number.is_multiple_of(3)); PAGE as usize];
        self.write(name, &(0..len / PAGE).flat_map(page).collect::<Vec<_>>())
    }

    fn import(&self, import: Import) -> Snapshot {
        let out = self.path("a.snap");
        import.write(&out, &WriteOptions::default(), &go).expect("it is written");
        Snapshot::open(&out).expect("it opens")
    }

    fn export(&self, snapshot: &Snapshot, format: ExportFormat) -> PathBuf {
        let export = Export::new(snapshot, format).expect("all data is in the snapshot");
        let path = self.path("out");
        let out = StagedOutput::new(&path, export.shape(), false).expect("the output is new");
        export.write(&out, &go).expect("it is written");
        assert!(!path.exists(), "it appears when it is published");
        out.publish().expect("it appears");
        path
    }
}

fn go(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn image(path: &Path) -> MemoryImage {
    MemoryImage::open(path).expect("it is memory")
}

fn bytes(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn vmstate() -> Vec<u8> {
    let mut bytes = 0x0710_1984_8664_0000_u64.to_le_bytes().to_vec();
    bytes.extend([5; 100]);
    bytes
}

#[test]
fn a_raw_image_may_have_ranges_in_any_order() {
    let files = Files::new();
    let memory = files.memory("m", 8 * PAGE);
    let ranges = [MIB..MIB + 5 * PAGE, 0..3 * PAGE];
    let import = Import::raw(image(&memory), Some(&ranges)).expect("the ranges fit");
    assert_eq!(import.kind(), "raw");
    let snapshot = files.import(import);
    assert_eq!(snapshot.regions().iter().map(|r| r.gpa).collect::<Vec<_>>(), [0, MIB]);
    // Regions are sorted by guest address.
    let exported = bytes(&files.export(&snapshot, ExportFormat::Raw));
    let original = bytes(&memory);
    let (upper, lower) = original.split_at(5 * PAGE as usize);
    assert!(exported == [lower, upper].concat());
    let mut streamed = Vec::new();
    let export = Export::new(&snapshot, ExportFormat::Raw).expect("all data is in the snapshot");
    export.stream(&mut streamed, &go).expect("it is written");
    assert!(streamed == exported);
}

#[test]
fn a_firecracker_pair_is_exported_unchanged() {
    let files = Files::new();
    let (memory, state) = (files.memory("m", 2 * MIB), files.write("s", &vmstate()));
    let import = Import::firecracker(image(&memory), VMSTATE.read(&state).expect("small"), None);
    let snapshot = files.import(import.expect("it is a pair"));
    assert!(!has_async_page_faults(&snapshot).expect("it is readable"));
    let out = files.export(&snapshot, ExportFormat::Firecracker);
    assert!(bytes(&out.join("memory")) == bytes(&memory));
    assert!(bytes(&out.join("vmstate")) == vmstate());
    let raw = Export::new(&snapshot, ExportFormat::Raw).expect("all data is in the snapshot");
    assert!(matches!(raw.without_async_page_faults(), Err(ExportError::NotFirecracker)));
}

#[test]
fn a_cloud_hypervisor_folder_is_exported_unchanged() {
    let files = Files::new();
    let folder = files.path("ch");
    fs::create_dir(&folder).expect("a folder");
    files.memory("ch/memory-ranges", 3 * PAGE);
    let manager = r#"{\"memory_ranges\":{\"data\":[{\"gpa\":1048576,\"length\":8192},{\"gpa\":0,\"length\":4096}]}}"#;
    let state = format!(
        r#"{{"snapshots":{{"memory-manager":{{"snapshot_data":{{"state":"{manager}"}}}}}}}}"#
    );
    files.write("ch/state.json", state.as_bytes());
    let missing = Import::cloud_hypervisor(&folder).expect_err("a file is missing");
    assert!(!missing.is_bad_file(), "{missing}");
    files.write("ch/config.json", b"{}");
    let snapshot = files.import(Import::cloud_hypervisor(&folder).expect("all files are there"));
    assert_eq!(CONFIG.bytes_in(&snapshot).expect("it is there"), b"{}");
    assert_eq!(STATE.bytes_in(&snapshot).expect("it is there"), state.as_bytes());
    let out = files.export(&snapshot, ExportFormat::CloudHypervisor);
    for name in Import::cloud_hypervisor_files() {
        assert!(bytes(&out.join(name)) == bytes(&folder.join(name)), "{name}");
    }
}

#[test]
fn errors_have_values() {
    let files = Files::new();
    let memory = files.memory("m", 2 * PAGE);
    let ranges = |ranges: &[std::ops::Range<u64>]| match Import::raw(image(&memory), Some(ranges)) {
        Err(ImportError::Ranges(error)) => *error,
        other => panic!("{other:?}"),
    };
    assert!(matches!(
        ranges(&[0..PAGE]),
        ImportError::Length { found_bytes: 8192, expected_bytes: 4096, .. }
    ));
    assert!(matches!(
        ranges(&[0..PAGE, 0..PAGE]),
        ImportError::Layout { error: LayoutError::Overlap { gpa: 0 }, .. }
    ));
    let open = |path: &Path| MemoryImage::open(path).expect_err("it is not memory");
    assert!(matches!(
        open(&files.write("odd", b"odd")),
        ImportError::NotPages { len_bytes: 3, .. }
    ));
    assert!(matches!(
        open(&files.write("core", b"\x7fELF")),
        ImportError::NotMemory { found: NotMemory::Elf, .. }
    ));
    assert!(matches!(open(files.0.path()), ImportError::Folder { .. }));
    let state = VMSTATE.read(&files.write("s", &[1; 100])).expect("small");
    let odd = Import::firecracker(image(&memory), state.clone(), None);
    assert!(matches!(odd, Err(ImportError::NotMebibytes { len_bytes: 8192, .. })));
    let whole = files.memory("whole", MIB);
    let unknown = Import::firecracker(image(&whole), state, None);
    assert!(matches!(unknown, Err(ImportError::NoVmstate)));
}

#[test]
fn a_cancelled_import_or_export_leaves_nothing() {
    let files = Files::new();
    let import = Import::raw(image(&files.memory("m", 4 * MIB)), None).expect("it is memory");
    let stop = |_| ControlFlow::Break(());
    let cancelled = import.write(&files.path("b.snap"), &WriteOptions::default(), &stop);
    assert!(matches!(cancelled, Err(ImportError::Write { error: WriteError::Cancelled, .. })));
    let snapshot = files.import(import);
    let export = Export::new(&snapshot, ExportFormat::Raw).expect("all data is in the snapshot");
    let out =
        StagedOutput::new(&files.path("out"), export.shape(), false).expect("the output is new");
    let cancelled = export.write(&out, &stop);
    assert!(matches!(cancelled, Err(ExportError::Read(ReadError::Cancelled))));
    drop(out);
    let mut names: Vec<_> = fs::read_dir(files.0.path())
        .expect("it is listed")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["a.snap", "m"]);
    let taken = StagedOutput::new(&files.path("m"), OutputShape::File, false);
    assert!(matches!(taken, Err(OutputError::Exists { .. })));
}
