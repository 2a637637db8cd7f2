//! The system calls that each role may use, and why. docs/jail.md explains the roles.
//!
//! What is not listed ends the process. Of a call that is listed more than once, any of its lines may allow it.

use libc::*;

use crate::role::Role;

/// One allowed call.
pub(crate) struct Rule {
    pub(crate) call: c_long,
    pub(crate) when: When,
    /// For the reader of the table, and of docs/jail.md, which a test compares with it.
    #[cfg_attr(not(test), allow(dead_code))]
    pub(crate) why: &'static str,
}

/// For which arguments. Arguments are counted from 0.
pub(crate) enum When {
    Always,
    /// The argument has one of these values.
    OneOf(u8, &'static [u32]),
    /// The argument is the id of this process.
    Own(u8),
    /// The argument has one of these bits.
    Has(u8, u32),
    /// The argument has none of these bits.
    Lacks(u8, u32),
    /// Never: the call returns this error, and the process continues.
    Fails(c_int),
}

use When::*;

const fn rule(call: c_long, when: When, why: &'static str) -> Rule {
    Rule { call, when, why }
}

/// The parts of a role's table.
pub(crate) fn of(role: Role) -> &'static [&'static [Rule]] {
    match role {
        Role::Vcpu => &[COMMON, NO_FILES, VCPU],
        Role::Pager => &[COMMON, STARTS_THREADS, READS_FILES, PAGER],
        Role::Devices => &[COMMON, NO_FILES, DEVICES],
        Role::Signals => &[COMMON, READS_FILES, SIGNALS],
        // Threads inherit the list of the thread that starts them, so these have all of the others.
        Role::Main => &[COMMON, STARTS_THREADS, READS_FILES, VCPU, PAGER, DEVICES, SIGNALS, MAIN],
        Role::Writer => {
            &[COMMON, STARTS_THREADS, READS_FILES, VCPU, PAGER, DEVICES, SIGNALS, MAIN, WRITER]
        }
        Role::Server => &[COMMON, STARTS_THREADS, READS_FILES, PAGER, SIGNALS, SERVER],
        Role::Fork => &[COMMON, STARTS_THREADS, READS_FILES, PAGER, SIGNALS, SERVER, FORK],
        Role::Mount => &[COMMON, STARTS_THREADS, READS_FILES, MOUNT],
    }
}

const WRITES: u32 = (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC | (O_TMPFILE & !O_DIRECTORY)) as u32;
/// PR_SET_VMA of linux/prctl.h: newer C libraries name their mappings.
const NAMES_MAPPING: u32 = 0x5356_4d41;
/// PR_GET_AUXV of linux/prctl.h.
const GET_AUXV: u32 = 0x4155_5856;

/// USERFAULTFD_IOC_NEW and UFFDIO_API.
const USERFAULTFD: &[u32] = &[0xaa00, 0xc018_aa3f];

#[rustfmt::skip]
const COMMON: &[Rule] = &[
    rule(SYS_futex, Always, "locks, and the end of threads"),
    rule(SYS_read, Always, "descriptors that are open: eventfds, pipes, files"),
    rule(SYS_write, Always, "the guest's console, eventfds, messages"),
    rule(SYS_sendto, Always, "wakes the thread that waits for signals, by a socket; no role has one to the network"),
    rule(SYS_close, Always, "descriptors that are dropped"),
    rule(SYS_poll, Always, "waits for descriptors"),
    rule(SYS_ppoll, Always, "waits for descriptors"),
    rule(SYS_fcntl, OneOf(1, &[F_GETFD as u32, F_SETFD as u32, F_GETFL as u32, F_SETFL as u32, F_DUPFD_CLOEXEC as u32]),
        "the standard library, and waits on stdout"),
    rule(SYS_mmap, Lacks(2, PROT_EXEC as u32), "memory of the allocator; nothing that can be executed"),
    rule(SYS_mprotect, Lacks(2, PROT_EXEC as u32), "memory of the allocator; nothing that can be executed"),
    rule(SYS_munmap, Always, "memory of the allocator, and stacks of threads"),
    rule(SYS_mremap, Always, "the allocator"),
    rule(SYS_madvise, Always, "the allocator, the stack of a thread that ends, pages of the guest"),
    rule(SYS_brk, Always, "the allocator"),
    rule(SYS_clock_gettime, Always, "times, where the vDSO cannot give them"),
    rule(SYS_clock_nanosleep, Always, "sleep"),
    rule(SYS_restart_syscall, Always, "the kernel's continuation of a call after a signal"),
    rule(SYS_sched_yield, Always, "locks of the pager and of the standard library"),
    rule(SYS_sched_getaffinity, Always, "the stack of a new thread, in the C library; the number of CPUs"),
    rule(SYS_getcpu, Always, "placement of threads, where the vDSO cannot give it"),
    rule(SYS_gettid, Always, "a thread's name for itself"),
    rule(SYS_getpid, Always, "signals to own threads"),
    rule(SYS_tgkill, Own(0), "kicks of own vCPU threads; abort(3)"),
    rule(SYS_rt_sigaction, OneOf(0, &[SIGABRT as u32, SIGBUS as u32, SIGSEGV as u32]), "the default action, before the process ends: abort(3), and a fault that is not the guest's"),
    rule(SYS_rt_sigprocmask, Always, "starts and ends of threads"),
    rule(SYS_rt_sigreturn, Always, "the end of a signal handler"),
    rule(SYS_sigaltstack, Always, "the standard library's stack for signal handlers"),
    rule(SYS_prctl, OneOf(0, &[PR_SET_NAME as u32, PR_GET_NAME as u32, NAMES_MAPPING, GET_AUXV]), "names of threads and mappings; the size of a page"),
    rule(SYS_getrandom, Always, "seeds of hash tables"),
    rule(SYS_readlink, Fails(EACCES), "the backtrace of a panic, which has no names without it"),
    rule(SYS_getcwd, Fails(EACCES), "the backtrace of a panic"),
    rule(SYS_exit, Always, "the end of a thread"),
    rule(SYS_exit_group, Always, "the end of the process"),
];

/// Only of roles that may open none: the error would come before a line that allows the call.
#[rustfmt::skip]
const NO_FILES: &[Rule] = &[
    rule(SYS_openat, Fails(EACCES), "the C library's allocator reads /proc/sys/vm/overcommit_memory when it can; the backtrace of a panic, which has no names without it"),
];

#[rustfmt::skip]
const STARTS_THREADS: &[Rule] = &[
    rule(SYS_clone, Has(0, CLONE_THREAD as u32), "new threads; no new processes"),
    rule(SYS_clone3, Fails(ENOSYS), "its flags are in memory, where a filter cannot see them: the C library then uses clone"),
    rule(SYS_set_robust_list, Always, "the C library, in a new thread"),
    rule(SYS_rseq, Always, "the C library, in a new thread"),
    rule(SYS_seccomp, Always, "the filter of a new thread: it can only take calls away"),
    rule(SYS_capget, Always, "the capabilities of a new thread"),
    rule(SYS_capset, Always, "a new thread drops capabilities; it can add none"),
    rule(SYS_prctl, OneOf(0, &[PR_SET_NO_NEW_PRIVS as u32]), "a new thread sets it again"),
    rule(SYS_landlock_restrict_self, Always, "the files of a new thread: it can only take some away"),
];

#[rustfmt::skip]
const READS_FILES: &[Rule] = &[
    rule(SYS_openat, Lacks(2, WRITES), "/proc/self, and another handle of the snapshot, for reading only"),
    rule(SYS_open, Lacks(1, WRITES), "another handle of a memfd, for reading only"),
    rule(SYS_fstat, Always, "length and times of an open file"),
    rule(SYS_newfstatat, Always, "length and times of a file"),
    rule(SYS_statx, Always, "length and times of a file"),
    rule(SYS_lseek, Always, "files of /proc, holes of a memfd"),
    rule(SYS_pread64, Always, "the snapshot"),
    rule(SYS_preadv, Always, "the snapshot, and a disk"),
    rule(SYS_preadv2, Always, "the snapshot, as far as it is in the page cache"),
    rule(SYS_readv, Always, "files"),
    rule(SYS_fadvise64, Always, "read-ahead of the snapshot"),
];

#[rustfmt::skip]
const VCPU: &[Rule] = &[
    rule(SYS_ioctl, OneOf(1, &[
        0xae80,      // KVM_RUN: first, because it is by far the most frequent
        0x4020_ae46, // KVM_SET_USER_MEMORY_REGION: memory that the guest touches before its slot is registered
        0x4008_ae61, // KVM_IRQ_LINE
        0x8004_ae98, // KVM_GET_MP_STATE: whether a vCPU has stopped for good
        0x8090_ae81, // KVM_GET_REGS: where the guest was, for a message
        0x4020_ae76, // KVM_IRQFD: a device that the driver resets
        0x4040_ae79, // KVM_IOEVENTFD: the same
    ]), "runs the guest"),
    rule(SYS_process_vm_readv, Own(0), "guest memory that may be unreadable: an error instead of SIGBUS"),
    rule(SYS_process_vm_writev, Own(0), "guest memory that may be unreadable: an error instead of SIGBUS"),
    rule(SYS_epoll_ctl, Always, "a driver switches a device's queue on or off"),
    rule(SYS_eventfd2, Always, "a driver switches a device's queue on"),
];

#[rustfmt::skip]
const PAGER: &[Rule] = &[
    rule(SYS_ioctl, OneOf(1, &[
        0xc028_aa03, // UFFDIO_COPY: first, because it is by far the most frequent
        0x8010_aa02, // UFFDIO_WAKE
        0xc020_aa04, // UFFDIO_ZEROPAGE
        0xc020_aa08, // UFFDIO_POISON
        0x8010_aa01, // UFFDIO_UNREGISTER
        0xc020_aa00, // UFFDIO_REGISTER
        0xc018_aa06, // UFFDIO_WRITEPROTECT
    ]), "installs pages of guest memory"),
    rule(SYS_timerfd_create, Always, "the watch of the threads that answer faults"),
    rule(SYS_timerfd_settime, Always, "the watch of the threads that answer faults"),
    rule(SYS_sched_setaffinity, OneOf(0, &[0]), "a fault is answered on the CPU of the vCPU that waits"),
    rule(SYS_sched_setscheduler, OneOf(1, &[SCHED_OTHER as u32, SCHED_IDLE as u32]), "a thread that gives way to the vCPUs"),
    rule(SYS_sched_getscheduler, Always, "a thread that gives way to the vCPUs"),
    rule(SYS_kill, Own(0), "--on-error kill: this process ends at a page that cannot be loaded"),
    rule(SYS_recvfrom, Always, "messages of a page server"),
    rule(SYS_recvmsg, Always, "messages of a page server"),
    rule(SYS_pwrite64, Always, "pages of a recording, or of a memory that clones share"),
    rule(SYS_fallocate, Always, "holes of a recording, or of a memory that clones share"),
    rule(SYS_process_vm_readv, Own(0), "guest memory that may be unreadable: an error instead of SIGBUS"),
    rule(SYS_process_vm_writev, Own(0), "guest memory that may be unreadable: an error instead of SIGBUS"),
];

#[rustfmt::skip]
const DEVICES: &[Rule] = &[
    rule(SYS_epoll_wait, Always, "waits for queues, sockets and taps"),
    rule(SYS_epoll_pwait, Always, "waits for queues, sockets and taps"),
    rule(SYS_epoll_ctl, Always, "which of them it waits for"),
    rule(SYS_readv, Always, "frames of a tap, bytes of a socket"),
    rule(SYS_writev, Always, "frames of a tap, bytes of a socket"),
    rule(SYS_preadv, Always, "a disk's image"),
    rule(SYS_pwritev, Always, "a disk's image"),
    rule(SYS_pread64, Always, "a disk's image"),
    rule(SYS_pwrite64, Always, "a disk's image"),
    rule(SYS_preadv2, Always, "a disk's image"),
    rule(SYS_pwritev2, Always, "a disk's image"),
    rule(SYS_fsync, Always, "a guest's flush of its disk"),
    rule(SYS_fdatasync, Always, "a guest's flush of its disk"),
    rule(SYS_fallocate, Always, "blocks and pages that a guest gives back"),
    rule(SYS_lseek, Always, "holes of a disk's image"),
    rule(SYS_fstat, Always, "length of a disk's image"),
    rule(SYS_statx, Always, "length of a disk's image"),
    rule(SYS_process_vm_readv, Own(0), "guest memory that may be unreadable: an error instead of SIGBUS"),
    rule(SYS_process_vm_writev, Own(0), "guest memory that may be unreadable: an error instead of SIGBUS"),
    rule(SYS_socket, OneOf(0, &[AF_UNIX as u32]), "a guest's vsock connection to a program of this host"),
    rule(SYS_connect, Always, "a guest's vsock connection; only AF_UNIX sockets exist"),
    rule(SYS_accept4, Always, "a program's connection to the guest's vsock"),
    rule(SYS_recvfrom, Always, "bytes of a vsock connection"),
    rule(SYS_recvmsg, Always, "bytes of a vsock connection"),
    rule(SYS_sendmsg, Always, "bytes of a vsock connection"),
    rule(SYS_shutdown, Always, "the end of a vsock connection"),
    rule(SYS_getsockopt, Always, "credentials of a program that connects; errors of a connection"),
    rule(SYS_setsockopt, Always, "time-outs of a connection"),
    rule(SYS_ioctl, OneOf(1, &[
        FIONBIO as u32,
        0x4020_ae76, // KVM_IRQFD: a device that breaks
        0x4040_ae79, // KVM_IOEVENTFD: the same
    ]), "sockets that do not block"),
];

#[rustfmt::skip]
const SIGNALS: &[Rule] = &[
    rule(SYS_recvfrom, Always, "the pipe of the signal handler"),
    rule(SYS_unlink, Always, "sockets and hidden files, when an interrupt ends the process"),
    rule(SYS_unlinkat, Always, "sockets and hidden files, when an interrupt ends the process"),
    rule(SYS_rmdir, Always, "hidden folders, when an interrupt ends the process"),
    rule(SYS_getdents64, Always, "hidden folders, when an interrupt ends the process"),
    rule(SYS_ioctl, OneOf(1, &[
        TCGETS as u32, TCSETS as u32, TCSETSW as u32, TCSETSF as u32, TIOCGPGRP as u32,
        0x802c_542a, 0x402c_542b, 0x402c_542c, 0x402c_542d, // TCGETS2, TCSETS2, TCSETSW2, TCSETSF2: the crate rustix
    ]), "the terminal is put back, when an interrupt ends the process"),
    rule(SYS_getpgrp, Always, "whether the terminal is this job's"),
    rule(SYS_clone, Has(0, CLONE_THREAD as u32), "files on a slow disk are removed by another thread"),
    rule(SYS_clone3, Fails(ENOSYS), "the C library then uses clone"),
    rule(SYS_set_robust_list, Always, "the C library, in a new thread"),
    rule(SYS_rseq, Always, "the C library, in a new thread"),
    rule(SYS_landlock_restrict_self, Always, "files are taken away before the guest runs"),
    rule(SYS_prctl, OneOf(0, &[PR_SET_NO_NEW_PRIVS as u32]), "it is set again before that"),
];

#[rustfmt::skip]
const MAIN: &[Rule] = &[
    rule(SYS_ioctl, OneOf(1, &[
        0xaead,      // KVM_KVMCLOCK_CTRL
        0x4090_ae82, 0x8138_ae83, 0x4138_ae84, // KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS
        0xc008_ae88, 0x4008_ae89, 0xc004_ae02, // KVM_GET_MSRS, KVM_SET_MSRS, KVM_GET_MSR_INDEX_LIST
        0x8004_ae98, 0x4004_ae99, // KVM_GET_MP_STATE, KVM_SET_MP_STATE
        0x8400_ae8e, 0x4400_ae8f, // KVM_GET_LAPIC, KVM_SET_LAPIC
        0x8040_ae9f, 0x4040_aea0, // KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS
        0x9000_aea4, 0x5000_aea5, 0x9000_aecf, // KVM_GET_XSAVE, KVM_SET_XSAVE, KVM_GET_XSAVE2
        0x8188_aea6, 0x4188_aea7, // KVM_GET_XCRS, KVM_SET_XCRS
        0x8080_aea1, 0x4080_aea2, // KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS
        0xaea3, 0xaea2, // KVM_GET_TSC_KHZ, KVM_SET_TSC_KHZ
        0xc008_ae91, 0x4008_ae90, // KVM_GET_CPUID2, KVM_SET_CPUID2
        0xc208_ae62, 0x8208_ae63, // KVM_GET_IRQCHIP, KVM_SET_IRQCHIP
        0x8070_ae9f, 0x4070_aea0, // KVM_GET_PIT2, KVM_SET_PIT2
        0x8030_ae7c, 0x4030_ae7b, // KVM_GET_CLOCK, KVM_SET_CLOCK
        0xae03,      // KVM_CHECK_EXTENSION
    ]), "the state of a guest that is paused"),
    rule(SYS_ioctl, OneOf(1, &[
        0x4010_ae42, // KVM_GET_DIRTY_LOG: what the guest, or KVM itself, has written
        0xc060_6610, // PAGEMAP_SCAN of /proc/self/pagemap: which pages are in memory
    ]), "a reset, and a snapshot of what has changed"),
    rule(SYS_ioctl, OneOf(1, &[TIOCGWINSZ as u32, FIONBIO as u32, FIONREAD as u32]),
        "the terminal's size, and clients of the control socket"),
    rule(SYS_pipe2, Always, "ends of threads"),
    rule(SYS_socketpair, OneOf(0, &[AF_UNIX as u32]), "ends of threads"),
    rule(SYS_epoll_create1, Always, "waits of several descriptors"),
    rule(SYS_memfd_create, Always, "memory that is recorded"),
    rule(SYS_ftruncate, Always, "memory that is recorded"),
    rule(SYS_readlink, Always, "/proc/self/fd"),
    rule(SYS_readlinkat, Always, "/proc/self/fd"),
    rule(SYS_access, Always, "whether a file exists"),
    rule(SYS_faccessat, Always, "whether a file exists"),
    rule(SYS_faccessat2, Always, "whether a file exists"),
    rule(SYS_getcwd, Always, "relative paths"),
    rule(SYS_prlimit64, Own(0), "limits of this process"),
    rule(SYS_prlimit64, OneOf(0, &[0]), "limits of this process"),
    rule(SYS_getrusage, Always, "what the process has used"),
    rule(SYS_times, Always, "what the process has used"),
    rule(SYS_sysinfo, Always, "memory of the host"),
    rule(SYS_uname, Always, "the host, for metadata"),
    rule(SYS_getuid, Always, "clients of the control socket must have it"),
    rule(SYS_geteuid, Always, "clients of the control socket must have it"),
    rule(SYS_getpgid, Always, "whether the terminal is this job's"),
    rule(SYS_getppid, Always, "whether the terminal is this job's"),
    rule(SYS_getsockname, Always, "the control socket"),
    rule(SYS_getpeername, Always, "the control socket"),
    rule(SYS_fstatfs, Always, "the kind of a file system"),
    rule(SYS_statfs, Always, "the kind of a file system"),
    rule(SYS_msync, Always, "mapped files"),
    rule(SYS_mincore, Always, "which pages are present"),
];

#[rustfmt::skip]
const WRITER: &[Rule] = &[
    rule(SYS_openat, Always, "a new snapshot; /dev/userfaultfd, if it is not open"),
    rule(SYS_open, Always, "a new snapshot"),
    rule(SYS_openat2, Always, "a new snapshot"),
    rule(SYS_ioctl, OneOf(1, USERFAULTFD), "a snapshot while the guest runs"),
    rule(SYS_userfaultfd, Always, "the same, without /dev/userfaultfd"),
    rule(SYS_mlock, Always, "messages of a userfaultfd"),
    rule(SYS_linkat, Always, "the snapshot gets its name when it is complete"),
    rule(SYS_link, Always, "the snapshot gets its name when it is complete"),
    rule(SYS_rename, Always, "the snapshot replaces another"),
    rule(SYS_renameat, Always, "the snapshot replaces another"),
    rule(SYS_renameat2, Always, "the snapshot replaces another"),
    rule(SYS_mkdir, Always, "a copy of a disk's overlay"),
    rule(SYS_mkdirat, Always, "a copy of a disk's overlay"),
    rule(SYS_fchmod, Always, "the mode of a new file"),
    rule(SYS_sync_file_range, Always, "write-back of a new file"),
    rule(SYS_copy_file_range, Always, "parts of other files"),
    rule(SYS_sendfile, Always, "parts of other files"),
    rule(SYS_flock, Always, "no two writers of one file"),
    rule(SYS_utimensat, Always, "times of a file"),
];

#[rustfmt::skip]
const SERVER: &[Rule] = &[
    rule(SYS_accept4, Always, "a guest, a server that is kept, a reader of metrics"),
    rule(SYS_recvmsg, Always, "messages with the descriptors of guests"),
    rule(SYS_sendmsg, Always, "messages with descriptors, to a keeper and to clones"),
    rule(SYS_ioctl, OneOf(1, &[FIONBIO as u32]), "sockets that do not block"),
    rule(SYS_shutdown, Always, "the end of a connection"),
    rule(SYS_getsockopt, Always, "who connects"),
    rule(SYS_setsockopt, Always, "time-outs of a connection"),
    rule(SYS_getsockname, Always, "the socket's own address"),
    rule(SYS_pidfd_open, Always, "the process of a guest, if the socket does not give it"),
    rule(SYS_pidfd_send_signal, Always, "a guest is killed whose page cannot be loaded"),
    rule(SYS_memfd_create, Always, "memory that clones share"),
    rule(SYS_ioctl, OneOf(1, USERFAULTFD), "memory that clones share; the device is open before"),
    rule(SYS_userfaultfd, Always, "the same, without /dev/userfaultfd"),
    rule(SYS_ftruncate, Always, "memory that clones share"),
    rule(SYS_fchmod, OneOf(1, &[0o400, 0o600]), "memory that clones share cannot be opened for writing"),
    rule(SYS_fcntl, OneOf(1, &[F_ADD_SEALS as u32, F_GET_SEALS as u32]), "memory that clones share"),
    rule(SYS_readlink, Always, "the kind of a guest's descriptor, in /proc/self/fd"),
    rule(SYS_readlinkat, Always, "the kind of a guest's descriptor, in /proc/self/fd"),
    rule(SYS_mlock, Always, "messages of a userfaultfd, which a keeper shares"),
    rule(SYS_munlock, Always, "messages of a userfaultfd, which a keeper shares"),
    rule(SYS_pipe2, Always, "ends of threads"),
    rule(SYS_socketpair, OneOf(0, &[AF_UNIX as u32]), "ends of threads"),
    rule(SYS_eventfd2, Always, "ends of threads"),
    rule(SYS_epoll_create1, Always, "waits of several descriptors"),
    rule(SYS_epoll_ctl, Always, "waits of several descriptors"),
    rule(SYS_epoll_wait, Always, "waits of several descriptors"),
    rule(SYS_epoll_pwait, Always, "waits of several descriptors"),
    rule(SYS_geteuid, Always, "who may connect"),
    rule(SYS_getuid, Always, "who may connect"),
    rule(SYS_prlimit64, OneOf(0, &[0]), "limits of this process"),
];

#[rustfmt::skip]
const FORK: &[Rule] = &[
    rule(SYS_socket, OneOf(0, &[AF_UNIX as u32]), "asks the guest for pages that are not copied yet"),
    rule(SYS_connect, Always, "asks the guest for pages that are not copied yet; only AF_UNIX sockets exist"),
];

#[rustfmt::skip]
const MOUNT: &[Rule] = &[
    rule(SYS_writev, Always, "answers to readers"),
    rule(SYS_geteuid, Always, "the owner of the files"),
    rule(SYS_getegid, Always, "the owner of the files"),
];

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;
    use crate::names;

    const PARTS: [(&str, &[Rule]); 13] = [
        ("Common", COMMON),
        ("No files", NO_FILES),
        ("Starts threads", STARTS_THREADS),
        ("Reads files", READS_FILES),
        ("vCPU", VCPU),
        ("Pager", PAGER),
        ("Devices", DEVICES),
        ("Signals", SIGNALS),
        ("Main", MAIN),
        ("Writer", WRITER),
        ("Server", SERVER),
        ("Fork", FORK),
        ("Mount", MOUNT),
    ];

    fn condition(when: &When) -> String {
        match when {
            Always => String::new(),
            OneOf(arg, values) => {
                let values: Vec<_> = values.iter().map(|value| format!("{value:#x}")).collect();
                format!("argument {arg} is {}", values.join(", "))
            }
            Own(arg) => format!("argument {arg} is this process"),
            Has(arg, mask) => format!("argument {arg} has a bit of {mask:#x}"),
            Lacks(arg, mask) => format!("argument {arg} has no bit of {mask:#x}"),
            Fails(errno) => format!("never: error {errno}"),
        }
    }

    /// The table as docs/jail.md has it.
    fn text() -> String {
        let mut text = String::new();
        for (title, rules) in PARTS {
            write!(text, "\n### {title}\n\n| call | only if | reason |\n|---|---|---|\n").unwrap();
            for rule in rules {
                let name = names::of(rule.call).expect("it has a name");
                writeln!(text, "| `{name}` | {} | {} |", condition(&rule.when), rule.why).unwrap();
            }
        }
        text
    }

    /// `JAIL_UPDATE_DOCS=1 cargo test -p snapvm-jail` writes it.
    #[test]
    fn the_documentation_has_the_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/jail.md");
        let document = std::fs::read_to_string(path).expect("the documentation is there");
        let (before, table) = document.split_once("\n### Common\n").expect("it has the table");
        if std::env::var_os("JAIL_UPDATE_DOCS").is_some() {
            std::fs::write(path, before.to_owned() + &text()).expect("it is written");
        } else {
            assert_eq!(
                format!("\n### Common\n{table}"),
                text(),
                "set JAIL_UPDATE_DOCS=1 to write it"
            );
        }
    }

    #[test]
    fn each_part_belongs_to_a_role_and_each_rule_has_a_reason() {
        let all = || Role::ALL.into_iter().flat_map(of).flat_map(|part| part.iter());
        let same = |one: &Rule, other: &Rule| one.call == other.call && one.why == other.why;
        let listed = || PARTS.into_iter().flat_map(|(_, rules)| rules);
        for rule in all() {
            assert!(!rule.why.is_empty(), "{}", rule.call);
            assert!(listed().any(|other| same(rule, other)), "{}: {}", rule.call, rule.why);
        }
        for rule in listed() {
            if let OneOf(_, values) = rule.when {
                assert!((1..=256).contains(&values.len()), "{}: {}", rule.call, rule.why);
            }
            assert!(all().any(|other| same(rule, other)), "{}: {}", rule.call, rule.why);
        }
    }
}
