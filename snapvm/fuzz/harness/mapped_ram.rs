//! QEMU: any bytes in a mapped-ram file, and in the section of a snapshot that was imported from one.

use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use snapvm::interchange::{Export, ExportFormat, Import, MAPPED_RAM};
use snapvm::snapfmt::{ChunkBuffer, Contents, MemoryRegion, Snapshot, StateBlob, write_snapshot};

use super::place::{self, MOST_BYTES};
use super::qemu_file::{self, Block, PAGE, Places, REST};

/// Input: a new length of the file (4 bytes, 0 for its own), then patches of what is not pages: a place there (2 bytes),
/// a length (1 byte, modulo 16, plus 1) and as many bytes.
pub(crate) fn mapped_ram(input: &[u8]) {
    let Some((len, patches)) = input.split_first_chunk() else { return };
    let file = place::empty("m");
    let places = offsets(&template(&file));
    for (at, bytes) in Patches(patches) {
        for (offset, byte) in places.iter().skip(at).zip(bytes) {
            file.write_all_at(&[*byte], *offset).expect("it can be written");
        }
    }
    match u64::from(u32::from_le_bytes(*len)) % MOST_BYTES {
        0 => {}
        len_bytes => file.set_len(len_bytes).expect("it can be sized"),
    }
    drop(file);
    let Ok(import) = Import::qemu(&place::path("m"), None) else { return };
    let snapshot = place::written(&import);
    let export = Export::new(&snapshot, ExportFormat::Qemu).expect("it has all data");
    let exported = place::content(&export, &snapshot, "migration");
    let lazy = place::content(&export, &snapshot, "migration-lazy");
    assert_eq!(exported.len(), lazy.len());
    let original = std::fs::read(place::path("m")).expect("it can be read");
    assert_eq!(exported.len(), original.len());
    assert!(import.has_left_out() || exported == original, "the export differs");
}

/// Input: a new length of the section (2 bytes, 0 for its own), then patches as for [`mapped_ram`].
pub(crate) fn skeleton(input: &[u8]) {
    let Some((len, patches)) = input.split_first_chunk() else { return };
    let (regions, section) = good();
    let mut bytes = section.bytes.clone();
    for (at, patch) in Patches(patches) {
        bytes.iter_mut().skip(at).zip(patch).for_each(|(to, from)| *to = *from);
    }
    match usize::from(u16::from_le_bytes(*len)) {
        0 => {}
        len => bytes.resize(len, 0),
    }
    let states = [StateBlob { bytes, ..section.clone() }];
    let memory = vec![7; regions.iter().map(|region| region.len as usize).sum()];
    let data = 0..memory.len() as u64;
    let contents = Contents::new(regions, &memory, std::slice::from_ref(&data)).states(&states);
    let path = place::path("b.snap");
    write_snapshot(&path, contents, &place::options(), &place::proceed).expect("it is written");
    let snapshot = Snapshot::open(&path).expect("it opens");
    let Ok(export) = Export::new(&snapshot, ExportFormat::Qemu) else { return };
    let mut buffer = ChunkBuffer::new();
    let mut found = vec![0; 70_000];
    for view in export.views() {
        let len_bytes = view.len_bytes();
        for offset in [0, len_bytes / 2, len_bytes.saturating_sub(100), len_bytes] {
            let read = view.read_at(&snapshot, offset, &mut found, &mut buffer);
            let expected = (len_bytes - offset).min(found.len() as u64);
            assert_eq!(read.expect("it is readable") as u64, expected);
            assert!(view.next_data(offset).is_none_or(|at| (offset..len_bytes).contains(&at)));
            assert!(view.next_hole(offset).is_none_or(|at| (offset..=len_bytes).contains(&at)));
        }
    }
}

/// Writes a small good file.
fn template(file: &std::fs::File) -> Places {
    let blocks = [
        Block::new("pc.ram", 64 << 10, &[(0, 1), (9, 2)]),
        Block::new("pc.bios", 16 << 10, &[(3, 3)]),
    ];
    qemu_file::write(file, "pc-q35-10.0", &blocks)
}

/// The offsets of all bytes that are not pages or padding.
fn offsets(places: &Places) -> Vec<u64> {
    let (first, second) = (places.blocks[0], places.blocks[1]);
    // The header is followed by the bitmap; before it are a length and a name.
    let areas = [
        0..first.0 + 36,
        second.0 - 16..second.0 + 36,
        places.rest..places.rest + REST.len() as u64,
    ];
    assert_eq!(first.1 + (64 << 10) + 16, second.0);
    assert!(second.1.is_multiple_of(PAGE));
    areas.into_iter().flatten().collect()
}

/// The memory map and the section of the good file's snapshot.
fn good() -> &'static (Vec<MemoryRegion>, StateBlob) {
    static GOOD: OnceLock<(Vec<MemoryRegion>, StateBlob)> = OnceLock::new();
    GOOD.get_or_init(|| {
        template(&place::empty("m"));
        let import = Import::qemu(&place::path("m"), None).expect("the template is a good file");
        let snapshot = place::written(&import);
        let section = snapshot.state(MAPPED_RAM.tag()).expect("it is readable");
        (snapshot.regions().to_vec(), section.expect("it is there"))
    })
}

/// Places and the bytes for them.
struct Patches<'a>(&'a [u8]);

impl<'a> Iterator for Patches<'a> {
    type Item = (usize, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let [a, b, len, rest @ ..] = self.0 else { return None };
        let (bytes, rest) = rest.split_at((usize::from(*len) % 16 + 1).min(rest.len()));
        self.0 = rest;
        Some((u16::from_le_bytes([*a, *b]).into(), bytes))
    }
}
