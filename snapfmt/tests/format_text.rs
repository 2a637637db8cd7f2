//! `docs/format.md` agrees with what the library writes.

use std::ops::ControlFlow;

use snapfmt::layout::PAGE_BYTES;
use snapfmt::{Codec, Contents, MemoryRegion, WriteOptions, write_snapshot};

const TEXT: &str = include_str!("../../docs/format.md");

/// The offset and the bytes (`None` for `..`) of a line of a hexdump.
fn hexdump_line(line: &str) -> Option<(usize, Vec<Option<u8>>)> {
    let (offset, rest) = line.strip_prefix("    ")?.split_once("  ")?;
    let offset = usize::from_str_radix(offset, 16).ok().filter(|_| offset.len() == 8)?;
    let bytes = rest.split("   ").next()?.split_whitespace();
    let byte = |text: &str| u8::from_str_radix(text, 16).ok();
    Some((offset, bytes.map(byte).collect()))
}

#[test]
fn the_worked_hexdump_is_a_real_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("one.snap");
    let memory = vec![7; PAGE_BYTES];
    let regions = [MemoryRegion { gpa: 0, len: 4096, source_offset: 0 }];
    let data = [0..4096];
    let contents = Contents::new(&regions, &memory, &data);
    let options = WriteOptions::default().codec(Codec::Raw);
    write_snapshot(&path, contents, &options, &|_| ControlFlow::Continue(())).unwrap();
    let file = std::fs::read(path).unwrap();
    let lines: Vec<_> = TEXT.lines().filter_map(hexdump_line).collect();
    assert_eq!(lines.len(), 9);
    for (offset, bytes) in lines {
        for (at, expected) in bytes.iter().enumerate() {
            let found = file[offset + at];
            assert!(expected.is_none_or(|byte| byte == found), "{:#x}: {found:#x}", offset + at);
        }
    }
    // "chunks_id to 0xa7, here the id at 0x28", and the body's checksum as in the text.
    assert_eq!(file[0x98..0xa8], file[0x28..0x38]);
    let body_crc = crc32fast::hash(&[&file[0x98..0xa8], &file[0x1020..0x2040]].concat());
    assert_eq!(file[0x100c..0x1010], body_crc.to_le_bytes());
}

#[test]
fn the_tables_of_header_and_records_leave_no_gap() {
    // Rows `| offset | size | name | ...`: in each table every field begins where the last ended.
    let number = |cell: &str| cell.trim().parse::<usize>().ok();
    let (mut tables, mut next) = (Vec::new(), None);
    for line in TEXT.lines() {
        let cells: Vec<_> = line.split('|').collect();
        let row = (cells.len() >= 5).then(|| (number(cells[1]), number(cells[2])));
        match row {
            Some((Some(offset), Some(size))) => {
                assert_eq!(next.unwrap_or(0), offset, "{line}");
                next = Some(offset + size);
            }
            Some((Some(_), None)) => next = None,
            _ => tables.extend(next.take()),
        }
    }
    assert_eq!(tables, [4096, 40, 32, 16, 8, 24]);
}
