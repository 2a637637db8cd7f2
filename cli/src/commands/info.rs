//! `snap info`: the content of a snapshot, without KVM.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use snapfmt::layout::{INCOMPAT_BOUND, INCOMPAT_LAYERED, INCOMPAT_SEALED, PAGE_BYTES};
use snapfmt::{Header, KeySlot, Metadata, Outline, Phase, Section, Snapshot, WorkingSet};
use snapvm::OutputShape;

use super::map::Picture;
use super::summary::{Pages, ratio};
use crate::exit::WrongOptions;
use crate::foreign_text::one_line as one;
use crate::input::{Input, reading, refuse_as_output};
use crate::keys::is_age_file;
use crate::leftovers::staged_output;
use crate::size;
use crate::stdout::{print_json, print_text, to_stdout};

/// Show the content of a snapshot, without KVM.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap info guest.snap
  snap info guest.snap --json | jq .pages
  snap info guest.snap --map                  a picture of memory
  snap info guest.snap --map -o memory.svg
  snap info guest.snap --map -o memory.png")]
pub(crate) struct Args {
    #[command(flatten)]
    input: Input,

    /// Print it as JSON.
    #[arg(long)]
    json: bool,

    /// Draw memory instead: which parts are zero, and how the others are stored. On stdout, in colours if it is a
    /// terminal and NO_COLOR is not set, or into a file (-o, or --map=FILE): SVG, or PNG without letters.
    #[arg(long, value_name = "FILE.svg|FILE.png", num_args = 0..=1, require_equals = true,
          default_missing_value = "-", conflicts_with = "json")]
    map: Option<PathBuf>,

    /// With --map: the picture to write.
    #[arg(short, long, value_name = "FILE.svg|FILE.png", requires = "map")]
    out: Option<PathBuf>,

    /// Replace the picture if it exists.
    #[arg(long, short, requires = "map")]
    force: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let file = &args.input.file;
    if args.map.is_none()
        && let Some(outline) = args.input.outline()?
    {
        return match args.json {
            true => print_json(&as_json(outline.header(), outline.sections(), None)),
            false => print_text(outline_as_text(&outline)),
        };
    }
    let snapshot = args.input.open()?;
    if let Some(path) = args.map.as_deref() {
        let path = match args.out.as_deref() {
            Some(out) if path == Path::new("-") => out,
            Some(_) => return Err(WrongOptions(ONE_PICTURE.into()).into()),
            None => path,
        };
        return draw(&snapshot, file, path, args.force).with_context(|| file.display().to_string());
    }
    let reading = reading(file);
    let metadata = snapshot.metadata().with_context(|| file.display().to_string())?;
    let set = snapshot.working_set().with_context(|| file.display().to_string())?;
    drop(reading);
    if args.json {
        let opened = Opened { snapshot: &snapshot, metadata: &metadata, set: set.as_ref() };
        print_json(&as_json(snapshot.header(), snapshot.sections(), Some(opened)))?;
    } else {
        print_text(as_text(&snapshot, &metadata, set.as_ref()))?;
    }
    Ok(())
}

const ONE_PICTURE: &str = "-o and --map=FILE both name a picture: give one of them";

/// Rows of letters, rows of which two share a line, and rows of a file.
const MAP_ROWS: [u64; 3] = [32, 64, 64];

/// Draws memory on stdout, or into a file if there is a path.
fn draw(snapshot: &Snapshot, file: &Path, path: &Path, force: bool) -> Result<()> {
    let [ascii_rows, ansi_rows, file_rows] = MAP_ROWS;
    let reading = reading(file);
    if path != Path::new("-") {
        let png = match path.extension().and_then(|extension| extension.to_str()) {
            Some("png") => true,
            Some("svg") => false,
            _ => bail!("{}: the picture's name ends in .svg or .png", path.display()),
        };
        refuse_as_output(path, [snapshot])?;
        let staging = staged_output(path, OutputShape::File, force)?;
        let picture = Picture::new(snapshot, file_rows)?;
        let bytes = if png { picture.as_png()? } else { picture.as_svg().into_bytes() };
        let written = staging.file()?.write_all(&bytes);
        written.with_context(|| format!("cannot write {}", path.display()))?;
        return Ok(staging.publish()?);
    }
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    let text = match std::io::stdout().is_terminal() && !set("NO_COLOR") && !dumb {
        true => Picture::new(snapshot, ansi_rows)?.as_ansi(),
        false => Picture::new(snapshot, ascii_rows)?.as_ascii(),
    };
    drop(reading);
    to_stdout(|out| Ok(out.write_all(text.as_bytes())?))
}

/// The features that a reader of the file must know, by their names in `docs/format.md`.
fn features(header: &Header) -> String {
    let named = [
        (INCOMPAT_LAYERED, ", LAYERED"),
        (INCOMPAT_BOUND, ", BOUND"),
        (INCOMPAT_SEALED, ", SEALED"),
    ];
    named.iter().filter(|(bit, _)| header.incompat & bit != 0).map(|(_, name)| *name).collect()
}

fn created(header: &Header) -> String {
    let at = UNIX_EPOCH.checked_add(Duration::from_millis(header.created_unix_ms));
    humantime::format_rfc3339_millis(bounded(at.unwrap_or(UNIX_EPOCH))).to_string()
}

/// A hostile file may claim any time; years above 9999 have no RFC 3339 form.
fn bounded(at: SystemTime) -> SystemTime {
    at.min(UNIX_EPOCH + Duration::from_secs(253_402_300_799))
}

fn sections_as_json(sections: &[Section]) -> Vec<Value> {
    let section = |s: &Section| {
        let crc = s.has_crc().then(|| format!("{:08x}", s.crc));
        json!({ "kind": s.kind.to_string(), "tag": s.tag, "version": s.version,
                "offset": s.offset, "len": s.len, "crc32": crc })
    };
    sections.iter().map(section).collect()
}

fn outline_as_text(outline: &Outline<File>) -> String {
    let header = outline.header();
    let mut lines = vec![
        format!("format     version {}{}", header.version, features(header)),
        format!("id         {}", header.id),
        format!("created    {}", created(header)),
    ];
    lines.extend(header.parent_id.map(|id| format!("parent 1   {id}")));
    let slots = outline.keys().into_iter().flat_map(|keys| &keys.slots);
    let kinds = slots.zip(1..).map(|(slot, number)| match slot.kind {
        KeySlot::SECRET_KEY | KeySlot::SALTED_SECRET_KEY => format!("{number}: a key (--key-file)"),
        KeySlot::EXTERNAL if is_age_file(&slot.bytes) => {
            format!("{number}: a key of age (--identity, --key-command)")
        }
        KeySlot::EXTERNAL => format!("{number}: a command (--key-command)"),
        other => format!("{number}: kind {other}"),
    });
    lines.push(format!(
        "sealed     opened by {}; what follows is not authenticated",
        kinds.collect::<Vec<_>>().join(", ")
    ));
    lines.push(format!("memory     {}", size::human(header.memory_bytes)));
    lines.push(pages_line(header));
    lines.extend(file_lines(header, outline.sections()));
    lines.join("\n") + "\n"
}

fn pages_line(header: &Header) -> String {
    let Pages { total, zero, data, stored, duplicate, parent } = Pages::of(header);
    format!(
        "pages      {total} in all: {zero} zero, {data} data ({stored} stored, {duplicate} \
         duplicate), {parent} unchanged from the parent"
    )
}

/// The length of the file, and its sections.
fn file_lines(header: &Header, sections: &[Section]) -> Vec<String> {
    let mut lines = vec![
        format!(
            "file       {}, ratio {:.2} to the data pages",
            size::human(header.file_bytes),
            ratio(header)
        ),
        "section          offset     length  crc32".into(),
    ];
    for section in sections {
        let crc = match section.has_crc() {
            true => format!("{:08x}", section.crc),
            false => "per part".into(),
        };
        let (kind, offset, len) = (section.kind.to_string(), section.offset, section.len);
        lines.push(format!("  {kind:<12} {offset:>10} {len:>10}  {crc}"));
    }
    lines
}

/// What is known of a file that has been opened. Of a sealed file without its key, it is not.
struct Opened<'a> {
    snapshot: &'a Snapshot,
    metadata: &'a Metadata,
    set: Option<&'a WorkingSet>,
}

/// All fields, null where the file would have to be opened.
fn as_json(header: &Header, sections: &[Section], opened: Option<Opened<'_>>) -> Value {
    let snapshot = opened.as_ref().map(|opened| opened.snapshot);
    let chain = |snapshot: &Snapshot| -> Vec<_> {
        snapshot.headers().map(|layer| layer.id.to_string()).collect()
    };
    let regions = |snapshot: &Snapshot| -> Vec<_> {
        let regions = snapshot.regions().iter();
        regions
            .map(|r| json!({ "gpa": r.gpa, "len": r.len, "source_offset": r.source_offset }))
            .collect()
    };
    let set = opened.as_ref().and_then(|opened| opened.set);
    json!({
        "version": header.version,
        "id": header.id.to_string(),
        "parent_id": header.parent_id.map(|id| id.to_string()),
        "chain": snapshot.map(chain),
        "created_at": created(header),
        "features": { "incompat": header.incompat, "ro_compat": header.ro_compat,
                      "compat": header.compat },
        "memory_bytes": header.memory_bytes,
        "page_bytes": PAGE_BYTES,
        "chunk_pages": header.chunk_pages,
        "regions": snapshot.map(regions),
        "pages": Pages::of(header),
        "chunks": header.chunks,
        "working_set": set.map(|set| json!({
            "restores": set.restores(),
            "pages": set.len(),
            "pages_by_phase": set.pages_by_phase(),
            "runs": set.runs().len(),
        })),
        "file_bytes": header.file_bytes,
        "ratio": ratio(header),
        "sections": sections_as_json(sections),
        "metadata": opened.map(|opened| opened.metadata),
    })
}

/// This many regions of memory have a line.
const REGIONS_LISTED: usize = 16;

fn as_text(snapshot: &Snapshot, metadata: &Metadata, set: Option<&WorkingSet>) -> String {
    let header = snapshot.header();
    let mut lines = vec![
        format!("format     version {}{}", header.version, features(header)),
        format!("id         {}", header.id),
        format!(
            "created    {} by {} {}",
            created(header),
            one(&metadata.tool),
            one(&metadata.tool_version)
        ),
    ];
    for (depth, layer) in snapshot.headers().enumerate().skip(1) {
        let pages = layer.data_pages;
        lines.push(format!("parent {depth:<3} {}, {pages} data pages", layer.id));
    }
    for (name, value) in &metadata.other {
        lines.push(format!("{:<10} {}", one(name), one_line(value)));
    }
    let regions = snapshot.regions();
    for (number, region) in regions.iter().take(REGIONS_LISTED).enumerate() {
        let name = if number == 0 { "memory" } else { "" };
        let end = region.gpa.saturating_add(region.len);
        lines.push(format!("{name:<10} {:#x}..{end:#x}  {}", region.gpa, size::human(region.len)));
    }
    if let more @ 1.. = regions.len().saturating_sub(REGIONS_LISTED) {
        let all = size::human(header.memory_bytes);
        lines.push(format!("{:<10} and {more} regions more, {all} in all (--json has them)", ""));
    }
    lines.push(pages_line(header));
    if let Some(set) = set {
        let phases = Phase::ALL.iter().zip(set.pages_by_phase()).filter(|(_, pages)| *pages > 0);
        let phases: Vec<_> =
            phases.map(|(phase, pages)| format!("{pages} {}", phase.name())).collect();
        lines.push(format!(
            "hot        {} pages, {}, of {} restores: {}",
            set.len(),
            size::human(set.len() * PAGE_BYTES as u64),
            set.restores(),
            phases.join(", ")
        ));
    }
    for (codec, used) in &metadata.storage {
        let raw = used.pages * PAGE_BYTES as u64;
        lines.push(format!(
            "codec      {}: {} pages in {} chunks, {} to {}, ratio {:.2}",
            one(codec),
            used.pages,
            used.chunks,
            size::human(raw),
            size::human(used.stored_bytes),
            raw as f64 / used.stored_bytes as f64
        ));
    }
    lines.extend(file_lines(header, snapshot.sections()));
    lines.join("\n") + "\n"
}

/// A metadata value on one line.
fn one_line(value: &Value) -> String {
    match value {
        Value::String(text) => one(text).into_owned(),
        Value::Object(fields) => {
            let fields = fields.iter().map(|(k, v)| format!("{} {}", one(k), one_line(v)));
            fields.collect::<Vec<_>>().join(", ")
        }
        Value::Array(values) => values.iter().map(one_line).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}
