//! The working set: which pages a restored guest touched, in what order and how soon.
//!
//! It is a hint. A wrong one costs time and never a wrong page, so only its limits and the properties that its users
//! rely on are checked.

use std::collections::HashMap;

use crate::entry::PageIndex;
use crate::error::{Corruption, Part, Problem, WriteError};
use crate::layout::{
    MAX_WORKING_SET_BYTES, W_FIRST_PAGE, W_PAGES, W_PHASE, W_RECORDS, W_RESERVED, W_RESTORES,
    W_SEEN, W_VERSION, WORKING_SET_HEADER_BYTES, WORKING_SET_RECORD_BYTES, WORKING_SET_VERSION,
    put, u16_at, u32_at,
};
use crate::section::SectionKind;

/// When a page was first accessed after the restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum Phase {
    /// Before the guest's first output.
    FirstOutput = 0,
    /// In the first 100 ms.
    First100Ms = 1,
    /// In the first second.
    FirstSecond = 2,
    /// Later.
    Later = 3,
}

impl Phase {
    /// All phases, in their order.
    pub const ALL: [Self; 4] =
        [Self::FirstOutput, Self::First100Ms, Self::FirstSecond, Self::Later];

    /// The printed name.
    pub fn name(self) -> &'static str {
        match self {
            Self::FirstOutput => "before the first output",
            Self::First100Ms => "in the first 100 ms",
            Self::FirstSecond => "in the first second",
            Self::Later => "later",
        }
    }
}

/// Pages that follow each other in memory and in the order of access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HotRun {
    /// The first of them.
    pub first: PageIndex,
    /// How many: 1 to 65536.
    pub pages: u32,
    /// When they were accessed; the earliest phase, if several restores were recorded.
    pub phase: Phase,
    /// In how many of the restores; 255 means that many or more.
    pub seen: u8,
}

/// The most that one [`HotRun`] has.
const MAX_RUN_PAGES: u32 = 1 << 16;
const MAX_RECORDS: usize =
    (MAX_WORKING_SET_BYTES as usize - WORKING_SET_HEADER_BYTES) / WORKING_SET_RECORD_BYTES;

/// The pages that a restored guest accessed, by phase, and within a phase in the order of access.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    restores: u32,
    runs: Vec<HotRun>,
}

impl WorkingSet {
    /// Joins the observations of some restores, each as its pages in the order of access. A page gets the
    /// earliest phase and, within that phase, the earliest position that it had in any of them.
    ///
    /// A set is at most 4 MiB in the file (524286 runs). Runs above that, the latest ones, are left out.
    pub fn join<'a>(restores: impl IntoIterator<Item = &'a [(PageIndex, Phase)]>) -> Self {
        let mut pages: HashMap<PageIndex, ((Phase, usize), u8)> = HashMap::new();
        let mut count = 0u32;
        for restore in restores {
            count += 1;
            for (place, (page, phase)) in restore.iter().enumerate() {
                let at = (*phase, place);
                let known = pages.entry(*page).or_insert((at, 0));
                known.0 = known.0.min(at);
                // A page that is listed twice for one restore counts once.
                if u32::from(known.1) < count {
                    known.1 = known.1.saturating_add(1);
                }
            }
        }
        let mut ordered: Vec<_> =
            pages.into_iter().map(|(page, (at, seen))| (at, page, seen)).collect();
        ordered.sort_unstable();
        let mut runs: Vec<HotRun> = Vec::new();
        for ((phase, _), page, seen) in ordered {
            let full = runs.len() == MAX_RECORDS;
            match runs.last_mut() {
                Some(run)
                    if (run.phase, run.seen) == (phase, seen)
                        && run.pages < MAX_RUN_PAGES
                        && run.first.0.checked_add(run.pages) == Some(page.0) =>
                {
                    run.pages += 1;
                }
                _ if full => break,
                _ => runs.push(HotRun { first: page, pages: 1, phase, seen }),
            }
        }
        Self { restores: count, runs }
    }

    /// How many restores were recorded.
    pub fn restores(&self) -> u32 {
        self.restores
    }

    /// The runs, earliest first.
    pub fn runs(&self) -> &[HotRun] {
        &self.runs
    }

    /// All pages, earliest first, each once.
    pub fn pages(&self) -> impl Iterator<Item = (PageIndex, Phase)> {
        self.runs.iter().flat_map(|run| {
            (run.first.0..=run.first.0.saturating_add(run.pages - 1))
                .map(|page| (PageIndex(page), run.phase))
        })
    }

    /// The number of its pages.
    pub fn len(&self) -> u64 {
        self.runs.iter().map(|run| u64::from(run.pages)).sum()
    }

    /// Whether it has no pages.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// How many pages each phase has, in the order of [`Phase::ALL`].
    pub fn pages_by_phase(&self) -> [u64; 4] {
        let mut pages = [0; 4];
        for run in &self.runs {
            pages[run.phase as usize] += u64::from(run.pages);
        }
        pages
    }

    /// Refuses a set that does not fit memory of this many pages.
    pub(crate) fn check(&self, memory_pages: u64) -> Result<(), WriteError> {
        let beyond = self.runs.iter().map(|run| u64::from(run.first.0) + u64::from(run.pages));
        match beyond.max() {
            Some(end) if end > memory_pages => Err(WriteError::Limit {
                what: "the end of a page of the working set",
                min: 0,
                max: memory_pages,
                found: end,
            }),
            _ => Ok(()),
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let len = WORKING_SET_HEADER_BYTES + self.runs.len() * WORKING_SET_RECORD_BYTES;
        let mut bytes = vec![0; len];
        let (header, records) = bytes.split_at_mut(WORKING_SET_HEADER_BYTES);
        put(header, W_VERSION, &WORKING_SET_VERSION.to_le_bytes());
        put(header, W_RESTORES, &self.restores.to_le_bytes());
        put(header, W_RECORDS, &(self.runs.len() as u32).to_le_bytes());
        for (record, run) in records.chunks_exact_mut(WORKING_SET_RECORD_BYTES).zip(&self.runs) {
            put(record, W_FIRST_PAGE, &run.first.0.to_le_bytes());
            put(record, W_PAGES, &((run.pages - 1) as u16).to_le_bytes());
            record[W_PHASE] = run.phase as u8;
            record[W_SEEN] = run.seen;
        }
        bytes
    }

    /// Parses a section with a correct checksum; `None` if its version is not known here.
    pub(crate) fn parse(
        bytes: &[u8],
        offset: u64,
        memory_pages: u64,
    ) -> Result<Option<Self>, Corruption> {
        let corrupt = |at: usize, problem| {
            Corruption::new(Part::Section(SectionKind::WORKING_SET), offset + at as u64, problem)
        };
        let exact = |field, at, expected: u64, found: u64| match expected == found {
            true => Ok(()),
            false => Err(corrupt(at, Problem::Field { field, expected, found })),
        };
        let range = |field, at, min, max, found: u64| match (min..=max).contains(&found) {
            true => Ok(()),
            false => Err(corrupt(at, Problem::Range { field, min, max, found })),
        };
        let least = WORKING_SET_HEADER_BYTES as u64;
        range("section.len", 0, least, MAX_WORKING_SET_BYTES, bytes.len() as u64)?;
        let (header, records) = bytes.split_at(WORKING_SET_HEADER_BYTES);
        if u32_at(header, W_VERSION) != WORKING_SET_VERSION {
            return Ok(None);
        }
        let count = u32_at(header, W_RECORDS);
        let expected = u64::from(count) * WORKING_SET_RECORD_BYTES as u64;
        exact("working_set.records", W_RECORDS, records.len() as u64, expected)?;
        exact("working_set.reserved", W_RESERVED, 0, u32_at(header, W_RESERVED).into())?;
        let mut runs = Vec::with_capacity(records.len() / WORKING_SET_RECORD_BYTES);
        let (mut phase, mut total) = (Phase::FirstOutput, 0);
        for (number, record) in records.chunks_exact(WORKING_SET_RECORD_BYTES).enumerate() {
            let at = WORKING_SET_HEADER_BYTES + number * WORKING_SET_RECORD_BYTES;
            let (first, pages) =
                (u32_at(record, W_FIRST_PAGE), u32::from(u16_at(record, W_PAGES)) + 1);
            let end = u64::from(first) + u64::from(pages);
            range("working_set.end_page", at, 1, memory_pages, end)?;
            total += u64::from(pages);
            range("pages of the working set", at, 1, memory_pages, total)?;
            let found = record[W_PHASE];
            let (min, max) = (phase as u64, Phase::Later as u64);
            range("working_set.phase", at + W_PHASE, min, max, found.into())?;
            phase = Phase::ALL[usize::from(found)];
            runs.push(HotRun { first: PageIndex(first), pages, phase, seen: record[W_SEEN] });
        }
        if let Some((number, least)) = overlap(&runs) {
            let at = WORKING_SET_HEADER_BYTES + number * WORKING_SET_RECORD_BYTES;
            range("working_set.first_page", at, least, memory_pages, runs[number].first.0.into())?;
        }
        Ok(Some(Self { restores: u32_at(header, W_RESTORES), runs }))
    }
}

/// The number of a run that has a page of another run, and the first page after that one.
fn overlap(runs: &[HotRun]) -> Option<(usize, u64)> {
    let mut order: Vec<usize> = (0..runs.len()).collect();
    order.sort_unstable_by_key(|number| runs[*number].first);
    order.windows(2).find_map(|pair| {
        let end = u64::from(runs[pair[0]].first.0) + u64::from(runs[pair[0]].pages);
        (end > u64::from(runs[pair[1]].first.0)).then_some((pair[1], end))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pages(list: &[(u32, Phase)]) -> Vec<(PageIndex, Phase)> {
        list.iter().map(|(page, phase)| (PageIndex(*page), *phase)).collect()
    }

    #[test]
    fn sets_are_joined_by_the_earliest_touch() {
        use Phase::{FirstOutput, FirstSecond, Later};
        let first = pages(&[(7, FirstOutput), (8, FirstOutput), (20, Later)]);
        let second =
            pages(&[(8, FirstOutput), (9, FirstSecond), (7, FirstSecond), (20, FirstSecond)]);
        let set = WorkingSet::join([&first[..], &second[..]]);
        assert_eq!(set.restores(), 2);
        let run =
            |first, pages, phase, seen| HotRun { first: PageIndex(first), pages, phase, seen };
        let expected =
            [run(7, 2, FirstOutput, 2), run(9, 1, FirstSecond, 1), run(20, 1, FirstSecond, 2)];
        assert_eq!(set.runs(), expected);
        assert_eq!((set.len(), set.pages_by_phase()), (4, [2, 0, 2, 0]));
    }

    #[test]
    fn long_runs_are_cut() {
        let all: Vec<_> = (0..70_000).map(|page| (PageIndex(page), Phase::Later)).collect();
        let set = WorkingSet::join([&all[..]]);
        assert_eq!(set.runs().iter().map(|run| run.pages).collect::<Vec<_>>(), [65536, 4464]);
        assert_eq!(set.pages().count(), 70_000);
        let parsed = WorkingSet::parse(&set.encode(), 0, 70_000).unwrap();
        assert_eq!(parsed, Some(set));
    }

    #[test]
    fn runs_that_do_not_fit_in_the_section_are_left_out() {
        let scattered: Vec<_> =
            (0..MAX_RECORDS as u32 + 5).map(|at| (PageIndex(2 * at), Phase::Later)).collect();
        let set = WorkingSet::join([&scattered[..]]);
        assert_eq!(set.len(), MAX_RECORDS as u64);
        assert!(set.encode().len() as u64 <= MAX_WORKING_SET_BYTES);
    }

    #[test]
    fn an_unknown_version_is_ignored_and_a_bad_set_is_named() {
        let set = WorkingSet::join([&pages(&[(3, Phase::FirstSecond), (5, Phase::Later)])[..]]);
        let good = set.encode();
        let parse = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            change(&mut bytes);
            WorkingSet::parse(&bytes, 1000, 6)
        };
        assert_eq!(parse(&|_| ()), Ok(Some(set.clone())));
        assert_eq!(parse(&|bytes| bytes[0] = 2), Ok(None));
        let place = |change: &dyn Fn(&mut Vec<u8>)| parse(change).unwrap_err().offset;
        assert_eq!(place(&|bytes| bytes.truncate(15)), 1000);
        assert_eq!(place(&|bytes| bytes.truncate(24)), 1008);
        assert_eq!(place(&|bytes| bytes[12] = 1), 1012);
        // Beyond memory, more pages than memory has, phases that go back.
        assert_eq!(place(&|bytes| bytes[24] = 6), 1024);
        assert_eq!(place(&|bytes| (bytes[16], bytes[20]) = (0, 5)), 1024);
        assert_eq!(place(&|bytes| bytes[30] = 1), 1030);
        assert_eq!(place(&|bytes| bytes[30] = 4), 1030);
        // Two runs with one page.
        assert_eq!(place(&|bytes| bytes[24] = 3), 1024);
    }

    proptest! {
        #[test]
        fn a_joined_set_is_read_back(
            touched in prop::collection::vec((0u32..500, 0usize..4), 0..200),
        ) {
            let touched: Vec<_> =
                touched.into_iter().map(|(page, phase)| (PageIndex(page), Phase::ALL[phase])).collect();
            let set = WorkingSet::join([&touched[..]]);
            let mut expected: Vec<_> = touched.iter().map(|(page, _)| *page).collect();
            expected.sort_unstable();
            expected.dedup();
            let mut found: Vec<_> = set.pages().map(|(page, _)| page).collect();
            found.sort_unstable();
            prop_assert_eq!(found, expected);
            prop_assert!(set.runs().iter().all(|run| run.seen == 1));
            prop_assert_eq!(WorkingSet::parse(&set.encode(), 0, 500), Ok(Some(set)));
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            if let Ok(Some(set)) = WorkingSet::parse(&bytes, 0, 1 << 20) {
                prop_assert!(set.len() <= 1 << 20);
                prop_assert_eq!(set.encode(), bytes);
            }
        }
    }
}
