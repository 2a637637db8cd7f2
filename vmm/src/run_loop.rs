//! The body of a vCPU thread: it runs the guest and handles its exits until the guest is stopped.

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

/// KVM starts a kernel thread when a process first runs a guest (against the ITLB multihit fault), and refuses to
/// run the guest if it gets no thread. KVM_RUN is then repeated this often, with these pauses, because limits are
/// raised and threads end.
const REFUSALS: u32 = 20;
const REFUSED: Duration = Duration::from_millis(10);
/// KVM refuses a vCPU once when another vCPU has just started it.
const REFUSALS_WITHOUT_PAUSE: u32 = 3;

/// The state that all vCPU threads of a guest share.
pub(crate) struct Shared {
    pub(crate) control: Arc<Control>,
    pub(crate) memory_slots: Arc<MemorySlots>,
    pub(crate) io_ports: Arc<Mutex<IoPorts>>,
    pub(crate) devices: Devices,
}

/// Runs the vCPU on the current thread until the guest must stop. Then it completes the instruction that caused
/// the last exit, so that the vCPU's registers are consistent.
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
        // In this order: a kick sets the flag before it interrupts. A kick between these two steps is seen by
        // the second one, and a later kick ends KVM_RUN.
        thread.set_immediate_exit(false);
        if control.is_stopping() {
            break;
        }
        // An access of more than 8 bytes, or across two pages, is several MMIO exits. KVM looks at the memory
        // slots only before the first exit, so it does not see a slot that the first exit has registered. So
        // the mark is not updated after an MMIO exit. A mark that is too old is harmless: an access may then
        // be done here that could have been refused immediately.
        if !after_mmio {
            mark = shared.memory_slots.mark();
        }
        control.note_first_entry();
        let exit = thread.run();
        exits.fetch_add(1, Ordering::Relaxed);
        control.note_first_exit();
        let (step, again) = match exit {
            Ok(exit) => (handle_exit(exit, mark, shared), None),
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
            // The vCPU waits for another vCPU to start it.
            Some(_) => Step::Interrupted,
            None => step,
        };
        if !matches!(step, Step::Refused) {
            refusals = 0;
        }
        after_mmio = matches!(step, Step::AfterMmio);
        let stop = match step {
            // After any exit: a SIGBUS may be raised together with an exit that looks harmless.
            Step::Continue | Step::AfterMmio | Step::Interrupted | Step::Refused => {
                memory_error(&mut thread, shared)
            }
            Step::Stop(stop) => Some(stop),
            // An instruction that KVM could not emulate, perhaps because it could not read memory whose slot is
            // not registered yet.
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
    /// A kick or a SIGBUS interrupted KVM_RUN.
    Interrupted,
    /// KVM refused to run the guest this time.
    Refused,
    InternalError,
    Stop(Stop),
}

fn handle_exit(exit: VcpuExit<'_>, mark: RegisteredMark, shared: &Shared) -> Step {
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
    Stop::Failed {
        reason: format!("cannot register memory for the guest: {error}: {}", error.source),
    }
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

/// After an exit for port I/O or MMIO the instruction is not complete: the next KVM_RUN writes its result to the
/// registers and advances the instruction pointer. With `immediate_exit` that KVM_RUN does
/// only this (KVM API documentation, "KVM_RUN"; also for string instructions, of which each step may be
/// another exit). `mark` is that of the last KVM_RUN: an MMIO access may continue in parts.
fn complete_pending_io(thread: &mut VcpuThread<'_>, shared: &Shared, mark: RegisteredMark) {
    loop {
        thread.set_immediate_exit(true);
        let step = match thread.run() {
            Ok(exit) => handle_exit(exit, mark, shared),
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
            // A second request to pause has no effect: the guest does not run.
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

/// Keeps the thread in the list of threads that can be kicked, as long as this exists.
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
