//! The runs: each mode in turn, each time in a new process.

use std::ffi::OsString;
use std::fs::File;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use snapfmt::{Snapshot, Storage};

use super::child::{Running, Snap};
use super::cold::Way;
use super::figures::{Measured, Run};
use super::mode::Mode;
use super::subject::Subject;

/// How the runs are made.
pub(super) struct Plan<'a> {
    pub(super) subject: &'a Subject,
    pub(super) snap: &'a Snap<'a>,
    pub(super) modes: &'a [Mode],
    pub(super) rounds: u32,
    pub(super) cold: bool,
    pub(super) timeout: Duration,
}

/// The results.
pub(super) struct Outcome {
    pub(super) all: Vec<Measured>,
    /// How the page cache was dropped, if it was.
    pub(super) way: Option<Way>,
    /// The hash of guest memory after the work, the same in all modes.
    pub(super) memory_sha256: Option<String>,
}

impl Plan<'_> {
    /// Runs each mode once unmeasured, then all of them in turn. `say` shows the next step.
    pub(super) fn run(&self, say: &dyn Fn(&str)) -> Result<Outcome> {
        let image = self.subject.image.as_ref().map(File::open).transpose();
        let image = image.context("cannot open the raw image")?;
        let storages = self.subject.snapshots().flat_map(Snapshot::storages);
        let files: Vec<&File> = storages.filter_map(Storage::file).chain(&image).collect();
        let mut way = self.cold.then(|| Way::first(&files)).transpose()?;
        let server = match self.modes.contains(&Mode::Shared) && !self.cold {
            true => Some(self.server()?),
            false => None,
        };

        let mut all = Vec::with_capacity(self.modes.len());
        let mut hashes = Vec::with_capacity(self.modes.len());
        for &mode in self.modes {
            say(&format!("{mode}, first look"));
            if mode == Mode::Shared && !self.cold {
                // The clone that loads the pages for the others.
                self.one(mode, &files, way, "totals")?;
            }
            let run = self.first_look(mode, &files, &mut way)?;
            hashes.extend(run.memory_sha256.clone().map(|hash| (mode, hash)));
            all.push(Measured { mode, runs: Vec::new(), timeline: run.timeline().to_vec() });
        }
        let memory_sha256 = agreed(&hashes)?;
        for round in 0..self.rounds as usize {
            // Each mode is first, second, ... equally often.
            let (later, first) = all.split_at_mut(round % self.modes.len());
            for measured in first.iter_mut().chain(later) {
                say(&format!("{}, run {} of {}", measured.mode, round + 1, self.rounds));
                let run = self.one(measured.mode, &files, way, "totals")?;
                measured.runs.push(run);
            }
        }
        drop(server);
        Ok(Outcome { all, way, memory_sha256 })
    }

    /// A run that is not measured. It loads the files into the page cache for warm runs, records a timeline, which
    /// would disturb a measured run, and hashes memory at the end. It also finds out whether and how the cache can be
    /// dropped.
    fn first_look(&self, mode: Mode, files: &[&File], way: &mut Option<Way>) -> Result<Run> {
        loop {
            let run = self.one(mode, files, *way, "timeline")?;
            match *way {
                // A server has read for its clones.
                Some(now) if run.storage_bytes() == 0 && mode != Mode::Shared => match now.next() {
                    Some(next) => *way = Some(next),
                    None => bail!(
                        "--cold: nothing was read from storage, so the page cache cannot be dropped there; \
                             keep the files on a disk (--dir for temporary ones)"
                    ),
                },
                _ => return Ok(run),
            }
        }
    }

    fn one(&self, mode: Mode, files: &[&File], way: Option<Way>, measure: &str) -> Result<Run> {
        if let Some(way) = way {
            way.drop_pages(files)?;
        }
        // A cold clone is the first of its server.
        let _server = match mode == Mode::Shared && self.cold {
            true => Some(self.server()?),
            false => None,
        };
        let failed = || format!("mode {mode}");
        let report = self.snap.run(self.command(mode, measure)?).with_context(failed)?;
        let run: Run = serde_json::from_str(&report)
            .with_context(|| format!("mode {mode}: cannot understand the report: {report}"))?;
        ensure!(
            self.subject.work.is_done(&run.stop),
            "mode {mode}: the guest's work was not done after {} ({}); give its end with --until, or \
             more time with --timeout",
            humantime::format_duration(self.timeout),
            run.stop
        );
        Ok(run)
    }

    fn command(&self, mode: Mode, measure: &str) -> Result<Vec<OsString>> {
        let subject = self.subject;
        let mut command: Vec<OsString> = vec!["restore".into()];
        match subject.hot(mode) {
            Some(hot) => {
                command.push(hot.file.clone().into());
                command.extend(subject.parents());
            }
            None => command.extend(subject.input()),
        }
        command.extend(["--report", "json", "--measure", measure].map(OsString::from));
        command.extend(subject.work.options(self.timeout));
        if measure == "timeline" && subject.is_deterministic {
            command.push("--hash".into());
        }
        match mode {
            Mode::Eager => {}
            Mode::Lazy => command.extend(["--lazy", "--prefetch", "off"].map(OsString::from)),
            Mode::LazyOff => {
                let options = ["--lazy", "--prefetch", "off", "--populate", "off"];
                command.extend(options.map(OsString::from));
            }
            Mode::LazyHot | Mode::LazyOther => {
                command.extend(["--lazy", "--prefetch", "hot"].map(OsString::from));
            }
            Mode::Shared => {
                command.extend(["--lazy".into(), "--share".into(), self.socket().into()]);
            }
            Mode::Mmap => {
                let image = subject.image.as_ref().context("there is no raw image")?;
                command.extend(["--image".into(), image.into()]);
            }
        }
        Ok(command)
    }

    fn server(&self) -> Result<Running> {
        let mut command: Vec<OsString> = vec!["serve".into()];
        command.extend(self.subject.input());
        command.extend(["--listen".into(), self.socket().into()]);
        self.snap.serve(command).context("cannot serve the clones")
    }

    fn socket(&self) -> std::path::PathBuf {
        self.subject.path("clones.sock")
    }
}

/// The one hash, if there are any.
fn agreed(hashes: &[(Mode, String)]) -> Result<Option<String>> {
    let Some((first, hash)) = hashes.first() else { return Ok(None) };
    for (mode, other) in hashes {
        ensure!(
            other == hash,
            "after the same work, the guest's memory is not the same in the modes {first} and {mode}: \
             sha256 {hash} and {other}"
        );
    }
    Ok(Some(hash.clone()))
}
