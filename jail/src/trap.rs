//! What happens at a refused system call: the kernel does not execute it and sends SIGSYS to the thread, whose handler
//! writes one line and ends the process.
//!
//! A thread that has SIGSYS blocked is ended, with its process, by the kernel itself; then there is no message.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::CStr;
use std::io;
use std::mem;
use std::ptr;
use std::sync::OnceLock;

use libc::{c_int, c_long, c_void, siginfo_t};

use crate::names;
use crate::role::Role;

/// The exit code of a process that the jail has ended: 128 and the number of SIGSYS, as shells write it.
pub const EXIT_CODE: u8 = 159;

thread_local! {
    /// Constant initialisation and no destructor: a handler may read it.
    static ROLE: Cell<Option<Role>> = const { Cell::new(None) };
}

pub(crate) fn set_role(role: Role) {
    ROLE.set(Some(role));
}

/// Installs the handler, once in a process.
pub(crate) fn install_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Option<i32>> = OnceLock::new();
    match INSTALLED.get_or_init(|| sigaction().err().and_then(|error| error.raw_os_error())) {
        None => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(*errno)),
    }
}

fn sigaction() -> io::Result<()> {
    // SAFETY: a sigaction of zeros is valid: the default action and no flags.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = on_sigsys as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `action` is valid, and its handler has the signature that SA_SIGINFO requires and calls only functions that
    // are async-signal-safe.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The start of `siginfo_t` for SIGSYS: sigaction(2).
#[repr(C)]
struct SigsysInfo {
    signo: c_int,
    errno: c_int,
    code: c_int,
    call_address: *const c_void,
    call: c_int,
    arch: u32,
}

const _: () = assert!(size_of::<SigsysInfo>() <= size_of::<siginfo_t>());

/// `si_code` of a signal from a filter: SYS_SECCOMP.
const FROM_FILTER: c_int = 1;

extern "C" fn on_sigsys(_: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a siginfo_t, whose start for SIGSYS is this struct.
    let info = unsafe { &*info.cast::<SigsysInfo>() };
    // SAFETY: the kernel passes the interrupted thread's context, because of SA_SIGINFO.
    let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let args =
        [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX].map(|register| registers[register as usize]);
    if info.code == FROM_FILTER {
        let mut name = [0u8; 16];
        // SAFETY: this call writes at most 16 bytes, with a zero at the end.
        unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
        let line = message(&name, ROLE.get(), c_long::from(info.call), args);
        // SAFETY: the bytes are initialised. An error cannot be reported.
        unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len) };
    }
    // SAFETY: no preconditions; it runs no destructors and no exit handlers.
    unsafe { libc::_exit(EXIT_CODE.into()) }
}

/// A line of text that is written without allocation. What does not fit is cut off.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl Line {
    fn push(&mut self, text: &[u8]) {
        for byte in text.iter().take(self.bytes.len() - self.len) {
            // A thread's name may be any bytes.
            self.bytes[self.len] = if matches!(byte, b' '..=b'~' | b'\n') { *byte } else { b'?' };
            self.len += 1;
        }
    }

    fn push_number(&mut self, value: u64, base: u64) {
        let mut digits = [0u8; 20];
        let (mut at, mut rest) = (digits.len(), value);
        loop {
            at -= 1;
            digits[at] = b"0123456789abcdef"[(rest % base) as usize];
            rest /= base;
            if rest == 0 {
                break;
            }
        }
        self.push(&digits[at..]);
    }
}

fn message(thread: &[u8; 16], role: Option<Role>, call: c_long, args: [i64; 3]) -> Line {
    let mut line = Line { bytes: [0; 256], len: 0 };
    line.push(b"snap: the jail has ended the process: the thread ");
    line.push(CStr::from_bytes_until_nul(thread).map_or(&b"?"[..], CStr::to_bytes));
    line.push(b" (role ");
    line.push(role.map_or("inherited", Role::name).as_bytes());
    line.push(b") has called ");
    match names::of(call) {
        Some(name) => line.push(name.as_bytes()),
        None => {
            line.push(b"system call ");
            line.push_number(call as u64, 10);
        }
    }
    for (arg, before) in args.iter().zip(["(0x", ", 0x", ", 0x"]) {
        line.push(before.as_bytes());
        line.push_number(*arg as u64, 16);
    }
    line.push(b"), which is not allowed to it; see docs/jail.md\n");
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_names_thread_role_and_call() {
        let text = |thread, role, call| {
            let line = message(thread, role, call, [0, -1, 0x2f]);
            String::from_utf8(line.bytes[..line.len].to_vec()).unwrap()
        };
        assert_eq!(
            text(b"vcpu0\0\0\0\0\0\0\0\0\0\0\0", Some(Role::Vcpu), libc::SYS_execve),
            "snap: the jail has ended the process: the thread vcpu0 (role vCPU) has called execve(0x0, \
             0xffffffffffffffff, 0x2f), which is not allowed to it; see docs/jail.md\n"
        );
        let unknown = text(&[0x1b; 16], None, 100_000);
        assert!(
            unknown.contains("the thread ? (role inherited) has called system call 100000(0x0,"),
            "{unknown}"
        );
    }
}
