//! `snap bench demo --sweep`: the modes against the share of memory that the guest touches.

use std::fmt::Write as _;
use std::io::Write as _;

use anyhow::{Context, Result};
use serde_json::json;
use snapvm::StagedOutput;

use super::args::Args;
use super::child::Snap;
use super::figures::{FIGURES, Measured, Ratios};
use super::html::{self, Point};
use super::mode::Mode;
use super::report::{headline, host_line, to_json};
use super::run::Plan;
use super::steps::Steps;
use super::subject::Subject;
use crate::stdout::{print_json, print_text};

pub(super) fn run(
    args: &Args,
    snap: &Snap<'_>,
    page: Option<StagedOutput>,
    steps: Steps,
) -> Result<()> {
    let (mut points, mut all_json, mut head) = (Vec::new(), Vec::new(), String::new());
    for &percent in &args.sweep {
        let say = |what: &str| steps.say(&format!("{percent} %: {what}"));
        let subject = Subject::prepare(args, Some(percent), snap, &say)?;
        let plan = Plan {
            subject: &subject,
            snap,
            modes: &args.modes,
            rounds: args.runs,
            cold: args.cold,
            timeout: args.timeout,
        };
        let outcome = plan.run(&|what| steps.next(&format!("{percent} %: {what}")))?;
        let ratios = Ratios::of(&outcome.all);
        let mut json = to_json(args, &subject, &outcome, &ratios);
        json["touched_percent"] = percent.into();
        all_json.push(json);
        head = headline(args, &subject, &outcome);
        points.push(Point { percent, all: outcome.all, ratios });
    }
    drop(steps);
    if let Some(page) = page {
        let texts = html::Texts {
            name: "the share of memory that a guest touches",
            subject: &head,
            host: &host_line(),
            footer: "",
        };
        let text = html::sweep_page(&texts, &points)?;
        page.file()?.write_all(text.as_bytes()).context("cannot write the page")?;
        page.publish()?;
    }
    match args.json {
        true => print_json(&json!({ "sweep": all_json })),
        false => print_text(format!("{}: {head}\n\n{}", args.target.display(), table(&points))),
    }
}

/// A row for each share: until the work is done in each mode, and that as a multiple of the first mode's.
fn table(points: &[Point]) -> String {
    let mut text = format!("{:<9}", "touched");
    let Some(first) = points.first().and_then(|point| point.all.first()) else { return text };
    let base = first.mode;
    for measured in points.iter().take(1).flat_map(|point| &point.all) {
        let _ = write!(text, " {:>20}", measured.mode.to_string());
    }
    text.push('\n');
    for Point { percent, all, ratios } in points {
        let _ = write!(text, "{:<9}", format!("{percent} %"));
        for measured in all {
            let _ = write!(text, " {:>20}", cell(measured, ratios, base));
        }
        text.push('\n');
    }
    text + &format!("\nTime until the work is done, and how many times that of {base}.\n")
}

fn cell(measured: &Measured, ratios: &Ratios, base: Mode) -> String {
    let figure = FIGURES.iter().find(|figure| figure.key == "done_ms");
    let done = figure.and_then(|figure| Some(figure.unit.show(measured.median(figure)?)));
    let done = done.unwrap_or_else(|| "-".into());
    match ratios.get("done_ms", measured.mode, base) {
        Some(ratio) => format!("{done} ({ratio:.2} x)"),
        None => done,
    }
}
