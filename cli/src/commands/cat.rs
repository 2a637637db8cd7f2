//! `snap cat`: the bytes at a guest-physical address.

use std::io::Write;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, bail};
use snapfmt::layout::PAGE_BYTES;
use snapfmt::{ChunkBuffer, MemoryRegion, PageIndex, Snapshot};

use crate::exit::Interrupted;
use crate::input::{Input, reading};
use crate::session::Session;
use crate::size;
use crate::stdout::to_stdout;

/// Print guest memory at an address, as hexdump -C does or as raw bytes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap cat guest.snap --gpa 0x100000                      256 bytes at 1 MiB
  snap cat guest.snap --gpa 0xfee00 --len 64
  snap cat guest.snap --gpa 4G --len 2M --raw > page.bin")]
pub(crate) struct Args {
    #[command(flatten)]
    input: Input,

    /// Guest-physical address: 0x100000, 1M, 1048576.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_address)]
    gpa: u64,

    /// The number of bytes.
    #[arg(long, value_name = "BYTES", default_value = "256", value_parser = parse_address)]
    len: u64,

    /// Write the raw bytes.
    #[arg(long)]
    raw: bool,
}

/// Parses an address or a length: decimal with an optional suffix K, M, G or T, or hex after 0x.
pub(crate) fn parse_address(text: &str) -> Result<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).context("not a hexadecimal number of 64 bits"),
        None => size::parse(text).map_err(anyhow::Error::msg),
    }
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    let file = &args.input.file;
    let named = || file.display().to_string();
    let snapshot = args.input.open()?;
    let end = args.gpa.checked_add(args.len).context("--gpa and --len reach above 2^64")?;
    let ranges = source_ranges(snapshot.regions(), args.gpa..end).with_context(named)?;
    to_stdout(|out| {
        let mut dump = HexDump::new(args.gpa);
        for range in ranges {
            each_part(&snapshot, file, range, &mut |bytes| {
                if session.interrupt.requested() {
                    return Err(Interrupted.into());
                }
                let written = if args.raw { out.write_all(bytes) } else { dump.write(out, bytes) };
                Ok(written?)
            })
            // A reader that has closed the pipe is not an error of the snapshot.
            .map_err(|error| match error.is::<snapfmt::ReadError>() {
                true => error.context(named()),
                false => error,
            })?;
        }
        if !args.raw {
            dump.finish(out)?;
        }
        Ok(())
    })
}

/// The source ranges of a guest-physical range, all of which must be memory.
fn source_ranges(regions: &[MemoryRegion], gpas: Range<u64>) -> Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    let mut at = gpas.start;
    let first = regions.partition_point(|region| region.gpa + region.len <= at);
    for region in &regions[first..] {
        if at >= gpas.end || region.gpa > at {
            break;
        }
        let end = gpas.end.min(region.gpa + region.len);
        let to_source = |gpa: u64| region.source_offset + (gpa - region.gpa);
        ranges.push(to_source(at)..to_source(end));
        at = end;
    }
    if at < gpas.end {
        bail!("no memory at gpa {at:#x}; memory is {}", described(regions));
    }
    Ok(ranges)
}

fn described(regions: &[MemoryRegion]) -> String {
    const MOST: usize = 8;
    let mut text: Vec<_> = regions
        .iter()
        .take(MOST)
        .map(|region| format!("{:#x}..{:#x}", region.gpa, region.gpa + region.len))
        .collect();
    if regions.len() > MOST {
        text.push(format!("and {} regions more", regions.len() - MOST));
    }
    text.join(", ")
}

/// Visits a source range page by page.
fn each_part(
    snapshot: &Snapshot,
    path: &Path,
    range: Range<u64>,
    visit: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let (mut buffer, mut page) = (ChunkBuffer::new(), [0; PAGE_BYTES]);
    let mut at = range.start;
    while at < range.end {
        let index = PageIndex::containing(at).context("above 16 TiB")?;
        let reading = reading(path);
        snapshot.read_page(index, &mut buffer, &mut page)?;
        drop(reading);
        let start = (at - index.source_offset()) as usize;
        let len = (PAGE_BYTES - start).min((range.end - at).try_into().unwrap_or(PAGE_BYTES));
        visit(&page[start..start + len])?;
        at += len as u64;
    }
    Ok(())
}

/// Bytes in a line.
const LINE: usize = 16;

/// Writes lines as `hexdump -C` does: equal ones are printed once, then `*`.
struct HexDump {
    /// Address of the present line.
    gpa: u64,
    line: Vec<u8>,
    before: Vec<u8>,
    starred: bool,
}

impl HexDump {
    fn new(gpa: u64) -> Self {
        Self { gpa, line: Vec::with_capacity(LINE), before: Vec::new(), starred: false }
    }

    fn write(&mut self, out: &mut dyn Write, mut bytes: &[u8]) -> std::io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(LINE - self.line.len()));
            self.line.extend_from_slice(now);
            bytes = later;
            if self.line.len() == LINE {
                self.end_line(out)?;
            }
        }
        Ok(())
    }

    fn finish(&mut self, out: &mut dyn Write) -> std::io::Result<()> {
        if !self.line.is_empty() {
            self.end_line(out)?;
        }
        writeln!(out, "{:08x}", self.gpa)
    }

    fn end_line(&mut self, out: &mut dyn Write) -> std::io::Result<()> {
        if self.line == self.before {
            if !std::mem::replace(&mut self.starred, true) {
                writeln!(out, "*")?;
            }
        } else {
            self.starred = false;
            let mut text = format!("{:08x}  ", self.gpa);
            for at in 0..LINE {
                match self.line.get(at) {
                    Some(byte) => text.push_str(&format!("{byte:02x} ")),
                    None => text.push_str("   "),
                }
                if at == LINE / 2 - 1 {
                    text.push(' ');
                }
            }
            text.push_str(" |");
            let printable = |byte: &u8| match byte {
                b' '..=b'~' => char::from(*byte),
                _ => '.',
            };
            text.extend(self.line.iter().map(printable));
            text.push('|');
            writeln!(out, "{text}")?;
        }
        self.gpa += self.line.len() as u64;
        std::mem::swap(&mut self.line, &mut self.before);
        self.line.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_hex_or_sizes() {
        for (text, value) in [("0x1000", 4096), ("4K", 4096), ("17", 17), ("0XfF", 255)] {
            assert_eq!(parse_address(text).unwrap(), value);
        }
        for bad in ["", "0x", "0xg", "-1", "0x10000000000000000", "4X"] {
            assert!(parse_address(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_dump_looks_like_that_of_hexdump() {
        let mut out = Vec::new();
        let mut dump = HexDump::new(0x1000);
        dump.write(&mut out, b"0123456789abcdef").unwrap();
        dump.write(&mut out, &[0; 40]).unwrap();
        dump.write(&mut out, &[0; 8]).unwrap();
        dump.write(&mut out, b"\xffz").unwrap();
        dump.finish(&mut out).unwrap();
        let expected = "\
00001000  30 31 32 33 34 35 36 37  38 39 61 62 63 64 65 66  |0123456789abcdef|
00001010  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|
*
00001040  ff 7a                                             |.z|
00001042
";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn addresses_outside_of_memory_are_named() {
        let region = |gpa, len, source_offset| MemoryRegion { gpa, len, source_offset };
        let regions = [region(0, 0x3000, 0), region(0x8000, 0x1000, 0x3000)];
        assert_eq!(source_ranges(&regions, 0x8010..0x8020).unwrap(), [0x3010..0x3020]);
        for (range, at) in [(0x2ff0..0x3010, "0x3000"), (0x5000..0x5001, "0x5000")] {
            let error = source_ranges(&regions, range).unwrap_err().to_string();
            assert!(error.contains(at) && error.contains("0x8000..0x9000"), "{error}");
        }
    }
}
