//! The demand thread of one slice: reads its messages and answers its faults.

use std::any::Any;
use std::io;
use std::os::fd::AsFd;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use crate::answer::{Desk, Trouble};
use crate::failure::{Failure, FailureCause};
use crate::inbox::{Fault, Inbox};
use crate::latency::FaultTimes;
use crate::layout::Place;
use crate::page_state::PageState;
use crate::placement::Follower;
use crate::populate::{Progress, Waiting};
use crate::slice::Shared;
use crate::source::{Load, PageReader, SourceError, SourceErrorKind};
use crate::traced::traced;
use crate::uffd::Wait;

/// How often a load that fails for a passing reason is tried again, and with what pauses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Tries after the first one.
    pub retries: u32,
    /// The first pause; each further one is twice as long.
    pub first_pause: Duration,
    /// No pause is longer.
    pub longest_pause: Duration,
}

impl Default for RetryPolicy {
    /// Five retries, after 1, 2, 4, 8 and 16 ms.
    fn default() -> RetryPolicy {
        RetryPolicy {
            retries: 5,
            first_pause: Duration::from_millis(1),
            longest_pause: Duration::from_millis(100),
        }
    }
}

impl RetryPolicy {
    pub(crate) fn pause(&self, failed_loads: u32) -> Duration {
        let factor = 1u32.checked_shl(failed_loads).unwrap_or(u32::MAX);
        self.first_pause.saturating_mul(factor).min(self.longest_pause)
    }
}

/// What a demand thread owns.
pub(crate) struct Handler {
    pub(crate) shared: Arc<Shared>,
    pub(crate) slice: usize,
    pub(crate) reader: Box<dyn PageReader>,
    pub(crate) retry: RetryPolicy,
    pub(crate) stop: Arc<io::PipeReader>,
    pub(crate) follower: Follower,
    pub(crate) inbox: Inbox,
    pub(crate) desk: Desk,
    /// When it last looked at the clock: a look takes 30 ns, and some are 1 % of an answer.
    pub(crate) looked: Instant,
    pub(crate) waiting: Waiting,
}

/// Why a handler leaves its loop.
enum End {
    /// Stopped, or the process that owned the memory is gone.
    Clean,
    Failed(FailureCause),
}

impl Handler {
    /// The thread's body. After a panic it goes on once, with a source that has only errors: whoever
    /// waits, or touches a missing page later, is told so and does not hang.
    pub(crate) fn run(mut self) {
        self.follower.begin();
        let shared = Arc::clone(&self.shared);
        let standing = &shared.slices[self.slice].standing;
        standing.begin();
        self.live();
        standing.end();
    }

    fn live(&mut self) {
        for _life in 0..2 {
            match panic::catch_unwind(AssertUnwindSafe(|| self.serve_until_stopped())) {
                Ok(End::Clean) => return,
                Ok(End::Failed(cause)) => return self.fail_all(cause),
                Err(payload) => self.report(FailureCause::Panic(panic_text(payload.as_ref()))),
            }
            // What panicked may be in any state: not even its destructor is run.
            let panicked = std::mem::replace(&mut self.reader, Box::new(Panicked));
            std::mem::forget(panicked);
        }
        // What panics again is no source, and this thread ends.
        self.poison_all();
    }

    fn serve_until_stopped(&mut self) -> End {
        loop {
            // A fault leaves the line only when it is answered: a panic in between does not lose it.
            while let Some(&fault) = self.inbox.faults.front() {
                if self.serve(fault).is_err() || self.stopping() {
                    return End::Clean;
                }
                if let Some(error) = self.inbox.broken.take() {
                    return End::Failed(FailureCause::Messages(error));
                }
                self.inbox.faults.pop_front();
                self.follower.served(fault, self.looked, &self.shared, self.slice);
            }
            if let Some(event) = self.inbox.unserved.take() {
                // Other events can still be read, and moved memory still fails here: go on for them.
                self.fail_all(FailureCause::Event(format!("{event:?}")));
                if self.stopping() {
                    return End::Clean;
                }
                continue;
            }
            // While a thread of the same CPU faults, its next fault is there as soon as this one runs again: that saves
            // asking whether one is.
            if let Err(error) = self.receive() {
                return End::Failed(FailureCause::Messages(error));
            }
            if !self.inbox.faults.is_empty() || self.inbox.unserved.is_some() {
                self.shared.slices[self.slice].answering.store(true, Ordering::Relaxed);
                continue;
            }
            let slice = &self.shared.slices[self.slice];
            slice.answering.store(false, Ordering::Relaxed);
            self.follower.idle(slice);
            if let Some((how_long, meanwhile)) = self.follower.awake() {
                let began = Instant::now();
                while began.elapsed() < how_long
                    && !slice.filler.uffd.readable()
                    && !self.stopping()
                {
                    meanwhile();
                }
            }
            match slice.filler.uffd.wait(self.stop.as_fd()) {
                Ok(Wait::Stop) => return End::Clean,
                Ok(Wait::Readable) => slice.answering.store(true, Ordering::Relaxed),
                Err(error) => return End::Failed(FailureCause::Messages(error)),
            }
        }
    }

    /// Reads what messages there are.
    fn receive(&mut self) -> io::Result<usize> {
        let _gate = self.shared.slices[self.slice].gate.demand();
        self.inbox.receive(&self.shared, self.slice)
    }

    /// Answers one fault, by the state of its page.
    fn serve(&mut self, fault: Fault) -> Result<(), ProcessGone> {
        let Handler { shared, slice, reader, retry, inbox, desk, looked, .. } = self;
        let own = &shared.slices[*slice];
        own.counters.fault();
        // It is its turn since the one before was answered, or since it was read.
        let queue_ns = nanoseconds(fault.read_at, *looked);
        let mut times = FaultTimes { queue_ns, ..FaultTimes::default() };
        let mut failed_loads = 0;
        // Only registered memory faults, and all of it is in the layout.
        let Some(place) = shared.layout.at_host(fault.address) else {
            let cause = FailureCause::Event(format!("a fault outside, at {:#x}", fault.address));
            shared.failures.report(Failure {
                source_offset: None,
                host_addr: Some(fault.address),
                thread: *slice,
                cause,
            });
            if !shared.poison_outside(*slice, fault.address, inbox) {
                shared.failures.unpoisonable();
            }
            return Ok(());
        };
        let source_offset = shared.layout.source_offset(place);
        #[cfg(feature = "tracing")]
        let _span = tracing::trace_span!("fault", source_offset).entered();
        let mut installed_at = None;
        // A background thread was just loading this page: waited for once.
        let mut met = false;
        loop {
            let answered = match shared.states.of(place.page) {
                PageState::Missing => {
                    // While nothing is loaded in the background there is nothing to meet.
                    let mark = match shared.background() && !met {
                        true => match shared.loading.by_demand(place.page) {
                            Some(mark) => Some(mark),
                            None => {
                                met = true;
                                shared.population.catch_up();
                                continue;
                            }
                        },
                        false => None,
                    };
                    let answered = match traced!("load", source_offset, reader.load(source_offset))
                    {
                        Ok(load) => {
                            let cost = load.cost();
                            times.read_ns += cost.read_ns;
                            times.decode_ns += cost.decode_ns;
                            own.counters.read(cost.bytes_read);
                            let started = Instant::now();
                            let installed = traced!(
                                "install",
                                source_offset,
                                desk.install(shared, place, load, inbox)
                            );
                            let ended = *installed_at.insert(desk.installed_at());
                            times.install_ns += nanoseconds(started, ended);
                            installed
                        }
                        Err(error)
                            if error.kind() == SourceErrorKind::Transient
                                && failed_loads < retry.retries
                                && !shared.stopping.load(Ordering::Relaxed) =>
                        {
                            own.counters.retried();
                            thread::sleep(retry.pause(failed_loads));
                            failed_loads += 1;
                            continue;
                        }
                        Err(error) => Err(Trouble::Failed(FailureCause::Source(error))),
                    };
                    drop(mark);
                    answered
                }
                // The fault came twice, or the page was removed since: it becomes zero if it is really
                // not there, and it never gets the source's content again.
                PageState::Present | PageState::Removed => {
                    installed_at = None;
                    desk.answer(shared, place, inbox)
                }
                PageState::Poisoned => {
                    installed_at = None;
                    desk.poison(shared, place, inbox)
                }
            };
            match answered {
                Ok(true) => break,
                // Removed while it was being installed: answer by its new state.
                Ok(false) if inbox.broken.is_none() && !shared.stopping.load(Ordering::Relaxed) => {
                }
                Ok(false) => return Ok(()),
                Err(Trouble::ProcessGone) => return Err(ProcessGone),
                // It found the source gone that the population has just done with.
                Err(Trouble::Failed(_)) if own.is_released() => {
                    // Wakes who waits.
                    let _ = desk.answer(shared, place, inbox);
                    return Ok(());
                }
                Err(Trouble::Failed(cause)) => {
                    // First the word, then the deed: when SIGBUS arrives, its cause is known.
                    shared.failures.report(Failure {
                        source_offset: Some(source_offset),
                        host_addr: Some(place.host_addr),
                        thread: *slice,
                        cause,
                    });
                    match desk.poison(shared, place, inbox) {
                        // Removed meanwhile, or brought by another thread: answer by its new state.
                        Ok(false)
                            if inbox.broken.is_none()
                                && !shared.stopping.load(Ordering::Relaxed) =>
                        {
                            continue;
                        }
                        // The thread that waits goes on waiting: it never sees zeros.
                        Err(Trouble::Failed(_)) => shared.failures.unpoisonable(),
                        _ => {}
                    }
                    break;
                }
            }
        }
        *looked = installed_at.unwrap_or_else(Instant::now);
        times.service_ns = nanoseconds(fault.read_at, *looked);
        own.recorder.record(shared.layout.extent(place.extent).region, times);
        self.waited(place, times.service_ns);
        Ok(())
    }

    /// A thread has waited for a page: enough of that begins the loading in the background.
    fn waited(&mut self, place: Place, service_ns: u64) {
        let (shared, service) = (&self.shared, Duration::from_nanos(service_ns));
        let source_offset = shared.layout.source_offset(place);
        if shared.population.waited(place.page, source_offset, service)
            && self.waiting.add(service, self.looked)
            && !shared.population.loads_ahead()
        {
            self.follower.unbound(|| Progress::demanded(shared));
        }
    }

    fn stopping(&self) -> bool {
        self.shared.stopping.load(Ordering::Relaxed)
    }

    /// Faults can no longer be served rightly: all that is missing fails, and so nobody waits for ever.
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

/// The reader of a thread whose own has panicked.
pub(crate) struct Panicked;

impl PageReader for Panicked {
    fn load(&mut self, _source_offset: u64) -> Result<Load<'_>, SourceError> {
        Err(SourceError::permanent("the source panicked before"))
    }
}

/// None if `end` is before `start`.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        let policy = RetryPolicy::default();
        let pauses: Vec<_> = [0, 1, 4, 7, 40].map(|n| policy.pause(n).as_millis()).into();
        assert_eq!(pauses, [1, 2, 16, 100, 100]);
    }
}
