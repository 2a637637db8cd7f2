//! The waits of a command: reported on stderr after a second, and ended when the user interrupts.
//!
//! A thread that may have to wait for something else (another program, a slow disk, a lock) begins a [`Wait`] before.
//! That costs no system call. The thread that handles signals checks all waits when one of them has lasted for a
//! second, and when the user interrupts. So a wait in the middle of a system call that no signal ends is reported, and
//! ended, like any other.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A wait is reported after this time.
pub(crate) const REPORTED_AFTER: Duration = Duration::from_secs(1);
/// A wait that ends and begins again is not reported more often.
const REPORTED_EVERY: Duration = Duration::from_secs(10);
/// An interrupted command without a [`Wait`] has this time to end.
const ENDED_AFTER: Duration = Duration::from_secs(5);

static WAITS: Mutex<Waits> = Mutex::new(Waits::new(&LOOKS_SOON));

/// A wait for something.
pub(crate) struct Wait {
    /// `None` if the wait is not reported.
    what: Option<Box<dyn Fn() -> String + Send>>,
    limit: Option<Duration>,
    fails: Option<String>,
    interrupted: Interrupted,
}

/// What an interrupt does to a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Interrupted {
    /// The process ends immediately. Nothing is lost by that.
    Ends,
    /// The waiting thread sees it and returns. If it does not within [`ENDED_AFTER`], the process ends.
    Handled,
    /// Nothing: the wait must end by itself.
    Waits,
}

impl Wait {
    /// A wait for `what`, which is called when the wait is reported. An interrupt ends the process immediately;
    /// [`leftovers`](crate::leftovers) removes its files.
    pub(crate) fn new(what: impl Fn() -> String + Send + 'static) -> Self {
        Self { what: Some(Box::new(what)), ..Self::unreported() }
    }

    /// As [`Wait::new`], but not reported.
    pub(crate) fn unreported() -> Self {
        Self { what: None, limit: None, fails: None, interrupted: Interrupted::Ends }
    }

    /// The waiting thread gives up after this time.
    pub(crate) fn at_most(self, limit: Duration) -> Self {
        Self { limit: Some(limit), ..self }
    }

    /// After this time the process ends, with this message.
    pub(crate) fn fails_after(self, limit: Duration, message: String) -> Self {
        Self { limit: Some(limit), fails: Some(message), ..self }
    }

    /// The waiting thread handles an interrupt itself.
    pub(crate) fn hears(self) -> Self {
        Self { interrupted: Interrupted::Handled, ..self }
    }

    /// The first interrupt does not end it; the second ends the process, as always.
    pub(crate) fn outlasts(self) -> Self {
        Self { interrupted: Interrupted::Waits, ..self }
    }

    /// Begins it; it ends when the result is dropped.
    pub(crate) fn begin(self) -> Waiting {
        lock().begin(self, Instant::now())
    }
}

/// A wait that has begun.
#[must_use]
pub(crate) struct Waiting(u64);

impl Waiting {
    /// A step is done: from now on the thread waits for the next one.
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

/// A wait that begins and ends too often to be recorded each time, as that for a page.
pub(crate) struct Often {
    /// Its start, in milliseconds since [`EPOCH`]; 0 while there is no wait.
    since_ms: Arc<AtomicU64>,
    _noted: Waiting,
}

/// When this process began to wait, less a moment, so that no time is 0.
static EPOCH: LazyLock<Instant> = LazyLock::new(|| Instant::now() - Duration::from_millis(1));
/// Whether the checking thread checks within a second, without being woken. It does so in the first second.
static LOOKS_SOON: AtomicBool = AtomicBool::new(true);

impl Often {
    /// No wait has begun yet.
    pub(crate) fn new(wait: Wait) -> Self {
        let since_ms = Arc::new(AtomicU64::new(0));
        let mut waits = lock();
        let noted = waits.begin(wait, Instant::now());
        if let Some(entry) = waits.entries.last_mut() {
            entry.often = Some(Arc::clone(&since_ms));
        }
        Self { since_ms, _noted: noted }
    }

    /// Begins a wait. This takes some nanoseconds, and once a second a wake-up.
    pub(crate) fn begin(&self) {
        let since = Instant::now().saturating_duration_since(*EPOCH).as_millis() as u64;
        self.since_ms.store(since.max(1), Ordering::Release);
        if !LOOKS_SOON.load(Ordering::Relaxed) && !LOOKS_SOON.swap(true, Ordering::AcqRel) {
            lock().wake();
        }
    }

    /// Ends the wait.
    pub(crate) fn end(&self) {
        self.since_ms.store(0, Ordering::Release);
    }
}

/// No wait is reported from now on.
pub(crate) fn be_quiet() {
    lock().quiet = true;
}

/// Sets the socket that is written to when [`look`] must be called earlier than it has returned.
pub(crate) fn wake_by(waker: Arc<UnixStream>) {
    let mut waits = lock();
    waits.waker = Some(waker);
    // A wait that begins within the first second is seen at the end of that second, without a wake-up.
    waits.looks_at = Some(Instant::now() + REPORTED_AFTER);
}

/// Wakes the thread that looks.
pub(crate) fn wake() {
    lock().wake();
}

/// Records that the user has interrupted.
pub(crate) fn interrupted() {
    lock().interrupted.get_or_insert_with(Instant::now);
}

/// Returns what is to be done now. `busy`: processes that have got the interrupt have not ended.
pub(crate) fn look(busy: bool) -> Look {
    lock().look(Instant::now(), busy)
}

/// What is to be done.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Look {
    /// Lines to be printed.
    pub(crate) lines: Vec<String>,
    /// Whether the process has to end.
    pub(crate) end: Option<End>,
    /// The time until the next check, at the latest.
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
    /// Whether it was reported that the end takes long.
    end_reported: bool,
    waker: Option<Arc<UnixStream>>,
    looks_at: Option<Instant>,
    /// Since when waits that come often are checked every second.
    watches_since: Option<Instant>,
}

struct Entry {
    id: u64,
    wait: Wait,
    since: Instant,
    /// Has the start of the wait, if there is one at the moment.
    often: Option<Arc<AtomicU64>>,
    reported: Option<Instant>,
}

impl Entry {
    /// When it is to be reported, if it was not.
    fn report_at(&self) -> Option<Instant> {
        match self.reported {
            None => Some(self.since + REPORTED_AFTER),
            Some(reported) if self.since > reported => {
                Some((self.since + REPORTED_AFTER).max(reported + REPORTED_EVERY))
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

    fn line(&self, interrupted: bool) -> Option<String> {
        let what = self.wait.what.as_ref()?;
        let mut line = format!("snap: waiting for {}", what());
        if let Some(limit) = self.wait.limit {
            line += &format!(", at most {}", humantime::format_duration(limit));
        }
        if self.wait.interrupted != Interrupted::Waits {
            let no_limit = if self.wait.limit.is_none() { "no time limit; " } else { "" };
            let ends =
                if interrupted { "Ctrl-C again ends it immediately" } else { "Ctrl-C ends it" };
            line += &format!(" ({no_limit}{ends})");
        }
        Some(line + "\n")
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
            end_reported: false,
            waker: None,
            looks_at: None,
            watches_since: None,
        }
    }

    fn begin(&mut self, wait: Wait, now: Instant) -> Waiting {
        let id = self.next_id;
        self.next_id += 1;
        let entry = Entry { id, wait, since: now, often: None, reported: None };
        let at = entry.fails_at().map_or(now + REPORTED_AFTER, |at| at.min(now + REPORTED_AFTER));
        self.entries.push(entry);
        if self.interrupted.is_some() || self.looks_at.is_none_or(|looks_at| looks_at > at) {
            self.looks_at = Some(at);
            self.wake();
        }
        Waiting(id)
    }

    fn wake(&self) {
        // A full socket wakes the thread, too.
        let _ = self.waker.as_ref().map(|waker| (&**waker).write(&[0]));
    }

    /// Reads which of the many short waits are in progress.
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
        // Only after a second it is known whether there are still some.
        match self.watches_since {
            Some(since) if !waits && since + REPORTED_AFTER <= now => {
                self.watches_since = None;
                self.looks_soon.store(false, Ordering::Release);
            }
            _ => {
                self.watches_since.get_or_insert(now);
                times.push(now + REPORTED_AFTER);
            }
        }
    }

    fn look(&mut self, now: Instant, busy: bool) -> Look {
        let mut look = Look::default();
        let mut times = Vec::new();
        self.look_at_short_ones(now, &mut times);
        for entry in &mut self.entries {
            if entry.report_at().is_some_and(|at| at <= now) {
                entry.reported = Some(now);
                look.lines.extend(entry.line(self.interrupted.is_some()));
            }
            if entry.often.is_none() {
                times.extend(entry.report_at());
            }
            match entry.fails_at() {
                Some(at) if at <= now => {
                    look.end = Some(End::Failed(entry.wait.fails.clone().unwrap_or_default()));
                }
                at => times.extend(at),
            }
        }
        if let Some(interrupted) = self.interrupted {
            let reported = self.entries.iter().any(|entry| entry.reported.is_some());
            let is = |what| self.entries.iter().any(|entry| entry.wait.interrupted == what);
            let (slow, late) = (interrupted + REPORTED_AFTER, interrupted + ENDED_AFTER);
            if is(Interrupted::Ends) || (!is(Interrupted::Waits) && !busy && late <= now) {
                look.end = Some(End::Interrupted);
            } else if !is(Interrupted::Waits) {
                if !self.end_reported && !reported && slow <= now {
                    self.end_reported = true;
                    let line =
                        "snap: interrupted, and not ended yet (Ctrl-C again ends it immediately)\n";
                    look.lines.push(line.into());
                }
                times.push(if slow <= now { late.max(now + REPORTED_AFTER) } else { slow });
            }
        }
        if self.quiet {
            look.lines.clear();
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

    /// Only of this thread.
    fn waits() -> Waits {
        static NEVER: AtomicBool = AtomicBool::new(false);
        Waits::new(&NEVER)
    }

    /// Begins a wait that only this test knows.
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
    fn a_wait_is_reported_once_after_a_second() {
        let (mut waits, begun) = (waits(), Instant::now());
        begin(&mut waits, server().at_most(Duration::from_secs(30)), begun);
        let look = waits.look(at(begun, 300), false);
        assert_eq!((look.lines, look.next), (vec![], Some(Duration::from_millis(700))));
        let look = waits.look(at(begun, 1000), false);
        assert_eq!(look.lines, ["snap: waiting for the server, at most 30s (Ctrl-C ends it)\n"]);
        assert_eq!((look.next, look.end), (None, None));
        assert_eq!(waits.look(at(begun, 9000), false), Look::default());
    }

    #[test]
    fn a_wait_that_moves_is_reported_again_but_not_often() {
        let (mut waits, begun) = (waits(), Instant::now());
        begin(&mut waits, server(), begun);
        assert_eq!(waits.look(at(begun, 1000), false).lines.len(), 1);
        waits.entries[0].since = at(begun, 1500);
        assert_eq!(waits.look(at(begun, 2600), false).lines.len(), 0);
        let look = waits.look(at(begun, 11_000), false);
        assert_eq!(look.lines, ["snap: waiting for the server (no time limit; Ctrl-C ends it)\n"]);
    }

    #[test]
    fn quiet_is_quiet() {
        let (mut waits, begun) = (waits(), Instant::now());
        waits.quiet = true;
        begin(&mut waits, server(), begun);
        assert!(waits.look(at(begun, 1000), false).lines.is_empty());
    }

    #[test]
    fn an_interrupt_ends_a_wait_immediately_unless_it_is_handled() {
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
            assert_eq!((look.lines.len(), look.end), (1, None));
        }
        assert_eq!(interrupted(None, 4999, false).end, None);
        assert_eq!(interrupted(None, 5000, false).end, Some(End::Interrupted));
        assert_eq!(interrupted(Some(server().hears()), 5000, false).end, Some(End::Interrupted));
        // Its processes have got the interrupt, and end first.
        assert_eq!(interrupted(None, 5000, true).end, None);
        let look = interrupted(Some(server().outlasts()), 60_000, false);
        assert_eq!((look.lines, look.end), (vec!["snap: waiting for the server\n".into()], None));
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
    fn short_waits_are_checked_as_long_as_there_are_some() {
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
        assert_eq!((look.lines.len(), look.next), (1, second));
        // It has ended, and no other begins.
        since_ms.store(0, Ordering::Release);
        assert_eq!(waits.look(at(begun, 4000), false), Look::default());
        assert!(!SOON.load(Ordering::Acquire));
    }

    #[test]
    fn the_checking_thread_is_woken_only_when_needed() {
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
