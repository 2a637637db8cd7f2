//! `snap diff`: which pages of two snapshots differ.

use std::path::PathBuf;

use anyhow::{Result, bail};
use serde_json::json;
use snapfmt::layout::PAGE_BYTES;
use snapfmt::{ChunkBuffer, PageEntry, PageIndex, Snapshot};
use snapvm::gpa_ranges;

use crate::exit::Interrupted;
use crate::input::Input;
use crate::session::Session;
use crate::size;
use crate::stdout::{print_json, print_line};
use crate::waits::Wait;

/// Show which pages of two snapshots differ.
///
/// Pages that both have from the same file are known to be equal and not read.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap diff before.snap after.snap
  snap diff base.snap layer.snap --json")]
pub(crate) struct Args {
    #[command(flatten)]
    first: Input,

    /// The other snapshot.
    #[arg(value_name = "OTHER")]
    second: PathBuf,

    /// Print every run of differing pages.
    #[arg(long)]
    list: bool,

    /// Print it as JSON, with every run of differing pages.
    #[arg(long)]
    json: bool,
}

/// A run of pages that differ: the first one, and their number.
struct Run {
    first: PageIndex,
    pages: u64,
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    let first = args.first.open()?;
    let second = args.first.beside(&args.second)?;
    if first.regions() != second.regions() {
        bail!(
            "the memory maps are not the same: {} has {}, {} has {}",
            args.first.file.display(),
            size::human(first.header().memory_bytes),
            args.second.display(),
            size::human(second.header().memory_bytes)
        );
    }
    let files = format!("{} and {}", args.first.file.display(), args.second.display());
    let runs = differing(&first, &second, files, session)?;
    let pages: u64 = runs.iter().map(|run| run.pages).sum();
    let gpa_ranges = runs.iter().flat_map(|run| {
        let start = run.first.source_offset();
        gpa_ranges(first.regions(), start..start + run.pages * PAGE_BYTES as u64)
    });
    if args.json {
        let runs: Vec<_> = gpa_ranges
            .map(|range| json!({ "gpa": range.start, "len": range.end - range.start }))
            .collect();
        let result = json!({
            "pages": first.header().pages(),
            "differing_pages": pages,
            "differing_bytes": pages * PAGE_BYTES as u64,
            "runs": runs,
        });
        print_json(&result)?;
        return Ok(());
    }
    print_line(format_args!(
        "{pages} of {} pages differ ({}), in {} runs",
        first.header().pages(),
        size::human(pages * PAGE_BYTES as u64),
        runs.len()
    ))?;
    if args.list {
        for range in gpa_ranges {
            print_line(format_args!(
                "{:#014x}  {}",
                range.start,
                size::human(range.end - range.start)
            ))?;
        }
    }
    Ok(())
}

fn differing(
    first: &Snapshot,
    second: &Snapshot,
    files: String,
    session: &Session,
) -> Result<Vec<Run>> {
    let mut runs: Vec<Run> = Vec::new();
    let (mut buffer, mut other_buffer) = (ChunkBuffer::new(), ChunkBuffer::new());
    let mut populated: Vec<_> =
        first.populated().chain(second.populated()).map(|range| (range.start, range.end)).collect();
    populated.sort_unstable();
    populated.dedup();
    let reading = Wait::new(move || format!("{files} to be read")).begin();
    for (start, end) in populated {
        reading.moved();
        if session.interrupt.requested() {
            return Err(Interrupted.into());
        }
        for offset in (start..end).step_by(PAGE_BYTES) {
            let Some(page) = PageIndex::containing(offset) else { continue };
            if same_place(first, second, page)?
                || first.page(page, &mut buffer)? == second.page(page, &mut other_buffer)?
            {
                continue;
            }
            match runs.last_mut() {
                Some(run) if u64::from(run.first.0) + run.pages == u64::from(page.0) => {
                    run.pages += 1;
                }
                _ => runs.push(Run { first: page, pages: 1 }),
            }
        }
    }
    Ok(runs)
}

/// Whether both have a page from the same slot of the same file, or zero.
fn same_place(first: &Snapshot, second: &Snapshot, page: PageIndex) -> Result<bool> {
    Ok(match (first.entry(page)?, second.entry(page)?) {
        (PageEntry::Zero, PageEntry::Zero) => true,
        (
            PageEntry::Data { chunk: a, slot: slot_a },
            PageEntry::Data { chunk: b, slot: slot_b },
        ) => {
            let file_of = |snapshot: &Snapshot, layer: u16| {
                snapshot.headers().nth(layer.into()).map(|header| header.id)
            };
            (a.offset(), slot_a) == (b.offset(), slot_b)
                && file_of(first, a.layer()) == file_of(second, b.layer())
        }
        _ => false,
    })
}
