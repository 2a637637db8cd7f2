//! Ctrl-C, SIGTERM, SIGHUP: the first requests a clean end, the second ends the process immediately.
//!
//! One thread handles them, and the waits of the command: see [`waits`].

use std::io::{self, PipeWriter};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use pager::serve::ServerHandle;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Signal, pidfd_send_signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGTTIN, SIGTTOU, SIGXCPU, SIGXFSZ};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;
use vmm::VmHandle;
use vmm_sys_util::signal::{Error as SignalError, block_signal, unblock_signal};

use crate::stderr::say;
use crate::waits::{self, End, Wait, Waiting};
use crate::{exit, leftovers, terminal};

/// Whether the user has interrupted. All threads share it.
#[derive(Clone, Default)]
pub(crate) struct Interrupt(Arc<Shared>);

#[derive(Default)]
struct Shared {
    requested: AtomicBool,
    guest: Mutex<Option<VmHandle>>,
    server: Mutex<Option<Serving>>,
    /// Child processes that are being waited for.
    children: Mutex<Vec<Weak<OwnedFd>>>,
    /// Waits until the thread is jailed.
    jail: Mutex<Option<Jailing>>,
}

/// What jails the thread, and where it sends when that is done.
type Jailing = (fn(), Sender<()>);

/// The guests of one server or of several.
pub(crate) trait Guests: Send + Sync {
    /// How many are served.
    fn count(&self) -> usize;
    /// Kills those that still need a server.
    fn kill(&self);
}

impl Guests for ServerHandle {
    fn count(&self) -> usize {
        self.guests().len()
    }

    fn kill(&self) {
        let _ = self.kill_guests();
    }
}

/// Servers, or a keeper, whose guests are not known; dropping this stops them.
struct Serving {
    guests: Option<Arc<dyn Guests>>,
    stop: Option<PipeWriter>,
    /// What it waits for then.
    draining: Option<Waiting>,
}

/// Signals that would end or stop the process during a system call that otherwise returns an error: a write beyond the
/// limit of a file's size (EFBIG), and the use of a terminal that belongs to another job (EIO).
///
/// They are blocked, which has the same effect as ignoring them. A child process inherits this: `bench` and `fork` start
/// other `snap`s, which block them themselves, and [`spawn_unblocked`] starts other programs.
const BLOCKED: [i32; 3] = [SIGXFSZ, SIGTTIN, SIGTTOU];

/// Whether this process ignores a signal, for example SIGHUP under `nohup`.
fn is_ignored(signal: i32) -> io::Result<bool> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let mask = mask.ok_or(io::ErrorKind::InvalidData)?;
    Ok(mask >> (signal - 1) & 1 == 1)
}

/// Blocks signals in this thread and in all threads that it starts.
fn block(signals: &[i32]) -> Result<()> {
    for signal in signals {
        match block_signal(*signal) {
            Ok(()) | Err(SignalError::SignalAlreadyBlocked(_)) => {}
            Err(error) => bail!("cannot block signals: {error}"),
        }
    }
    Ok(())
}

/// Starts another program. It can be interrupted: a child process inherits the blocked signals of the thread that starts it,
/// so a thread does that which blocks none of those that are blocked here.
pub(crate) fn spawn_unblocked(command: &mut Command) -> io::Result<Child> {
    let spawn = || {
        for signal in BLOCKED.into_iter().chain([SIGINT, SIGTERM, SIGHUP, SIGXCPU]) {
            unblock_signal(signal).map_err(|error| io::Error::other(error.to_string()))?;
        }
        command.spawn()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("spawn".into()).spawn_scoped(scope, spawn)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread has panicked")))
    })
}

type Signals = SignalDelivery<UnixStream, SignalOnly>;

impl Interrupt {
    /// Installs the handling of signals for the rest of the process.
    pub(crate) fn install() -> Result<Self> {
        let mut handled = vec![SIGINT, SIGTERM, SIGXCPU];
        // Under `nohup` it stays ignored. Without /proc it counts as not ignored.
        if !is_ignored(SIGHUP).unwrap_or(false) {
            handled.push(SIGHUP);
        }
        // Only one thread handles them. A signal to a thread that reads from a slow disk would be handled only after
        // the read.
        block(&BLOCKED)?;
        block(&handled)?;
        let taken = || {
            let (read, write) = UnixStream::pair()?;
            write.set_nonblocking(true)?;
            let write = Arc::new(write);
            waits::wake_by(Arc::clone(&write));
            SignalDelivery::with_pipe(read, write, SignalOnly, &handled)
        };
        let signals = taken().context("cannot handle signals")?;
        let interrupt = Self::default();
        let handler = interrupt.clone();
        let handle = move || {
            for signal in handled {
                // It was blocked before, so this cannot fail.
                let _ = unblock_signal(signal);
            }
            handler.listen(signals);
        };
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(handle)
            .context("cannot start the thread that waits for signals")?;
        Ok(interrupt)
    }

    /// The body of the thread.
    fn listen(&self, mut signals: Signals) {
        let mut next = Some(waits::REPORTED_AFTER);
        loop {
            let mut fds = [PollFd::new(signals.get_read(), PollFlags::IN)];
            let timeout = next.and_then(|next| Timespec::try_from(next).ok());
            if let Err(error) = rustix::event::poll(&mut fds, timeout.as_ref())
                && error != rustix::io::Errno::INTR
            {
                // For example, out of memory.
                std::thread::sleep(Duration::from_millis(100));
            }
            if let Some((enter, waiting)) = self.jail_waits().take() {
                enter();
                let _ = waiting.send(());
            }
            self.handle(&signals.pending().collect::<Vec<_>>());
            let look = waits::look(self.has_children());
            look.lines.iter().for_each(|line| say(line));
            match look.end {
                None => next = look.next,
                Some(End::Interrupted) => {
                    say("snap: interrupted\n");
                    self.end_immediately(exit::INTERRUPTED);
                }
                Some(End::Failed(message)) => {
                    say(&format!("snap: {message}\n"));
                    self.end_immediately(exit::FAILED);
                }
            }
        }
    }

    /// Handles signals that have arrived together.
    fn handle(&self, signals: &[i32]) {
        let again = |signal: &i32| matches!(*signal, SIGINT | SIGTERM);
        if signals.is_empty() {
            return;
        }
        if signals.contains(&SIGXCPU) && !self.requested() {
            say("snap: the limit of CPU time (RLIMIT_CPU, `ulimit -t`) is reached: ending\n");
        }
        if !self.0.requested.swap(true, Ordering::SeqCst) {
            waits::interrupted();
            self.pause_guest();
            self.stop_server();
            self.interrupt_children();
        } else if signals.iter().any(again) {
            self.end_immediately(exit::INTERRUPTED);
        }
        // SIGHUP is sent by the shell and by the kernel, and SIGXCPU comes every second: repeats of them are ignored.
    }

    /// Ends the process immediately, after removing its sockets and hidden files.
    fn end_immediately(&self, code: u8) -> ! {
        if let Some(serving) = &*self.server() {
            serving.guests.iter().for_each(|guests| guests.kill());
        }
        leftovers::remove();
        terminal::restore();
        std::process::exit(code.into());
    }

    /// Calls `enter`, which jails a thread, on the thread of this. It sends when that is done.
    pub(crate) fn jail(&self, enter: fn()) -> Receiver<()> {
        let (done, jailed) = mpsc::channel();
        *self.jail_waits() = Some((enter, done));
        waits::wake();
        jailed
    }

    fn jail_waits(&self) -> MutexGuard<'_, Option<Jailing>> {
        self.0.jail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn requested(&self) -> bool {
        self.0.requested.load(Ordering::SeqCst)
    }

    /// Pauses this guest at an interrupt, or now if there was one.
    pub(crate) fn pauses(&self, guest: VmHandle) {
        if self.requested() {
            guest.request_pause();
        }
        *self.0.guest.lock().unwrap_or_else(PoisonError::into_inner) = Some(guest);
        // An interrupt in between has not found the guest.
        self.pause_guest();
    }

    /// The first interrupt drops `stop`; the second kills the guests that still need the server, because they would
    /// wait forever.
    pub(crate) fn stops(&self, guests: Option<Arc<dyn Guests>>, stop: PipeWriter) {
        *self.server() = Some(Serving { guests, stop: Some(stop), draining: None });
        if self.requested() {
            self.stop_server();
        }
    }

    /// Passes an interrupt, or an earlier one, on to the process of this pidfd, until the pidfd is dropped.
    pub(crate) fn reaches(&self, process: &Arc<OwnedFd>) {
        let mut children = self.children();
        children.retain(|child| child.strong_count() > 0);
        children.push(Arc::downgrade(process));
        drop(children);
        if self.requested() {
            self.interrupt_children();
        }
    }

    fn interrupt_children(&self) {
        for child in self.children().iter().filter_map(Weak::upgrade) {
            // A process that has already ended needs no signal.
            let _ = pidfd_send_signal(&*child, Signal::INT);
        }
    }

    fn children(&self) -> MutexGuard<'_, Vec<Weak<OwnedFd>>> {
        self.0.children.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_children(&self) -> bool {
        self.children().iter().any(|child| child.strong_count() > 0)
    }

    fn stop_server(&self) {
        if let Some(serving) = &mut *self.server() {
            drop(serving.stop.take());
            serving.draining = serving.guests.clone().map(|guests| {
                let guests = move || {
                    let guests = guests.count();
                    format!("{guests} guests to end; Ctrl-C kills those that still need pages")
                };
                Wait::new(guests).outlasts().begin()
            });
        }
    }

    fn server(&self) -> MutexGuard<'_, Option<Serving>> {
        self.0.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pause_guest(&self) {
        if self.requested() {
            let guest = self.0.guest.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(guest) = &*guest {
                guest.request_pause();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    #[test]
    fn another_program_is_started_without_blocked_signals() {
        let blocked = |start: fn(&mut Command) -> io::Result<Child>| {
            let mut grep = Command::new("grep");
            grep.args(["^SigBlk", "/proc/self/status"]).stdout(Stdio::piped());
            let output = start(&mut grep).unwrap().wait_with_output().unwrap().stdout;
            let text = String::from_utf8(output).unwrap();
            u64::from_str_radix(text.trim_start_matches("SigBlk:").trim(), 16).unwrap()
        };
        let all = [SIGINT, SIGTERM, SIGHUP, SIGXCPU, SIGXFSZ, SIGTTIN, SIGTTOU];
        let mask = all.iter().fold(0, |mask, signal| mask | 1 << (signal - 1));
        // Of this test's thread only.
        block(&all).unwrap();
        assert_eq!(blocked(Command::spawn) & mask, mask);
        assert_eq!(blocked(spawn_unblocked) & mask, 0);
    }
}
