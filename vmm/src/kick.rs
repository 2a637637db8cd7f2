//! Interrupting KVM_RUN on a vCPU thread, and surviving a page that cannot be read.
//!
//! A kick is a signal. Its handler sets `kvm_run.immediate_exit`. So a kick works while the thread is in
//! KVM_RUN (the call returns EINTR because a signal is pending) and just before that (the call returns EINTR
//! because of `immediate_exit`): KVM API documentation, "KVM_RUN".
//!
//! A guest access to a page that the host cannot supply (UFFDIO_POISON, a hardware memory error) makes the kernel send
//! SIGBUS to the vCPU thread. A process-wide handler records the address when the thread is in KVM_RUN; in any other
//! case it passes the signal to the previous handler, by default the one that ends the process.
#![allow(unsafe_code)]

use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering, compiler_fence};

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::arch;

/// What the signal handlers use of the thread that they interrupt.
///
/// Constant initialisation and no destructor: access is a plain thread-relative load, which is
/// async-signal-safe. Only the thread itself and handlers on it use it, hence `Relaxed` throughout.
struct ThisVcpu {
    immediate_exit: AtomicPtr<u8>,
    in_kvm_run: AtomicBool,
    sigbus: AtomicBool,
    sigbus_host_addr: AtomicU64,
}

thread_local! {
    static THIS_VCPU: ThisVcpu = const {
        ThisVcpu {
            immediate_exit: AtomicPtr::new(ptr::null_mut()),
            in_kvm_run: AtomicBool::new(false),
            sigbus: AtomicBool::new(false),
            sigbus_host_addr: AtomicU64::new(0),
        }
    };
}

/// The action of SIGBUS before this crate installed its handler.
static PREVIOUS_SIGBUS: OnceLock<libc::sigaction> = OnceLock::new();

/// The signal of a kick. Real-time signals below SIGRTMIN belong to the C library; programs tend to
/// use the first ones after it, so this is a later one.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN() + 5
}

/// A running vCPU thread.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct VcpuThreadId {
    pthread: libc::pthread_t,
    tid: libc::pid_t,
}

impl VcpuThreadId {
    /// Interrupts the thread's KVM_RUN, now or the next.
    ///
    /// The caller makes sure that the thread cannot end: see `Control::inner`.
    pub(crate) fn kick(&self) {
        // SAFETY: the thread is alive, as it takes itself out of the list of threads, under the lock
        // the caller holds, before it ends. The signal has a handler: `install_signal_handlers`
        // ran before the thread was started.
        unsafe { libc::pthread_kill(self.pthread, kick_signal()) };
    }

    pub(crate) fn tid(&self) -> libc::pid_t {
        self.tid
    }
}

/// Makes the current thread kickable for as long as this lives, and KVM_RUN callable.
pub(crate) struct VcpuThread<'a> {
    vcpu: &'a mut VcpuFd,
    id: VcpuThreadId,
    /// It is valid only on the thread that created it.
    _not_send: PhantomData<*const ()>,
}

impl<'a> VcpuThread<'a> {
    pub(crate) fn enter(vcpu: &'a mut VcpuFd) -> VcpuThread<'a> {
        let immediate_exit = &raw mut vcpu.get_kvm_run().immediate_exit;
        THIS_VCPU.with(|this| this.immediate_exit.store(immediate_exit, Ordering::Relaxed));
        unblock_kicks();
        // SAFETY: no preconditions.
        let pthread = unsafe { libc::pthread_self() };
        // SAFETY: no preconditions.
        let tid = unsafe { libc::gettid() };
        VcpuThread { vcpu, id: VcpuThreadId { pthread, tid }, _not_send: PhantomData }
    }

    pub(crate) fn id(&self) -> VcpuThreadId {
        self.id
    }

    /// `true`: KVM completes pending I/O and returns EINTR without entering the guest.
    pub(crate) fn set_immediate_exit(&mut self, on: bool) {
        self.vcpu.set_kvm_immediate_exit(on.into());
    }

    /// KVM_RUN.
    pub(crate) fn run(&mut self) -> Result<VcpuExit<'_>, io::Error> {
        THIS_VCPU.with(|this| this.in_kvm_run.store(true, Ordering::Relaxed));
        compiler_fence(Ordering::SeqCst);
        let exit = self.vcpu.run();
        compiler_fence(Ordering::SeqCst);
        THIS_VCPU.with(|this| this.in_kvm_run.store(false, Ordering::Relaxed));
        exit.map_err(io::Error::from)
    }

    /// Host address of the SIGBUS that was raised during KVM_RUN, if there was one.
    pub(crate) fn take_sigbus(&mut self) -> Option<u64> {
        THIS_VCPU.with(|this| {
            let came = this.sigbus.swap(false, Ordering::Relaxed);
            came.then(|| this.sigbus_host_addr.load(Ordering::Relaxed))
        })
    }

    /// `kvm_run.internal.suberror`, meaningful after KVM_EXIT_INTERNAL_ERROR.
    pub(crate) fn internal_suberror(&mut self) -> u32 {
        // SAFETY: all bytes of the union are initialised (the page is mapped from the kernel), and
        // every bit pattern is a u32.
        unsafe { self.vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror }
    }

    /// Whether the vCPU can run, and does not wait for another vCPU to start it.
    pub(crate) fn is_runnable(&self) -> bool {
        let state = self.vcpu.get_mp_state();
        state.is_ok_and(|state| state.mp_state == kvm_bindings::KVM_MP_STATE_RUNNABLE)
    }

    pub(crate) fn instruction_pointer(&self) -> Option<u64> {
        arch::instruction_pointer(self.vcpu)
    }
}

impl Drop for VcpuThread<'_> {
    fn drop(&mut self) {
        // A kick that arrives later finds no vCPU and does nothing.
        THIS_VCPU.with(|this| this.immediate_exit.store(ptr::null_mut(), Ordering::Relaxed));
        compiler_fence(Ordering::SeqCst);
    }
}

/// Installs the handlers of the kick signal and of SIGBUS, once per process.
pub(crate) fn install_signal_handlers() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let install = || {
        set_action(kick_signal(), on_kick as *const () as usize, 0)?;
        let previous = current_action(libc::SIGBUS)?;
        // Before the handler that reads it is in place.
        let _ = PREVIOUS_SIGBUS.set(previous);
        // On the alternate stack, if there is one: the previous handler (Rust's stack overflow report) needs it.
        let flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        set_action(libc::SIGBUS, on_sigbus as *const () as usize, flags)
    };
    INSTALLED
        .get_or_init(|| install().map_err(|error| error.raw_os_error().unwrap_or(libc::EINVAL)))
        .map_err(io::Error::from_raw_os_error)
}

extern "C" fn on_kick(_signal: libc::c_int) {
    leave_kvm_run();
}

/// Async-signal-safe: atomics in thread-local storage, sigaction(2) and raise(3) only.
extern "C" fn on_sigbus(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    let in_kvm_run = THIS_VCPU.with(|this| this.in_kvm_run.load(Ordering::Relaxed));
    if in_kvm_run {
        // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo_t.
        let info = unsafe { &*info };
        // SAFETY: a SIGBUS that comes from a memory access has an address; in one that a process sent
        // the same bytes are its sender, which is initialised too.
        let host_addr = unsafe { info.si_addr() } as u64;
        THIS_VCPU.with(|this| {
            this.sigbus_host_addr.store(host_addr, Ordering::Relaxed);
            this.sigbus.store(true, Ordering::Relaxed);
        });
        leave_kvm_run();
    } else {
        hand_on_sigbus(signal, info, context);
    }
}

fn leave_kvm_run() {
    let immediate_exit = THIS_VCPU.with(|this| this.immediate_exit.load(Ordering::Relaxed));
    if !immediate_exit.is_null() {
        // SAFETY: not null means that a `VcpuThread` exists on this thread; it borrows the vCPU whose
        // mapped kvm_run page the pointer points into. Volatile, as the kernel reads the byte.
        unsafe { immediate_exit.write_volatile(1) };
    }
}

/// Calls the previous handler, or restores the default action.
fn hand_on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = PREVIOUS_SIGBUS.get();
    let handler = previous.map_or(libc::SIG_DFL, |action| action.sa_sigaction);
    if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
        // With the default action back in place, returning runs the faulting instruction again, or
        // takes the signal raised here (it is blocked until this handler returns), and the process
        // ends as it would have.
        let _ = set_action(signal, libc::SIG_DFL, 0);
        // SAFETY: no preconditions.
        unsafe { libc::raise(signal) };
    } else if previous.is_some_and(|action| action.sa_flags & libc::SA_SIGINFO != 0) {
        type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
        // SAFETY: the action was installed with SA_SIGINFO, so its handler has this signature.
        let handler: Handler = unsafe { std::mem::transmute(handler) };
        handler(signal, info, context);
    } else {
        // SAFETY: the action was installed without SA_SIGINFO, so its handler has this signature.
        let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(handler) };
        handler(signal);
    }
}

fn set_action(signal: libc::c_int, handler: usize, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: sigaction is plain data for which all zeros (no flags, empty mask) is valid.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: the action is initialised, its handler has the signature its flags announce and is
    // async-signal-safe, and a null old action is allowed.
    let result = unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn current_action(signal: libc::c_int) -> io::Result<libc::sigaction> {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: with a null new action the call only reads, and the old one is valid for writes.
    let result = unsafe { libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded and filled it.
    Ok(unsafe { action.assume_init() })
}

/// A thread inherits the signal mask of the thread that started it, which may block these signals.
fn unblock_kicks() {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set it is given room for.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: initialised by the call before.
    let mut set = unsafe { set.assume_init() };
    for signal in [kick_signal(), libc::SIGBUS] {
        // SAFETY: the set is initialised and the signal number is valid.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    // SAFETY: the set is initialised, a null old set is allowed.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut()) };
}
