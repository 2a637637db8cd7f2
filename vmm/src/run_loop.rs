//! What a vCPU thread does: run the guest, answer its exits, until something stops it.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use kvm_ioctls::VcpuExit;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::arch::{IoPorts, Vcpu};
use crate::control::{Control, Stop};
use crate::devices::{Devices, NO_DEVICE};
use crate::error::KvmError;
use crate::kick::VcpuThread;
use crate::memory_slots::{MemorySlots, MmioAt, RegisteredMark};

/// `kvm_run.system_event.type`: KVM API documentation, "KVM_EXIT_SYSTEM_EVENT".
const SYSTEM_EVENT_RESET: u32 = 2;

/// KVM starts a thread of its own when a process first runs a guest (against the ITLB multihit fault), and refuses to run it
/// where there is none to be had. It is asked again that often, with these pauses: limits are raised, threads end.
const REFUSALS: u32 = 20;
const REFUSED: Duration = Duration::from_millis(10);
/// A vCPU that another one has just started is refused once.
const REFUSALS_WITHOUT_PAUSE: u32 = 3;

/// What all vCPU threads of a guest share.
pub(crate) struct Shared {
    pub(crate) control: Arc<Control>,
    pub(crate) memory_slots: Arc<MemorySlots>,
    pub(crate) io_ports: Arc<Mutex<IoPorts>>,
    pub(crate) devices: Devices,
}

/// Runs the vCPU on the current thread until the guest is to stop; then completes the instruction that
/// made the last exit, so that the vCPU's registers are whole.
pub(crate) fn run(vcpu: &mut Vcpu, shared: &Shared) {
    let control = &shared.control;
    let _stop_others = StopOnPanic(control);
    let exits = Arc::clone(&vcpu.exits);
    let mut thread = VcpuThread::enter(&mut vcpu.fd);
    let _kickable = Kickable::new(control, &thread, &exits);
    let mut retried = false;
    let mut refusals = 0;
    let mut mark = shared.memory_slots.mark();
    let mut after_mmio = false;

    loop {
        // In this order: a kick sets the flag before it interrupts, so one that comes between these
        // lines is seen by the second, and one that comes later ends KVM_RUN.
        thread.set_immediate_exit(false);
        if control.is_stopping() {
            break;
        }
        // An access of more than 8 bytes, or across two pages, is several MMIO exits, and KVM looks at the
        // memory slots only before the first: the slot that the first exit has plugged is not there for
        // the others. So the mark is not moved on after an MMIO exit. One that is too old is
        // harmless: it only has an access done here that could have been refused at once.
        if !after_mmio {
            mark = shared.memory_slots.mark();
        }
        control.note_first_entry();
        let exit = thread.run();
        exits.fetch_add(1, Ordering::Relaxed);
        control.note_first_exit();
        let (step, again) = match exit {
            Ok(exit) => (answer(exit, mark, shared), None),
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                (Step::Refused, Some(error))
            }
            Err(error) => (interrupted(&error), None),
        };
        let step = match again {
            Some(error) if thread.is_runnable() => {
                refusals += 1;
                refused(&error, refusals)
            }
            // A vCPU that another one is to start says so.
            Some(_) => Step::Interrupted,
            None => step,
        };
        if !matches!(step, Step::Refused) {
            refusals = 0;
        }
        after_mmio = matches!(step, Step::AfterMmio);
        let stop = match step {
            // After any exit: a SIGBUS may come together with one that looks harmless.
            Step::Continue | Step::AfterMmio | Step::Interrupted | Step::Refused => {
                memory_error(&mut thread, shared)
            }
            Step::Stop(stop) => Some(stop),
            // An instruction KVM could not emulate, perhaps because it could not read what is not
            // plugged yet.
            Step::InternalError if !retried && !shared.memory_slots.is_complete(mark) => {
                retried = true;
                shared.memory_slots.register_all().err().map(slot_refused)
            }
            Step::InternalError => {
                let suberror = thread.internal_suberror();
                Some(Stop::InternalError { suberror, rip: thread.instruction_pointer() })
            }
        };
        if let Some(stop) = stop {
            control.stop(stop);
        }
    }
    complete_pending_io(&mut thread, shared, mark);
}

enum Step {
    Continue,
    /// An MMIO access was done; the next exit may be for another part of it.
    AfterMmio,
    /// By a kick, or by a SIGBUS.
    Interrupted,
    /// KVM does not run the guest at the moment.
    Refused,
    InternalError,
    Stop(Stop),
}

fn answer(exit: VcpuExit<'_>, mark: RegisteredMark, shared: &Shared) -> Step {
    let lock_io_ports = || shared.io_ports.lock().unwrap_or_else(PoisonError::into_inner);
    let stop = match exit {
        VcpuExit::IoOut(port, data) => lock_io_ports().port_write(port, data),
        VcpuExit::IoIn(port, data) => {
            lock_io_ports().port_read(port, data);
            None
        }
        VcpuExit::MmioRead(gpa, data) => return mmio(shared, mark, gpa, Access::Read(data)),
        VcpuExit::MmioWrite(gpa, data) => return mmio(shared, mark, gpa, Access::Write(data)),
        VcpuExit::InternalError => return Step::InternalError,
        VcpuExit::Hlt => Some(Stop::Halt),
        VcpuExit::Shutdown => Some(Stop::Shutdown),
        VcpuExit::SystemEvent(SYSTEM_EVENT_RESET, _) => Some(Stop::Reset),
        VcpuExit::SystemEvent(_, _) => Some(Stop::Shutdown),
        VcpuExit::MemoryFault { gpa, .. } => {
            Some(Stop::MemoryError { gpa: Some(gpa), host_addr: None })
        }
        VcpuExit::Intr => return Step::Interrupted,
        other => Some(Stop::UnexpectedExit { exit: format!("{other:?}") }),
    };
    stop.map_or(Step::Continue, Step::Stop)
}

fn refused(error: &io::Error, times: u32) -> Step {
    if times <= REFUSALS_WITHOUT_PAUSE {
        return Step::Refused;
    }
    if times <= REFUSALS {
        thread::sleep(REFUSED);
        return Step::Refused;
    }
    Step::Stop(Stop::UnexpectedExit {
        exit: format!(
            "KVM_RUN: {error}; KVM gets no thread: a limit of processes or threads is reached \
             (RLIMIT_NPROC, a cgroup's pids.max)"
        ),
    })
}

fn interrupted(error: &io::Error) -> Step {
    match error.raw_os_error() {
        Some(libc::EINTR | libc::EAGAIN) => Step::Interrupted,
        Some(libc::EFAULT | libc::EHWPOISON) => {
            Step::Stop(Stop::MemoryError { gpa: None, host_addr: None })
        }
        _ => Step::Stop(Stop::UnexpectedExit { exit: format!("KVM_RUN: {error}") }),
    }
}

enum Access<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
}

fn mmio(shared: &Shared, mark: RegisteredMark, gpa: u64, access: Access<'_>) -> Step {
    let stop = match shared.memory_slots.mmio_at(gpa, mark) {
        Err(error) => Some(slot_refused(error)),
        Ok(MmioAt::RegisteredRam) => Some(Stop::MmioInRam { gpa }),
        Ok(MmioAt::LateRam) => match access {
            Access::Read(data) => shared.memory_slots.read(gpa, data),
            Access::Write(data) => shared.memory_slots.write(gpa, data),
        }
        .err()
        .map(|_| Stop::MemoryError { gpa: Some(gpa), host_addr: None }),
        Ok(MmioAt::Outside) => {
            match (shared.devices.at(gpa), access) {
                (Some((mut device, offset)), Access::Read(data)) => device.read(offset, data),
                (Some((mut device, offset)), Access::Write(data)) => device.write(offset, data),
                (None, Access::Read(data)) => data.fill(NO_DEVICE),
                (None, Access::Write(_)) => {}
            }
            None
        }
    };
    stop.map_or(Step::AfterMmio, Step::Stop)
}

pub(crate) fn slot_refused(error: KvmError) -> Stop {
    Stop::Failed { reason: format!("cannot give memory to the guest: {error}: {}", error.source) }
}

/// A SIGBUS during KVM_RUN, as the reason to stop.
fn memory_error(thread: &mut VcpuThread<'_>, shared: &Shared) -> Option<Stop> {
    let host_addr = thread.take_sigbus()?;
    let gpa = gpa_of(shared.memory_slots.memory(), host_addr);
    Some(Stop::MemoryError { gpa, host_addr: Some(host_addr) })
}

fn gpa_of(memory: &GuestMemoryMmap, host_addr: u64) -> Option<u64> {
    memory.iter().find_map(|region| {
        let offset = host_addr.checked_sub(region.as_ptr() as u64)?;
        (offset < region.len()).then(|| region.start_addr().0 + offset)
    })
}

/// An exit for port I/O or MMIO leaves the instruction half done: its result is written to the registers,
/// and the instruction pointer moved on, by the next KVM_RUN. With `immediate_exit` that KVM_RUN does
/// only this (KVM API documentation, "KVM_RUN"; also for string instructions, of which each step may be
/// another exit). `mark` is that of the last KVM_RUN: an MMIO access may go on in parts.
fn complete_pending_io(thread: &mut VcpuThread<'_>, shared: &Shared, mark: RegisteredMark) {
    loop {
        thread.set_immediate_exit(true);
        let step = match thread.run() {
            Ok(exit) => answer(exit, mark, shared),
            Err(error) => interrupted(&error),
        };
        match step {
            Step::Continue | Step::AfterMmio => {}
            Step::Interrupted | Step::Refused => {
                if let Some(stop) = memory_error(thread, shared) {
                    shared.control.stop(stop);
                }
                break;
            }
            // A pause asked for once more is known already: the guest does not run.
            Step::Stop(stop) if stop.is_resumable() => {}
            Step::Stop(stop) => {
                shared.control.stop(stop);
                break;
            }
            Step::InternalError => {
                let suberror = thread.internal_suberror();
                shared
                    .control
                    .stop(Stop::InternalError { suberror, rip: thread.instruction_pointer() });
                break;
            }
        }
    }
    thread.set_immediate_exit(false);
}

/// Lists the thread as one that can be kicked, for as long as this lives.
struct Kickable<'a> {
    control: &'a Control,
    id: crate::kick::VcpuThreadId,
}

impl<'a> Kickable<'a> {
    fn new(control: &'a Control, thread: &VcpuThread<'_>, exits: &Arc<AtomicU64>) -> Kickable<'a> {
        control.add_thread(thread.id(), Arc::clone(exits));
        Kickable { control, id: thread.id() }
    }
}

impl Drop for Kickable<'_> {
    fn drop(&mut self) {
        self.control.remove_thread(self.id);
    }
}

/// A vCPU thread that panics, in the caller's console for example, stops the guest.
struct StopOnPanic<'a>(&'a Control);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop(Stop::Failed { reason: "a vCPU thread panicked".into() });
        }
    }
}
