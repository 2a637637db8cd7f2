//! A guest's side of shared memory: a private mapping of the server's file, and what happens if the server is gone.
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
use crate::install::{self, Book, Fill, Filler, Settled, Target};
use crate::serve::handshake::{RegionMessage, Request};
use crate::serve::wire::{self, Inlet};
use crate::serve::{Answer, RefuseError, SnapshotName};
use crate::uffd::{Features, MessageBatch, OpenError, Uffd};

const PAGE_BYTES: u64 = 4096;
/// Enough for a server, which answers at once unless the machine is very busy.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Why memory cannot be shared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShareError {
    /// Nobody listens, or something else failed on the way.
    #[error("cannot {what}")]
    System {
        /// What.
        what: &'static str,
        /// The answer.
        #[source]
        error: io::Error,
    },
    /// No userfaultfd, or one without poison (Linux 6.6).
    #[error(transparent)]
    Open(OpenError),
    /// The server says nothing.
    #[error(
        "the page server has not answered within {after:?}; it may be stopped, or the socket is another program's"
    )]
    Silent {
        /// Time given.
        after: Duration,
    },
    /// The talk with the server went wrong.
    #[error("the page server")]
    Server(#[source] RefuseError),
    /// The server does not want to.
    #[error("the page server refuses: {reason}")]
    Refused {
        /// Its words.
        reason: String,
    },
    /// The server runs as somebody else.
    #[error("the page server runs as user {uid}: only this user's and root's are trusted")]
    User {
        /// Whose it is.
        uid: u32,
    },
    /// What the server has sent is not a sealed file of the right size.
    #[error("the page server's file is not a sealed one of {memory_bytes} bytes")]
    File {
        /// Size wanted.
        memory_bytes: u64,
    },
}

/// The paging of one guest's memory by a server that shares it with others.
///
/// Drop it when nothing can touch a missing page any more, as with [`crate::Pager::stop`].
#[derive(Debug)]
pub struct SharedClone {
    stream: Arc<UnixStream>,
    /// Kept open to the end, whatever becomes of the server: without it missing pages would be zeros.
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
    /// Asks the server at `path` for the memory of the snapshot, and maps it: for each of `ranges` the guest physical
    /// address, the length, and the offset in the snapshot.
    ///
    /// `on_failure` is called when the server cannot bring a page (which is poisoned) or is gone; then all missing pages
    /// are poisoned: who waits for one, or touches one, gets an error. It should note the failure and ask the guest to
    /// stop. Waits for the server no longer than `patience` in all; [`PATIENCE`] is enough.
    ///
    /// # Errors
    /// [`ShareError`].
    pub fn start(
        path: &Path,
        snapshot: &SnapshotName,
        ranges: &[(GuestAddress, usize, u64)],
        patience: Duration,
        on_failure: impl Fn(String) + Send + 'static,
    ) -> Result<(SharedClone, Arc<GuestMemoryMmap>), ShareError> {
        let system = |what| move |error| ShareError::System { what, error };
        let begun = Instant::now();
        let connected = wire::connect(path, patience);
        let stream = Arc::new(connected.map_err(system("connect to the page server"))?);
        trusted(&stream)?;
        let mut inlet = Inlet::new(&stream, patience.saturating_sub(begun.elapsed()));
        let request = encoded(&Request::Share(snapshot.clone()))?;
        wire::send_line(&stream, &request, None).map_err(system("ask the page server"))?;
        accepted(&mut inlet, patience)?;
        let file = File::from(inlet.descriptor().map_err(ShareError::Server)?);
        check(&file, snapshot.memory_bytes)?;

        let required = Features::EVENT_REMOVE.with(Features::POISON).with(Features::MISSING_SHMEM);
        let uffd = Uffd::open(required, Features::THREAD_ID).map_err(ShareError::Open)?;
        let memory = Arc::new(mapped(&file, ranges)?);
        let mut regions = Vec::new();
        for ((_, _, offset), region) in ranges.iter().zip(memory.iter()) {
            let (host_addr, len) = (region.as_ptr() as u64, region.len());
            // SAFETY: the mapping is new and nobody has touched it; it lives as long as `memory`, which is kept
            // longer than the userfaultfd; vm-memory makes no reference into it, only volatile accesses.
            unsafe { uffd.register(host_addr, len) }
                .map_err(|errno| system("register the memory")(errno.into()))?;
            regions.push(RegionMessage {
                base_host_virt_addr: host_addr,
                size: len,
                offset: *offset,
                page_size: Some(PAGE_BYTES),
                page_size_kib: None,
            });
        }
        wire::send_line(&stream, &encoded(&regions)?, Some(uffd.as_fd()))
            .map_err(system("give the page server the userfaultfd"))?;
        accepted(&mut inlet, patience)?;
        let filler = Filler { uffd, zeros: None };
        let stopping = AtomicBool::new(false);
        let (memory_kept, failure) = (Arc::clone(&memory), OnceLock::new());
        let link = Arc::new(Link { filler, memory: memory_kept, stopping, failure });
        let (read_from, watched) = (Arc::clone(&stream), Arc::clone(&link));
        let early = std::mem::take(&mut inlet.bytes);
        let watch = thread::Builder::new()
            .name("share".into())
            .spawn(move || watched.watch(&early, &read_from, on_failure))
            .map_err(system("start a thread"))?;
        Ok((SharedClone { stream, link, watch: Some(watch) }, memory))
    }

    /// Ends the service and answers the first failure, if there was one. As with [`crate::Pager::stop`]: only when
    /// nothing can touch a missing page any more.
    pub fn stop(mut self) -> Option<String> {
        self.end();
        self.link.failure.get().cloned()
    }

    fn end(&mut self) {
        self.link.stopping.store(true, Ordering::SeqCst);
        // What the server has said before is still read.
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
    /// Tells what the server says, until the end of it or of the guest.
    fn watch(&self, early: &[u8], stream: &UnixStream, on_failure: impl Fn(String)) {
        // The caller's code: its panic must not keep the pages from being poisoned.
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
            // First the word, then the deed: when an access fails, its cause is known.
            let reason = || "the page server is gone".to_owned();
            on_failure(self.failure.get_or_init(reason).clone());
            self.poison_all();
        }
    }

    fn poison_all(&self) {
        for region in self.memory.iter() {
            let target = Target {
                first_page: 0,
                pages: (region.len() / PAGE_BYTES) as usize,
                host_addr: region.as_ptr() as u64,
                page_bytes: PAGE_BYTES as usize,
            };
            // What is refused keeps waiting, and sees no zeros.
            let _ = install::install(&self.filler, target, Fill::Poison, &mut Poisoning(self));
        }
    }
}

/// All that is not there.
struct Poisoning<'a>(&'a Link);

impl Book for Poisoning<'_> {
    fn wants(&self, _page: u64) -> bool {
        true
    }
    fn filled(&mut self, _first_page: u64, _pages: usize) {}
    fn existing(&mut self, _page: u64) {}
    fn gone(&mut self, _page: u64) {}

    /// The server does not read the events any more.
    fn settle(&mut self) -> Settled {
        if self.0.stopping.load(Ordering::SeqCst) {
            return Settled::GiveUp;
        }
        let _ = self.0.filler.uffd.read(&mut MessageBatch::new());
        thread::yield_now();
        Settled::Retry
    }
}

fn encoded(message: &impl serde::Serialize) -> Result<String, ShareError> {
    serde_json::to_string(message).map_err(|error| ShareError::Server(RefuseError::Message(error)))
}

fn accepted(inlet: &mut Inlet<'_>, patience: Duration) -> Result<(), ShareError> {
    let line = inlet.line().map_err(|error| match error {
        RefuseError::TimedOut { .. } => ShareError::Silent { after: patience },
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

/// The server decides what the guest runs: it must be of this user, or root's.
fn trusted(stream: &UnixStream) -> Result<(), ShareError> {
    let credentials = rustix::net::sockopt::socket_peercred(stream)
        .map_err(|error| ShareError::System { what: "see who listens", error: error.into() })?;
    match credentials.uid {
        uid if uid == rustix::process::geteuid() || uid.is_root() => Ok(()),
        uid => Err(ShareError::User { uid: uid.as_raw() }),
    }
}

/// A file that could become shorter would end the guest by SIGBUS.
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
