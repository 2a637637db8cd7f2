//! `snap info --map`: memory as a picture, on a terminal or in a file.
//!
//! Memory is cut into cells of equal size. A cell has the colour of the most frequent kind of its pages that are not
//! zero, and a stronger colour the more pages are not zero. So a cell is only drawn as zero if all of it is zero. A
//! cell with pages of the working set is drawn as hot, with a stronger colour the more they are. Only the codec of a
//! cell's first stored page is looked up: the picture costs the index and one chunk header a cell, for any size of the
//! guest. Memory in more parts than the picture has rows is drawn without its gaps.

mod png;

use std::collections::HashSet;
use std::fmt::Write as _;
use std::ops::Range;

use anyhow::Result;
use snapfmt::layout::PAGE_BYTES;
use snapfmt::{ChunkExtent, Codec, PageEntry, PageIndex, Snapshot};
use snapvm::gpa_ranges;

use super::pages::codec_of;
use crate::size;

/// Cells in a row.
const COLUMNS: u64 = 64;

/// The kinds of cells. Each has a line in [`LEGEND`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Zero,
    Stored(Codec),
    /// In the working set, and not zero.
    Hot,
    /// Equal to an earlier page, whose slot it shares.
    Duplicate,
    Parent,
}

/// How a kind is drawn.
struct Look {
    kind: Kind,
    name: &'static str,
    /// Small if less than half of the cell is not zero, else capital.
    letter: char,
    /// Red, green and blue, each 0 to 5: the colour cube of terminals.
    colour: [u8; 3],
}

const LEGEND: [Look; 7] = [
    Look { kind: Kind::Zero, name: "zero", letter: '.', colour: [1, 1, 1] },
    Look { kind: Kind::Stored(Codec::Raw), name: "raw", letter: 'r', colour: [5, 2, 0] },
    Look { kind: Kind::Stored(Codec::Lz4), name: "lz4", letter: 'l', colour: [1, 3, 5] },
    Look { kind: Kind::Stored(Codec::Zstd), name: "zstd", letter: 'z', colour: [1, 5, 1] },
    Look { kind: Kind::Hot, name: "hot", letter: 'h', colour: [5, 0, 0] },
    Look { kind: Kind::Duplicate, name: "duplicate", letter: 'd', colour: [5, 1, 5] },
    Look { kind: Kind::Parent, name: "parent", letter: 'p', colour: [5, 5, 1] },
];

impl Kind {
    fn look(self) -> &'static Look {
        LEGEND.iter().find(|look| look.kind == self).unwrap_or(&LEGEND[0])
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Cell {
    /// Of its first page.
    gpa: u64,
    kind: Kind,
    /// Part of its pages that are not zero, 0 to 1.
    share: f64,
}

impl Cell {
    /// The colour, stronger for a fuller cell, as 0 to 5 each.
    fn colour(self) -> [u8; 3] {
        let [strongest, steps] = [5, 3];
        let weaker = match self.kind {
            Kind::Zero => 0,
            _ => steps - (self.share * f64::from(steps)).ceil().clamp(1.0, f64::from(steps)) as u8,
        };
        self.kind.look().colour.map(|part| part * (strongest - weaker) / strongest)
    }

    fn letter(self) -> char {
        let letter = self.kind.look().letter;
        if self.share < 0.5 { letter } else { letter.to_ascii_uppercase() }
    }
}

/// Cells that follow each other in guest memory.
#[derive(Debug)]
struct Row {
    gpa: u64,
    /// The number of the part, each of which begins a new row.
    part: usize,
    cells: Vec<Cell>,
}

/// Memory as rows of cells.
#[derive(Debug)]
pub(crate) struct Picture {
    rows: Vec<Row>,
    cell_bytes: u64,
    memory_bytes: u64,
    /// How many regions are drawn as if there were no gaps between them, if they are.
    joined: Option<usize>,
}

/// The counters of a cell.
#[derive(Clone, Copy, Default)]
struct Tally {
    hot: u64,
    stored: u64,
    duplicate: u64,
    parent: u64,
    first: Option<ChunkExtent>,
}

impl Picture {
    /// A picture of about `rows` rows, or fewer.
    pub(crate) fn new(snapshot: &Snapshot, rows: u64) -> Result<Self> {
        let memory_bytes = snapshot.header().memory_bytes;
        let page = PAGE_BYTES as u64;
        let cell_bytes = memory_bytes.div_ceil(rows * COLUMNS).max(page).next_power_of_two();
        let regions = snapshot.regions();
        let joined = (regions.len() as u64 > rows).then_some(regions.len());
        let mut picture = Self { rows: Vec::new(), cell_bytes, memory_bytes, joined };
        let set = snapshot.working_set()?;
        let hot: HashSet<_> =
            set.iter().flat_map(|set| set.pages()).map(|(page, _)| page).collect();
        let mut last_stored = None;
        let parts = match joined {
            None => regions.iter().map(|r| r.source_offset..r.source_offset + r.len).collect(),
            Some(_) => vec![0..memory_bytes],
        };
        for (number, part) in parts.into_iter().enumerate() {
            let end = part.end;
            let tallies = tallies(snapshot, part.clone(), cell_bytes, &hot, &mut last_stored)?;
            let mut starts = part.step_by(cell_bytes as usize);
            for in_row in tallies.chunks(COLUMNS as usize) {
                let cell = |(tally, start): (&Tally, u64)| {
                    // A cell begins below the end of memory, which the regions fill.
                    let gpa = gpa_ranges(regions, start..start + page).next();
                    let gpa = gpa.map_or(0, |range| range.start);
                    cell(snapshot, tally, gpa, cell_bytes.min(end - start) / page)
                };
                let cells: Vec<_> =
                    in_row.iter().zip(&mut starts).map(cell).collect::<Result<_>>()?;
                let gpa = cells.first().map_or(0, |cell| cell.gpa);
                picture.rows.push(Row { gpa, part: number, cells });
            }
        }
        Ok(picture)
    }

    /// One letter a cell.
    pub(crate) fn as_ascii(&self) -> String {
        let mut text = String::new();
        for row in &self.rows {
            let cells: String = row.cells.iter().map(|cell| cell.letter()).collect();
            let _infallible = writeln!(text, "{:#014x} {cells}", row.gpa);
        }
        let names: Vec<_> =
            self.legend().map(|look| format!("{} {}", look.letter, look.name)).collect();
        let _infallible = writeln!(
            text,
            "{}; capital: at least half is not zero; {}",
            names.join("  "),
            self.scale()
        );
        text
    }

    /// Two rows a line, in colours.
    pub(crate) fn as_ansi(&self) -> String {
        let mut text = String::new();
        let mut rows = self.rows.iter().peekable();
        while let Some(upper) = rows.next() {
            let lower = rows.next_if(|lower| lower.part == upper.part);
            let _infallible = write!(text, "{:#014x} ", upper.gpa);
            for (at, cell) in upper.cells.iter().enumerate() {
                let below = lower.and_then(|lower| lower.cells.get(at));
                let below = below.map(|cell| format!(";48;5;{}", indexed(cell.colour())));
                let below = below.unwrap_or_default();
                let _infallible =
                    write!(text, "\x1b[0;38;5;{}{below}m\u{2580}", indexed(cell.colour()));
            }
            text.push_str("\x1b[0m\n");
        }
        for look in self.legend() {
            let _infallible =
                write!(text, "\x1b[38;5;{}m\u{2588}\x1b[0m {}  ", indexed(look.colour), look.name);
        }
        let _infallible = writeln!(text, "{}", self.scale());
        text
    }

    /// A complete document. Adjacent cells of one colour are one rectangle.
    pub(crate) fn as_svg(&self) -> String {
        let (side, left, top) = (10, 130, 30);
        let width = left + COLUMNS as usize * side + 10;
        let height = top + (self.rows.len() + 3) * side;
        let mut text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             font-family=\"monospace\" font-size=\"{side}\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
             <text x=\"10\" y=\"18\" font-size=\"12\">{}</text>\n",
            self.scale()
        );
        let mut rect = |x: usize, y: usize, cells: usize, colour: [u8; 3], about: &str| {
            let [r, g, b] = colour.map(|part| part * 51);
            let _infallible = writeln!(
                text,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{side}\" \
                 fill=\"#{r:02x}{g:02x}{b:02x}\">{about}</rect>",
                cells * side
            );
        };
        for (number, row) in self.rows.iter().enumerate() {
            let mut column = 0;
            for alike in row.cells.chunk_by(|a, b| a.kind == b.kind && a.colour() == b.colour()) {
                let gpa = alike[0].gpa;
                let name = alike[0].kind.look().name;
                let about = format!("<title>{gpa:#x} {name}</title>");
                let (x, y) = (left + column * side, top + number * side);
                rect(x, y, alike.len(), alike[0].colour(), &about);
                column += alike.len();
            }
        }
        let y = height - 2 * side;
        for (at, look) in self.legend().enumerate() {
            rect(left + at * 90, y, 1, look.colour, "");
        }
        let baseline = side - 1;
        for (at, look) in self.legend().enumerate() {
            let (x, y) = (left + at * 90 + side + 4, y + baseline);
            let _infallible = writeln!(text, "<text x=\"{x}\" y=\"{y}\">{}</text>", look.name);
        }
        for (number, row) in self.rows.iter().enumerate() {
            let y = top + number * side + baseline;
            let _infallible = writeln!(text, "<text x=\"10\" y=\"{y}\">{:#014x}</text>", row.gpa);
        }
        text + "</svg>\n"
    }

    /// The kinds that are in the picture.
    fn legend(&self) -> impl Iterator<Item = &'static Look> {
        let shown =
            |look: &&Look| self.rows.iter().flat_map(|row| &row.cells).any(|c| c.kind == look.kind);
        LEGEND.iter().filter(shown)
    }

    fn scale(&self) -> String {
        let joined = self.joined.map(|regions| format!(" in {regions} parts, drawn without gaps"));
        format!(
            "{} of memory{}, a cell is {}",
            size::human(self.memory_bytes),
            joined.unwrap_or_default(),
            size::human(self.cell_bytes)
        )
    }
}

/// Number of a colour in the 256-colour palette: a cube of 6 x 6 x 6 from 16 on.
fn indexed([r, g, b]: [u8; 3]) -> u8 {
    16 + 36 * r + 6 * g + b
}

/// Counts the pages of each cell of one region.
///
/// A writer stores pages in their order, so a page whose slot is not behind all slots before it shares it with an
/// earlier one. `last_stored` is the furthest slot so far. (In a file that was written in another order, some pages are
/// wrongly drawn as duplicates.)
fn tallies(
    snapshot: &Snapshot,
    Range { start, end }: Range<u64>,
    cell_bytes: u64,
    hot: &HashSet<PageIndex>,
    last_stored: &mut Option<(ChunkExtent, u16)>,
) -> Result<Vec<Tally>> {
    let mut tallies = vec![Tally::default(); (end - start).div_ceil(cell_bytes) as usize];
    let leaves = snapshot.populated().enumerate();
    let leaves = leaves.skip_while(|(_, range)| range.end <= start);
    for (leaf, _) in leaves.take_while(|(_, range)| range.start < end) {
        snapshot.for_each_entry(leaf..leaf + 1, |page, entry| {
            let at = page.source_offset();
            if (start..end).contains(&at) {
                let tally = &mut tallies[((at - start) / cell_bytes) as usize];
                match entry {
                    PageEntry::Zero => {}
                    // It may be stored before pages with lower addresses.
                    _ if hot.contains(&page) => tally.hot += 1,
                    PageEntry::Parent => tally.parent += 1,
                    PageEntry::Data { chunk, .. } if chunk.layer() > 0 => tally.parent += 1,
                    PageEntry::Data { chunk, slot } if *last_stored < Some((chunk, slot)) => {
                        *last_stored = Some((chunk, slot));
                        tally.stored += 1;
                        tally.first.get_or_insert(chunk);
                    }
                    PageEntry::Data { .. } => tally.duplicate += 1,
                }
            }
            Ok(())
        })?;
    }
    Ok(tallies)
}

fn cell(snapshot: &Snapshot, tally: &Tally, gpa: u64, pages: u64) -> Result<Cell> {
    let Tally { hot, stored, duplicate, parent, first } = *tally;
    if hot > 0 {
        return Ok(Cell { gpa, kind: Kind::Hot, share: hot as f64 / pages as f64 });
    }
    let kind = match first {
        Some(chunk) if stored >= duplicate.max(parent) => Kind::Stored(codec_of(snapshot, chunk)?),
        _ if duplicate > parent => Kind::Duplicate,
        _ if parent > 0 => Kind::Parent,
        _ => Kind::Zero,
    };
    Ok(Cell { gpa, kind, share: (stored + duplicate + parent) as f64 / pages as f64 })
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn picture() -> Picture {
        let cell = |gpa, kind, share| Cell { gpa, kind, share };
        let zero = |gpa| cell(gpa, Kind::Zero, 0.0);
        let zstd = |gpa, share| cell(gpa, Kind::Stored(Codec::Zstd), share);
        let row = |gpa, part, cells| Row { gpa, part, cells };
        Picture {
            rows: vec![
                row(0, 0, vec![zero(0), zstd(0x1000, 0.1), zstd(0x2000, 1.0)]),
                row(0x40000, 0, vec![cell(0x40000, Kind::Stored(Codec::Raw), 0.5)]),
                row(0x1_0000_0000, 1, vec![zero(0x1_0000_0000)]),
            ],
            cell_bytes: 4096,
            memory_bytes: 5 * 4096,
            joined: None,
        }
    }

    #[test]
    fn letters_show_kind_and_share() {
        let text = picture().as_ascii();
        let expected = "\
0x000000000000 .zZ
0x000000040000 R
0x000100000000 .
. zero  r raw  z zstd; capital: at least half is not zero; 20 KiB of memory, a cell is 4 KiB
";
        assert_eq!(text, expected);
    }

    #[test]
    fn colours_pair_rows_of_one_region_only() {
        let text = picture().as_ansi();
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(text.starts_with("0x000000000000 \x1b[0;38;5;59;48;5;"), "{text:?}");
        // A cell that is nearly empty is weaker, but never looks like zero.
        let colours: Vec<_> = [0.01, 0.5, 1.0]
            .map(|share| Cell { gpa: 0, kind: Kind::Stored(Codec::Lz4), share }.colour())
            .to_vec();
        assert_eq!(colours[2], [1, 3, 5]);
        assert!(colours.windows(2).all(|pair| pair[0] != pair[1]));
        assert!(!colours.contains(&LEGEND[0].colour));
    }

    #[test]
    fn svg_is_balanced_and_has_a_rectangle_for_each_change() {
        let text = picture().as_svg();
        assert!(text.starts_with("<svg ") && text.ends_with("</svg>\n"));
        assert_eq!(text.matches("<rect").count(), 1 + 5 + 3);
        assert_eq!(text.matches("<rect").count() - 1, text.matches("</rect>").count());
        assert_eq!(text.matches("<text").count(), text.matches("</text>").count());
        assert!(text.contains("<title>0x2000 zstd</title>"), "{text}");
    }
}
