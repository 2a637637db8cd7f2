//! The figures as one self-contained page: plots as inline SVG, no scripts, no network.

mod escape;
mod plot;

use std::fmt::Write as _;

use anyhow::Result;

use self::escape::escape;
use self::plot::{Axis, Lying, Scale, Shape, lying, plot};
use super::figures::{FIGURES, Figure, Measured, Ratios};
use super::mode::Mode;
use super::table::RATIOS;
use crate::size;
use crate::usage::Sample;

/// The texts of the page besides the figures.
pub(super) struct Texts<'a> {
    pub(super) name: &'a str,
    /// What was measured, and on which host.
    pub(super) subject: &'a str,
    pub(super) host: &'a str,
    /// A sentence that the modes agree, if they do.
    pub(super) footer: &'a str,
}

/// The results for a guest that touches this share of its memory, in percent.
pub(super) struct Point {
    pub(super) percent: u8,
    pub(super) all: Vec<Measured>,
    pub(super) ratios: Ratios,
}

pub(super) fn page(texts: &Texts<'_>, all: &[Measured], ratios: &Ratios) -> Result<String> {
    let figures = [
        until_done(all)?,
        memory_over_time(all)?,
        faults_over_time(all)?,
        latencies(all)?.unwrap_or_default(),
        table(all, ratios),
    ];
    Ok(framed(texts, &figures.concat()))
}

/// A page of several shares: the time until the work is done against them, and the figures of each.
pub(super) fn sweep_page(texts: &Texts<'_>, points: &[Point]) -> Result<String> {
    let mut content = over_shares(points)?;
    for Point { percent, all, ratios } in points {
        let _ = write!(
            content,
            "<h2>{percent} % touched</h2>\n{}{}",
            until_done(all)?,
            table(all, ratios)
        );
    }
    Ok(framed(texts, &content))
}

fn framed(texts: &Texts<'_>, content: &str) -> String {
    let Texts { name, subject, host, footer } = texts;
    let title = format!("snap bench: {name}");
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n\
         <header><h1>{title}</h1>\n<p>{subject}</p>\n<p class=\"soft\">{host}</p></header>\n",
        title = escape(&title),
        subject = escape(subject),
        host = escape(host),
        style = include_str!("style.css"),
    );
    html += content;
    let footer = escape(footer.trim());
    let _ = write!(
        html,
        "<section><p>{footer} docs/benchmarks.md of the project defines each figure and describes how it is measured.</p>\
         <p class=\"soft\">Made by snap {}.</p></section>\n</main>\n</body>\n</html>\n",
        env!("CARGO_PKG_VERSION")
    );
    html
}

/// The class that gives a mode its colour.
fn class(mode: Mode) -> &'static str {
    match mode {
        Mode::Eager => "m-eager",
        Mode::Mmap => "m-mmap",
        Mode::Lazy => "m-lazy",
        Mode::LazyOff => "m-off",
        Mode::LazyHot => "m-hot",
        Mode::LazyOther => "m-other",
        Mode::Shared => "m-shared",
    }
}

fn figure(title: &str, caption: &str, legend: &[Mode], svg: &str) -> String {
    let mut html = format!("<figure><h2>{title}</h2><figcaption>{caption}</figcaption>\n");
    if !legend.is_empty() {
        html += "<ul class=\"legend\">";
        for mode in legend {
            let _ = write!(html, "<li class=\"{}\">{mode}</li>", class(*mode));
        }
        html += "</ul>\n";
    }
    let _ =
        writeln!(html, "<div role=\"img\" aria-label=\"{}\">{svg}</div></figure>", escape(title));
    html
}

fn by_key(key: &str) -> Option<&'static Figure> {
    FIGURES.iter().find(|figure| figure.key == key)
}

fn until_done(all: &[Measured]) -> Result<String> {
    let median = |measured: &Measured, key| by_key(key).and_then(|figure| measured.median(figure));
    let bars: Vec<Lying> = all
        .iter()
        .map(|measured| {
            let end = median(measured, "done_ms").unwrap_or(0.0);
            let middle = median(measured, "first_instruction_ms").unwrap_or(end).min(end);
            let spread = by_key("done_ms").and_then(|figure| measured.spread(figure));
            Lying {
                mode: measured.mode,
                end,
                middle,
                spread: spread.unwrap_or(end..end),
                label: format!("{}, runs after {}", short_ms(end), short_ms(middle)),
            }
        })
        .collect();
    let caption = "Medians, from the start of the command. Pale: until the guest's first instruction; full: its work. \
                   The line spans the fastest and the slowest run.";
    let title = "Time until the work is done";
    Ok(figure(title, caption, &[], &lying(&bars, &short_ms)?))
}

/// One line a mode.
fn over_shares(points: &[Point]) -> Result<String> {
    let done = |measured: &Measured| by_key("done_ms").and_then(|figure| measured.median(figure));
    let values = || points.iter().flat_map(|point| point.all.iter().filter_map(done));
    let modes: Vec<Mode> =
        points.first().map_or(Vec::new(), |point| point.all.iter().map(|m| m.mode).collect());
    let curve = |(index, mode): (usize, &Mode)| {
        let at = |point: &Point| Some((f64::from(point.percent), done(point.all.get(index)?)?));
        (*mode, Shape::Curve(points.iter().filter_map(at).collect()))
    };
    let curves: Vec<_> = modes.iter().enumerate().map(curve).collect();
    let name = "share of its memory that the guest touches, in percent";
    let svg = plot(
        Axis { scale: Scale::linear(100.0), tick: &count, name },
        Axis { scale: Scale::linear(values().fold(0.0, f64::max)), tick: &short_ms, name: "" },
        &curves,
    )?;
    let title = "Time until the work is done, against the share of memory that it touches";
    let caption = "Medians, from the start of the command. The file holds the same for each share.";
    Ok(figure(title, caption, &modes, &svg))
}

const LOADED: &str = "Memory of the process in one run that is not among the measured ones. It includes the program itself, \
     a few MiB. The dot is the end of the work.";
const FAULTS: &str = "Page faults so far, in the same runs: with a pager those that it has served, otherwise those of the kernel. \
     A steep line is a guest that waits most of the time.";

fn memory_over_time(all: &[Measured]) -> Result<String> {
    let tick = |value: f64| size::human(value as u64);
    let svg = over_time(all, Scale::bytes, &tick, |sample| sample.rss_bytes)?;
    Ok(figure("Memory loaded over time", LOADED, &modes(all), &svg))
}

fn faults_over_time(all: &[Measured]) -> Result<String> {
    let svg = over_time(all, Scale::linear, &count, |sample| sample.faults)?;
    Ok(figure("Faults over time", FAULTS, &modes(all), &svg))
}

fn modes(all: &[Measured]) -> Vec<Mode> {
    all.iter().map(|measured| measured.mode).collect()
}

fn over_time(
    all: &[Measured],
    scale: fn(f64) -> Scale,
    tick: &dyn Fn(f64) -> String,
    value: fn(&Sample) -> u64,
) -> Result<String> {
    let samples = || all.iter().flat_map(|measured| &measured.timeline);
    let first = samples().map(|sample| sample.ms).fold(f64::INFINITY, f64::min);
    let last = samples().map(|sample| sample.ms).fold(0.0, f64::max);
    let most = samples().map(value).max().unwrap_or(0) as f64;
    let first = if first.is_finite() { first.max(0.1) } else { 1.0 };
    let at = |sample: &Sample| (sample.ms.max(first), value(sample) as f64);
    let curve = |measured: &Measured| {
        (measured.mode, Shape::Curve(measured.timeline.iter().map(at).collect()))
    };
    let name = "time since the start of the command, logarithmic";
    plot(
        Axis { scale: Scale::log(first..last), tick: &short_ms, name },
        Axis { scale: scale(most), tick, name: "" },
        &all.iter().map(curve).collect::<Vec<_>>(),
    )
}

/// The durations of the pager's faults, for the modes that have a pager.
fn latencies(all: &[Measured]) -> Result<Option<String>> {
    let shown: Vec<_> = all
        .iter()
        .map(|measured| (measured.mode, measured.fault_shares()))
        .filter(|(_, shares)| !shares.is_empty())
        .collect();
    let steps = || shown.iter().flat_map(|(_, shares)| shares);
    let first = steps().map(|step| step.0).fold(f64::INFINITY, f64::min);
    let last = steps().map(|step| step.0).fold(0.0, f64::max);
    let most = steps().map(|step| step.1).fold(0.0, f64::max);
    if !first.is_finite() {
        return Ok(None);
    }
    // The bars of a step stand side by side.
    let ratio = std::f64::consts::SQRT_2;
    let of_step = |number: usize| ratio.powf(0.04 + 0.92 * number as f64 / shown.len() as f64);
    let bars = shown.iter().enumerate().map(|(number, (mode, shares))| {
        let bar = |&(up_to_us, share): &(f64, f64)| {
            let from = up_to_us / ratio;
            (from * of_step(number)..from * of_step(number + 1), share * 100.0)
        };
        (*mode, Shape::Bars(shares.iter().map(bar).collect()))
    });
    let name = "from the message to the last page installed, logarithmic";
    let svg = plot(
        Axis { scale: Scale::log(first / ratio..last), tick: &short_us, name },
        Axis {
            scale: Scale::linear(most * 100.0),
            tick: &|percent| format!("{percent} %"),
            name: "",
        },
        &bars.collect::<Vec<_>>(),
    )?;
    let modes: Vec<_> = shown.iter().map(|(mode, _)| *mode).collect();
    let caption = "Of the faults that the pager has served in the measured runs: the share in each step. Each step ends at 1.4 times \
                   its beginning. Faults that the kernel serves itself (mmap, present pages) are not included.";
    Ok(Some(figure("How long a fault took", caption, &modes, &svg)))
}

fn table(all: &[Measured], ratios: &Ratios) -> String {
    let mut html =
        "<section><h2>All figures</h2><div class=\"scroll\"><table>\n<thead><tr><th></th>"
            .to_owned();
    for measured in all {
        let _ = write!(html, "<th class=\"{}\">{}</th>", class(measured.mode), measured.mode);
    }
    html += "</tr></thead>\n<tbody>\n";
    let mut row = |row_class: &str, label: &str, cells: Vec<String>| {
        let part = if label.starts_with(' ') { " class=\"part\"" } else { "" };
        let label = escape(label.trim_start());
        let _ = write!(html, "<tr{row_class}><th{part} scope=\"row\">{label}</th>");
        for cell in cells {
            let _ = write!(html, "<td>{}</td>", escape(&cell));
        }
        html += "</tr>\n";
    };
    for figure in FIGURES {
        let medians: Vec<_> = all.iter().map(|measured| measured.median(figure)).collect();
        if medians.iter().any(Option::is_some) {
            let show = |value: Option<f64>| value.map_or("–".into(), |v| figure.unit.show(v));
            row("", figure.label, medians.into_iter().map(show).collect());
        }
    }
    let mut row_class = " class=\"first-ratio\"";
    for (key, label, base) in RATIOS {
        if all.len() > 1 && all.iter().any(|measured| measured.mode == base) {
            let show = |measured: &Measured| match ratios.get(key, measured.mode, base) {
                _ if measured.mode == base => "1".into(),
                ratio => ratio.map_or("–".into(), |ratio| format!("{ratio:.2} ×")),
            };
            row(std::mem::take(&mut row_class), label, all.iter().map(show).collect());
        }
    }
    html + "</tbody></table></div></section>\n"
}

/// Few digits, for axes and labels.
fn short(value: f64) -> String {
    match value {
        _ if value >= 99.5 || value.fract().abs() < 1e-9 => format!("{value:.0}"),
        _ if value >= 9.95 => format!("{value:.1}"),
        _ => format!("{}", (value * 100.0).round() / 100.0),
    }
}

fn short_ms(value: f64) -> String {
    if value >= 1000.0 { short(value / 1000.0) + " s" } else { short(value) + " ms" }
}

fn short_us(value: f64) -> String {
    if value >= 1000.0 { short_ms(value / 1000.0) } else { short(value) + " us" }
}

fn count(value: f64) -> String {
    if value >= 10_000.0 { short(value / 1000.0) + " k" } else { short(value) }
}
