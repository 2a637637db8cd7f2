//! A file after a power loss before its sync: blocks that were not written read as zeros, and the end may be missing.
//! Such a file must not be accepted.
//!
//! (The writer gives a file its name only after fsync; this is the second line of defence, for
//! disks and file systems that violate it, and for incomplete copies.)

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::sync::OnceLock;

use proptest::prelude::*;
use snapfmt::layout::PAGE_BYTES;
use snapfmt::{
    Codec, Contents, MemoryRegion, ReadError, Snapshot, StateBlob, Verified, WriteOptions,
    write_snapshot,
};

/// The unit in which disks write.
const BLOCK_BYTES: usize = 512;

/// A file of some ten pages, compressible and not, with state. Written once.
fn sample(codec: Codec) -> &'static [u8] {
    static SAMPLES: [OnceLock<Vec<u8>>; 3] = [const { OnceLock::new() }; 3];
    SAMPLES[codec as usize].get_or_init(|| write_sample(codec))
}

fn write_sample(codec: Codec) -> Vec<u8> {
    let mut memory = vec![0; 700 * PAGE_BYTES];
    let mut noise = 1u64;
    for page in [0, 1, 2, 3, 90, 91, 400, 511, 512, 699] {
        for (at, byte) in memory[page * PAGE_BYTES..][..PAGE_BYTES].iter_mut().enumerate() {
            noise = noise.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            *byte = if page % 2 == 0 { (noise >> 56) as u8 } else { (at / 90) as u8 };
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.snap");
    let len = memory.len() as u64;
    let regions = [MemoryRegion { gpa: 0, len, source_offset: 0 }];
    let data = [0..len];
    let states = [StateBlob { tag: 1, version: 1, bytes: (0..3000).map(|at| at as u8).collect() }];
    let contents = Contents::new(&regions, &memory, &data).states(&states);
    let options = WriteOptions::default().codec(codec).chunk_pages(4);
    write_snapshot(&path, contents, &options, &|_| ControlFlow::Continue(())).unwrap();
    std::fs::read(path).unwrap()
}

fn codecs() -> Vec<Codec> {
    let built = |codec: &Codec| cfg!(feature = "zstd") || *codec != Codec::Zstd;
    Codec::ALL.into_iter().filter(built).collect()
}

fn verify(bytes: &[u8]) -> Result<Verified, ReadError> {
    Snapshot::new(bytes)?.verify(NonZeroUsize::MIN, &|_| ControlFlow::Continue(()))
}

/// Zeros in place of some blocks. The rest of the file is unchanged.
fn without(bytes: &[u8], blocks: impl IntoIterator<Item = usize>) -> Vec<u8> {
    let mut torn = bytes.to_vec();
    for block in blocks {
        let end = ((block + 1) * BLOCK_BYTES).min(torn.len());
        torn[block * BLOCK_BYTES..end].fill(0);
    }
    torn
}

#[test]
fn a_file_that_lacks_any_one_block_is_detected() {
    for codec in codecs() {
        let whole = sample(codec);
        verify(whole).unwrap();
        let (mut lost, mut empty) = (0, 0);
        for block in 0..whole.len().div_ceil(BLOCK_BYTES) {
            let torn = without(whole, [block]);
            if torn == whole {
                // It held zeros: nothing is lost.
                empty += 1;
            } else {
                lost += 1;
                assert!(verify(&torn).is_err(), "{codec}: block {block}");
            }
        }
        assert!(lost > 20 && empty > 5, "{lost} {empty}");
    }
}

#[test]
fn a_file_cut_at_any_block_does_not_open() {
    for codec in codecs() {
        let whole = sample(codec);
        for len in (0..whole.len()).step_by(BLOCK_BYTES) {
            assert!(Snapshot::new(&whole[..len]).is_err(), "{codec}: {len} bytes");
            // Its length was recorded, the rest of it was not.
            let blocks = len / BLOCK_BYTES..whole.len().div_ceil(BLOCK_BYTES);
            assert!(verify(&without(whole, blocks)).is_err(), "{codec}: zeros from {len}");
        }
    }
}

/// The header is the last thing written and one disk block of it holds the CRC: as long as the
/// first or the last block of the header is missing, it does not even open.
#[test]
fn without_its_header_it_does_not_open() {
    let whole = sample(Codec::Raw);
    let all = whole.len().div_ceil(BLOCK_BYTES);
    for lost in [vec![0], vec![7], (0..8).collect(), (0..all).collect::<Vec<_>>()] {
        assert!(Snapshot::new(&without(whole, lost)[..]).is_err());
    }
    let no_header = without(whole, 0..8);
    assert!(matches!(Snapshot::new(&no_header[..]), Err(ReadError::NotASnapshot { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Any set of blocks missing, in any pattern, with or without the end: it is detected, or nothing was lost.
    #[test]
    fn a_file_that_lacks_any_blocks_is_detected(
        codec in prop::sample::select(codecs()),
        lost in prop::collection::vec(any::<prop::sample::Index>(), 1..40),
        end in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let whole = sample(codec);
        let blocks = whole.len().div_ceil(BLOCK_BYTES);
        let mut torn = without(whole, lost.iter().map(|block| block.index(blocks)));
        if let Some(end) = end {
            torn.truncate(end.index(blocks) * BLOCK_BYTES);
        }
        prop_assert!(torn == whole || verify(&torn).is_err());
    }

    /// Blocks that still hold another snapshot's bytes, as after an overwrite in place, which a copy may do but not the
    /// writer. This is detected, unless the blocks are equal.
    #[test]
    fn a_mixture_of_two_files_is_detected(
        from in any::<prop::sample::Index>(),
        count in 1usize..16,
    ) {
        let (old, whole) = (sample(Codec::Raw), sample(Codec::Lz4));
        let mut mixed = whole.to_vec();
        let start = from.index(whole.len() / BLOCK_BYTES) * BLOCK_BYTES;
        let end = (start + count * BLOCK_BYTES).min(whole.len()).min(old.len());
        mixed[start..end].copy_from_slice(&old[start..end]);
        prop_assert!(mixed == whole || verify(&mixed).is_err());
    }
}
