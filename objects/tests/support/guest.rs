//! Memory that a pager fills from a snapshot in a bucket.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pager::{FailurePolicy, Pager, Populate, Region, SnapshotSource, StartError};
use snapfmt::Snapshot;
use snapfmt::layout::PAGE_BYTES;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemoryError, WriteVolatile,
};

/// The memory of a guest, and its pager.
pub(crate) struct Guest {
    pub(crate) memory: Arc<GuestMemoryMmap>,
    pub(crate) pager: Pager,
}

impl Guest {
    /// `None` if userfaultfd does not work here.
    pub(crate) fn start(
        test: &str,
        snapshot: &Arc<Snapshot>,
        slices: usize,
        populate: Populate,
    ) -> Option<Guest> {
        let len = snapshot.header().memory_bytes as usize;
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), len)]);
        let memory = Arc::new(memory.expect("anonymous memory"));
        let regions = Region::of_guest_memory(&memory, |gpa| gpa.0).expect("whole pages");
        let started = Pager::builder(Arc::new(SnapshotSource::new(Arc::clone(snapshot))))
            .regions(regions)
            .slices(slices)
            .populate(populate)
            .on_error(FailurePolicy::Poison)
            .start();
        match started {
            Ok(pager) => Some(Guest { memory, pager }),
            Err(StartError::Open(error)) => {
                assert!(std::env::var_os("SNAP_REQUIRE_VM").is_none(), "{test}: {error}");
                eprintln!("SKIPPED {test}: {error}");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// Touches a page and checks its bytes. Returns how long that took.
    #[track_caller]
    pub(crate) fn check(&self, expected: &[u8], page: usize) -> Duration {
        let (at, mut bytes) = (page * PAGE_BYTES, [0; PAGE_BYTES]);
        let begun = Instant::now();
        let first: u8 = self.memory.read_obj(GuestAddress(at as u64)).expect("inside");
        let took = begun.elapsed();
        self.memory.read_slice(&mut bytes, GuestAddress(at as u64)).expect("inside");
        assert!(first == bytes[0] && bytes == expected[at..at + PAGE_BYTES], "page {page} differs");
        took
    }

    /// Lets the kernel read one byte of a page: a page that failed is an error, and not SIGBUS.
    pub(crate) fn read_by_syscall(&self, page: usize) -> io::Result<()> {
        let (_reader, mut writer) = UnixStream::pair()?;
        let at = GuestAddress((page * PAGE_BYTES) as u64);
        let slice = self.memory.get_slice(at, 1);
        match writer.write_volatile(&slice.map_err(io::Error::other)?) {
            Ok(_) => Ok(()),
            Err(VolatileMemoryError::IOError(error)) => Err(error),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// Touches these pages in this many threads, each the next one that no thread has touched. Returns the times.
    pub(crate) fn check_all(
        &self,
        expected: &[u8],
        pages: &[usize],
        threads: usize,
    ) -> Vec<Duration> {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut times = Vec::new();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(page) = pages.get(at) else { return times };
                times.push(self.check(expected, *page));
            }
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            threads.into_iter().flat_map(|thread| thread.join().expect("no page differs")).collect()
        })
    }
}
