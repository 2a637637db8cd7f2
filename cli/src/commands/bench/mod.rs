//! `snap bench`: the costs of the ways to restore a guest, side by side.

mod args;
mod child;
mod cold;
mod figures;
mod hot;
mod hot_file;
mod html;
mod mode;
mod report;
mod run;
mod steps;
mod subject;
mod sweep;
mod table;

use std::io::Write;

use anyhow::{Context, Result, bail};
use snapvm::OutputShape;

pub(crate) use self::args::Args;
use self::child::Snap;
use self::figures::Ratios;
use self::report::{footer, headline, host_line, to_json};
use self::run::{Outcome, Plan};
use self::steps::Steps;
use self::subject::Subject;
use crate::leftovers::staged_output;
use crate::session::Session;
use crate::stdout::{print_json, print_text};

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    for (number, mode) in args.modes.iter().enumerate() {
        if args.modes[..number].contains(mode) {
            bail!("--modes: {mode} is given twice");
        }
    }
    // Before the runs, because it may be refused.
    let page = args.html.as_deref().map(|out| staged_output(out, OutputShape::File, args.force));
    let page = page.transpose()?;
    let snap = Snap::new(session)?;
    let steps = Steps::new(args, session.quiet);
    args.refuse_sweep_of_others()?;
    if !args.sweep.is_empty() {
        return sweep::run(args, &snap, page, steps);
    }
    let subject = Subject::prepare(args, None, &snap, &|what| steps.say(what))?;
    let plan = Plan {
        subject: &subject,
        snap: &snap,
        modes: &args.modes,
        rounds: args.runs,
        cold: args.cold,
        timeout: args.timeout,
    };
    let outcome = plan.run(&|what| steps.next(what))?;
    drop(steps);
    let ratios = Ratios::of(&outcome.all);
    if let Some(page) = page {
        let text = html(args, &subject, &outcome, &ratios)?;
        let written = page.file()?.write_all(text.as_bytes());
        written.context("cannot write the page")?;
        page.publish()?;
    }
    match args.json {
        true => {
            let all = to_json(args, &subject, &outcome, &ratios);
            print_json(&all)
        }
        false => {
            let (head, foot) = (headline(args, &subject, &outcome), footer(&subject, &outcome));
            let name = args.target.display();
            print_text(format!("{name}: {head}\n\n{}{foot}", table::table(&outcome.all, &ratios)))
        }
    }
}

fn html(args: &Args, subject: &Subject, outcome: &Outcome, ratios: &Ratios) -> Result<String> {
    let texts = html::Texts {
        name: &args.target.display().to_string(),
        subject: &headline(args, subject, outcome),
        host: &host_line(),
        footer: &footer(subject, outcome),
    };
    html::page(&texts, &outcome.all, ratios)
}
