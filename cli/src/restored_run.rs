//! One restore, from the file to the end of the guest's run, and its costs.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pager::Pager;
use snapvm::{Pace, RestoreConfig, Vm, VmMemory};
use vmm::PauseError;

use crate::api::{Api, Facts, PagerFigures};
use crate::exit::GuestStopped;
use crate::guest_console::{GuestConsole, Until};
use crate::guest_output::Hold;
use crate::jailed::Jail;
use crate::keys::KeyArgs;
use crate::live::{self, Ended, Live};
use crate::millis::{ms, ms_since, unix_ms};
use crate::on_restore::{Hook, OnRestore, Restored};
use crate::report::RestoreReport;
use crate::restoring::{self, check_image, check_memory};
use crate::session::Session;
use crate::terminal::Keyboard;
use crate::usage::{Counters, Faults, Measure, Usage};
use crate::{bucket, memory_hash, usage};

/// One restore, from the file to the end of the run.
pub(crate) struct Restore {
    pub(crate) config: RestoreConfig,
    /// For the report.
    pub(crate) mode: &'static str,
    /// How often touched pages are sampled, if they are recorded.
    pub(crate) pace: Pace,
    pub(crate) until: Until,
    pub(crate) run_for: Option<Duration>,
    /// Of its output: see [`Live::hold`].
    pub(crate) hold: Option<Hold>,
    pub(crate) hash: bool,
    /// Whether stdin is connected to the guest.
    pub(crate) keyboard: bool,
    /// What is measured of the process, if anything.
    pub(crate) measure: Option<Measure>,
    /// Its control socket.
    pub(crate) api: Option<Api>,
    /// Whether it waits there until a client resumes it.
    pub(crate) paused: bool,
    /// Of this process.
    pub(crate) jail: Jail,
    /// The keys of the files that the guest's clients request.
    pub(crate) keys: KeyArgs,
    /// Whether those clients may name files to be written.
    pub(crate) names_files: bool,
    /// The command that is run when the guest runs.
    pub(crate) on_restore: Option<OnRestore>,
}

/// Modes of the report.
pub(crate) const LAZY: &str = "lazy";
pub(crate) const EAGER: &str = "eager";

impl Restore {
    /// Restores and runs. Returns the report also for a guest that stopped by itself, whose error is then the second
    /// value.
    pub(crate) fn run(
        self,
        out: impl Write + Send + 'static,
        session: &Session,
        started: Instant,
    ) -> Result<(RestoreReport, Result<()>)> {
        let (console, seen) = GuestConsole::new(out, self.until.clone());
        let restore = || restoring::restore(&self.config, console, session);
        let (restored, mut timeline) =
            usage::sampled(self.measure, started, Faults::None, restore)?;
        let restored = restored?;
        let memory = Arc::clone(restored.vm.memory());
        let vm = restored.vm;
        let (opened, memory_ready) = (restored.opened_at, restored.memory_ready_at);
        let on_restore = match &self.on_restore {
            None => None,
            Some(OnRestore { command, api }) => {
                let id = self.config.snapshot().header().id;
                let generation_id = vm.generation_id().context("cannot read the generation id")?;
                let restored = Restored { id, generation_id, api: api.as_deref() };
                Some(Hook::start(command, &restored)?)
            }
        };
        self.jail.close()?;
        let keyboard = match self.keyboard {
            true => Some(Keyboard::connect(vm.handle()).context("cannot use the keyboard")?),
            false => None,
        };

        let (remote, events) = live::remote();
        let facts = Facts {
            names_files: self.names_files,
            ..facts(&memory, vm.vcpu_count(), started, self.keys.is_given())
        };
        let serving = self.api.map(|api| api.serve(remote, facts)).transpose()?;
        let hold = self.hold.as_ref();
        let (run_for, begins_paused) = (self.run_for, self.paused);
        let keys = self.keys;
        let live =
            Live { session, seen: &seen, hold, run_for, begins_paused, events, keys, on_restore };
        let before = self.measure.map(|_| Counters::now()).transpose()?;
        let faults = memory.pager().map_or(Faults::Kernel, Faults::Served);
        let mut touched = None;
        let live = || {
            let live = || live.run(vm);
            let Some(recording) = memory.recording() else { return live() };
            let (ended, pages) = snapvm::record(recording, self.pace, seen.first_output(), live);
            touched = Some(pages);
            ended
        };
        let (ended, of_run) = usage::sampled(self.measure, started, faults, live)?;
        timeline.extend(of_run);
        let ended = ended?;
        let process =
            before.map(|before| Usage::since(&before, memory.mapped(), timeline)).transpose()?;
        // The figures are those of the run. Later work, for example a hash, is not the guest's.
        let stats = memory.pager().map(Pager::stats);
        drop((keyboard, serving));
        let (mut outcome, memory_sha256) =
            checked(&memory, self.hash, ended.outcome(&seen, session));
        let stop = ended.describe(&seen, session);
        let Ended { at: end, first_entry, first_exit, paused, .. } = ended;
        let working_set_damage = memory.working_set_damage().map(str::to_owned);
        let memory_bytes = bytes_of(&memory);
        end_service(memory, paused).unwrap_or_else(|error| outcome = Err(error));

        let report = RestoreReport {
            mode: self.mode,
            memory_bytes,
            started_unix_ms: unix_ms(started),
            opened_ms: ms(opened - started),
            memory_ready_ms: ms(memory_ready - started),
            first_instruction_ms: ms_since(started, first_entry),
            first_exit_ms: ms_since(started, first_exit),
            first_output_ms: ms_since(started, seen.first_output().at()),
            end_ms: ms(end - started),
            stop,
            beats: seen.beats().0,
            bad_beats: seen.beats().1,
            bytes_read: match &stats {
                Some(stats) => stats.bytes_read,
                // For clones, the server has read the file.
                None => restored.loaded_bytes,
            },
            memory_sha256,
            pager: stats,
            working_set_damage,
            process,
            touched: touched.transpose()?,
        };
        Ok((report, outcome))
    }
}

/// The facts that the control socket reports about the guest.
fn facts(memory: &Arc<VmMemory>, vcpus: usize, started: Instant, sealed: bool) -> Facts {
    Facts {
        memory_bytes: bytes_of(memory),
        vcpus,
        restored_from: memory.file().map(|file| match bucket::is_meant(file) {
            true => file.to_owned(),
            // The reader may be in another folder.
            false => std::path::absolute(file).unwrap_or_else(|_| file.to_owned()),
        }),
        sealed,
        names_files: true,
        started,
        pager: {
            // The control socket keeps no memory.
            let memory = Arc::downgrade(memory);
            Box::new(move || memory.upgrade()?.pager().map(PagerFigures::of))
        },
    }
}

fn bytes_of(memory: &VmMemory) -> u64 {
    memory.snapshot().map_or(0, |snapshot| snapshot.header().memory_bytes)
}

/// The outcome of a run, with what is wrong with the memory afterwards; and the memory's hash, if it is wanted.
fn checked(memory: &VmMemory, hash: bool, ran: Result<()>) -> (Result<()>, Option<String>) {
    let hashed = ran.and_then(|()| hash.then(|| memory_hash::sha256(memory)).transpose());
    let (mut outcome, memory_sha256) = match hashed {
        Ok(memory_sha256) => (Ok(()), memory_sha256),
        Err(error) => (Err(error), None),
    };
    // The kernel has read it, without checks.
    check_image(memory).unwrap_or_else(|error| outcome = Err(error));
    // A failure of the pager is the cause of any other error.
    check_memory(memory).unwrap_or_else(|error| outcome = Err(error));
    (outcome, memory_sha256)
}

/// Ends the service of the guest's pages, once the control socket is gone and nothing else has the memory.
fn end_service(memory: Arc<VmMemory>, paused: Result<Vm, PauseError>) -> Result<()> {
    let _ending = live::ending("the threads that serve the guest's pages to end", &memory);
    drop(paused);
    match Arc::into_inner(memory).map(VmMemory::end) {
        Some(Err(failure)) => Err(GuestStopped(failure.to_string()).into()),
        _ => Ok(()),
    }
}
