//! The report of `snap restore`.

use std::fmt;

use serde::Serialize;

use crate::size;
use crate::usage::Usage;
use snapvm::Touched;

/// The report of one restore. All times are counted from the start of the command.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct RestoreReport {
    /// `eager`, `lazy`, `shared` or `mmap`.
    pub(crate) mode: &'static str,
    pub(crate) memory_bytes: u64,
    /// When the command was started, by the host's clock, in milliseconds since 1970: to compare several processes.
    pub(crate) started_unix_ms: Option<f64>,
    /// Until the file was opened and checked.
    pub(crate) opened_ms: f64,
    /// Until the guest's memory was mapped, and loaded (eager) or registered with the pager (lazy).
    pub(crate) memory_ready_ms: f64,
    /// Until just before the vCPU entered the guest for the first time.
    pub(crate) first_instruction_ms: Option<f64>,
    /// Until the guest's first exit to user space: some instructions have run by then.
    pub(crate) first_exit_ms: Option<f64>,
    /// Until the guest's first byte on its serial port.
    pub(crate) first_output_ms: Option<f64>,
    /// Until the end of the run.
    pub(crate) end_ms: f64,
    /// Why it ended.
    pub(crate) stop: String,
    /// Beats of the demo guest in this run.
    pub(crate) beats: u64,
    /// Those that found a wrong page.
    pub(crate) bad_beats: u64,
    /// Bytes read from the chunks of the file.
    pub(crate) bytes_read: u64,
    /// SHA-256 of guest memory at the end, if it was requested.
    pub(crate) memory_sha256: Option<String>,
    /// The pager's statistics at the end of the run, in a lazy restore.
    pub(crate) pager: Option<pager::Stats>,
    /// Why the file's working set could not be used; the guest has run without it.
    pub(crate) working_set_damage: Option<String>,
    /// The touched pages, if they were recorded.
    #[serde(skip)]
    pub(crate) touched: Option<Touched>,
    /// The resources that the process has used until then, if that was requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) process: Option<Usage>,
}

impl fmt::Display for RestoreReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_never = |time: Option<f64>| time.map_or("never".into(), |ms| format!("{ms:.2} ms"));
        writeln!(f, "{} restore of {}: {}", self.mode, size::human(self.memory_bytes), self.stop)?;
        writeln!(f, "  first instruction  {}", or_never(self.first_instruction_ms))?;
        writeln!(f, "  first output       {}", or_never(self.first_output_ms))?;
        writeln!(f, "  end                {:.2} ms", self.end_ms)?;
        if self.beats > 0 {
            writeln!(f, "  beats              {}, {} bad", self.beats, self.bad_beats)?;
        }
        writeln!(f, "  read from file     {}", size::human(self.bytes_read))?;
        if let Some(stats) = &self.pager {
            let us = |ns: u64| ns as f64 / 1e3;
            let pages = &stats.installed;
            writeln!(
                f,
                "  faults             {}, p50 {:.1} us, p99 {:.1} us",
                stats.faults,
                us(stats.times.service.p50_ns),
                us(stats.times.service.p99_ns)
            )?;
            match pages.file {
                0 => writeln!(
                    f,
                    "  pages              {} on demand, {} with them, {} zero; {} never loaded",
                    pages.demand, pages.fault_around, pages.zero, stats.pages.missing
                )?,
                // The kernel maps pages of the file, and their number is unknown.
                loads => writeln!(
                    f,
                    "  pages              of {loads} loads, mapped by the kernel when they are touched; {} zero",
                    pages.zero
                )?,
            }
            if stats.prefetch != pager::Prefetch::Off {
                let state = match stats.prefetch {
                    _ if self.working_set_damage.is_some() => "the set is damaged",
                    pager::Prefetch::Done => "all of the set is loaded",
                    pager::Prefetch::GivenUp => "given up",
                    _ => "not at its end",
                };
                writeln!(f, "  prefetched         {} pages; {state}", pages.prefetched)?;
            }
            if stats.population != pager::Population::Off {
                let state = match stats.population {
                    pager::Population::Quiet => "the guest does not wait for pages".into(),
                    pager::Population::Complete => "all pages are loaded".into(),
                    pager::Population::Reset => "some were given back by a reset".into(),
                    pager::Population::Incomplete { pages } => format!("{pages} are unreadable"),
                    _ => "not at its end".to_owned(),
                };
                writeln!(f, "  populated          {} pages; {state}", pages.populated)?;
            }
        }
        if let Some(damage) = &self.working_set_damage {
            writeln!(f, "  working set        not used: {damage}")?;
        }
        if let Some(hash) = &self.memory_sha256 {
            writeln!(f, "  memory sha256      {hash}")?;
        }
        Ok(())
    }
}
