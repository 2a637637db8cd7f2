//! The faults of one slice whose pages have to come from another host. Their demand thread answers other faults
//! meanwhile, and answers these when their pages can be loaded without waiting.

use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use crate::fault::queued::{Fault, Ticket};
use crate::source::error::SourceError;
use crate::source::load::WhenReady;

/// A fault that waits for longer than this is counted as stalled.
pub(crate) const STALL: Duration = Duration::from_secs(1);

/// The faults of a slice that wait.
#[derive(Debug)]
pub(crate) struct WaitingFaults {
    /// Created for the first fault that waits, so that a pager of a local file needs no further descriptor.
    arrivals: OnceLock<Arc<Arrivals>>,
    state: Mutex<State>,
    created: Instant,
    /// When the fault that is being answered was read: nanoseconds after `created`, plus one. 0: there is none.
    answering: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    faults: Vec<(Ticket, Fault)>,
    last: Ticket,
}

/// The ends of waits, for the demand thread.
#[derive(Debug)]
struct Arrivals {
    ended: Mutex<Vec<(Ticket, Result<(), SourceError>)>>,
    /// The demand thread polls it.
    event: OwnedFd,
}

/// The end of one wait. If the source drops it, the wait ends with an error.
struct Arrival {
    arrivals: Arc<Arrivals>,
    ticket: Ticket,
    result: Result<(), SourceError>,
}

impl Arrival {
    fn end(mut self, result: Result<(), SourceError>) {
        self.result = result;
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        let result = mem::replace(&mut self.result, Ok(()));
        let mut ended = lock(&self.arrivals.ended);
        ended.push((self.ticket, result));
        // While the lock is held, so that the event is readable exactly while there are ends: a demand thread that had
        // taken this end before the write would poll without end. The write fails only if the counter is full.
        let _ = rustix::io::write(&self.arrivals.event, &1u64.to_ne_bytes());
    }
}

impl WaitingFaults {
    pub(crate) fn none() -> WaitingFaults {
        WaitingFaults {
            arrivals: OnceLock::new(),
            state: Mutex::default(),
            created: Instant::now(),
            answering: AtomicU64::new(0),
        }
    }

    /// Adds a fault. The source calls the result when the wait has ended.
    ///
    /// # Errors
    /// If there is no descriptor for that. Then the demand thread has to wait itself.
    pub(crate) fn add(&self, fault: Fault) -> io::Result<WhenReady> {
        let arrivals = match self.arrivals.get() {
            Some(arrivals) => arrivals,
            None => {
                let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
                self.arrivals.get_or_init(|| Arc::new(Arrivals { ended: Mutex::default(), event }))
            }
        };
        let mut state = lock(&self.state);
        state.last += 1;
        let ticket = state.last;
        state.faults.push((ticket, fault));
        let dropped = Err(SourceError::permanent("the source has dropped a wait for a page"));
        let arrival = Arrival { arrivals: Arc::clone(arrivals), ticket, result: dropped };
        Ok(Box::new(move |result| arrival.end(result)))
    }

    /// The descriptor that is readable when waits have ended, if any fault has waited so far.
    pub(crate) fn event(&self) -> Option<BorrowedFd<'_>> {
        self.arrivals.get().map(|arrivals| arrivals.event.as_fd())
    }

    /// Whether waits have ended.
    pub(crate) fn have_ended(&self) -> bool {
        self.arrivals.get().is_some_and(|arrivals| !lock(&arrivals.ended).is_empty())
    }

    /// Passes each fault whose wait has ended to `each`, with the number of the wait and an error, if there was one.
    pub(crate) fn take_ended(&self, mut each: impl FnMut(Ticket, Fault, Option<SourceError>)) {
        let Some(arrivals) = self.arrivals.get() else { return };
        let mut ended = lock(&arrivals.ended);
        if ended.is_empty() {
            return;
        }
        let _ = rustix::io::read(&arrivals.event, &mut [0; 8]);
        let taken = mem::take(&mut *ended);
        drop(ended);
        let mut state = lock(&self.state);
        for (ticket, result) in taken {
            if let Some(at) = state.faults.iter().position(|(number, _)| *number == ticket) {
                let (_, fault) = state.faults.swap_remove(at);
                each(ticket, fault, result.err());
            }
        }
    }

    /// Ends all waits without their sources, and passes their faults to `each`.
    pub(crate) fn end_all(&self, each: impl FnMut(Fault)) {
        mem::take(&mut lock(&self.state).faults).into_iter().map(|(_, fault)| fault).for_each(each);
    }

    /// Called when the demand thread begins to answer a fault, and with `None` after that.
    pub(crate) fn answering(&self, fault: Option<&Fault>) {
        let since = fault.map_or(0, |fault| {
            fault.read_at.saturating_duration_since(self.created).as_nanos() as u64 + 1
        });
        self.answering.store(since, Ordering::Relaxed);
    }

    /// The number of faults that have waited for longer than [`STALL`] now.
    pub(crate) fn stalled(&self, now: Instant) -> u64 {
        let stalled = |since: Instant| now.saturating_duration_since(since) > STALL;
        let waiting = lock(&self.state).faults.iter().filter(|(_, f)| stalled(f.read_at)).count();
        let answering = match self.answering.load(Ordering::Relaxed) {
            0 => false,
            since => stalled(self.created + Duration::from_nanos(since - 1)),
        };
        waiting as u64 + u64::from(answering)
    }

    /// Called when the demand thread ends: no fault is answered any more. Returns how many of them were stalled.
    pub(crate) fn clear(&self) -> u64 {
        self.answering(None);
        let stalled = self.stalled(Instant::now());
        lock(&self.state).faults.clear();
        stalled
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    fn fault(address: u64, read_at: Instant) -> Fault {
        Fault { address, thread_id: 0, write_protected: false, read_at, waited: Default::default() }
    }

    fn ended(waiting: &WaitingFaults) -> Vec<(u64, Option<String>)> {
        let mut ended = Vec::new();
        waiting.take_ended(|_, fault, error| {
            ended.push((fault.address, error.map(|error| error.to_string())));
        });
        ended
    }

    #[test]
    fn each_wait_ends_once_also_one_that_the_source_has_dropped() {
        let waiting = WaitingFaults::none();
        assert!(waiting.event().is_none());
        let add = |address| waiting.add(fault(address, Instant::now())).expect("a descriptor");
        let (one, two, three) = (add(1), add(2), add(3));
        assert!(!waiting.have_ended() && ended(&waiting).is_empty());
        two(Ok(()));
        drop(three);
        assert!(waiting.have_ended());
        let dropped = "the source has dropped a wait for a page".to_owned();
        assert_eq!(ended(&waiting), [(2, None), (3, Some(dropped))]);
        assert!(!waiting.have_ended() && ended(&waiting).is_empty());
        assert_eq!(waiting.clear(), 0);
        one(Err(SourceError::transient("too late")));
        assert!(ended(&waiting).is_empty());
    }

    /// Otherwise the demand thread would poll without end, or would not wake.
    #[test]
    fn the_event_is_readable_exactly_while_there_are_ends() {
        let waiting = WaitingFaults::none();
        let readable = |waiting: &WaitingFaults| {
            let event = waiting.event().expect("a fault has waited");
            poll(&mut [PollFd::new(&event, PollFlags::IN)], Some(&Timespec::default()))
                .expect("it polls")
                == 1
        };
        for _ in 0..200 {
            let waits: Vec<_> = (0..8)
                .map(|at| waiting.add(fault(at, Instant::now())).expect("a descriptor"))
                .collect();
            let source = thread::spawn(move || waits.into_iter().for_each(|ready| ready(Ok(()))));
            let mut found = 0;
            while found < 8 {
                found += ended(&waiting).len();
            }
            source.join().expect("it ends");
            assert!(!readable(&waiting));
        }
        waiting.add(fault(9, Instant::now())).expect("a descriptor")(Ok(()));
        assert!(readable(&waiting) && ended(&waiting).len() == 1 && !readable(&waiting));
    }

    #[test]
    fn faults_stall_after_a_second() {
        let waiting = WaitingFaults::none();
        let now = Instant::now();
        let _kept = waiting.add(fault(1, now)).expect("a descriptor");
        waiting.answering(Some(&fault(2, now + STALL / 2)));
        let after = |time: Duration| waiting.stalled(now + time);
        assert_eq!([after(STALL), after(STALL + STALL / 4), after(2 * STALL)], [0, 1, 2]);
        waiting.answering(None);
        assert_eq!(after(2 * STALL), 1);
    }
}
