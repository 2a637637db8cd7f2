//! Files of every released version of the format stay readable forever.
//!
//! A new version of the format adds files to `tests/golden`; existing ones are never changed. `SNAP_MAKE_GOLDEN=FOLDER
//! cargo test golden` writes those of the present version.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use snapfmt::layout::{INCOMPAT_BOUND, INCOMPAT_SEALED, PAGE_BYTES};
use snapfmt::{
    Changes, ChunkBuffer, Codec, Contents, HotRun, KeyProvider, MemoryRegion, Metadata, PageIndex,
    Parents, Phase, SecretKey, Snapshot, StateBlob, WorkingSet, WriteOptions, copy_snapshot,
    write_snapshot,
};

use crate::support::snap;

/// 8 MiB in two regions with a hole between them.
const REGIONS: [MemoryRegion; 2] = [
    MemoryRegion { gpa: 0, len: 5 << 20, source_offset: 0 },
    MemoryRegion { gpa: 1 << 32, len: 3 << 20, source_offset: 5 << 20 },
];

/// The golden memory: most pages are zero, the rest are of all kinds.
fn page(number: u32) -> [u8; PAGE_BYTES] {
    let mut page = [0; PAGE_BYTES];
    let mut state = u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for (at, byte) in page.iter_mut().enumerate() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = match (number / 512, number % 40) {
            (2, _) | (_, 0..25) => 0,
            (_, 25..35) => (at / 48) as u8 ^ number as u8,
            (_, 35..38) => state as u8,
            _ => u8::from(at == number as usize),
        };
    }
    page
}

fn memory() -> Vec<u8> {
    (0..2048).flat_map(page).collect()
}

/// The file with a working set, its pages at the front. It is read, but not written any more: chunks have BOUND now.
const HOT: &str = "v1-working-set.snap";

/// A copy of a file, with its chunks and with a working set.
const COPY: &str = "v1-bound-copy.snap";

/// A sealed file with the content of the zstd file. All bytes of its key are [`KEY`].
const SEALED: &str = "v1-sealed-zstd.snap";
const KEY: u8 = 0xa7;

const STATE: &[u8] = b"the state of a golden machine";

/// The required files: a missing one is an error, not a skip. These are from before BOUND.
const OLD: [(&str, Codec); 4] = [
    ("v1-raw.snap", Codec::Raw),
    ("v1-lz4.snap", Codec::Lz4),
    ("v1-zstd.snap", Codec::Zstd),
    (HOT, Codec::Lz4),
];

/// Files in the present format.
const PRESENT: [(&str, Codec); 3] =
    [("v1-bound-raw.snap", Codec::Raw), ("v1-bound-zstd.snap", Codec::Zstd), (COPY, Codec::Zstd)];

#[test]
fn golden_files_read_without_a_change() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    if let Some(new) = std::env::var_os("SNAP_MAKE_GOLDEN") {
        make(Path::new(&new));
    }
    let old = OLD.map(|(name, codec)| (name, codec, 0));
    let present = PRESENT.map(|(name, codec)| (name, codec, INCOMPAT_BOUND));
    for (name, codec, incompat) in old.into_iter().chain(present) {
        let path = folder.join(name);
        check(name, &Snapshot::open(&path).expect(name), codec);
        let header = Snapshot::open(&path).expect(name).header().clone();
        assert_eq!((header.version, header.incompat), (1, incompat), "{name}");
        assert_eq!(header.chunks_id.is_some(), incompat == INCOMPAT_BOUND, "{name}");
        assert_eq!(header.chunks_id.is_some_and(|id| id != header.id), name == COPY, "{name}");
        snap(["verify".as_ref(), path.as_os_str()]).ok();
    }
}

/// The snapshot has the content of all golden files.
fn check(name: &str, snapshot: &Snapshot, codec: Codec) {
    assert_eq!(snapshot.regions(), REGIONS, "{name}");
    let state = snapshot.state(7).expect(name).expect("the state is there");
    assert_eq!((state.version, &state.bytes[..]), (3, STATE), "{name}");
    let metadata = snapshot.metadata().expect(name);
    assert_eq!(metadata.tool, "golden");
    assert!(metadata.storage.contains_key(codec.name()), "{name}");
    let set = snapshot.working_set().expect(name);
    assert_eq!(set, [HOT, COPY].contains(&name).then(working_set), "{name}");
    let (mut buffer, mut found) = (ChunkBuffer::new(), [0; PAGE_BYTES]);
    for number in 0..2048 {
        snapshot.read_page(PageIndex(number), &mut buffer, &mut found).expect(name);
        assert!(found == page(number), "{name}: page {number}");
    }
    snapshot.verify(NonZeroUsize::MIN, &|_| ControlFlow::Continue(())).expect(name);
}

#[test]
fn the_golden_sealed_file_reads_without_a_change() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(SEALED);
    let keys: Arc<dyn KeyProvider> = Arc::new(SecretKey::new([KEY; 32]));
    let parents = Parents { keys: Some(keys), ..Parents::default() };
    let snapshot = Snapshot::open_with(&path, &parents).expect(SEALED);
    assert_eq!(snapshot.header().incompat, INCOMPAT_BOUND | INCOMPAT_SEALED);
    check(SEALED, &snapshot, Codec::Zstd);
    snap(["verify".as_ref(), path.as_os_str()]).ok();
}

/// Two restores: 40 pages in one run, some single ones, one that only the second has touched.
fn working_set() -> WorkingSet {
    let first = (30..70).chain([1900, 5, 38]).map(|page| (PageIndex(page), Phase::FirstOutput));
    let first: Vec<_> = first.chain([(PageIndex(2047), Phase::FirstSecond)]).collect();
    let second: Vec<_> = first.iter().copied().chain([(PageIndex(1030), Phase::Later)]).collect();
    WorkingSet::join([&first[..], &second[..]])
}

#[test]
fn the_golden_working_set_has_the_expected_pages() {
    let run = |first, pages, phase, seen| HotRun { first: PageIndex(first), pages, phase, seen };
    let expected = [
        run(30, 40, Phase::FirstOutput, 2),
        run(1900, 1, Phase::FirstOutput, 2),
        run(5, 1, Phase::FirstOutput, 2),
        run(2047, 1, Phase::FirstSecond, 2),
        run(1030, 1, Phase::Later, 1),
    ];
    assert_eq!(working_set().runs(), expected);
}

fn make(folder: &Path) {
    let memory = memory();
    let states = [StateBlob { tag: 7, version: 3, bytes: STATE.to_vec() }];
    let data = [0..memory.len() as u64];
    let contents = || {
        Contents::new(&REGIONS, &memory, &data)
            .states(&states)
            .metadata(Metadata::default().tool("golden"))
    };
    let go_on = |_| ControlFlow::Continue(());
    let [(raw, _), (zstd, _), (copy, _)] = PRESENT;
    for (name, codec) in [(raw, Codec::Raw), (zstd, Codec::Zstd)] {
        let options = WriteOptions::default().codec(codec);
        write_snapshot(folder.join(name), contents(), &options, &go_on).expect(name);
    }
    let original = Snapshot::open(folder.join(zstd)).expect(zstd);
    let changes = Changes::new(working_set(), original.metadata().expect(zstd));
    copy_snapshot(folder.join(copy), &original, &changes, &go_on).expect(copy);
}
