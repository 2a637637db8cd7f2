//! Why a guest stops, and the handle with which other threads make it stop.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::arch::IoPorts;
use crate::kick::VcpuThreadId;

/// Why a guest stopped running.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stop {
    /// The console answered [`ConsoleFlow::Pause`](crate::ConsoleFlow::Pause). The guest can continue.
    ConsolePause,
    /// [`VmHandle::request_pause`] or [`RunningVm::pause`](crate::RunningVm::pause). The guest can continue.
    PauseRequested,
    /// The guest requested a snapshot of itself, by a write to [`SNAPSHOT_TRIGGER_PORT`](crate::SNAPSHOT_TRIGGER_PORT).
    /// It can continue.
    SnapshotTrigger,
    /// The guest turned its machine off, by ACPI.
    PowerOff,
    /// The guest executed HLT and no in-kernel interrupt controller can wake it.
    Halt,
    /// The guest shut itself down, as a triple fault does.
    Shutdown,
    /// The guest requested a reset.
    Reset,
    /// A page of guest memory could not be read: the host raised SIGBUS, or KVM could not map the page.
    MemoryError {
        /// Guest physical address, where known.
        gpa: Option<u64>,
        /// Host virtual address, where known.
        host_addr: Option<u64>,
    },
    /// KVM reported the guest's access to RAM as an access outside of RAM. Hosts that emulate the accessing
    /// instruction report an unreadable page in this way.
    MmioInRam {
        /// Guest physical address of the access.
        gpa: u64,
    },
    /// KVM_EXIT_INTERNAL_ERROR: KVM could not continue, mostly because it cannot emulate an instruction.
    InternalError {
        /// `kvm_run.internal.suberror`; 1 is KVM_INTERNAL_ERROR_EMULATION.
        suberror: u32,
        /// Guest instruction pointer, where it could be read.
        rip: Option<u64>,
    },
    /// An exit or an error of KVM_RUN that no part of this guest should cause.
    UnexpectedExit {
        /// The exit or the error.
        exit: String,
    },
    /// [`VmHandle::fail`]: something that the guest depends on has failed.
    Failed {
        /// The reason given.
        reason: String,
    },
}

impl Stop {
    /// Whether the guest is intact, so that its state can be saved and it can continue.
    #[must_use]
    pub fn is_resumable(&self) -> bool {
        matches!(self, Stop::ConsolePause | Stop::PauseRequested | Stop::SnapshotTrigger)
    }
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stop::ConsolePause => write!(f, "the console paused the guest"),
            Stop::PauseRequested => write!(f, "a pause was requested"),
            Stop::SnapshotTrigger => write!(f, "the guest requested a snapshot"),
            Stop::PowerOff => write!(f, "the guest powered off"),
            Stop::Halt => write!(f, "the guest halted"),
            Stop::Shutdown => write!(f, "the guest shut down (triple fault)"),
            Stop::Reset => write!(f, "the guest requested a reset"),
            Stop::MemoryError { gpa, host_addr } => {
                write!(f, "a page of guest memory could not be read")?;
                if let Some(gpa) = gpa {
                    write!(f, ", gpa {gpa:#x}")?;
                }
                if let Some(host_addr) = host_addr {
                    write!(f, ", host address {host_addr:#x}")?;
                }
                Ok(())
            }
            Stop::MmioInRam { gpa } => {
                write!(f, "a page of guest memory could not be read, gpa {gpa:#x} (seen as MMIO)")
            }
            Stop::InternalError { suberror, rip } => {
                write!(f, "KVM internal error, suberror {suberror}")?;
                if let Some(rip) = rip {
                    write!(f, ", at rip {rip:#x}")?;
                }
                Ok(())
            }
            Stop::UnexpectedExit { exit } => write!(f, "unexpected KVM exit: {exit}"),
            Stop::Failed { reason } => write!(f, "{reason}"),
        }
    }
}

/// What the vCPU threads share with the threads that stop them.
#[derive(Default)]
pub(crate) struct Control {
    /// A copy of `inner.stop` that is checked before each KVM_RUN, without the lock.
    stopping: AtomicBool,
    inner: Mutex<Inner>,
    stopped: Condvar,
    /// Called after each [`Control::stop`], without the lock.
    on_stop: OnceLock<Box<dyn Fn() + Send + Sync>>,
    first_entry: OnceLock<Instant>,
    first_exit: OnceLock<Instant>,
}

#[derive(Default)]
struct Inner {
    stop: Option<Stop>,
    /// vCPU threads that may be in KVM_RUN. A thread removes itself before it ends, under this
    /// lock, so that a kick never reaches a thread that has ended.
    threads: Vec<(VcpuThreadId, Arc<AtomicU64>)>,
}

impl Control {
    /// Stops all vCPUs. The first reason is kept, but a reason that the guest cannot survive
    /// replaces one that it can survive.
    pub(crate) fn stop(&self, reason: Stop) {
        let mut inner = self.lock();
        let replace = match &inner.stop {
            None => true,
            Some(known) => known.is_resumable() && !reason.is_resumable(),
        };
        if replace {
            inner.stop = Some(reason);
        }
        // Set before the kick: a vCPU whose KVM_RUN is interrupted must see it.
        self.stopping.store(true, Ordering::SeqCst);
        for (thread, _) in &inner.threads {
            thread.kick();
        }
        self.stopped.notify_all();
        drop(inner);
        if let Some(on_stop) = self.on_stop.get() {
            on_stop();
        }
    }

    fn on_stop(&self, notify: Box<dyn Fn() + Send + Sync>) {
        let set = self.on_stop.set(notify).is_ok();
        // A thread that stopped the guest before found no function to call, or has called this one just now.
        // A second call does no harm.
        if set
            && self.reason().is_some()
            && let Some(notify) = self.on_stop.get()
        {
            notify();
        }
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    pub(crate) fn reason(&self) -> Option<Stop> {
        self.lock().stop.clone()
    }

    /// Clears a reason that the guest can survive, so that it can run again.
    pub(crate) fn clear_pause(&self) {
        let mut inner = self.lock();
        if inner.stop.as_ref().is_some_and(Stop::is_resumable) {
            inner.stop = None;
            self.stopping.store(false, Ordering::SeqCst);
        }
    }

    /// Waits for a reason to stop; `None` when `timeout` expires first.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> Option<Stop> {
        let inner = self.lock();
        let inner = match timeout {
            None => self
                .stopped
                .wait_while(inner, |inner| inner.stop.is_none())
                .unwrap_or_else(PoisonError::into_inner),
            Some(timeout) => {
                self.stopped
                    .wait_timeout_while(inner, timeout, |inner| inner.stop.is_none())
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            }
        };
        inner.stop.clone()
    }

    pub(crate) fn add_thread(&self, thread: VcpuThreadId, exits: Arc<AtomicU64>) {
        self.lock().threads.push((thread, exits));
    }

    pub(crate) fn remove_thread(&self, thread: VcpuThreadId) {
        self.lock().threads.retain(|(other, _)| *other != thread);
    }

    fn vcpus(&self) -> Vec<VcpuActivity> {
        let activity = |(thread, exits): &(VcpuThreadId, Arc<AtomicU64>)| VcpuActivity {
            thread_id: thread.tid(),
            exits: exits.load(Ordering::Relaxed),
        };
        self.lock().threads.iter().map(activity).collect()
    }

    pub(crate) fn note_first_entry(&self) {
        self.first_entry.get_or_init(Instant::now);
    }

    pub(crate) fn note_first_exit(&self) {
        self.first_exit.get_or_init(Instant::now);
    }

    pub(crate) fn first_entry(&self) -> Option<Instant> {
        self.first_entry.get().copied()
    }

    pub(crate) fn first_exit(&self) -> Option<Instant> {
        self.first_exit.get().copied()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // The data is consistent whenever the lock is released, even by a panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a running vCPU has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VcpuActivity {
    /// Kernel id of its thread. The kernel accounts its time in `/proc/self/task/THREAD_ID`.
    pub thread_id: libc::pid_t,
    /// How often KVM_RUN has returned to this program since the vCPU was created. It does not include what KVM
    /// does itself, such as waiting in HLT.
    pub exits: u64,
}

/// Reaches a guest from any thread, for as long as it exists.
///
/// A handle does not keep the guest alive. After its VM is dropped, a handle does nothing.
#[derive(Clone)]
pub struct VmHandle {
    control: Arc<Control>,
    io_ports: Weak<Mutex<IoPorts>>,
}

impl VmHandle {
    pub(crate) fn new(control: Arc<Control>, io_ports: Weak<Mutex<IoPorts>>) -> VmHandle {
        VmHandle { control, io_ports }
    }

    /// Stops the guest with [`Stop::PauseRequested`], even one that sleeps in HLT.
    ///
    /// It has no effect on a guest that is already paused: the guest runs when it is resumed.
    pub fn request_pause(&self) {
        self.control.stop(Stop::PauseRequested);
    }

    /// Sets a function that is called whenever the guest has stopped or a stop was requested, until the guest is
    /// dropped. If that was before this call, the function is called now. It runs on the thread that stops the guest,
    /// and it must not block. It is meant for threads that wait for other things too:
    /// [`RunningVm::wait`](crate::RunningVm::wait) with a timeout of zero then returns the reason.
    ///
    /// Only the first call of this method has an effect.
    pub fn on_stop(&self, notify: impl Fn() + Send + Sync + 'static) {
        self.control.on_stop(Box::new(notify));
    }

    /// Stops the guest permanently with [`Stop::Failed`], for example because its pager cannot read a
    /// page. Its state cannot be saved after that.
    pub fn fail(&self, reason: impl Into<String>) {
        self.control.stop(Stop::Failed { reason: reason.into() });
    }

    /// Stops the guest permanently, because a device could not access a page of its memory.
    pub(crate) fn memory_error(&self, gpa: Option<u64>) {
        self.control.stop(Stop::MemoryError { gpa, host_addr: None });
    }

    /// Sends bytes to the guest's serial port, as a terminal does.
    ///
    /// Returns how many bytes were taken. Up to 64 KiB are queued for a guest that does not read them.
    #[must_use = "bytes that do not fit are not sent"]
    pub fn send_input(&self, bytes: &[u8]) -> usize {
        let Some(io_ports) = self.io_ports.upgrade() else {
            return 0;
        };
        let mut io_ports = io_ports.lock().unwrap_or_else(PoisonError::into_inner);
        io_ports.serial().enqueue(bytes)
    }

    /// Kernel thread ids of the vCPU threads that run now, for example to place other threads near them.
    #[must_use]
    pub fn vcpu_thread_ids(&self) -> Vec<libc::pid_t> {
        self.vcpus().iter().map(|vcpu| vcpu.thread_id).collect()
    }

    /// What the vCPUs that run now have done. It shows whether a guest without output runs.
    #[must_use]
    pub fn vcpus(&self) -> Vec<VcpuActivity> {
        self.control.vcpus()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn a_late_listener_is_called_for_an_earlier_stop() {
        let handle = VmHandle::new(Arc::default(), Weak::new());
        let calls = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&calls);
        handle.fail("the pager has no page");
        handle.on_stop(move || {
            count.fetch_add(1, Ordering::SeqCst);
        });
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        handle.request_pause();
        assert_eq!(calls.load(Ordering::SeqCst), 2);
        let reason = handle.control.reason().expect("it has stopped");
        assert_eq!(reason.to_string(), "the pager has no page");
    }
}
