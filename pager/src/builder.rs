//! What a pager is told before it starts.

use std::fmt;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::failure::{Failure, FailurePolicy, OnFailure};
use crate::handler::RetryPolicy;
use crate::placement::Placement;
use crate::populate::{LoadsAhead, OVERHEAD, OnComplete, Populate, Population};
use crate::prefetch::{PageList, Ready};
use crate::records::Records;
use crate::region::Region;
use crate::source::PageSource;
use crate::uffd::ForeignUffd;

/// How a pager is to be: see [`Pager::builder`](crate::Pager::builder).
#[must_use]
pub struct PagerBuilder {
    pub(crate) source: Arc<dyn PageSource>,
    pub(crate) regions: Vec<Region>,
    pub(crate) slices: usize,
    pub(crate) placement: Placement,
    pub(crate) retry: RetryPolicy,
    pub(crate) on_error: FailurePolicy,
    pub(crate) on_failure: Option<OnFailure>,
    pub(crate) foreign: Option<(ForeignUffd, OwnedFd)>,
    pub(crate) backed: bool,
    pub(crate) records: Option<Records>,
    pub(crate) populate: Populate,
    pub(crate) populate_rate: Option<NonZeroU64>,
    pub(crate) populate_threads: Option<usize>,
    pub(crate) on_complete: Option<OnComplete>,
    pub(crate) prefetch: Option<PageList>,
    pub(crate) prefetch_when: Option<Ready>,
    pub(crate) one_by_one: bool,
    pub(crate) elsewhere: Option<Arc<dyn LoadsAhead>>,
    pub(crate) fault_overhead: Duration,
}

impl PagerBuilder {
    pub(crate) fn new(source: Arc<dyn PageSource>) -> PagerBuilder {
        PagerBuilder {
            source,
            regions: Vec::new(),
            slices: 1,
            placement: Placement::default(),
            retry: RetryPolicy::default(),
            on_error: FailurePolicy::default(),
            on_failure: None,
            foreign: None,
            backed: false,
            records: None,
            populate: Populate::default(),
            populate_rate: None,
            populate_threads: None,
            on_complete: None,
            prefetch: None,
            prefetch_when: None,
            one_by_one: false,
            elsewhere: None,
            fault_overhead: OVERHEAD,
        }
    }

    /// Adds a region. All regions have the same page size, and overlap neither in memory nor in the source.
    pub fn region(mut self, region: Region) -> PagerBuilder {
        self.regions.push(region);
        self
    }

    /// Adds regions: see [`PagerBuilder::region`].
    pub fn regions(mut self, regions: impl IntoIterator<Item = Region>) -> PagerBuilder {
        self.regions.extend(regions);
        self
    }

    /// Cuts the memory into this many slices (1 unless told), each with a userfaultfd and a demand thread
    /// of its own. One per vCPU is a good number. Slices are at least 2 MiB, so there may be fewer.
    pub fn slices(mut self, slices: usize) -> PagerBuilder {
        self.slices = slices.max(1);
        self
    }

    /// Where the demand threads run; [`Placement::Follow`] unless told.
    pub fn placement(mut self, placement: Placement) -> PagerBuilder {
        self.placement = placement;
        self
    }

    /// How loads that fail for a passing reason are tried again.
    pub fn retry(mut self, retry: RetryPolicy) -> PagerBuilder {
        self.retry = retry;
        self
    }

    /// What is done with a page that cannot be had; [`FailurePolicy::Poison`] unless told.
    pub fn on_error(mut self, policy: FailurePolicy) -> PagerBuilder {
        self.on_error = policy;
        self
    }

    /// Called with the first failure, once, on the thread that has it and before the page is poisoned.
    /// It should note the failure and ask the guest to stop; it must not wait for that: the guest may
    /// be waiting for this very page.
    pub fn on_failure(
        mut self,
        callback: impl Fn(&Failure) + Send + Sync + 'static,
    ) -> PagerBuilder {
        self.on_failure = Some(Box::new(callback));
        self
    }

    /// When pages that no thread has touched are loaded in the background; [`Populate::Auto`] unless told.
    pub fn populate(mut self, populate: Populate) -> PagerBuilder {
        self.populate = populate;
        self
    }

    /// What a fault costs the thread that waits besides its answer, 8 us unless told: [`Populate::Auto`] counts it. Guests with
    /// KVM's asynchronous page faults halt for milliseconds; from 8 ms on the first fault begins the loading.
    pub fn fault_overhead(mut self, overhead: Duration) -> PagerBuilder {
        self.fault_overhead = overhead;
        self
    }

    /// Bytes of memory that the population fills a second at most; no limit unless told.
    pub fn populate_rate(mut self, bytes_per_second: Option<NonZeroU64>) -> PagerBuilder {
        self.populate_rate = bytes_per_second;
        self
    }

    /// How many threads load in the background, each with a load of its own under way. Unless told, one for each CPU
    /// that demand threads leave over, four at most and one at least; and on a host with a single CPU none for
    /// [`Populate::Auto`], where they would only take turns with those that they load for.
    pub fn populate_threads(mut self, threads: usize) -> PagerBuilder {
        self.populate_threads = Some(threads.max(1));
        self
    }

    /// Installs these pages (ranges of source offsets, in the order in which they will probably be needed) as soon as the
    /// pager runs, on a thread of its own, which calls `list` for them. Faults are answered before; population comes after.
    ///
    /// The list is a hint: pages that are not missing, or in no region, are passed over, and one that cannot be had is
    /// left to whoever touches it. It leads to at most 16 times its bytes, and 64 MiB, being decoded.
    pub fn prefetch(
        mut self,
        list: impl FnOnce() -> Vec<Range<u64>> + Send + 'static,
    ) -> PagerBuilder {
        self.prefetch = Some(Box::new(list));
        self
    }

    /// Called on the thread that prefetches when its first pages are loaded, before any of them is installed: it may wait
    /// until that disturbs nobody. It must not wait for ever: stopping the pager waits for it.
    pub fn prefetch_when(mut self, ready: impl FnOnce() + Send + 'static) -> PagerBuilder {
        self.prefetch_when = Some(Box::new(ready));
        self
    }

    /// Called once, when the population has ended ([`Population::Complete`] or [`Population::Incomplete`]), on
    /// its last thread. Not when the pager is stopped before.
    pub fn on_complete(
        mut self,
        callback: impl Fn(Population) + Send + Sync + 'static,
    ) -> PagerBuilder {
        self.on_complete = Some(Box::new(callback));
        self
    }

    /// Serves the memory of another process, which has registered it with `uffd` and is known by a pidfd. All
    /// regions are made by [`Region::foreign`]. There is one slice; the threads go on after that process has
    /// ended, until the pager is stopped.
    ///
    /// What leaves faults unanswered, and with [`FailurePolicy::Kill`] every failure, ends that process by SIGKILL.
    /// Poisoning needs no feature here: a process whose page cannot be poisoned is ended, too.
    pub fn foreign(mut self, uffd: ForeignUffd, process: OwnedFd) -> PagerBuilder {
        self.foreign = Some((uffd, process));
        self
    }

    /// The memory is a private mapping of a file into which the source puts the pages: it answers
    /// [`Load::InFile`](crate::Load::InFile).
    ///
    /// Giving pages back by `madvise` is a failure then: the file's content would come back. Map anonymous memory
    /// over them.
    pub fn backed(mut self) -> PagerBuilder {
        self.backed = true;
        self
    }

    /// Of memory that is [`PagerBuilder::backed`]: what fills its file ahead while threads wait for pages.
    #[cfg(feature = "serve")]
    pub(crate) fn loaded_ahead_by(mut self, elsewhere: Arc<dyn LoadsAhead>) -> PagerBuilder {
        self.elsewhere = Some(elsewhere);
        self
    }

    /// Of a foreign process' memory: keeps account of the pages there, or goes on with what is found there.
    #[cfg(feature = "serve")]
    pub(crate) fn recorded(mut self, records: Records) -> PagerBuilder {
        self.records = Some(records);
        self
    }
}

impl fmt::Debug for PagerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagerBuilder")
            .field("regions", &self.regions)
            .field("slices", &self.slices)
            .field("placement", &self.placement)
            .field("retry", &self.retry)
            .field("on_error", &self.on_error)
            .finish_non_exhaustive()
    }
}
