//! The demand thread of one slice: it reads the messages of the slice and answers its faults.

use std::any::Any;
use std::io;
use std::os::fd::AsFd;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use crate::background::populate::demand::WaitBucket;
use crate::background::populate::start;
use crate::failure::{Failure, FailureCause};
use crate::fault::inbox::Inbox;
use crate::fault::latency::FaultTimes;
use crate::fault::queued::{Fault, Waited};
use crate::fault::resolver::{ResolveError, Resolver};
use crate::fault::waiting::STALL;
use crate::install::page_state::PageState;
use crate::layout::Place;
use crate::pager_state::PagerState;
use crate::sched::placement::Follower;
use crate::sched::run_delay::RunDelay;
use crate::source::error::SourceErrorKind;
use crate::source::load::PageReader;
use crate::source::panicked::Panicked;
use crate::source::retry::RetryPolicy;
use crate::traced::traced;
use crate::uffd::{Errno, Wait};

/// The state of a demand thread.
pub(crate) struct Handler {
    pub(crate) shared: Arc<PagerState>,
    pub(crate) slice: usize,
    pub(crate) reader: Box<dyn PageReader>,
    pub(crate) retry: RetryPolicy,
    pub(crate) stop: Arc<io::PipeReader>,
    pub(crate) follower: Follower,
    pub(crate) inbox: Inbox,
    pub(crate) resolver: Resolver,
    /// The time at the end of the last answer. Reading the clock takes 30 ns; a few reads are 1 % of an answer.
    pub(crate) last_now: Instant,
    pub(crate) wait_bucket: WaitBucket,
    pub(crate) run_delay: RunDelay,
    /// How long this thread has waited for a CPU before it could read the message of the next fault.
    pub(crate) delay: Duration,
}

/// Why a handler leaves its loop.
enum End {
    /// The pager was stopped, or the process that owned the memory has ended.
    Clean,
    Failed(FailureCause),
}

/// One fault while it is answered.
struct Attempt {
    place: Place,
    source_offset: u64,
    times: FaultTimes,
    /// When the pages of the last load were installed.
    installed_at: Option<Instant>,
    /// The fault has waited while others were answered.
    waited: Waited,
    /// The thread has waited for a background thread that was loading this page. It waits only once.
    has_waited: bool,
}

/// How the answer to a fault ended.
#[derive(PartialEq, Eq)]
enum Outcome {
    /// The page is installed, or poisoned, or could not even be poisoned.
    Answered,
    /// The page comes from another host. The fault is answered later.
    Waits,
    /// The pager is stopping, cannot read messages, or has let the memory go.
    Abandoned,
}

/// A fault waits at most this often, and then the thread itself waits: for a part of the index, and for the chunk. The
/// others are for blocks that a cache has dropped.
const MOST_WAITS: u32 = 4;

impl Handler {
    /// The thread's body. After a first panic it continues with a reader that only fails, so that every thread that
    /// waits for a missing page gets an error and does not hang.
    pub(crate) fn run(mut self) {
        self.follower.begin();
        self.run_delay.open();
        let shared = Arc::clone(&self.shared);
        let priority = &shared.slices[self.slice].priority;
        priority.begin();
        self.serve_through_panic();
        let own = &shared.slices[self.slice];
        own.counters.stalled(own.waiting.clear());
        // Write faults of this slice are not answered any more.
        shared.end_window("a thread of the pager has ended");
        priority.end();
    }

    fn serve_through_panic(&mut self) {
        for _attempt in 0..2 {
            match panic::catch_unwind(AssertUnwindSafe(|| self.serve_until_stopped())) {
                Ok(End::Clean) => return,
                Ok(End::Failed(cause)) => return self.fail_all(cause),
                Err(payload) => self.report(FailureCause::Panic(panic_text(payload.as_ref()))),
            }
            // The reader may be in any state after its panic: even its destructor must not run.
            let panicked = std::mem::replace(&mut self.reader, Box::new(Panicked));
            std::mem::forget(panicked);
            self.end_waits();
        }
        // The second panic does not come from the source. This thread ends.
        self.poison_all();
    }

    fn serve_until_stopped(&mut self) -> End {
        loop {
            self.take_arrived();
            // A fault leaves the queue only after its answer, so that a panic in between does not lose it.
            while let Some(&fault) = self.inbox.faults.front() {
                self.shared.slices[self.slice].waiting.answering(Some(&fault));
                let outcome = self.serve(fault);
                self.shared.slices[self.slice].waiting.answering(None);
                let Ok(outcome) = outcome else { return End::Clean };
                if self.stopping() {
                    return End::Clean;
                }
                if let Some(error) = self.inbox.broken.take() {
                    return End::Failed(FailureCause::Messages(error));
                }
                self.inbox.faults.pop_front();
                if outcome != Outcome::Waits {
                    self.follower.served(fault, self.last_now, &self.shared, self.slice);
                }
            }
            if let Some(event) = self.inbox.unserved.take() {
                // The thread continues: other events can still be read, and moved memory still fails here.
                self.fail_all(FailureCause::Event(format!("{event:?}")));
                if self.stopping() {
                    return End::Clean;
                }
                continue;
            }
            // While a thread of the same CPU faults, its next fault arrives as soon as this thread runs again. Reading
            // without a poll(2) before saves a system call.
            if let Err(error) = self.receive() {
                return End::Failed(FailureCause::Messages(error));
            }
            if !self.inbox.faults.is_empty() || self.inbox.unserved.is_some() {
                self.shared.slices[self.slice].answering.store(true, Ordering::Relaxed);
                continue;
            }
            if let Some(end) = self.wait_for_messages() {
                return end;
            }
        }
    }

    /// Reads the queued messages.
    fn receive(&mut self) -> io::Result<usize> {
        let _lock = self.shared.slices[self.slice].lock.for_demand();
        self.inbox.receive(&self.shared, self.slice)
    }

    /// Queues the faults whose waits have ended.
    fn take_arrived(&mut self) {
        let Inbox { faults, failed, .. } = &mut self.inbox;
        self.shared.slices[self.slice].waiting.take_ended(|ticket, mut fault, error| {
            let since = fault.waited.since.take();
            fault.waited.wait_ns += since.map_or(0, |since| nanoseconds(since, Instant::now()));
            fault.waited.ticket = ticket;
            faults.push_back(fault);
            failed.extend(error.map(|error| (ticket, error)));
        });
    }

    /// Queues all faults that wait: the reader has panicked, and what it would have called may be lost with it.
    fn end_waits(&mut self) {
        let faults = &mut self.inbox.faults;
        self.shared.slices[self.slice].waiting.end_all(|fault| faults.push_back(fault));
    }

    /// Waits until messages can be read, or the wait of a fault has ended. Returns why the thread has to end, if it has
    /// to.
    fn wait_for_messages(&mut self) -> Option<End> {
        let slice = &self.shared.slices[self.slice];
        slice.answering.store(false, Ordering::Relaxed);
        self.follower.idle(slice);
        if let Some((how_long, meanwhile)) = self.follower.awake() {
            let began = Instant::now();
            let idle = || !slice.filler.uffd.readable() && !slice.waiting.have_ended();
            while began.elapsed() < how_long && idle() && !self.stopping() {
                meanwhile();
            }
        }
        // Only until the message is read: after the answer, this thread often waits while the woken thread computes.
        self.run_delay.begin();
        let waited = slice.filler.uffd.wait_with(self.stop.as_fd(), slice.waiting.event());
        self.delay = self.run_delay.end();
        match waited {
            Ok(Wait::Stop) => return Some(End::Clean),
            Ok(Wait::Readable) => slice.answering.store(true, Ordering::Relaxed),
            Err(error) => return Some(End::Failed(FailureCause::Messages(error))),
        }
        None
    }

    /// Answers one fault, by the state of its page.
    fn serve(&mut self, fault: Fault) -> Result<Outcome, ProcessGone> {
        if fault.write_protected {
            self.serve_write(fault);
            return Ok(Outcome::Answered);
        }
        let own = &self.shared.slices[self.slice];
        let Waited { count, queue_ns, wait_ns, .. } = fault.waited;
        if count == 0 {
            own.counters.fault();
        }
        // The fault has waited since it was read or, if that is later, since the answer to the fault before it.
        let queue_ns = if count > 0 { queue_ns } else { nanoseconds(fault.read_at, self.last_now) };
        // Only registered memory faults, and the layout has all of it, unless the memory was moved.
        let Some(place) = self.shared.layout.at_host(fault.address) else {
            self.fail_outside(fault);
            return Ok(Outcome::Answered);
        };
        let source_offset = self.shared.layout.source_offset(place);
        #[cfg(feature = "tracing")]
        let _span = tracing::trace_span!("fault", source_offset).entered();
        let mut attempt = Attempt {
            place,
            source_offset,
            times: FaultTimes { queue_ns, read_ns: wait_ns, ..FaultTimes::default() },
            installed_at: None,
            waited: fault.waited,
            has_waited: false,
        };
        // Each fault that is counted is timed, also one that the end of the pager, or of the population, has answered.
        let outcome = self.answer(fault, &mut attempt)?;
        // If the page was removed meanwhile, the error of its load does not matter.
        self.inbox.failed.remove(&fault.waited.ticket);
        let Attempt { mut times, installed_at, .. } = attempt;
        self.last_now = installed_at.unwrap_or_else(Instant::now);
        if outcome == Outcome::Waits {
            return Ok(outcome);
        }
        times.service_ns = nanoseconds(fault.read_at, self.last_now);
        let region = self.shared.layout.extent(place.extent).region;
        self.shared.slices[self.slice].recorder.record(region, times);
        if u128::from(times.service_ns) > STALL.as_nanos() {
            self.shared.slices[self.slice].counters.stalled(1);
        }
        if outcome == Outcome::Answered {
            self.waited(place, &times);
        }
        Ok(outcome)
    }

    /// Lets a thread write to a page that a window has protected.
    fn serve_write(&mut self, fault: Fault) {
        loop {
            match self.shared.answer_write(fault.address) {
                Ok(()) => break,
                // A queued event has to be read before the kernel changes the protection.
                Err(Errno(libc::EAGAIN)) => {
                    if let Err(error) = self.receive() {
                        self.inbox.broken = Some(error);
                    }
                    if !self.may_continue() {
                        break;
                    }
                    thread::yield_now();
                }
                Err(errno) => {
                    self.fail_write(fault, errno);
                    break;
                }
            }
        }
        self.last_now = Instant::now();
    }

    /// A page stays protected from writes. Its window must not be saved.
    fn fail_write(&self, fault: Fault, errno: Errno) {
        let (shared, host_addr) = (&self.shared, fault.address);
        shared.fail_window(format!("cannot make the page at {host_addr:#x} writable: {errno}"));
        if matches!(errno, Errno(libc::ENOENT | libc::ESRCH)) {
            // The memory is not registered any more, or its process has ended: the kernel has woken the writer.
            return;
        }
        let cause = FailureCause::Install { ioctl: "UFFDIO_WRITEPROTECT", host_addr, errno };
        let place = shared.layout.at_host(host_addr);
        shared.failures.report(Failure {
            source_offset: place.map(|place| shared.layout.source_offset(place)),
            host_addr: Some(host_addr),
            thread: self.slice,
            cause,
        });
        // The writer keeps waiting.
        shared.failures.unpoisonable();
    }

    /// Answers a fault in memory that the layout does not have: it was registered and then moved.
    fn fail_outside(&mut self, fault: Fault) {
        let shared = &self.shared;
        let cause = FailureCause::Event(format!("a fault outside, at {:#x}", fault.address));
        shared.failures.report(Failure {
            source_offset: None,
            host_addr: Some(fault.address),
            thread: self.slice,
            cause,
        });
        if !shared.poison_outside(self.slice, fault.address, &mut self.inbox) {
            shared.failures.unpoisonable();
        }
    }

    fn answer(&mut self, fault: Fault, attempt: &mut Attempt) -> Result<Outcome, ProcessGone> {
        let place = attempt.place;
        loop {
            let answered = match self.shared.states.of(place.page) {
                PageState::Missing if self.leaves_waiting(fault, attempt) => {
                    return Ok(Outcome::Waits);
                }
                PageState::Missing => match self.load_and_install(attempt) {
                    Some(answered) => answered,
                    None => continue,
                },
                // The fault came twice, or the page was removed since. The page becomes zero if it is not in memory.
                // It never gets the content of the source a second time.
                PageState::Present | PageState::Removed => {
                    attempt.installed_at = None;
                    self.resolver.fill_zero(&self.shared, place, &mut self.inbox)
                }
                PageState::Poisoned => {
                    attempt.installed_at = None;
                    self.resolver.poison(&self.shared, place, &mut self.inbox)
                }
            };
            match answered {
                Ok(true) => return Ok(Outcome::Answered),
                // The page was removed during the install: answer by its new state.
                Ok(false) if self.may_continue() => {}
                Ok(false) => return Ok(Outcome::Abandoned),
                Err(ResolveError::ProcessGone) => return Err(ProcessGone),
                // The population has ended meanwhile, and the source may be gone for this reason.
                Err(ResolveError::Failed(_)) if self.shared.slices[self.slice].is_released() => {
                    // This wakes the faulting thread.
                    let _ = self.resolver.fill_zero(&self.shared, place, &mut self.inbox);
                    return Ok(Outcome::Abandoned);
                }
                Err(ResolveError::Failed(cause)) => {
                    if !self.fail_page(attempt, cause) {
                        return Ok(Outcome::Answered);
                    }
                }
            }
        }
    }

    /// If the load of a missing page would wait for another host: starts to fetch the page, and puts the fault aside
    /// until it has come. Returns whether it did.
    fn leaves_waiting(&mut self, fault: Fault, attempt: &Attempt) -> bool {
        let (offset, waited) = (attempt.source_offset, attempt.waited);
        if self.inbox.failed.contains_key(&waited.ticket)
            || !self.reader.would_wait(offset)
            || waited.count >= MOST_WAITS + waited.failed_loads
        {
            return false;
        }
        let own = &self.shared.slices[self.slice];
        let times = &attempt.times;
        let waited = Waited {
            count: waited.count + 1,
            since: Some(Instant::now()),
            queue_ns: times.queue_ns,
            wait_ns: times.read_ns,
            ..waited
        };
        // Without a descriptor for the wait, this thread waits itself.
        let Ok(ready) = own.waiting.add(Fault { waited, ..fault }) else { return false };
        if self.shared.background() && self.shared.loading.is_by_background(attempt.place.page) {
            self.shared.population.catch_up();
        }
        self.reader.when_ready(offset, ready);
        true
    }

    /// Loads a missing page and installs what was loaded. `None` means that the caller has to look at the page's state
    /// again.
    fn load_and_install(&mut self, attempt: &mut Attempt) -> Option<Result<bool, ResolveError>> {
        let Handler { shared, slice, reader, retry, inbox, resolver, .. } = self;
        let own = &shared.slices[*slice];
        let Attempt { place, source_offset, .. } = *attempt;
        // Without background loading, no other thread can be loading this page.
        let _mark = match shared.background() && !attempt.has_waited {
            true => match shared.loading.by_demand(place.page) {
                // A background thread may have installed it between the check of its state and the mark.
                Some(_) if shared.states.of(place.page) != PageState::Missing => return None,
                Some(mark) => Some(mark),
                None => {
                    attempt.has_waited = true;
                    shared.population.catch_up();
                    return None;
                }
            },
            false => None,
        };
        let loaded = match inbox.failed.remove(&attempt.waited.ticket) {
            Some(error) => Err(error),
            None => traced!("load", source_offset, reader.load(source_offset)),
        };
        match loaded {
            Ok(load) => {
                let cost = load.cost();
                attempt.times.read_ns += cost.read_ns;
                attempt.times.decode_ns += cost.decode_ns;
                own.counters.read(cost.bytes_read);
                let started = Instant::now();
                let installed =
                    traced!("install", source_offset, resolver.install(shared, place, load, inbox));
                let ended = *attempt.installed_at.insert(resolver.installed_at());
                attempt.times.install_ns += nanoseconds(started, ended);
                Some(installed)
            }
            Err(error)
                if error.kind() == SourceErrorKind::Transient
                    && attempt.waited.failed_loads < retry.retries
                    && !shared.stopping.load(Ordering::Relaxed) =>
            {
                own.counters.retried();
                thread::sleep(retry.pause(attempt.waited.failed_loads));
                attempt.waited.failed_loads += 1;
                None
            }
            Err(error) => Some(Err(ResolveError::Failed(FailureCause::Source(error)))),
        }
    }

    /// Reports the failure and poisons the page. Returns whether the caller has to look at the page's state again.
    fn fail_page(&mut self, attempt: &Attempt, cause: FailureCause) -> bool {
        // The report comes first, so that its cause is known when SIGBUS arrives.
        self.shared.failures.report(Failure {
            source_offset: Some(attempt.source_offset),
            host_addr: Some(attempt.place.host_addr),
            thread: self.slice,
            cause,
        });
        match self.resolver.poison(&self.shared, attempt.place, &mut self.inbox) {
            // The page was removed meanwhile, or another thread has installed it.
            Ok(false) => return self.may_continue(),
            // The faulting thread keeps waiting. It never sees zeros.
            Err(ResolveError::Failed(_)) => self.shared.failures.unpoisonable(),
            _ => {}
        }
        false
    }

    /// Counts how long a thread has waited for a page. After enough waiting, background loading starts.
    fn waited(&mut self, place: Place, times: &FaultTimes) {
        let shared = &self.shared;
        let [service, read] = [times.service_ns, times.read_ns].map(Duration::from_nanos);
        let source_offset = shared.layout.source_offset(place);
        let delay = std::mem::take(&mut self.delay);
        let installed = || shared.data_bytes();
        if shared.population.waited(place.page, source_offset, service + delay, read, installed)
            && self.wait_bucket.add(service, delay, self.last_now)
            && !shared.population.loads_ahead()
        {
            self.follower.unbound(|| start::on_demand(shared));
        }
    }

    fn stopping(&self) -> bool {
        self.shared.stopping.load(Ordering::Relaxed)
    }

    /// Whether messages can still be read and the pager is not stopping.
    fn may_continue(&self) -> bool {
        self.inbox.broken.is_none() && !self.stopping()
    }

    /// Fails all missing pages after an error that leaves faults unanswered, so that no thread waits forever.
    fn fail_all(&mut self, cause: FailureCause) {
        self.report(cause);
        self.poison_all();
    }

    fn poison_all(&mut self) {
        if !self.shared.poison_missing(self.slice, &mut self.inbox) {
            self.shared.failures.unpoisonable();
        }
    }

    fn report(&self, cause: FailureCause) {
        let failure = Failure { source_offset: None, host_addr: None, thread: self.slice, cause };
        self.shared.failures.report(failure);
    }
}

/// The process that owned the memory has ended.
struct ProcessGone;

/// 0 if `end` is before `start`.
fn nanoseconds(start: Instant, end: Instant) -> u64 {
    u64::try_from(end.saturating_duration_since(start).as_nanos()).unwrap_or(u64::MAX)
}

fn panic_text(payload: &(dyn Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else {
        "with a value that is not text".to_owned()
    }
}
