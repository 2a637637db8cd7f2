//! Snapshots with a working set at the front: trained on the work that is measured, or on other work.

use std::ffi::OsString;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use snapfmt::{Changes, MemoryRegion, PageIndex, Phase, WorkingSet, copy_snapshot};
use vmm::demo::{DemoConfig, DemoPlan, PageClass, WALKED_OF_256};

use super::args::Args;
use super::child::Snap;
use super::hot_file::Hot;
use super::mode::Mode;
use super::subject::Subject;

/// How often the guest is recorded.
const TRAINING_RUNS: &str = "3";

impl Subject {
    /// As [`Subject::new`], with the files that have a working set at the front, if a mode restores them.
    pub(super) fn prepare(
        args: &Args,
        swept: Option<u8>,
        snap: &Snap<'_>,
        say: &dyn Fn(&str),
    ) -> Result<Self> {
        let mut subject = Self::new(args, swept, snap, say)?;
        if args.modes.contains(&Mode::LazyHot) {
            subject.hot = Some(of_this_work(&subject, snap, args.timeout, say)?);
        }
        if args.modes.contains(&Mode::LazyOther) {
            subject.other = Some(of_other_work(&subject, snap, say)?);
        }
        Ok(subject)
    }
}

/// For the work that is measured. A file that already has a working set is used directly.
fn of_this_work(
    subject: &Subject,
    snap: &Snap<'_>,
    timeout: Duration,
    say: &dyn Fn(&str),
) -> Result<Hot> {
    if subject.snapshot.working_set()?.is_some() {
        return Hot::open(&subject.parents, subject.file.clone());
    }
    say("recording which pages the guest touches");
    let trained = subject.path("trained.snap");
    let mut command: Vec<OsString> = vec!["--quiet".into(), "train".into()];
    command.extend(subject.input());
    command.extend(["--runs", TRAINING_RUNS].map(OsString::from));
    command.extend(subject.work.options(timeout));
    command.extend(["-o".into(), trained.clone().into()]);
    snap.run(command).context("cannot record the working set")?;
    optimized(subject, snap, trained, "hot.snap", say)
}

/// For other work: as many of the demo guest's pages as a beat touches, but others.
fn of_other_work(subject: &Subject, snap: &Snap<'_>, say: &dyn Fn(&str)) -> Result<Hot> {
    let mut metadata = subject.snapshot.metadata()?;
    let guest = metadata.other.get("guest").filter(|guest| guest["kind"] == "demo");
    let work_bytes = guest.and_then(|guest| guest.get("work_bytes")).and_then(Value::as_u64);
    let walked = guest.and_then(|guest| guest.get("walked_of_256")).and_then(Value::as_u64);
    let walked_of_256 = walked.and_then(|walked| walked.try_into().ok()).unwrap_or(WALKED_OF_256);
    let Some(work_bytes) = work_bytes else {
        bail!(
            "mode lazy+other is only for the demo guest: for others it is unknown which pages they do not touch"
        );
    };
    let set = untouched(
        &DemoConfig::new(work_bytes).walked_of_256(walked_of_256),
        subject.snapshot.regions(),
    )?;
    let trained = subject.path("other.snap");
    metadata.other.remove("rewritten_from");
    let changes = Changes::new(WorkingSet::join([&set[..]]), metadata);
    copy_snapshot(&trained, &subject.snapshot, &changes, &|_| ControlFlow::Continue(()))
        .context("cannot write a snapshot that was trained on other work")?;
    optimized(subject, snap, trained, "other-hot.snap", say)
}

fn optimized(
    subject: &Subject,
    snap: &Snap<'_>,
    trained: PathBuf,
    name: &str,
    say: &dyn Fn(&str),
) -> Result<Hot> {
    say("moving the working set to the front");
    let file = subject.path(name);
    let mut command: Vec<OsString> = vec!["--quiet".into(), "optimize".into(), trained.into()];
    command.extend(subject.parents());
    command.extend(["-o".into(), file.clone().into()]);
    snap.run(command).context("cannot move the working set to the front")?;
    Hot::open(&subject.parents, file)
}

/// One third of the pages of the demo guest's working area that are not zero and that no beat reads: about as many as
/// it reads.
fn untouched(demo: &DemoConfig, regions: &[MemoryRegion]) -> Result<Vec<(PageIndex, Phase)>> {
    let plan = DemoPlan::new(demo, &snapvm::to_ranges(regions))?;
    let in_use = (0..plan.pages()).filter(|&page| {
        vmm::demo::page_class(page) != PageClass::Zero
            && !vmm::demo::in_working_set(page, demo.walked_of_256)
    });
    let page_index = |page| {
        let gpa = plan.page_gpa(page);
        let region = regions.iter().find(|r| (r.gpa..r.gpa + r.len).contains(&gpa))?;
        PageIndex::containing(region.source_offset + (gpa - region.gpa))
    };
    Ok(in_use.step_by(3).filter_map(|page| Some((page_index(page)?, Phase::First100Ms))).collect())
}

#[cfg(test)]
mod tests {
    use snapfmt::layout::PAGE_BYTES;

    use super::*;

    #[test]
    fn other_work_touches_as_many_pages_and_none_of_the_same() {
        let regions = snapvm::to_regions(&vmm::memory_layout(256 << 20).unwrap());
        let demo = DemoConfig::new(64 << 20);
        let plan = DemoPlan::new(&demo, &vmm::memory_layout(256 << 20).unwrap()).unwrap();
        let touched: Vec<u64> = (0..plan.pages())
            .filter(|&page| vmm::demo::in_working_set(page, WALKED_OF_256))
            .map(|page| plan.page_gpa(page) / PAGE_BYTES as u64)
            .collect();
        let other = untouched(&demo, &regions).unwrap();
        assert!(other.len().abs_diff(touched.len()) < touched.len() / 20);
        // One region: source offsets are guest addresses.
        assert!(other.iter().all(|(page, _)| !touched.contains(&u64::from(page.0))));
    }
}
