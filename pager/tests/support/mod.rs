//! Memory of the test process as the "guest", touched only by volatile accesses.
#![allow(unsafe_code, dead_code, missing_docs, unreachable_pub)]

pub mod windows;

use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

pub use pager::PAGE_BYTES as PAGE;
use pager::uffd::{Features, Uffd};
use pager::{Load, LoadCost, LoadedPage, LoadedPages, PageReader, PageSource, Region, SourceError};

/// Anonymous memory, unmapped when dropped.
#[derive(Debug)]
pub struct Memory {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: raw memory of the process, accessed by volatile operations and system calls only.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub fn map(len: usize) -> Memory {
        Memory::map_with(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .expect("anonymous memory")
    }

    pub fn map_with(len: usize, flags: i32) -> io::Result<Memory> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Memory { start: NonNull::new(start.cast()).expect("not at 0"), len })
    }

    /// A private mapping of a file.
    pub fn of_file(file: &std::fs::File, len: usize) -> Memory {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags, file.as_raw_fd(), 0) };
        assert_ne!(start, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Memory { start: NonNull::new(start.cast()).expect("not at 0"), len }
    }

    pub fn addr(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// `pages` pages from page `first`, with the source's content from `source_offset`.
    pub fn region(&self, first: usize, pages: usize, source_offset: u64) -> Region {
        assert!((first + pages) * PAGE <= self.len);
        // SAFETY: mapped until `self` is dropped, which tests do after the pager has stopped. No references into it are
        // made.
        unsafe {
            Region::new(
                self.addr() + (first * PAGE) as u64,
                (pages * PAGE) as u64,
                PAGE,
                source_offset,
            )
        }
        .expect("whole pages")
    }

    pub fn whole(&self) -> Region {
        self.region(0, self.len / PAGE, 0)
    }

    fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.len);
        self.start.as_ptr().wrapping_add(offset)
    }

    pub fn read(&self, offset: usize) -> u8 {
        // SAFETY: inside the mapping.
        unsafe { self.at(offset).read_volatile() }
    }

    pub fn read_u64(&self, offset: usize) -> u64 {
        assert!(offset + 8 <= self.len && offset.is_multiple_of(8));
        // SAFETY: inside the mapping, and aligned.
        unsafe { self.at(offset).cast::<u64>().read_volatile() }
    }

    pub fn write(&self, offset: usize, value: u8) {
        // SAFETY: inside the mapping.
        unsafe { self.at(offset).write_volatile(value) }
    }

    /// `madvise(MADV_DONTNEED)`: the pages are given back.
    pub fn remove(&self, first: usize, pages: usize) {
        assert!((first + pages) * PAGE <= self.len);
        // SAFETY: inside the mapping; no references into it exist.
        let result = unsafe {
            libc::madvise(self.at(first * PAGE).cast(), pages * PAGE, libc::MADV_DONTNEED)
        };
        assert_eq!(result, 0, "madvise: {}", io::Error::last_os_error());
    }

    /// `mremap` to another address.
    pub fn move_away(&mut self) {
        let to = Memory::map(self.len);
        let (flags, old) = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, self.start.as_ptr());
        // SAFETY: the target is a mapping that is forgotten immediately, and nothing refers to either.
        let moved =
            unsafe { libc::mremap(old.cast(), self.len, self.len, flags, to.start.as_ptr()) };
        assert_ne!(moved, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        self.start = to.start;
        std::mem::forget(to);
    }

    /// Touches the page in a forked child. Returns the signal that has ended it, if one did.
    pub fn touch_in_a_child(&self, page: usize) -> Option<i32> {
        let address = self.at(page * PAGE);
        // SAFETY: the child only reads one byte and ends, neither of which takes a lock.
        let child = unsafe { libc::fork() };
        assert!(child >= 0, "{}", io::Error::last_os_error());
        if child == 0 {
            // SAFETY: inside the mapping. If the child does not have it, the child ends here.
            unsafe { address.read_volatile() };
            // SAFETY: takes a number.
            unsafe { libc::_exit(0) };
        }
        let mut status = 0;
        // SAFETY: a child of this process, and a valid place for its status.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status))
    }

    /// Lets the kernel read one byte of the page. Returns the byte, or the error if an access by this process would
    /// raise SIGBUS.
    pub fn read_by_syscall(&self, page: usize) -> io::Result<u8> {
        let (reader, writer) = io::pipe()?;
        let writer = OwnedFd::from(writer);
        // SAFETY: the kernel checks the address; it is inside the mapping anyway.
        let written = unsafe { libc::write(writer.as_raw_fd(), self.at(page * PAGE).cast(), 1) };
        if written < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut byte = [0];
        io::Read::read_exact(&mut &reader, &mut byte)?;
        Ok(byte[0])
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: `map_with` has made this mapping, and nothing refers to it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Makes all userfaultfds of this process blocking. From then on `poll` reports an error for them.
pub fn make_userfaultfds_blocking() {
    for entry in std::fs::read_dir("/proc/self/fd").expect("proc") {
        let path = entry.expect("proc").path();
        let Ok(target) = std::fs::read_link(&path) else { continue };
        if target.as_os_str() == "anon_inode:[userfaultfd]" {
            let fd = path.file_name().and_then(|name| name.to_str()).and_then(|n| n.parse().ok());
            // SAFETY: F_SETFL takes flags.
            assert_eq!(unsafe { libc::fcntl(fd.expect("a number"), libc::F_SETFL, 0) }, 0);
        }
    }
}

/// Whether userfaultfd works here. If not, this prints that, or fails if `SNAP_REQUIRE_VM` is set.
pub fn userfaultfd_works(test: &str) -> bool {
    match Uffd::open(Features::EVENT_REMOVE.with(Features::POISON), Features::NONE) {
        Ok(_) => true,
        Err(error) => {
            assert!(std::env::var_os("SNAP_REQUIRE_VM").is_none(), "{test}: {error}");
            let line = format!("SKIPPED {test}: /dev/userfaultfd: {error}\n");
            io::stderr().write_all(line.as_bytes()).expect("stderr can be written");
            false
        }
    }
}

/// Binds the calling thread, and those that it creates, to a CPU.
pub fn pin(cpu: usize) {
    // SAFETY: all zero bits are an empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: checks the number itself.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the calling thread, and a valid set of that size.
    let result = unsafe { libc::sched_setaffinity(0, std::mem::size_of_val(&set), &set) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// The same, to the CPU where it runs now: it may use that one.
pub fn pin_here() {
    // SAFETY: takes nothing and has no effect.
    let cpu = unsafe { libc::sched_getcpu() };
    pin(usize::try_from(cpu).expect("the thread runs on a CPU"));
}

/// The calling thread's id in `/proc`.
pub fn thread_id() -> i32 {
    // SAFETY: gettid(2) only gives a number.
    unsafe { libc::gettid() }
}

/// The first word of page `page` in the source of every test. It is never zero.
pub fn stamp(page: usize) -> u64 {
    0x5eed_0000_0000_0001 | (page as u64) << 8
}

/// The pages that a lossy source cannot load.
pub fn is_lost(page: usize) -> bool {
    page % 61 == 17
}

/// `pages` pages, each filled with its stamp.
pub fn stamped(pages: usize) -> Vec<u8> {
    (0..pages)
        .flat_map(|page| std::iter::repeat_n(stamp(page).to_ne_bytes(), PAGE / 8).flatten())
        .collect()
}

/// xorshift64*: small, and the same everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }
}

pub fn number_from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// `SNAP_CHAOS_SEED`, or a random one.
pub fn chaos_seed() -> u64 {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    number_from_env("SNAP_CHAOS_SEED").unwrap_or(clock.map_or(1, |since| since.as_nanos() as u64))
}

/// A step of the chaos tests takes at most some seconds.
pub const HUNG: Duration = Duration::from_secs(60);

/// Ends this process if no step is reported for too long.
pub fn watchdog() -> Sender<&'static str> {
    let (steps, seen) = channel();
    std::thread::spawn(move || {
        let mut last = "the start";
        loop {
            match seen.recv_timeout(HUNG) {
                Ok(step) => last = step,
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {
                    eprintln!("chaos: it hangs in {last}");
                    std::process::abort();
                }
            }
        }
    });
    steps
}

/// Resident memory of this process.
pub fn rss_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("proc");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok());
    number.expect("a number")
}

/// 0..n in a fixed pseudo-random order.
pub fn shuffled(n: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    let mut state = seed | 1;
    for i in (1..n).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(i, (state % (i as u64 + 1)) as usize);
    }
    order
}

/// A source of stamped pages, which a function of its reader fills.
pub struct FnSource<F> {
    pub len_bytes: u64,
    pub load: F,
}

impl<F> PageSource for FnSource<F>
where
    F: Fn(u64, &mut Answer) -> Result<(), SourceError> + Clone + Send + Sync + 'static,
{
    fn reader(&self, _page_bytes: usize) -> Result<Box<dyn PageReader>, SourceError> {
        Ok(Box::new(FnReader { load: self.load.clone(), answer: Answer::default() }))
    }
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }
}

/// The pages that the function fills, in the order of the buffer.
#[derive(Default)]
pub struct Answer {
    bytes: Vec<u8>,
    pages: Vec<LoadedPage>,
    zero: Option<std::ops::Range<u64>>,
}

impl Answer {
    /// All of these offsets are zero.
    pub fn zero(&mut self, range: std::ops::Range<u64>) {
        self.zero = Some(range);
    }

    /// Adds the stamped page with this number to the buffer.
    pub fn push(&mut self, page: usize) {
        let source_offset = (page * PAGE) as u64;
        self.pages.push(LoadedPage { source_offset, buffer_offset: self.bytes.len() });
        self.bytes.extend(std::iter::repeat_n(stamp(page).to_ne_bytes(), PAGE / 8).flatten());
    }

    /// Lists a page beyond the buffer.
    pub fn push_beyond(&mut self, page: usize) {
        let source_offset = (page * PAGE) as u64;
        self.pages.push(LoadedPage { source_offset, buffer_offset: self.bytes.len() + 1 });
    }
}

struct FnReader<F> {
    load: F,
    answer: Answer,
}

impl<F: Fn(u64, &mut Answer) -> Result<(), SourceError> + Send> PageReader for FnReader<F> {
    fn load(&mut self, source_offset: u64) -> Result<Load<'_>, SourceError> {
        self.answer.bytes.clear();
        self.answer.pages.clear();
        (self.load)(source_offset, &mut self.answer)?;
        if let Some(range) = self.answer.zero.take() {
            return Ok(Load::Zero { range });
        }
        let (bytes, pages) = (&self.answer.bytes, &self.answer.pages);
        Ok(Load::Pages(LoadedPages { bytes, pages, cost: LoadCost::default() }))
    }
}

pub fn source_of(
    pages: usize,
    load: impl Fn(u64, &mut Answer) -> Result<(), SourceError> + Clone + Send + Sync + 'static,
) -> std::sync::Arc<dyn PageSource> {
    std::sync::Arc::new(FnSource { len_bytes: (pages * PAGE) as u64, load })
}
