//! The resources that this process has used while its guest ran, from /proc (proc(5)).

use std::fs;
use std::ops::Range;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;
use pager::Pager;
use serde::{Deserialize, Serialize};
use snapfmt::layout::PAGE_BYTES;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::millis::ms;

/// How closely a run is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Measure {
    /// Only before and after the run, so that nothing disturbs it.
    Totals,
    /// Also every millisecond, on a separate thread.
    Timeline,
}

/// The resources that a run has used.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Usage {
    /// Page faults of the process that needed no storage, and those that did. KVM's on behalf of the guest
    /// are among them.
    pub(crate) minor_faults: u64,
    pub(crate) major_faults: u64,
    /// Bytes that storage had to deliver for this process since its start, read-ahead included.
    pub(crate) storage_bytes: u64,
    /// Memory of the process at the end of the run; pages that several processes map count in each.
    pub(crate) rss_bytes: u64,
    /// The same; a page that n processes map counts an n-th in each.
    pub(crate) pss_bytes: u64,
    /// Guest memory that is mapped in this process at the end.
    pub(crate) guest_resident_bytes: u64,
    pub(crate) timeline: Vec<Sample>,
}

/// One sample of a running guest.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// Since the start of the command.
    pub(crate) ms: f64,
    /// Faults that the pager has answered; without a pager, those of the process.
    pub(crate) faults: u64,
    /// Memory of the process.
    pub(crate) rss_bytes: u64,
}

/// Counters that only grow.
pub(crate) struct Counters {
    minor_faults: u64,
    major_faults: u64,
}

impl Counters {
    pub(crate) fn now() -> Result<Self> {
        let text = read("/proc/self/stat")?;
        // The name of the program is in brackets, and may have some itself.
        let numbers = text.rsplit_once(')').map_or("", |(_, rest)| rest);
        let field = |number: usize| numbers.split_ascii_whitespace().nth(number - 3)?.parse().ok();
        let counters = || Some(Self { minor_faults: field(10)?, major_faults: field(12)? });
        counters().context("cannot understand /proc/self/stat")
    }
}

impl Usage {
    /// The resources used since `before`, by a guest with this memory.
    pub(crate) fn since(
        before: &Counters,
        memory: &GuestMemoryMmap,
        timeline: Vec<Sample>,
    ) -> Result<Self> {
        let now = Counters::now()?;
        let regions: Vec<Range<u64>> = memory
            .iter()
            .map(|region| {
                let start = region.as_ptr() as u64;
                start..start + region.len()
            })
            .collect();
        let maps = Maps::parse(&read("/proc/self/smaps")?, &regions);
        Ok(Self {
            minor_faults: now.minor_faults.saturating_sub(before.minor_faults),
            major_faults: now.major_faults.saturating_sub(before.major_faults),
            storage_bytes: storage_bytes(&read("/proc/self/io")?)
                .context("cannot understand /proc/self/io")?,
            rss_bytes: maps.rss_bytes,
            pss_bytes: maps.pss_bytes,
            guest_resident_bytes: maps.within_bytes,
            timeline,
        })
    }
}

/// Between two samples, at first.
const INTERVAL: Duration = Duration::from_millis(1);
/// At this number of samples, every second one is dropped, and the interval doubles.
const SAMPLES_MAX: usize = 2048;

/// Which faults a sample counts.
#[derive(Clone, Copy)]
pub(crate) enum Faults<'a> {
    /// There is no guest yet.
    None,
    Served(&'a Pager),
    Kernel,
}

/// Does `work` and, with [`Measure::Timeline`], samples the process meanwhile, on another thread.
pub(crate) fn sampled<T>(
    measure: Option<Measure>,
    started: Instant,
    faults: Faults<'_>,
    work: impl FnOnce() -> T,
) -> Result<(T, Vec<Sample>)> {
    if measure != Some(Measure::Timeline) {
        return Ok((work(), Vec::new()));
    }
    let sample = || -> Result<Sample> {
        let rss_pages = read("/proc/self/statm")?
            .split_ascii_whitespace()
            .nth(1)
            .and_then(|pages| pages.parse::<u64>().ok())
            .context("cannot understand /proc/self/statm")?;
        let faults = match faults {
            Faults::None => 0,
            Faults::Served(pager) => pager.faults(),
            Faults::Kernel => {
                let Counters { minor_faults, major_faults } = Counters::now()?;
                minor_faults + major_faults
            }
        };
        let rss_bytes = rss_pages * PAGE_BYTES as u64;
        Ok(Sample { ms: ms(started.elapsed()), faults, rss_bytes })
    };
    let (done, is_done) = channel::<()>();
    std::thread::scope(|scope| {
        let sampler = std::thread::Builder::new()
            .name("sampler".into())
            .spawn_scoped(scope, move || {
                let mut samples = vec![sample()?];
                let mut interval = INTERVAL;
                while is_done.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                    samples.push(sample()?);
                    if samples.len() >= SAMPLES_MAX {
                        let mut number = 0;
                        samples.retain(|_| {
                            number += 1;
                            number % 2 == 1
                        });
                        interval *= 2;
                    }
                }
                samples.push(sample()?);
                Ok(samples)
            })
            .context("cannot start the thread that takes samples")?;
        let done_work = work();
        drop(done);
        let samples: Result<Vec<Sample>> = match sampler.join() {
            Ok(samples) => samples,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        let mut samples = samples?;
        // Only those of this run: the process may have had others before.
        if matches!(faults, Faults::Kernel) {
            let first = samples.first().map_or(0, |sample| sample.faults);
            samples.iter_mut().for_each(|sample| sample.faults -= first);
        }
        Ok((done_work, samples))
    })
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {path}"))
}

fn storage_bytes(io: &str) -> Option<u64> {
    io.lines().find_map(|line| line.strip_prefix("read_bytes:"))?.trim().parse().ok()
}

/// Sums over the mappings of a process.
#[derive(Debug, Default, PartialEq, Eq)]
struct Maps {
    rss_bytes: u64,
    pss_bytes: u64,
    /// Resident bytes of the mappings in the requested ranges.
    within_bytes: u64,
}

impl Maps {
    /// Of /proc/PID/smaps: for each mapping a line with its addresses, then lines like `Rss:  12 kB`.
    fn parse(smaps: &str, ranges: &[Range<u64>]) -> Self {
        let mut maps = Self::default();
        let mut is_within = false;
        for line in smaps.lines() {
            let mut fields = line.split_ascii_whitespace();
            let (Some(first), second) = (fields.next(), fields.next()) else { continue };
            let kib = || second.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024;
            match first {
                "Rss:" => {
                    maps.rss_bytes += kib();
                    maps.within_bytes += if is_within { kib() } else { 0 };
                }
                "Pss:" => maps.pss_bytes += kib(),
                _ => {
                    let start = first.split_once('-').map(|(start, _)| start);
                    if let Some(start) = start.and_then(|start| u64::from_str_radix(start, 16).ok())
                    {
                        is_within = ranges.iter().any(|range| range.contains(&start));
                    }
                }
            }
        }
        maps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_summed_and_those_of_the_guest_separately() {
        let smaps = "\
7f0000000000-7f0000200000 rw-p 00000000 00:00 0
Size:               2048 kB
Rss:                 100 kB
Pss:                  50 kB
Pss_Dirty:             7 kB
VmFlags: rd wr
7f0000400000-7f0000600000 r--p 00000000 fe:00 42    /usr/lib/a-b: c
Rss:                   8 kB
Pss:                   4 kB
";
        let range = 0x7f00_0000_0000..0x7f00_0020_0000;
        let found = Maps::parse(smaps, &[range]);
        let expected = Maps { rss_bytes: 108 << 10, pss_bytes: 54 << 10, within_bytes: 100 << 10 };
        assert_eq!(found, expected);
    }

    #[test]
    fn this_process_can_be_sampled() {
        let before = Counters::now().unwrap();
        use vm_memory::GuestAddress;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8 << 20)]).unwrap();
        let touch = || {
            use vm_memory::Bytes;
            memory.write_slice(&[1; 1 << 20], GuestAddress(0)).unwrap();
        };
        let ((), timeline) =
            sampled(Some(Measure::Timeline), Instant::now(), Faults::Kernel, touch).unwrap();
        let usage = Usage::since(&before, &memory, timeline).unwrap();
        assert!(usage.minor_faults > 0);
        assert!(usage.guest_resident_bytes >= 1 << 20 && usage.pss_bytes <= usage.rss_bytes);
        assert!(usage.timeline.len() >= 2);
        assert!(usage.timeline.is_sorted_by(|a, b| a.ms <= b.ms && a.faults <= b.faults));
    }
}
