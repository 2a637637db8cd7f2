//! Files of every released version of the format stay readable for ever.
//!
//! A new version of the format adds files to `tests/golden`; the ones that are there are never
//! changed. `SNAP_MAKE_GOLDEN=FOLDER cargo test golden` writes those of the present version.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::Path;

use snapfmt::layout::PAGE_BYTES;
use snapfmt::{
    ChunkBuffer, Codec, Contents, MemoryRegion, Metadata, PageIndex, Snapshot, StateBlob,
    WriteOptions, write_snapshot,
};

use crate::support::snap;

/// 8 MiB in two regions with a hole between them.
const REGIONS: [MemoryRegion; 2] = [
    MemoryRegion { gpa: 0, len: 5 << 20, source_offset: 0 },
    MemoryRegion { gpa: 1 << 32, len: 3 << 20, source_offset: 5 << 20 },
];

/// The golden memory: most pages zero, the rest of all kinds.
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

const STATE: &[u8] = b"the state of a golden machine";

/// The files that there must be: a missing one is an error, not a skip.
const FILES: [(&str, Codec); 3] =
    [("v1-raw.snap", Codec::Raw), ("v1-lz4.snap", Codec::Lz4), ("v1-zstd.snap", Codec::Zstd)];

#[test]
fn golden_files_read_as_they_always_did() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    if let Some(new) = std::env::var_os("SNAP_MAKE_GOLDEN") {
        make(Path::new(&new));
    }
    for (name, codec) in FILES {
        let path = folder.join(name);
        let snapshot = Snapshot::open(&path).expect(name);
        assert_eq!(snapshot.header().version, 1, "{name}");
        assert_eq!(snapshot.regions(), REGIONS, "{name}");
        let state = snapshot.state(7).expect(name).expect("the state is there");
        assert_eq!((state.version, &state.bytes[..]), (3, STATE), "{name}");
        let metadata = snapshot.metadata().expect(name);
        assert_eq!(metadata.tool, "golden");
        assert!(metadata.storage.contains_key(codec.name()), "{name}");
        let (mut buffer, mut found) = (ChunkBuffer::new(), [0; PAGE_BYTES]);
        for number in 0..2048 {
            snapshot.read_page(PageIndex(number), &mut buffer, &mut found).expect(name);
            assert!(found == page(number), "{name}: page {number}");
        }
        snapshot.verify(NonZeroUsize::MIN, &|_| ControlFlow::Continue(())).expect(name);
        snap(["verify".as_ref(), path.as_os_str()]).ok();
    }
}

fn make(folder: &Path) {
    let memory = memory();
    for (name, codec) in FILES {
        let contents = Contents {
            regions: &REGIONS,
            memory: &memory,
            data: &[0..memory.len() as u64],
            states: &[StateBlob { tag: 7, version: 3, bytes: STATE.to_vec() }],
            metadata: Metadata { tool: "golden".into(), ..Metadata::default() },
        };
        let options = WriteOptions { codec, ..WriteOptions::default() };
        let go_on = |_| ControlFlow::Continue(());
        write_snapshot(folder.join(name), contents, &options, &go_on).expect(name);
    }
}
