//! `snap demo`: a snapshot and its restores in a few seconds, checked.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use snapvm::{MemoryFrom, Pace, Prefetch};

use super::create;
use crate::config::ConfigArgs;
use crate::guest::GuestArgs;
use crate::guest_console::{BEAT, Until};
use crate::input::ParentArgs;
use crate::jailed::{GuestJailArgs, Jail};
use crate::keys::KeyArgs;
use crate::leftovers;
use crate::report::RestoreReport;
use crate::restored_run::{EAGER, LAZY, Restore};
use crate::restoring;
use crate::session::Session;
use crate::size;
use crate::stdout::{print_line, print_text};
use crate::storage::Storage;

/// Create a snapshot of the demo guest, restore it eagerly and lazily, and check that all agree.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap demo                                   create, restore eagerly and lazily, side by side
  snap demo --memory 4G --work 256M")]
pub(crate) struct Args {
    /// Memory of the guest.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size::parse)]
    memory: u64,

    /// How much of it the guest fills and works on.
    #[arg(long, value_name = "SIZE", default_value = "32M", value_parser = size::parse)]
    work: u64,

    /// Beats to run after each restore.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    beats: u64,
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    let creating = leftovers::creating();
    let directory = tempfile::Builder::new()
        .prefix("snap-demo-")
        .tempdir()
        .context("cannot create a temporary folder")?;
    leftovers::folder(directory.path());
    drop(creating);
    let file = directory.path().join("demo.snap");
    let say = |text: String| if session.quiet { Ok(()) } else { print_line(text) };
    say(format!(
        "snap create: a guest with {} of memory fills {} and is snapshotted ...",
        size::human(args.memory),
        size::human(args.work)
    ))?;
    let created = create::create(&create_args(args, file.clone()), session)?;
    say(format!(
        "  {} in {:.0} ms, the guest was paused for {:.0} ms of it",
        size::human(created.file_bytes),
        created.total_ms,
        created.pause_ms
    ))?;

    let restore = |from, mode| -> Result<RestoreReport> {
        let config = restoring::config(&file, &ParentArgs::default(), None, session)?;
        let restore = Restore {
            config: config.memory(from).prefetch(Prefetch::Off),
            mode,
            pace: Pace::InPassing,
            until: Until::lines(BEAT, args.beats),
            run_for: None,
            hold: None,
            hash: true,
            keyboard: false,
            measure: None,
            api: None,
            paused: false,
            jail: Jail::Off,
            keys: KeyArgs::default(),
            names_files: true,
            on_restore: None,
        };
        let (report, outcome) = restore.run(std::io::sink(), session, Instant::now())?;
        outcome.map(|()| report)
    };
    say(format!("snap restore: all memory is read, then the guest runs {} beats ...", args.beats))?;
    let eager = restore(MemoryFrom::Eager, EAGER)?;
    say("snap restore --lazy: the guest runs immediately, its pages are loaded when it touches them ..."
        .into())?;
    let lazy = restore(MemoryFrom::Lazy, LAZY)?;

    for report in [&eager, &lazy] {
        ensure!(
            (report.beats, report.bad_beats) == (args.beats, 0),
            "the {} restore made {} beats, {} of them bad",
            report.mode,
            report.beats,
            report.bad_beats
        );
    }
    ensure!(eager.memory_sha256.is_some(), "the guest's memory was not hashed");
    ensure!(
        eager.memory_sha256 == lazy.memory_sha256,
        "the memory of the two guests differs after {} beats",
        args.beats
    );
    print_text(table(&eager, &lazy, args.beats))?;
    print_line("All beats ok, and both guests' memory is the same.")?;
    Ok(())
}

fn create_args(args: &Args, out: std::path::PathBuf) -> create::Args {
    create::Args {
        trust: Default::default(),
        file: Some(out),
        out: None,
        guest: GuestArgs::demo(args.memory, args.work),
        config: ConfigArgs::default(),
        parent: None,
        vm: None,
        diff: false,
        live: false,
        stop: false,
        storage: Storage::default(),
        jail: GuestJailArgs::OFF,
        keys: KeyArgs::default(),
        when: None,
        timeout: std::time::Duration::from_secs(60),
        json: false,
    }
}

fn table(eager: &RestoreReport, lazy: &RestoreReport, beats: u64) -> String {
    let ms = |time: Option<f64>| time.map_or("-".into(), |ms| format!("{ms:.1} ms"));
    let pages = |report: &RestoreReport| match &report.pager {
        Some(stats) => format!("{} of {}", stats.pages.present, stats.pages.total),
        None => "all".into(),
    };
    let faults = |report: &RestoreReport| match &report.pager {
        Some(stats) => stats.faults.to_string(),
        None => "-".into(),
    };
    type Row<'a> = (String, &'a dyn Fn(&RestoreReport) -> String);
    let rows: [Row<'_>; 6] = [
        ("first instruction after".into(), &|r| ms(r.first_instruction_ms)),
        ("first beat after".into(), &|r| ms(r.first_output_ms)),
        (format!("{beats} beats after"), &|r| ms(Some(r.end_ms))),
        ("read from the file".into(), &|r| size::human(r.bytes_read)),
        ("page faults served".into(), &faults),
        ("pages in memory".into(), &pages),
    ];
    let mut text = format!("\n{:<24} {:>16} {:>16}\n", "", "eager", "lazy");
    for (name, value) in rows {
        text += &format!("{name:<24} {:>16} {:>16}\n", value(eager), value(lazy));
    }
    text + "\n"
}
