//! A page of guest memory that the host cannot supply stops the guest; it does not kill the process.
#![allow(unsafe_code, clippy::unwrap_used)]

mod common;

use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::time::Duration;

use common::{Lines, MIB, guest_memory, kvm_or_skip, run_to_pause, stop_of};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm::demo::{DemoConfig, DemoPlan, WALKED_OF_256, in_working_set};
use vmm::{PausedVm, Payload, Stop, memory_layout};

const MEMORY_BYTES: u64 = 64 * MIB;
const WORK_BYTES: u64 = 8 * MIB;

/// `include/uapi/linux/userfaultfd.h`
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_POISON: libc::c_ulong = 0xc020_aa08;
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_POISON: u64 = 1 << 14;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;

/// Makes one page of guest memory missing: a thread that accesses it waits.
fn withhold(memory: &GuestMemoryMmap, gpa: u64) -> io::Result<Withheld> {
    let host_addr = memory.get_host_address(GuestAddress(gpa)).unwrap();
    // SAFETY: no pointers are passed.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor without another owner.
    let uffd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    call(&uffd, UFFDIO_API, [UFFD_API, UFFD_FEATURE_POISON, 0, 0])?;
    // SAFETY: a whole page of the guest's memory, which no reference points into.
    let result = unsafe { libc::madvise(host_addr.cast(), 4096, libc::MADV_DONTNEED) };
    assert_eq!(result, 0);
    call(&uffd, UFFDIO_REGISTER, [host_addr as u64, 4096, UFFDIO_REGISTER_MODE_MISSING, 0])?;
    Ok(Withheld { uffd, host_addr: host_addr as u64 })
}

struct Withheld {
    uffd: OwnedFd,
    host_addr: u64,
}

impl Withheld {
    /// Makes the page unreadable: a thread that waits for it continues with an error.
    fn poison(&self) -> io::Result<()> {
        call(&self.uffd, UFFDIO_POISON, [self.host_addr, 4096, 0, 0])
    }
}

fn call(uffd: &OwnedFd, request: libc::c_ulong, mut arg: [u64; 4]) -> io::Result<()> {
    // SAFETY: each of the three requests takes a structure of at most four u64.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), request, arg.as_mut_ptr()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[test]
fn a_poisoned_page_stops_the_guest_with_its_address() {
    let name = "a_poisoned_page_stops_the_guest_with_its_address";
    if !kvm_or_skip(name) {
        return;
    }
    let config = DemoConfig::new(WORK_BYTES);
    let plan = DemoPlan::new(&config, &memory_layout(MEMORY_BYTES).unwrap()).unwrap();
    let memory = guest_memory(MEMORY_BYTES);
    let console = Lines::pausing_after(2);
    let vm = PausedVm::boot(Arc::clone(&memory), &Payload::Demo(config), console.clone()).unwrap();
    let vm = run_to_pause(vm);
    let page = (300..).find(|&page| in_working_set(page, WALKED_OF_256)).unwrap();
    let withheld = withhold(&memory, plan.page_gpa(page));
    let _withheld = match withheld.and_then(|page| page.poison().map(|()| page)) {
        Ok(withheld) => withheld,
        Err(error) => return skip(name, &error),
    };
    let running = vm.resume().unwrap();
    let gpa = match stop_of(&running) {
        Stop::MemoryError { gpa, .. } => gpa.map(|gpa| gpa - gpa % 4096),
        Stop::MmioInRam { gpa } => Some(gpa - gpa % 4096),
        other => panic!("{other:?}"),
    };
    // Where KVM returns only EFAULT, the address is not known.
    assert!(gpa.is_none_or(|gpa| gpa == plan.page_gpa(page)), "{gpa:x?}");
    assert!(running.pause().is_err(), "a guest that lost a page cannot be saved");
    assert_eq!(
        console.take(),
        [format!("ready memory=64 work=8 pages={}", non_zero()), "beat 1 ok".into()]
    );
}

fn skip(name: &str, error: &io::Error) {
    assert!(std::env::var_os("SNAP_REQUIRE_VM").is_none(), "{name}: userfaultfd: {error}");
    let line = format!("SKIPPED {name}: userfaultfd: {error}\n");
    io::stderr().write_all(line.as_bytes()).unwrap();
}

/// A guest can be paused even if its pager does not answer.
#[test]
fn a_guest_that_waits_for_a_page_can_be_paused_and_resumed() {
    let name = "a_guest_that_waits_for_a_page_can_be_paused_and_resumed";
    if !kvm_or_skip(name) {
        return;
    }
    let config = DemoConfig::new(WORK_BYTES);
    let plan = DemoPlan::new(&config, &memory_layout(MEMORY_BYTES).unwrap()).unwrap();
    let memory = guest_memory(MEMORY_BYTES);
    let console = Lines::pausing_after(2);
    let vm = PausedVm::boot(Arc::clone(&memory), &Payload::Demo(config), console.clone()).unwrap();
    let vm = run_to_pause(vm);
    console.take();
    let page = (300..).find(|&page| in_working_set(page, WALKED_OF_256)).unwrap();
    let withheld = match withhold(&memory, plan.page_gpa(page)) {
        Ok(withheld) => withheld,
        Err(error) => return skip(name, &error),
    };
    let running = vm.resume().unwrap();
    // It reaches the page in far less time, and does not get past it.
    assert_eq!(running.wait(Some(Duration::from_millis(500))), None);
    assert!(console.take().is_empty());
    let (paused, when_paused) = std::sync::mpsc::channel();
    std::thread::spawn(move || paused.send(running.pause()).unwrap());
    let vm = when_paused.recv_timeout(Duration::from_secs(20)).expect("it can be paused").unwrap();
    // It reaches the same page again.
    let running = vm.resume().unwrap();
    assert_eq!(running.wait(Some(Duration::from_millis(200))), None);
    withheld.poison().unwrap();
    assert!(!stop_of(&running).is_resumable());
}

fn non_zero() -> u64 {
    let pages = 0..WORK_BYTES / 4096;
    pages.filter(|&p| vmm::demo::page_class(p) != vmm::demo::PageClass::Zero).count() as u64
}

/// The process-wide handler must not swallow a SIGBUS from another cause.
#[test]
fn a_sigbus_outside_of_the_guest_still_ends_the_process() {
    const CHILD: &str = "VMM_TEST_SIGBUS_CHILD";
    let name = "a_sigbus_outside_of_the_guest_still_ends_the_process";
    if !kvm_or_skip(name) {
        return;
    }
    if std::env::var_os(CHILD).is_some() {
        let payload = Payload::Program { code: vec![0xeb, 0xfe] };
        let _vm = PausedVm::boot(guest_memory(4 * MIB), &payload, Lines::default()).unwrap();
        // SAFETY: no pointers are passed but a literal.
        let fd = unsafe { libc::memfd_create(c"empty".as_ptr(), 0) };
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let page = unsafe {
            libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, fd, 0)
        };
        assert_ne!(page, libc::MAP_FAILED);
        // SAFETY: mapped above; that the file has no such page is the point.
        let byte = unsafe { page.cast::<u8>().read_volatile() };
        panic!("read {byte} where no page is");
    }
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact"])
        .env(CHILD, "1")
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
}
