//! What the command waits for: told on stderr after a second, and ended when the user interrupts.
//!
//! A thread that begins what may wait for something else (another program, a slow disk, a lock) begins a [`Wait`]
//! before. That costs no system call. The thread that hears signals looks at all waits when one of them has
//! lasted for a second, and when the user interrupts: so a wait in the middle of a system call that no signal
//! ends is heard of, and ended, like any other.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A wait is told of after so long.
pub(crate) const TOLD_AFTER: Duration = Duration::from_secs(1);
/// One that comes to its end and begins again is not told of more often.
const TOLD_EVERY: Duration = Duration::from_secs(10);
/// A command that was interrupted, and waits for nothing that was begun here, has so long to come to its end.
const ENDED_AFTER: Duration = Duration::from_secs(5);

static WAITS: Mutex<Waits> = Mutex::new(Waits::new(&LOOKS_SOON));

/// Something to be waited for.
pub(crate) struct Wait {
    /// Nothing where nothing is to be told.
    what: Option<Box<dyn Fn() -> String + Send>>,
    limit: Option<Duration>,
    fails: Option<String>,
    interrupted: Interrupted,
}

/// What an interrupt does to a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Interrupted {
    /// The process ends immediately. Nothing is lost with what is waited for.
    Ends,
    /// The waiting thread sees it and returns. If it does not within [`ENDED_AFTER`], the process ends.
    IsHeard,
    /// Nothing: it has to come to its end.
    Waits,
}

impl Wait {
    /// Waits for what `what` says, which is asked when it is told. An interrupt ends the process
    /// immediately; [`leftovers`](crate::leftovers) removes its files.
    pub(crate) fn new(what: impl Fn() -> String + Send + 'static) -> Self {
        Self { what: Some(Box::new(what)), ..Self::untold() }
    }

    /// As [`Wait::new`], of which nothing is told.
    pub(crate) fn untold() -> Self {
        Self { what: None, limit: None, fails: None, interrupted: Interrupted::Ends }
    }

    /// The waiting thread gives it up after so long.
    pub(crate) fn at_most(self, limit: Duration) -> Self {
        Self { limit: Some(limit), ..self }
    }

    /// After so long the process ends, with this message.
    pub(crate) fn fails_after(self, limit: Duration, message: String) -> Self {
        Self { limit: Some(limit), fails: Some(message), ..self }
    }

    /// The waiting thread sees an interrupt itself.
    pub(crate) fn hears(self) -> Self {
        Self { interrupted: Interrupted::IsHeard, ..self }
    }

    /// The first interrupt does not end it; the second ends the process, as always.
    pub(crate) fn outlasts(self) -> Self {
        Self { interrupted: Interrupted::Waits, ..self }
    }

    /// Begins it; it ends when the answer is dropped.
    pub(crate) fn begin(self) -> Waiting {
        lock().begin(self, Instant::now())
    }
}

/// A wait that has begun.
#[must_use]
pub(crate) struct Waiting(u64);

impl Waiting {
    /// Something has come: from now on it is waited for the next.
    pub(crate) fn moved(&self) {
        let now = Instant::now();
        if let Some(entry) = lock().entries.iter_mut().find(|entry| entry.id == self.0) {
            entry.since = now;
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        lock().entries.retain(|entry| entry.id != self.0);
    }
}

/// A wait that begins and ends too often to be noted each time, as that for a page.
pub(crate) struct Often {
    /// Since when, in milliseconds since [`EPOCH`]; 0 while nothing is waited for.
    since_ms: Arc<AtomicU64>,
    _noted: Waiting,
}

/// When this process began to wait, less a moment, so that no time is 0.
static EPOCH: LazyLock<Instant> = LazyLock::new(|| Instant::now() - Duration::from_millis(1));
/// Whether the thread that looks does so within a second, without being woken. It does in the first one.
static LOOKS_SOON: AtomicBool = AtomicBool::new(true);

impl Often {
    /// None has begun yet.
    pub(crate) fn new(wait: Wait) -> Self {
        let since_ms = Arc::new(AtomicU64::new(0));
        let mut waits = lock();
        let noted = waits.begin(wait, Instant::now());
        if let Some(entry) = waits.entries.last_mut() {
            entry.often = Some(Arc::clone(&since_ms));
        }
        Self { since_ms, _noted: noted }
    }

    /// Begins one; costs some nanoseconds, and once a second a wake-up.
    pub(crate) fn begin(&self) {
        let since = Instant::now().saturating_duration_since(*EPOCH).as_millis() as u64;
        self.since_ms.store(since.max(1), Ordering::Release);
        if !LOOKS_SOON.load(Ordering::Relaxed) && !LOOKS_SOON.swap(true, Ordering::AcqRel) {
            lock().wake();
        }
    }

    /// It is over.
    pub(crate) fn end(&self) {
        self.since_ms.store(0, Ordering::Release);
    }
}

/// Nothing is told from now on.
pub(crate) fn be_quiet() {
    lock().quiet = true;
}

/// Has this socket written to when [`look`] should be called before it has said.
pub(crate) fn wake_by(waker: Arc<UnixStream>) {
    let mut waits = lock();
    waits.waker = Some(waker);
    // A wait that begins within the first second is seen at the end of that second, without a wake-up.
    waits.looks_at = Some(Instant::now() + TOLD_AFTER);
}

/// Notes that the user has interrupted.
pub(crate) fn interrupted() {
    lock().interrupted.get_or_insert_with(Instant::now);
}

/// What is to be done now. `busy`: processes that were told of the interrupt have not ended.
pub(crate) fn look(busy: bool) -> Look {
    lock().look(Instant::now(), busy)
}

/// What there is to do.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Look {
    /// Lines to be told.
    pub(crate) words: Vec<String>,
    /// Whether the process has to end.
    pub(crate) end: Option<End>,
    /// When to look again, at the latest.
    pub(crate) next: Option<Duration>,
}

/// Why the process ends immediately.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum End {
    Interrupted,
    Failed(String),
}

struct Waits {
    looks_soon: &'static AtomicBool,
    entries: Vec<Entry>,
    next_id: u64,
    quiet: bool,
    interrupted: Option<Instant>,
    /// Whether it was told that the end takes long.
    told_of_end: bool,
    waker: Option<Arc<UnixStream>>,
    looks_at: Option<Instant>,
    /// Since when it is looked every second at waits that come often.
    watches_since: Option<Instant>,
}

struct Entry {
    id: u64,
    wait: Wait,
    since: Instant,
    /// Where it is told whether there is a wait at all, and since when.
    often: Option<Arc<AtomicU64>>,
    told: Option<Instant>,
}

impl Entry {
    /// When it is to be told of, if it has not been.
    fn tell_at(&self) -> Option<Instant> {
        match self.told {
            None => Some(self.since + TOLD_AFTER),
            Some(told) if self.since > told => {
                Some((self.since + TOLD_AFTER).max(told + TOLD_EVERY))
            }
            Some(_) => None,
        }
    }

    fn fails_at(&self) -> Option<Instant> {
        self.wait
            .fails
            .as_ref()
            .and(self.wait.limit)
            .and_then(|limit| self.since.checked_add(limit))
    }

    fn word(&self, interrupted: bool) -> Option<String> {
        let what = self.wait.what.as_ref()?;
        let mut word = format!("snap: waiting for {}", what());
        if let Some(limit) = self.wait.limit {
            word += &format!(", at most {}", humantime::format_duration(limit));
        }
        if self.wait.interrupted != Interrupted::Waits {
            let no_limit = if self.wait.limit.is_none() { "no time limit; " } else { "" };
            let ends = if interrupted { "Ctrl-C again ends it at once" } else { "Ctrl-C ends it" };
            word += &format!(" ({no_limit}{ends})");
        }
        Some(word + "\n")
    }
}

impl Waits {
    const fn new(looks_soon: &'static AtomicBool) -> Self {
        Self {
            looks_soon,
            entries: Vec::new(),
            next_id: 0,
            quiet: false,
            interrupted: None,
            told_of_end: false,
            waker: None,
            looks_at: None,
            watches_since: None,
        }
    }

    fn begin(&mut self, wait: Wait, now: Instant) -> Waiting {
        let id = self.next_id;
        self.next_id += 1;
        let entry = Entry { id, wait, since: now, often: None, told: None };
        let at = entry.fails_at().map_or(now + TOLD_AFTER, |at| at.min(now + TOLD_AFTER));
        self.entries.push(entry);
        if self.interrupted.is_some() || self.looks_at.is_none_or(|looks_at| looks_at > at) {
            self.looks_at = Some(at);
            self.wake();
        }
        Waiting(id)
    }

    fn wake(&self) {
        // A socket that is full wakes, too.
        let _ = self.waker.as_ref().map(|waker| (&**waker).write(&[0]));
    }

    /// Takes over which of the many short waits are under way.
    fn look_at_short_ones(&mut self, now: Instant, times: &mut Vec<Instant>) {
        let mut waits = false;
        for entry in &mut self.entries {
            if let Some(often) = &entry.often {
                let since_ms = often.load(Ordering::Acquire);
                entry.since = match since_ms {
                    0 => now,
                    ms => *EPOCH + Duration::from_millis(ms),
                };
                waits |= since_ms != 0;
            }
        }
        if !self.looks_soon.load(Ordering::Relaxed) {
            return;
        }
        // Only after a second is it seen whether there are still some.
        match self.watches_since {
            Some(since) if !waits && since + TOLD_AFTER <= now => {
                self.watches_since = None;
                self.looks_soon.store(false, Ordering::Release);
            }
            _ => {
                self.watches_since.get_or_insert(now);
                times.push(now + TOLD_AFTER);
            }
        }
    }

    fn look(&mut self, now: Instant, busy: bool) -> Look {
        let mut look = Look::default();
        let mut times = Vec::new();
        self.look_at_short_ones(now, &mut times);
        for entry in &mut self.entries {
            if entry.tell_at().is_some_and(|at| at <= now) {
                entry.told = Some(now);
                look.words.extend(entry.word(self.interrupted.is_some()));
            }
            if entry.often.is_none() {
                times.extend(entry.tell_at());
            }
            match entry.fails_at() {
                Some(at) if at <= now => {
                    look.end = Some(End::Failed(entry.wait.fails.clone().unwrap_or_default()));
                }
                at => times.extend(at),
            }
        }
        if let Some(interrupted) = self.interrupted {
            let told = self.entries.iter().any(|entry| entry.told.is_some());
            let is = |what| self.entries.iter().any(|entry| entry.wait.interrupted == what);
            let (slow, late) = (interrupted + TOLD_AFTER, interrupted + ENDED_AFTER);
            if is(Interrupted::Ends) || (!is(Interrupted::Waits) && !busy && late <= now) {
                look.end = Some(End::Interrupted);
            } else if !is(Interrupted::Waits) {
                if !self.told_of_end && !told && slow <= now {
                    self.told_of_end = true;
                    let word = "snap: interrupted, and not at its end yet (Ctrl-C again ends it at once)\n";
                    look.words.push(word.into());
                }
                times.push(if slow <= now { late.max(now + TOLD_AFTER) } else { slow });
            }
        }
        if self.quiet {
            look.words.clear();
        }
        self.looks_at = times.iter().min().copied();
        look.next = self.looks_at.map(|at| at.saturating_duration_since(now));
        look
    }
}

fn lock() -> MutexGuard<'static, Waits> {
    WAITS.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(begun: Instant, ms: u64) -> Instant {
        begun + Duration::from_millis(ms)
    }

    /// Of this thread alone.
    fn waits() -> Waits {
        static NEVER: AtomicBool = AtomicBool::new(false);
        Waits::new(&NEVER)
    }

    /// Begins a wait that no thread but this test knows.
    fn begin(waits: &mut Waits, wait: Wait, now: Instant) -> u64 {
        let waiting = waits.begin(wait, now);
        let id = waiting.0;
        std::mem::forget(waiting);
        id
    }

    fn server() -> Wait {
        Wait::new(|| "the server".into())
    }

    #[test]
    fn a_wait_is_told_of_once_after_a_second() {
        let (mut waits, begun) = (waits(), Instant::now());
        begin(&mut waits, server().at_most(Duration::from_secs(30)), begun);
        let look = waits.look(at(begun, 300), false);
        assert_eq!((look.words, look.next), (vec![], Some(Duration::from_millis(700))));
        let look = waits.look(at(begun, 1000), false);
        assert_eq!(look.words, ["snap: waiting for the server, at most 30s (Ctrl-C ends it)\n"]);
        assert_eq!((look.next, look.end), (None, None));
        assert_eq!(waits.look(at(begun, 9000), false), Look::default());
    }

    #[test]
    fn a_wait_that_moves_is_told_of_again_but_not_often() {
        let (mut waits, begun) = (waits(), Instant::now());
        begin(&mut waits, server(), begun);
        assert_eq!(waits.look(at(begun, 1000), false).words.len(), 1);
        waits.entries[0].since = at(begun, 1500);
        assert_eq!(waits.look(at(begun, 2600), false).words.len(), 0);
        let look = waits.look(at(begun, 11_000), false);
        assert_eq!(look.words, ["snap: waiting for the server (no time limit; Ctrl-C ends it)\n"]);
    }

    #[test]
    fn quiet_is_quiet() {
        let (mut waits, begun) = (waits(), Instant::now());
        waits.quiet = true;
        begin(&mut waits, server(), begun);
        assert!(waits.look(at(begun, 1000), false).words.is_empty());
    }

    #[test]
    fn an_interrupt_ends_a_wait_at_once_unless_somebody_hears_of_it() {
        let begun = Instant::now();
        let interrupted = |wait: Option<Wait>, ms, busy| {
            let mut waits = waits();
            wait.map(|wait| begin(&mut waits, wait, begun));
            waits.interrupted = Some(begun);
            waits.look(at(begun, ms), busy)
        };
        assert_eq!(interrupted(Some(server()), 0, false).end, Some(End::Interrupted));
        for wait in [None, Some(server().hears())] {
            let look = interrupted(wait, 1000, false);
            assert_eq!((look.words.len(), look.end), (1, None));
        }
        assert_eq!(interrupted(None, 4999, false).end, None);
        assert_eq!(interrupted(None, 5000, false).end, Some(End::Interrupted));
        assert_eq!(interrupted(Some(server().hears()), 5000, false).end, Some(End::Interrupted));
        // Its processes have been told, and end first.
        assert_eq!(interrupted(None, 5000, true).end, None);
        let look = interrupted(Some(server().outlasts()), 60_000, false);
        assert_eq!((look.words, look.end), (vec!["snap: waiting for the server\n".into()], None));
    }

    #[test]
    fn a_wait_that_may_fail_does_so_in_time() {
        let (mut waits, begun) = (waits(), Instant::now());
        let limit = Duration::from_secs(3);
        begin(&mut waits, server().fails_after(limit, "too late".into()).hears(), begun);
        let look = waits.look(at(begun, 1000), false);
        assert_eq!((look.end, look.next), (None, Some(Duration::from_secs(2))));
        let look = waits.look(at(begun, 3000), false);
        assert_eq!(look.end, Some(End::Failed("too late".into())));
    }

    #[test]
    fn short_waits_are_looked_at_for_as_long_as_there_are_some() {
        static SOON: AtomicBool = AtomicBool::new(true);
        let (mut waits, begun) = (Waits::new(&SOON), Instant::now());
        begin(&mut waits, server(), begun);
        let since_ms = Arc::new(AtomicU64::new(0));
        waits.entries[0].often = Some(Arc::clone(&since_ms));
        let set = |at: Instant| {
            let since = at.saturating_duration_since(*EPOCH).as_millis() as u64;
            since_ms.store(since, Ordering::Release);
        };
        let second = Some(Duration::from_secs(1));
        assert_eq!(waits.look(at(begun, 1000), false), Look { next: second, ..Look::default() });
        set(at(begun, 1900));
        assert_eq!(waits.look(at(begun, 2000), false), Look { next: second, ..Look::default() });
        let look = waits.look(at(begun, 3000), false);
        assert_eq!((look.words.len(), look.next), (1, second));
        // It came to its end, and nothing begins any more.
        since_ms.store(0, Ordering::Release);
        assert_eq!(waits.look(at(begun, 4000), false), Look::default());
        assert!(!SOON.load(Ordering::Acquire));
    }

    #[test]
    fn whoever_looks_is_woken_only_for_what_it_would_see_too_late() {
        let (mut waits, begun) = (waits(), Instant::now());
        let (waker, woken) = UnixStream::pair().unwrap();
        woken.set_nonblocking(true).unwrap();
        let was_woken = || std::io::Read::read(&mut &woken, &mut [0; 8]).is_ok();
        waits.waker = Some(Arc::new(waker));
        waits.looks_at = Some(at(begun, 1000));
        begin(&mut waits, server(), at(begun, 500));
        assert!(!was_woken());
        waits.entries.clear();
        assert_eq!(waits.look(at(begun, 1000), false).next, None);
        begin(&mut waits, server(), at(begun, 2000));
        assert!(was_woken());
        begin(&mut waits, server(), at(begun, 2500));
        assert!(!was_woken());
        waits.interrupted = Some(at(begun, 2600));
        begin(&mut waits, server(), at(begun, 2700));
        assert!(was_woken());
    }
}
