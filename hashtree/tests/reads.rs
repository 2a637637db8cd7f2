//! What is read through a tree is right, or an error.

use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hashtree::{GROUP_BYTES, HashError, HashedStorage, Root, TreeError, tree_bytes, write_tree};
use proptest::prelude::*;
use snapfmt::{Existing, Permanent, ReadAt};

/// Data whose groups all differ.
fn data(len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

struct Built {
    data: Vec<u8>,
    tree: Vec<u8>,
    root: Root,
}

fn built(data: Vec<u8>) -> Built {
    let folder = tempfile::tempdir().expect("a folder");
    let path: PathBuf = folder.path().join("tree");
    let root = write_tree(&data, &path, Existing::Keep, &|_, _| ControlFlow::Continue(()));
    let (root, tree) = (root.expect("a tree"), std::fs::read(&path).expect("it is there"));
    assert_eq!(tree.len() as u64, tree_bytes(data.len() as u64));
    Built { data, tree, root }
}

impl Built {
    fn open(&self) -> HashedStorage<Vec<u8>> {
        HashedStorage::open(self.data.clone(), self.tree.clone(), self.root).expect("it is right")
    }
}

fn read(storage: &impl ReadAt, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0xaa; len];
    storage.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

fn hash_error(error: &io::Error) -> &HashError {
    assert!(Permanent::is_in(error), "{error:?}");
    HashError::of(error).expect("it is one of a hash")
}

const LENGTHS: [usize; 10] =
    [0, 1, 16384, 16385, 32768, 65_537, 1 << 20, (1 << 20) + 1, (2 << 20) + 16_384, 3_333_333];

#[test]
fn the_root_is_the_hash_of_the_whole_file() {
    for len in LENGTHS {
        let built = built(data(len));
        assert_eq!(built.root.to_string(), blake3::hash(&built.data).to_hex().as_str(), "{len}");
    }
}

#[test]
fn the_tree_is_baos_outboard_encoding() {
    // Two groups: the length, then the values of both.
    let built = built(data(20_000));
    assert_eq!(built.tree[..8], 20_000u64.to_le_bytes());
    use blake3::hazmat::HasherExt;
    let left = blake3::Hasher::new().update(&built.data[..16384]).finalize_non_root();
    let right = blake3::Hasher::new()
        .set_input_offset(16384)
        .update(&built.data[16384..])
        .finalize_non_root();
    assert_eq!(built.tree[8..], [left, right].concat());
}

#[test]
fn a_read_beyond_the_end_is_one_of_any_storage() {
    let checked = built(data(100)).open();
    for (offset, len) in [(100, 1), (0, 101), (u64::MAX, 2), (u64::MAX - 1, 1)] {
        let error = read(&checked, offset, len).expect_err("there is nothing");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{offset} {len}");
    }
    assert_eq!(read(&checked, 100, 0).expect("nothing is read"), [0u8; 0]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_read_has_the_bytes_of_the_file(
        len in prop::sample::select(&LENGTHS[1..]), reads in prop::collection::vec((any::<u32>(), any::<u32>()), 20),
    ) {
        let built = built(data(len));
        let checked = built.open();
        for (start, read_len) in reads {
            let start = start as usize % len;
            let read_len = read_len as usize % (len - start + 1);
            let found = read(&checked, start as u64, read_len).expect("it is right");
            prop_assert!(found == built.data[start..][..read_len], "{} {}", start, read_len);
        }
    }

    #[test]
    fn a_flipped_bit_of_the_file_is_found_by_reads_of_its_group_only(
        len in prop::sample::select(&LENGTHS[3..]), at in any::<u32>(), bit in 0..8u8,
    ) {
        let mut built = built(data(len));
        let at = at as usize % len;
        let checked = built.open();
        drop(checked);
        built.data[at] ^= 1u8 << bit;
        let group = at as u64 / GROUP_BYTES * GROUP_BYTES;
        let group = group..(group + GROUP_BYTES).min(len as u64);
        let opened = HashedStorage::open(built.data.clone(), built.tree.clone(), built.root);
        if group.end == len as u64 {
            // The last group is read to check the length.
            prop_assert!(matches!(opened, Err(TreeError::File(_))));
            return Ok(());
        }
        let checked = opened.expect("its last group is right");
        for offset in (0..len as u64).step_by(9973) {
            let wanted = 5000.min(len - offset as usize);
            let touches = offset < group.end && group.start < offset + wanted as u64;
            match read(&checked, offset, wanted) {
                Ok(found) => {
                    prop_assert!(!touches);
                    prop_assert!(found == built.data[offset as usize..][..wanted]);
                }
                Err(error) => {
                    prop_assert!(touches, "{}", error);
                    let expected = HashError::Data {
                        start: group.start, len: group.end - group.start, root: built.root,
                    };
                    prop_assert_eq!(hash_error(&error), &expected);
                }
            }
        }
    }

    #[test]
    fn a_flipped_bit_of_the_tree_gives_no_wrong_bytes(
        len in prop::sample::select(&LENGTHS[3..]), at in any::<u32>(), bit in 0..8u8,
    ) {
        let mut built = built(data(len));
        let at = at as usize % built.tree.len();
        built.tree[at] ^= 1u8 << bit;
        let Ok(checked) = HashedStorage::open(built.data.clone(), built.tree.clone(), built.root) else {
            return Ok(());
        };
        prop_assert!(at >= 8, "another length");
        let mut refused = 0;
        for offset in (0..len as u64).step_by(4999) {
            let wanted = 3000.min(len - offset as usize);
            match read(&checked, offset, wanted) {
                Ok(found) => prop_assert!(found == built.data[offset as usize..][..wanted]),
                Err(error) => {
                    let node = (at as u64 - 8) / 64 * 64 + 8;
                    let expected = HashError::Node { offset: node, root: built.root };
                    prop_assert_eq!(hash_error(&error), &expected);
                    refused += 1;
                }
            }
        }
        // All nodes are above some group.
        prop_assert!(refused > 0);
    }
}

#[test]
fn a_file_of_another_length_is_refused() {
    for len in LENGTHS {
        let Built { data, tree, root } = built(data(len));
        let mut lengths = vec![0, len.saturating_sub(1), len + 1, len + 16384, 2 * len];
        lengths.retain(|&other| other != len);
        for other in lengths {
            let mut other_data = data.clone();
            other_data.resize(other, 0);
            let opened = HashedStorage::open(other_data.clone(), tree.clone(), root);
            assert!(matches!(opened, Err(TreeError::Length { .. })), "{len} as {other}");
            // With a tree that says so too.
            let mut forged = tree.clone();
            forged[..8].copy_from_slice(&(other as u64).to_le_bytes());
            forged.resize(tree_bytes(other as u64) as usize, 0);
            let opened = HashedStorage::open(other_data, forged, root);
            assert!(opened.is_err(), "{len} as {other}, with a forged tree");
        }
        let mut longer = tree.clone();
        longer.push(0);
        let opened = HashedStorage::open(data, longer, root);
        assert!(matches!(opened, Err(TreeError::TreeLength { .. })), "{len}");
    }
}

#[test]
fn another_root_is_refused_when_opened() {
    for len in LENGTHS {
        let Built { data, tree, root } = built(data(len));
        let mut bytes = *root.as_bytes();
        bytes[31] ^= 1;
        assert!(HashedStorage::open(data, tree, Root::from_bytes(bytes)).is_err(), "{len}");
    }
}

#[test]
fn bytes_that_change_after_they_were_read_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("data");
    let built = built(data(2_000_000));
    std::fs::write(&path, &built.data).expect("it is written");
    let file = std::fs::File::open(&path).expect("it opens");
    let checked = HashedStorage::open(file, built.tree.clone(), built.root).expect("it is right");
    let in_order = checked.in_order().expect("a file has a handle for that");
    for storage in [&checked as &dyn ReadAt, &*in_order] {
        assert_eq!(read(&storage, 5, 10).expect("it is right"), built.data[5..15]);
    }
    let mut changed = built.data.clone();
    changed[1000] ^= 1;
    std::fs::write(&path, &changed).expect("it is written");
    for storage in [&checked as &dyn ReadAt, &*in_order] {
        let error = read(&storage, 5, 10).expect_err("it has changed");
        assert!(matches!(hash_error(&error), HashError::Data { start: 0, .. }));
        assert_eq!(read(&storage, 1_500_000, 9).expect("right"), built.data[1_500_000..][..9]);
    }
}

/// A copy that is damaged until it is fetched once more.
struct Copy {
    bytes: Vec<u8>,
    refetched: Arc<AtomicUsize>,
    heals: bool,
}

impl ReadAt for Copy {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.bytes.read_exact_at(buf, offset)?;
        let healed = self.heals && self.refetched.load(Ordering::Relaxed) > 0;
        if offset < 100_000 && !healed {
            buf[0] ^= 1;
        }
        Ok(())
    }

    fn len_bytes(&self) -> io::Result<u64> {
        self.bytes.len_bytes()
    }

    fn refetch(&self, _bytes: std::ops::Range<u64>) -> bool {
        self.refetched.fetch_add(1, Ordering::Relaxed);
        true
    }
}

#[test]
fn a_damaged_copy_is_fetched_once_more() {
    for heals in [true, false] {
        let built = built(data(200_000));
        let refetched = Arc::new(AtomicUsize::new(0));
        let copy = Copy { bytes: built.data.clone(), refetched: Arc::clone(&refetched), heals };
        let checked =
            HashedStorage::open(copy, built.tree.clone(), built.root).expect("its end is right");
        let found = read(&checked, 20_000, 100);
        assert_eq!(found.is_ok(), heals);
        assert_eq!(refetched.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn a_tree_that_is_cancelled_does_not_appear() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tree");
    let cancelled = write_tree(&data(5 << 20), &path, Existing::Keep, &|done, _| {
        if done > 1 << 20 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(cancelled, Err(TreeError::Cancelled)));
    assert_eq!(folder.path().read_dir().expect("it is there").count(), 0);
}
