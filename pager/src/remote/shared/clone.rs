//! The guest side of shared memory: a private mapping of the file of the server, and the reaction to its end.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

use super::image::SEALS;
use crate::install::kernel::{self, Drained, Fill, Filler, InstallObserver, Target};
use crate::region::PAGE_BYTES;
use crate::remote::serve::credentials;
use crate::remote::serve::handshake::{RegionMessage, Request};
use crate::remote::serve::wire::{self, SocketReader};
use crate::remote::serve::{Answer, RefuseError, SnapshotName};
use crate::threads;
use crate::uffd::{Features, MessageBatch, OpenError, Uffd};

/// A timeout for [`SharedClone::start`]. A server answers immediately, unless the host is very busy.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Why memory cannot be shared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShareError {
    /// A system call failed.
    #[error("cannot {what}")]
    System {
        /// The operation.
        what: &'static str,
        /// The error of the system call.
        #[source]
        error: io::Error,
    },
    /// No userfaultfd, or one without poison (Linux 6.6).
    #[error(transparent)]
    Open(OpenError),
    /// The server does not answer.
    #[error(
        "the page server has not answered within {after:?}; it may be stopped, or the socket is another program's"
    )]
    Silent {
        /// The time that the clone has waited.
        after: Duration,
    },
    /// The handshake with the server failed.
    #[error("the page server")]
    Server(#[source] RefuseError),
    /// The server refuses the clone.
    #[error("the page server refuses: {reason}")]
    Refused {
        /// The reason that the server gives.
        reason: String,
    },
    /// The server runs as another user.
    #[error("the page server runs as user {uid}: only this user's and root's are trusted")]
    User {
        /// The id of that user.
        uid: u32,
    },
    /// The server has not sent a sealed file of the right size.
    #[error("the page server's file is not a sealed one of {memory_bytes} bytes")]
    File {
        /// The expected size.
        memory_bytes: u64,
    },
}

/// The memory of one guest, paged by a server that shares it with others.
///
/// Drop it when nothing can touch a missing page any more, as with [`crate::Pager::stop`].
#[derive(Debug)]
pub struct SharedClone {
    stream: Arc<UnixStream>,
    /// Kept open to the end, even if the server ends: without it, missing pages would be zeros.
    link: Arc<Link>,
    watch: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Link {
    filler: Filler,
    memory: Arc<GuestMemoryMmap>,
    stopping: AtomicBool,
    failure: OnceLock<String>,
}

impl SharedClone {
    /// Requests the memory of the snapshot from the server at `path`, and maps it. Each of `ranges` has the guest
    /// physical address, the length in bytes, and the offset in the snapshot in bytes.
    ///
    /// `on_failure` is called when the server cannot load a page, which is then poisoned, and when the server has
    /// ended. In the second case all missing pages are poisoned, so that threads which touch them get an error. The
    /// callback should record the failure and ask the guest to stop. This waits for the server at most `timeout`;
    /// [`ANSWER_TIMEOUT`] is enough.
    ///
    /// # Errors
    /// [`ShareError`].
    pub fn start(
        path: &Path,
        snapshot: &SnapshotName,
        ranges: &[(GuestAddress, usize, u64)],
        timeout: Duration,
        on_failure: impl Fn(String) + Send + 'static,
    ) -> Result<(SharedClone, Arc<GuestMemoryMmap>), ShareError> {
        let system = |what| move |error| ShareError::System { what, error };
        let begun = Instant::now();
        let connected = wire::connect(path, timeout);
        let stream = Arc::new(connected.map_err(system("connect to the page server"))?);
        trusted(&stream)?;
        let mut reader = SocketReader::new(&stream, timeout.saturating_sub(begun.elapsed()));
        let request = encoded(&Request::Share(snapshot.clone()))?;
        wire::send_line(&stream, &request, None)
            .map_err(system("send a request to the page server"))?;
        accepted(&mut reader, timeout)?;
        let file = File::from(reader.descriptor().map_err(ShareError::Server)?);
        check(&file, snapshot.memory_bytes)?;

        let required = Features::EVENT_REMOVE.with(Features::POISON).with(Features::MISSING_SHMEM);
        let uffd = Uffd::open(required, Features::THREAD_ID).map_err(ShareError::Open)?;
        let memory = Arc::new(mapped(&file, ranges)?);
        let mut regions = Vec::new();
        for ((_, _, offset), region) in ranges.iter().zip(memory.iter()) {
            let (host_addr, len) = (region.as_ptr() as u64, region.len());
            // SAFETY: the mapping is new and was not accessed. It lives as long as `memory`, which outlives the
            // userfaultfd. vm-memory makes no reference into it, only volatile accesses.
            unsafe { uffd.register(host_addr, len) }
                .map_err(|errno| system("register the memory")(errno.into()))?;
            regions.push(RegionMessage {
                base_host_virt_addr: host_addr,
                size: len,
                offset: *offset,
                page_size: Some(PAGE_BYTES as u64),
                page_size_kib: None,
            });
        }
        wire::send_line(&stream, &encoded(&regions)?, Some(uffd.as_fd()))
            .map_err(system("send the page server the userfaultfd"))?;
        accepted(&mut reader, timeout)?;
        let filler = Filler { uffd, zeros: None };
        let stopping = AtomicBool::new(false);
        let (memory_kept, failure) = (Arc::clone(&memory), OnceLock::new());
        let link = Arc::new(Link { filler, memory: memory_kept, stopping, failure });
        let (read_from, watched) = (Arc::clone(&stream), Arc::clone(&link));
        let early = std::mem::take(&mut reader.bytes);
        let watch = threads::spawn("share", move || watched.watch(&early, &read_from, on_failure))
            .map_err(system("start a thread"))?;
        Ok((SharedClone { stream, link, watch: Some(watch) }, memory))
    }

    /// Stops the paging and returns the first failure, if there was one. As with [`crate::Pager::stop`], call this only
    /// when nothing can touch a missing page any more.
    pub fn stop(mut self) -> Option<String> {
        self.end();
        self.link.failure.get().cloned()
    }

    fn end(&mut self) {
        self.link.stopping.store(true, Ordering::SeqCst);
        // Messages that the server has sent before are still read.
        let _ = self.stream.shutdown(Shutdown::Both);
        if let Some(watch) = self.watch.take() {
            let _ = watch.join();
        }
    }
}

impl Drop for SharedClone {
    fn drop(&mut self) {
        self.end();
    }
}

impl Link {
    /// Reports the failures that the server sends, until the server or the guest ends.
    fn watch(&self, early: &[u8], stream: &UnixStream, on_failure: impl Fn(String)) {
        // The callback belongs to the caller. The pages must be poisoned even if it panics.
        let on_failure = |reason: String| {
            let _ = panic::catch_unwind(AssertUnwindSafe(|| on_failure(reason)));
        };
        let lines = BufReader::new(io::Read::chain(early, stream)).lines();
        for line in lines.map_while(Result::ok) {
            if let Ok(Answer::Failure(reason)) = serde_json::from_str(&line) {
                on_failure(self.failure.get_or_init(|| reason).clone());
            }
        }
        if !self.stopping.load(Ordering::SeqCst) {
            // The report comes first, so that its cause is known when an access fails.
            let reason = || "the page server has ended".to_owned();
            on_failure(self.failure.get_or_init(reason).clone());
            self.poison_all();
        }
    }

    fn poison_all(&self) {
        for region in self.memory.iter() {
            let target = Target {
                first_page: 0,
                pages: region.len() as usize / PAGE_BYTES,
                host_addr: region.as_ptr() as u64,
                page_bytes: PAGE_BYTES,
            };
            // If the kernel refuses this, threads keep waiting. They see no zeros.
            let _ = kernel::install(&self.filler, target, Fill::Poison, &mut Poisoning(self));
        }
    }
}

/// Poisons all missing pages.
struct Poisoning<'a>(&'a Link);

impl InstallObserver for Poisoning<'_> {
    /// The server does not read the events any more, so that this process has to.
    fn drain_events(&mut self) -> Drained {
        if self.0.stopping.load(Ordering::SeqCst) {
            return Drained::GiveUp;
        }
        let _ = self.0.filler.uffd.read(&mut MessageBatch::new());
        thread::yield_now();
        Drained::Retry
    }
}

fn encoded(message: &impl serde::Serialize) -> Result<String, ShareError> {
    serde_json::to_string(message).map_err(|error| ShareError::Server(RefuseError::Message(error)))
}

fn accepted(reader: &mut SocketReader<'_>, timeout: Duration) -> Result<(), ShareError> {
    let line = reader.line().map_err(|error| match error {
        RefuseError::TimedOut { .. } => ShareError::Silent { after: timeout },
        error => ShareError::Server(error),
    })?;
    match serde_json::from_slice(&line) {
        Ok(Answer::Accepted {}) => Ok(()),
        Ok(Answer::Refused(reason) | Answer::Failure(reason)) => {
            Err(ShareError::Refused { reason })
        }
        Err(error) => Err(ShareError::Server(RefuseError::Message(error))),
    }
}

/// Checks that the server runs as this user or as root, because it decides what the guest runs.
fn trusted(stream: &UnixStream) -> Result<(), ShareError> {
    let failed = |error| ShareError::System { what: "get the user of the server", error };
    let found = credentials::of(stream).map_err(failed)?;
    match found.is_own_or_root() {
        true => Ok(()),
        false => Err(ShareError::User { uid: found.uid }),
    }
}

/// Checks the file: if it could become shorter, the guest could end by SIGBUS.
fn check(file: &File, memory_bytes: u64) -> Result<(), ShareError> {
    let sealed = rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SEALS));
    match file.metadata() {
        Ok(found) if sealed && found.len() == memory_bytes => Ok(()),
        _ => Err(ShareError::File { memory_bytes }),
    }
}

fn mapped(
    file: &File,
    ranges: &[(GuestAddress, usize, u64)],
) -> Result<GuestMemoryMmap, ShareError> {
    let failed = |error| ShareError::System { what: "map the shared memory", error };
    let mut regions = Vec::new();
    for (gpa, len, offset) in ranges {
        let file = FileOffset::new(file.try_clone().map_err(failed)?, *offset);
        let region = MmapRegionBuilder::new(*len)
            .with_file_offset(file)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .build()
            .map_err(|error| failed(io::Error::other(error)))?;
        let region = GuestRegionMmap::new(region, *gpa)
            .ok_or_else(|| failed(io::Error::other("a region beyond the address space")))?;
        regions.push(region);
    }
    GuestMemoryMmap::from_regions(regions).map_err(|error| failed(io::Error::other(error)))
}
