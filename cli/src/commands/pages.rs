//! `snap pages`: the page index as a stream of runs.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use snapfmt::layout::{CHUNK_HEADER_BYTES, CHUNK_MAGIC};
use snapfmt::{ChunkExtent, Codec, MemoryRegion, PageEntry, PageIndex, ReadAt, Snapshot};

use crate::exit::Interrupted;
use crate::input::{Input, reading};
use crate::session::Session;
use crate::stdout::to_stdout;

/// Print where every page is: one line for each run of pages that are stored in the same way.
///
/// Pages of a run follow each other in guest memory and, if stored, in one chunk. Only the index
/// and the chunks' headers are read.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap pages guest.snap | head
  snap pages guest.snap --json | jq -s 'map(select(.kind == \"zero\") | .pages) | add'

Columns: gpa of the first page, pages, then zero, or data with its codec, or parent with the number
of the parent (1 is the file's own, 2 the parent's parent); the offset and the length of the chunk
in that file, and the slot of the first page in the chunk.")]
pub(crate) struct Args {
    #[command(flatten)]
    input: Input,

    /// Print a JSON object a line.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    let file = &args.input.file;
    let named = || file.display().to_string();
    let snapshot = args.input.open()?;
    to_stdout(|out| {
        let mut runs = Runs::new(&snapshot, file, |line: &Line| {
            match args.json {
                true => serde_json::to_writer(&mut *out, line).map_err(std::io::Error::from)?,
                false => line.write(out)?,
            }
            Ok(writeln!(out)?)
        });
        let mut entries = Vec::new();
        for leaf in 0..snapshot.leaf_count() {
            if session.interrupt.requested() {
                return Err(Interrupted.into());
            }
            entries.clear();
            let reading = reading(file);
            let read = snapshot.for_each_entry(leaf..leaf + 1, |page, entry| {
                entries.push((page, entry));
                Ok(())
            });
            drop(reading);
            read.with_context(named)?;
            for (page, entry) in &entries {
                runs.push(u64::from(page.0), *entry)?;
            }
        }
        runs.finish()
    })
}

/// The codec of a chunk of the file itself (layer 0), from its header alone.
///
/// The header's checksum is not checked: a damaged one may show a wrong codec here, and is refused by all commands that
/// read the chunk.
pub(crate) fn codec_of(snapshot: &Snapshot, chunk: ChunkExtent) -> Result<Codec> {
    let mut header = [0; CHUNK_HEADER_BYTES];
    let at = chunk.offset();
    snapshot
        .storage()
        .read_exact_at(&mut header, at)
        .with_context(|| format!("cannot read the chunk at offset {at}"))?;
    // The byte after the magic; docs/format.md, "Chunk".
    let codec = Codec::ALL.get(usize::from(header[CHUNK_MAGIC.len()]));
    match codec {
        Some(codec) if header.starts_with(&CHUNK_MAGIC) => Ok(*codec),
        _ => bail!("corrupt chunks at offset {at}: no chunk starts there"),
    }
}

/// One line of output.
#[derive(Serialize)]
struct Line {
    gpa: u64,
    pages: u64,
    #[serde(flatten)]
    place: Place,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
enum Place {
    Zero,
    /// In a chunk of the file.
    Data {
        #[serde(serialize_with = "codec_name")]
        codec: Codec,
        chunk_offset: u64,
        chunk_bytes: u32,
        /// Of the first page.
        slot: u64,
    },
    /// In a chunk of a parent.
    Parent {
        /// 1 for the file's own parent, 2 for the parent's, and so on.
        layer: u16,
        chunk_offset: u64,
        chunk_bytes: u32,
        slot: u64,
    },
}

fn codec_name<S: serde::Serializer>(codec: &Codec, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(codec.name())
}

impl Line {
    fn write(&self, out: &mut dyn Write) -> std::io::Result<()> {
        write!(out, "{:#014x} {:>8}  ", self.gpa, self.pages)?;
        match self.place {
            Place::Zero => write!(out, "zero"),
            Place::Data { codec, chunk_offset, chunk_bytes, slot } => {
                write!(out, "data {codec:<4} chunk {chunk_offset:#x}+{chunk_bytes:#x} slot {slot}")
            }
            Place::Parent { layer, chunk_offset, chunk_bytes, slot } => {
                write!(out, "parent {layer} chunk {chunk_offset:#x}+{chunk_bytes:#x} slot {slot}")
            }
        }
    }
}

impl Place {
    /// The place of a page that is `pages` after this one in the same run.
    fn after(self, pages: u64) -> Self {
        let mut place = self;
        match &mut place {
            Self::Zero => {}
            Self::Data { slot, .. } | Self::Parent { slot, .. } => *slot += pages,
        }
        place
    }
}

/// Joins pages, which come in ascending order without the zero ones, into runs.
struct Runs<'a, E> {
    snapshot: &'a Snapshot,
    path: &'a Path,
    emit: E,
    /// The present run: first page, pages, place.
    first: u64,
    pages: u64,
    place: Place,
    /// The last chunk that was looked up: several pages in a row have the same one.
    seen: Option<(ChunkExtent, Codec)>,
    /// The regions that are not printed yet.
    regions: &'a [MemoryRegion],
}

impl<'a, E: FnMut(&Line) -> Result<()>> Runs<'a, E> {
    fn new(snapshot: &'a Snapshot, path: &'a Path, emit: E) -> Self {
        let regions = snapshot.regions();
        Self { snapshot, path, emit, first: 0, pages: 0, place: Place::Zero, seen: None, regions }
    }

    fn push(&mut self, page: u64, entry: PageEntry) -> Result<()> {
        self.fill_to(page)?;
        let place = self.place_of(entry)?;
        self.extend(1, place)
    }

    fn finish(mut self) -> Result<()> {
        self.fill_to(self.snapshot.header().pages())?;
        self.flush()
    }

    /// Pages that the index does not mention are zero.
    fn fill_to(&mut self, page: u64) -> Result<()> {
        match page - (self.first + self.pages) {
            0 => Ok(()),
            zeros => self.extend(zeros, Place::Zero),
        }
    }

    fn extend(&mut self, pages: u64, place: Place) -> Result<()> {
        if self.place.after(self.pages) != place {
            self.flush()?;
            self.place = place;
        }
        self.pages += pages;
        Ok(())
    }

    fn place_of(&mut self, entry: PageEntry) -> Result<Place> {
        let (chunk, slot) = match entry {
            PageEntry::Zero => return Ok(Place::Zero),
            PageEntry::Parent => bail!("corrupt index: a page without the parent it is in"),
            PageEntry::Data { chunk, slot } => (chunk, u64::from(slot)),
        };
        let (chunk_offset, chunk_bytes) = (chunk.offset(), chunk.len_bytes());
        if chunk.layer() > 0 {
            return Ok(Place::Parent { layer: chunk.layer(), chunk_offset, chunk_bytes, slot });
        }
        let codec = match self.seen {
            Some((seen, codec)) if seen == chunk => codec,
            _ => {
                let _reading = reading(self.path);
                codec_of(self.snapshot, chunk)?
            }
        };
        self.seen = Some((chunk, codec));
        Ok(Place::Data { codec, chunk_offset, chunk_bytes, slot })
    }

    /// Prints the run, cut where the guest's addresses have a gap.
    fn flush(&mut self) -> Result<()> {
        while self.pages > 0 {
            // Pages below the end of memory are in a region: the regions fill the source space.
            let Some(region) = self.regions.first() else { break };
            // Below 2^32: a page number.
            let at = PageIndex(self.first as u32).source_offset();
            let left = region.source_offset + region.len - at;
            if left == 0 {
                self.regions = &self.regions[1..];
                continue;
            }
            let pages = self.pages.min(left / snapfmt::layout::PAGE_BYTES as u64);
            let gpa = region.gpa + (at - region.source_offset);
            (self.emit)(&Line { gpa, pages, place: self.place })?;
            self.first += pages;
            self.pages -= pages;
            self.place = self.place.after(pages);
        }
        Ok(())
    }
}
