//! Mapped-ram files of QEMU, written by this test from the description of the format: imported and exported bit for bit,
//! and damaged.

#[path = "../fuzz/harness/qemu_file.rs"]
#[allow(dead_code, reason = "shared with the fuzz targets")]
mod qemu_file;

use std::fs::{self, File};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use snapfmt::{
    ChunkBuffer, Contents, Existing, MemoryRegion, Progress, Snapshot, WriteOptions, write_snapshot,
};
use snapvm::StagedOutput;
use snapvm::interchange::{
    Export, ExportError, ExportFormat, Import, ImportError, LayoutError, MAPPED_RAM,
    MappedRamError, MemoryImage, NotMemory, imported_from,
};

use qemu_file::{Block, MIB, PAGE, REST, head};

const GIB: u64 = 1 << 30;

/// A file, and where things are in it.
struct Written {
    path: PathBuf,
    /// Offsets of (header, pages) of each block.
    blocks: Vec<(u64, u64)>,
}

fn write(path: &Path, machine: &str, blocks: &[Block]) -> Written {
    let file = File::create(path).expect("it is created");
    let places = qemu_file::write(&file, machine, blocks);
    Written { path: path.to_owned(), blocks: places.blocks }
}

/// What QEMU writes for a guest of this size.
fn guest(path: &Path, len_bytes: u64) -> Written {
    let last = len_bytes / PAGE - 1;
    let blocks = [
        Block::new("pc.ram", len_bytes, &[(0, 1), (1, 2), (last / 2, 3), (last, 4)]),
        Block::new("0000:00:02.0/vga.vram", 16 * MIB, &[(7, 5)]),
        Block::new("pc.bios", 256 << 10, &[(0, 6), (63, 0)]),
        Block::new("/rom@etc/acpi/rsdp", PAGE, &[(0, 8)]),
    ];
    write(path, "pc-q35-10.0", &blocks)
}

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn import(&self, import: &Import) -> Snapshot {
        let out = self.path("a.snap");
        import
            .write(&out, &WriteOptions::default().existing(Existing::Replace), &go)
            .expect("it is written");
        Snapshot::open(&out).expect("it opens")
    }

    /// Imports the file and exports it again.
    fn there_and_back(&self, path: &Path) -> PathBuf {
        let import = Import::qemu(path, None).expect("it is a mapped-ram file");
        let snapshot = self.import(&import);
        assert!(!import.has_left_out());
        export(&snapshot, &self.path("out"));
        self.path("out")
    }
}

fn export(snapshot: &Snapshot, path: &Path) {
    let export = Export::new(snapshot, ExportFormat::Qemu).expect("all data is in the snapshot");
    let out = StagedOutput::new(path, export.shape(), true).expect("it can be created");
    export.write(&out, &go).expect("it is written");
    out.publish().expect("it appears");
}

fn go(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[track_caller]
fn assert_same(one: &Path, other: &Path) {
    let bytes = |path: &Path| fs::read(path).expect("it is there");
    assert!(bytes(one) == bytes(other), "{} and {} differ", one.display(), other.display());
}

#[test]
fn a_file_is_exported_bit_for_bit() {
    let files = Files::new();
    let file = guest(&files.path("m"), 64 * MIB).path;
    let import = Import::qemu(&file, None).expect("it is a mapped-ram file");
    assert_eq!(import.kind(), "qemu");
    let snapshot = files.import(&import);
    assert_eq!(imported_from(&snapshot), Some("QEMU"));
    let source = &snapshot.metadata().expect("it has some").other["source"];
    assert_eq!(source["machine"], "pc-q35-10.0");
    export(&snapshot, &files.path("out"));
    assert_same(&file, &files.path("out"));
    // As a view, too, which can be read at any offset.
    let export = Export::new(&snapshot, ExportFormat::Qemu).expect("all data is in the snapshot");
    let views = export.views();
    let names: Vec<_> = views.iter().map(|view| view.name()).collect();
    assert_eq!(names, ["migration", "migration-lazy"]);
    let expected = fs::read(&file).expect("it is there");
    let mut found = vec![0xee; expected.len() + 9];
    let mut buffer = ChunkBuffer::new();
    let len = views[0].read_at(&snapshot, 0, &mut found, &mut buffer).expect("it is readable");
    assert!(found[..len] == expected);
    assert!(export.stream(&mut Vec::new(), &go).is_err());
}

/// The lazy view is the file of a guest whose main memory has no pages.
#[test]
fn the_lazy_view_has_all_but_main_memory() {
    let files = Files::new();
    let blocks = |pages: &[(u64, u8)]| {
        [Block::new("pc.ram", 64 * MIB, pages), Block::new("pc.bios", 256 << 10, &[(3, 6)])]
    };
    let file = write(&files.path("m"), "pc", &blocks(&[(0, 1), (5000, 2), (16383, 3)]));
    let without = write(&files.path("without"), "pc", &blocks(&[]));
    let snapshot = files.import(&Import::qemu(&file.path, None).expect("a mapped-ram file"));
    let export = Export::new(&snapshot, ExportFormat::Qemu).expect("all data is in the snapshot");
    let lazy = &export.views()[1];
    let expected = fs::read(&without.path).expect("it is there");
    assert_eq!(lazy.len_bytes(), expected.len() as u64);
    let mut found = vec![0xee; expected.len()];
    let mut buffer = ChunkBuffer::new();
    lazy.read_at(&snapshot, 0, &mut found, &mut buffer).expect("it is readable");
    assert!(found == expected);
    let data: u64 = lazy.data().iter().map(|range| range.end - range.start).sum();
    assert!(data < 4 * MIB, "{data}");
}

/// Memory is where the machine has it, and can be at other addresses.
#[test]
fn main_memory_has_the_addresses_of_the_machine() {
    let others = |pages: &[(u64, u8)]| {
        [Block::new("pc.ram", 4 * GIB, pages), Block::new("vram", MIB, &[(1, 9)])]
    };
    for (machine, low_end) in [
        ("pc-i440fx-10.0", 3 * GIB),
        ("pc-q35-9.1", 2 * GIB),
        ("microvm", 3 * GIB),
        ("virt-10.0", 4 * GIB),
    ] {
        let files = Files::new();
        let first_high = low_end / PAGE;
        let last = 4 * GIB / PAGE - 1;
        let file = write(&files.path("m"), machine, &others(&[(first_high % last, 7), (last, 8)]));
        let snapshot = files.import(&Import::qemu(&file.path, None).expect("a mapped-ram file"));
        let found: Vec<_> = snapshot.regions().iter().map(|r| (r.gpa, r.len)).collect();
        let mut expected = vec![(0, low_end), (4 * GIB, 4 * GIB - low_end), (1 << 52, MIB)];
        expected.retain(|(_, len)| *len > 0);
        assert_eq!(found, expected, "{machine}");
    }
    let files = Files::new();
    let file = write(&files.path("m"), "virt-10.0", &others(&[(0, 7)]));
    let ranges = [GIB..4 * GIB, 8 * GIB..9 * GIB];
    let snapshot = files.import(&Import::qemu(&file.path, Some(&ranges)).expect("the ranges fit"));
    assert_eq!(snapshot.regions()[..2].iter().map(|r| r.gpa).collect::<Vec<_>>(), [GIB, 8 * GIB]);
    let short = Import::qemu(&file.path, Some(&ranges[..1])).expect_err("memory is longer");
    let ImportError::Ranges(error) = short else { panic!("{short:?}") };
    let expected = LayoutError::OtherLength { found_bytes: 3 * GIB, expected_bytes: 4 * GIB };
    assert!(matches!(*error, ImportError::Layout { error, .. } if error == expected));
}

/// Postcopy and x-ignore-shared add fields; other targets have larger pages.
#[test]
fn optional_fields_and_larger_pages_are_understood() {
    for optional in [vec![], vec![0; 8], (0..16).collect()] {
        let files = Files::new();
        let mut block = Block::new("mach-virt.ram", 8 * MIB, &[(16, 1), (31, 2), (2047, 3)]);
        block.optional = optional;
        block.page_bytes = 64 << 10;
        let file = write(&files.path("m"), "virt", &[block]);
        assert_same(&file.path, &files.there_and_back(&file.path));
    }
    // Newer releases leave no room for shared memory.
    let files = Files::new();
    let mut bytes = head("pc", "mapped-ram");
    bytes.extend(((8 * MIB) | 4).to_be_bytes());
    bytes.extend(b"\x06pc.ram");
    bytes.extend((8 * MIB).to_be_bytes());
    bytes.extend([0; 8]);
    bytes.extend(1u32.to_be_bytes());
    bytes.extend([PAGE, 0, 0].into_iter().flat_map(u64::to_be_bytes));
    bytes.extend(REST);
    fs::write(files.path("m"), &bytes).expect("it is written");
    assert!(matches!(error_of(&files.path("m")), MappedRamError::NoPages));
}

/// A page of a clear bit is zero, whatever the file has in its place.
#[test]
fn pages_that_qemu_does_not_read_are_zero() {
    let files = Files::new();
    let mut blocks = [Block::new("pc.ram", 4 * MIB, &[(0, 1), (9, 2)])];
    let clean = write(&files.path("clean"), "pc", &blocks);
    blocks[0].pages.extend([(8, 3, false), (1023, 4, false)]);
    let file = write(&files.path("m"), "pc", &blocks);
    let import = Import::qemu(&file.path, None).expect("it is a mapped-ram file");
    let snapshot = files.import(&import);
    assert!(import.has_left_out());
    assert_eq!(snapshot.header().data_pages, 2);
    export(&snapshot, &files.path("out"));
    assert_same(&clean.path, &files.path("out"));
}

fn error_of(path: &Path) -> MappedRamError {
    match Import::qemu(path, None) {
        Err(ImportError::MappedRam { error, .. }) => error,
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("it is imported"),
    }
}

#[test]
fn errors_have_values() {
    let files = Files::new();
    let file = guest(&files.path("m"), 64 * MIB);
    let good = fs::read(&file.path).expect("it is there");
    let len = good.len() as u64;
    let header = file.blocks[0].0;
    let changed = |at: u64, with: &[u8]| {
        let mut bytes = good.clone();
        bytes[at as usize..][..with.len()].copy_from_slice(with);
        fs::write(files.path("bad"), &bytes).expect("it is written");
        error_of(&files.path("bad"))
    };
    let total = head("pc-q35-10.0", "mapped-ram").len() as u64;
    let word = |value: u64| value.to_be_bytes();
    let field = |error, name: &str, value: u64| match error {
        MappedRamError::Field { block: 0, field, found, .. } => {
            assert_eq!((field.contains(name), found), (true, value), "{field}");
        }
        error => panic!("{error:?}"),
    };
    field(changed(total, &word(64 * MIB)), "the sum of the lengths", 64 * MIB);
    assert!(matches!(
        changed(total, &word((1 << 63) | 4)),
        MappedRamError::TooMany { what: "bytes of memory", found, .. } if found == 1 << 63
    ));
    assert!(matches!(changed(total, &word(MIB | 4)), MappedRamError::Total { total_bytes: MIB }));
    // The first block's length, then the fields of its header.
    assert!(matches!(changed(header - 8, &word(!0xfff)), MappedRamError::CutShort { .. }));
    field(changed(header - 8, &word(64 * MIB + 1)), "its length", 64 * MIB + 1);
    field(changed(header + 4, &word(2048)), "the page size", 2048);
    field(changed(header + 4, &word(3 * PAGE)), "the page size", 3 * PAGE);
    field(changed(header + 12, &word(u64::MAX)), "its header", u64::MAX);
    field(changed(header + 20, &word(MIB + 1)), "the offset of its pages", MIB + 1);
    field(changed(header + 20, &word(0)), "the offset of its pages", 0);
    let beyond = (u64::MAX - MIB) & !0xfff;
    assert!(matches!(changed(header + 20, &word(beyond)), MappedRamError::CutShort { .. }));
    field(changed(header, &[0, 0, 0, 9]), "its header", header + 28);
    field(changed(total + 8, &[0]), "a name", 0);
    field(changed(total + 9, b"\x1b"), "a name", 6);

    assert!(matches!(changed(total - 17, b"\x02"), MappedRamError::NoRam { searched_bytes: MIB }));
    for cut in [1, 3, REST.len() as u64] {
        fs::write(files.path("bad"), &good[..(len - cut) as usize]).expect("it is written");
        assert!(matches!(error_of(&files.path("bad")), MappedRamError::Unfinished), "{cut}");
    }
    fs::write(files.path("bad"), &good[..(len - REST.len() as u64 - 1) as usize]).expect("written");
    assert!(matches!(error_of(&files.path("bad")), MappedRamError::CutShort { .. }));
    let plain = [&head("pc", "other")[..], &good[total as usize..]].concat();
    fs::write(files.path("bad"), &plain).expect("it is written");
    assert!(matches!(error_of(&files.path("bad")), MappedRamError::NotMappedRam));
    let image = MemoryImage::open(&file.path);
    assert!(matches!(image, Err(ImportError::NotMemory { found: NotMemory::QemuMigration, .. })));
}

/// A skeleton is kept in a state section: what does not fit there is refused, not cut.
#[test]
fn more_than_a_state_section_takes_is_refused() {
    let files = Files::new();
    let file = guest(&files.path("m"), 8 * MIB);
    let long = File::options().write(true).open(&file.path).expect("it opens");
    let len = long.metadata().expect("it has a length").len();
    for at in 0..65 {
        long.write_all_at(&vec![7; MIB as usize], len + at * MIB).expect("it is written");
    }
    long.write_all_at(b"\x7e\0\0\0\x03\0", len + 65 * MIB).expect("it is written");
    let refused = Import::qemu(&file.path, None);
    assert!(matches!(refused, Err(ImportError::StateTooLong { .. })));
}

/// A snapshot from elsewhere may have the section of another guest.
#[test]
fn a_section_of_other_memory_is_refused() {
    let files = Files::new();
    let file = guest(&files.path("m"), 2 * MIB);
    let snapshot = files.import(&Import::qemu(&file.path, None).expect("a mapped-ram file"));
    let state = snapshot.state(MAPPED_RAM.tag()).expect("it is readable").expect("it is there");
    let memory = vec![0; PAGE as usize];
    let regions = [MemoryRegion { gpa: 0, len: PAGE, source_offset: 0 }];
    let states = [state];
    let contents = Contents::new(&regions, &memory, &[]).states(&states);
    write_snapshot(files.path("b.snap"), contents, &WriteOptions::default(), &go)
        .expect("it is written");
    let snapshot = Snapshot::open(files.path("b.snap")).expect("it opens");
    let refused = Export::new(&snapshot, ExportFormat::Qemu).err();
    assert!(matches!(refused, Some(ExportError::MemoryMap { .. })), "{refused:?}");
}
