//! Equal pages are stored once, and read once, however many of them are touched.
#![allow(missing_docs)]

#[path = "support/snapshot.rs"]
mod snapshot;
mod support;

use pager::{Load, PageReader, PageSource, SnapshotSource};
use snapfmt::Codec;
use support::PAGE;

/// The result of a load: the numbers of its pages in order, and the bytes read.
fn load(reader: &mut dyn PageReader, page: usize, content: &[u8]) -> (Vec<usize>, u64) {
    match reader.load((page * PAGE) as u64).expect("it is readable") {
        Load::Pages(loaded) => {
            let pages = loaded.pages.iter().map(|of| {
                let number = of.source_offset as usize / PAGE;
                let bytes = &loaded.bytes[of.buffer_offset..][..PAGE];
                assert_eq!(bytes, &content[number * PAGE..][..PAGE], "page {number}");
                number
            });
            let mut pages: Vec<_> = pages.collect();
            pages.sort_unstable();
            (pages, loaded.cost.bytes_read)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_chunk_of_equal_pages_is_read_once() {
    // 16 different pages, and 48 that are equal to the fourth or the fifth of them.
    let page = |number: usize| vec![number as u8 + 1; PAGE];
    let content: Vec<u8> = (0..64)
        .flat_map(|number| page(if number < 16 { number } else { 3 + number % 2 }))
        .collect();
    for codec in [Codec::Raw, Codec::Lz4, Codec::Zstd] {
        let folder = tempfile::tempdir().expect("a folder");
        let source = SnapshotSource::new(snapshot::stored(folder.path(), &content, codec));
        assert_eq!(source.data_bytes(), 64 * PAGE as u64, "equal pages count, too");
        let mut reader = source.reader(PAGE).expect("it has such pages");
        let own: Vec<usize> = (0..16).collect();
        let (pages, read) = load(&mut *reader, 20, &content);
        assert_eq!(pages, [&own[..], &[20]].concat());
        assert!(read > 0);
        // The first shared page is kept now. The other one is not yet.
        let even: Vec<usize> = (32..48).step_by(2).collect();
        assert_eq!(load(&mut *reader, 40, &content), (even, 0));
        let (pages, read) = load(&mut *reader, 41, &content);
        assert_eq!(pages, [&own[..], &[41]].concat());
        assert!(read > 0);
        assert_eq!(load(&mut *reader, 63, &content), ((48..64).collect(), 0));
        // A page that is stored itself is still loaded with its chunk.
        assert_eq!(load(&mut *reader, 7, &content).0, own);
    }
}

#[test]
fn a_chunk_brings_the_equal_pages_between_its_own() {
    // Of 64 pages each fourth is equal to page 3, and one is equal to the page before it.
    let number_of = |number: usize| match number {
        _ if number % 4 == 3 => 3,
        21 => 20,
        _ => number,
    };
    let content: Vec<u8> =
        (0..64).flat_map(|number| vec![number_of(number) as u8 + 1; PAGE]).collect();
    for codec in [Codec::Raw, Codec::Lz4, Codec::Zstd] {
        let folder = tempfile::tempdir().expect("a folder");
        let source = SnapshotSource::new(snapshot::stored(folder.path(), &content, codec));
        let mut reader = source.reader(PAGE).expect("it has such pages");
        // The first chunk has 16 pages, up to page 18. Page 3 is one of them.
        let (pages, read) = load(&mut *reader, 0, &content);
        assert_eq!(pages, (0..19).collect::<Vec<_>>());
        assert!(read > 0);
        // No fault was on a page that is equal to page 3, so that is not kept, and the second chunk does not bring 23.
        let (pages, read) = load(&mut *reader, 22, &content);
        assert!(pages.contains(&21) && !pages.contains(&23), "{pages:?}");
        assert!(read > 0);
        // Now it is kept.
        load(&mut *reader, 63, &content);
        let (pages, read) = load(&mut *reader, 22, &content);
        assert!([21, 22, 23, 24, 27, 28].iter().all(|page| pages.contains(page)), "{pages:?}");
        assert!(read > 0);
        // Each page comes once.
        assert!(pages.windows(2).all(|pair| pair[0] < pair[1]), "{pages:?}");
    }
}
