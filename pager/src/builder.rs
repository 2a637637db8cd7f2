//! The options of a pager.

use std::fmt;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::background::page_list::{PageList, Ready};
use crate::background::populate::demand::OVERHEAD;
use crate::background::populate::population::{Populate, Population};
use crate::background::populate::progress::{LoadsAhead, OnComplete};
use crate::failure::{Failure, FailurePolicy, OnFailure};
use crate::install::records::Records;
use crate::region::Region;
use crate::sched::placement::Placement;
use crate::source::page_source::PageSource;
use crate::source::retry::RetryPolicy;
use crate::uffd::{ForeignUffd, Uffd};

/// The options of a pager: see [`Pager::builder`](crate::Pager::builder).
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
    pub(crate) userfaultfd: Option<Uffd>,
    pub(crate) backed: bool,
    pub(crate) records: Option<Records>,
    pub(crate) populate: Populate,
    pub(crate) populate_rate: Option<NonZeroU64>,
    pub(crate) populate_threads: Option<usize>,
    pub(crate) on_complete: Option<OnComplete>,
    pub(crate) prefetch: Option<PageList>,
    pub(crate) prefetch_when: Option<Ready>,
    pub(crate) fault_around_off: bool,
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
            userfaultfd: None,
            backed: false,
            records: None,
            populate: Populate::default(),
            populate_rate: None,
            populate_threads: None,
            on_complete: None,
            prefetch: None,
            prefetch_when: None,
            fault_around_off: false,
            elsewhere: None,
            fault_overhead: OVERHEAD,
        }
    }

    /// Adds a region. All regions must have the same page size, and must not overlap in memory or in the source.
    pub fn region(mut self, region: Region) -> PagerBuilder {
        self.regions.push(region);
        self
    }

    /// Adds regions: see [`PagerBuilder::region`].
    pub fn regions(mut self, regions: impl IntoIterator<Item = Region>) -> PagerBuilder {
        self.regions.extend(regions);
        self
    }

    /// Cuts the memory into this many slices, each with its own userfaultfd and demand thread. The default is 1; one
    /// per vCPU is a good number. Slices have at least 2 MiB, so that there may be fewer.
    pub fn slices(mut self, slices: usize) -> PagerBuilder {
        self.slices = slices.max(1);
        self
    }

    /// On which CPUs the demand threads run. The default is [`Placement::Follow`].
    pub fn placement(mut self, placement: Placement) -> PagerBuilder {
        self.placement = placement;
        self
    }

    /// How often loads are retried after a transient error.
    pub fn retry(mut self, retry: RetryPolicy) -> PagerBuilder {
        self.retry = retry;
        self
    }

    /// What happens to a page that cannot be loaded. The default is [`FailurePolicy::Poison`].
    pub fn on_error(mut self, policy: FailurePolicy) -> PagerBuilder {
        self.on_error = policy;
        self
    }

    /// Called with the first failure, once, on the thread that has it, before the page is poisoned. The callback should
    /// record the failure and ask the guest to stop. It must not wait for that, because the guest may be waiting for
    /// this page.
    pub fn on_failure(
        mut self,
        callback: impl Fn(&Failure) + Send + Sync + 'static,
    ) -> PagerBuilder {
        self.on_failure = Some(Box::new(callback));
        self
    }

    /// When pages that no thread has touched are loaded in the background. The default is [`Populate::Auto`].
    pub fn populate(mut self, populate: Populate) -> PagerBuilder {
        self.populate = populate;
        self
    }

    /// What a fault costs the faulting thread besides its answer, for the measure of [`Populate::Auto`]. The default is
    /// 8 us. Guests with asynchronous page faults of KVM halt for milliseconds. From 8 ms on, one fault is enough to start
    /// the loading, and it starts with the pager.
    pub fn fault_overhead(mut self, overhead: Duration) -> PagerBuilder {
        self.fault_overhead = overhead;
        self
    }

    /// The limit of the population, in bytes of memory per second. The default is no limit.
    pub fn populate_rate(mut self, bytes_per_second: Option<NonZeroU64>) -> PagerBuilder {
        self.populate_rate = bytes_per_second;
        self
    }

    /// The number of threads of the population, each with its own loads. The default is the number of CPUs less that of
    /// demand threads, at least one and at most four. With a single CPU and by default, [`Populate::Auto`] loads only
    /// what is left when five eighths of the source's data ([`crate::PageSource::data_bytes`]) are installed, because
    /// its thread takes time from those that it loads for.
    pub fn populate_threads(mut self, threads: usize) -> PagerBuilder {
        self.populate_threads = Some(threads.max(1));
        self
    }

    /// Installs a list of pages as soon as the pager runs, on a thread of its own. That thread calls `list`, which
    /// returns ranges of source offsets in bytes, in the order in which the pages will probably be needed. Faults are
    /// answered first. The population starts afterwards.
    ///
    /// The list is a hint: pages that are not missing, or are in no region, are skipped, and a page that cannot be
    /// loaded is left to a fault. At most 16 times the listed bytes, plus 64 MiB, are decoded.
    pub fn prefetch(
        mut self,
        list: impl FnOnce() -> Vec<Range<u64>> + Send + 'static,
    ) -> PagerBuilder {
        self.prefetch = Some(Box::new(list));
        self
    }

    /// Called on the thread that prefetches when its first pages are loaded, before any of them is installed. It may
    /// wait until installing disturbs no other work. It must not wait forever, because stopping the pager waits for it.
    pub fn prefetch_when(mut self, ready: impl FnOnce() + Send + 'static) -> PagerBuilder {
        self.prefetch_when = Some(Box::new(ready));
        self
    }

    /// Called once, when the population has ended ([`Population::Complete`], [`Population::Reset`] or [`Population::Incomplete`]), on its last
    /// thread. It is not called if the pager is stopped before.
    pub fn on_complete(
        mut self,
        callback: impl Fn(Population) + Send + Sync + 'static,
    ) -> PagerBuilder {
        self.on_complete = Some(Box::new(callback));
        self
    }

    /// Uses this userfaultfd of this process, which serves no other memory, instead of opening one. There is one slice. It
    /// needs the features [`Features::EVENT_REMOVE`](crate::uffd::Features::EVENT_REMOVE) and
    /// [`Features::EVENT_REMAP`](crate::uffd::Features::EVENT_REMAP), for [`FailurePolicy::Poison`] also
    /// [`Features::POISON`](crate::uffd::Features::POISON), and for [`Placement::Follow`]
    /// [`Features::THREAD_ID`](crate::uffd::Features::THREAD_ID) has an effect.
    pub fn userfaultfd(mut self, uffd: Uffd) -> PagerBuilder {
        self.userfaultfd = Some(uffd);
        self
    }

    /// Serves the memory of another process, which has registered it with `uffd`. `process` is a pidfd of that process. All
    /// regions must be made by [`Region::foreign`]. There is one slice. The threads continue after that process has
    /// ended, until the pager is stopped.
    ///
    /// A failure that leaves faults unanswered ends that process by SIGKILL; with [`FailurePolicy::Kill`] every failure
    /// does. Poisoning needs no feature here: a process whose page cannot be poisoned is killed, too.
    pub fn foreign(mut self, uffd: ForeignUffd, process: OwnedFd) -> PagerBuilder {
        self.foreign = Some((uffd, process));
        self
    }

    /// The memory is a private mapping of a file. The source adds the pages to that file and returns
    /// [`Load::InFile`](crate::Load::InFile).
    ///
    /// Giving pages back by `madvise` is a failure then, because the content of the file would come back. Map anonymous
    /// memory over them instead.
    pub fn backed(mut self) -> PagerBuilder {
        self.backed = true;
        self
    }

    /// For memory that is [`PagerBuilder::backed`]: fills its file ahead while threads wait for pages.
    #[cfg(feature = "serve")]
    pub(crate) fn loaded_ahead_by(mut self, elsewhere: Arc<dyn LoadsAhead>) -> PagerBuilder {
        self.elsewhere = Some(elsewhere);
        self
    }

    /// For memory of another process: keeps the page states in `records`, or continues with the states found there.
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
