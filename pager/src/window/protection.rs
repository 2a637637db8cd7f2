//! Memory that has no pager: it gets a userfaultfd for write protection only.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::core::{Core, Protect};
use super::error::WindowError;
use crate::layout::Layout;
use crate::region::{PAGE_BYTES, Region};
use crate::threads;
use crate::uffd::{Errno, Features, Message, MessageBatch, Uffd, Wait};

const FEATURES: Features = Features::WRITE_PROTECT
    .with(Features::WRITE_PROTECT_SHMEM)
    .with(Features::WRITE_PROTECT_UNPOPULATED);

/// Memory that can be protected from writes: anonymous, or a memfd. It may be kept for one window after the other.
/// Without a window, nothing is protected and it costs nothing.
#[derive(Debug)]
pub struct Protection {
    uffd: Uffd,
    pub(super) layout: Layout,
    pub(super) busy: AtomicBool,
    _regions: Vec<Region>,
}

impl Protect for Protection {
    fn protect(&self, host_addr: u64, len: u64, on: bool) -> Result<(), Errno> {
        self.uffd.write_protect(host_addr, len, on)
    }

    fn is_present(&self, _page: u64) -> bool {
        true
    }
}

impl Protection {
    /// Registers the memory of `regions` for write protection. The source offset of a region is the offset that
    /// [`ReadMemory`](super::ReadMemory) gets.
    ///
    /// # Errors
    /// [`WindowError`]; [`WindowError::Register`] for memory with a pager, or a mapping of a regular file.
    pub fn new(regions: Vec<Region>) -> Result<Protection, WindowError> {
        let supported = |region: &Region| region.page_bytes() == PAGE_BYTES && !region.is_foreign();
        if !regions.iter().all(supported) {
            return Err(WindowError::Unsupported);
        }
        let uffd = Uffd::open(FEATURES, Features::NONE).map_err(WindowError::Open)?;
        let layout = Layout::cut(&regions, 1);
        for extent in layout.extents() {
            let (host_addr, len) = (extent.host.start, extent.host.end - extent.host.start);
            uffd.register_protection(host_addr, len)
                .map_err(|errno| WindowError::Register { host_addr, errno })?;
        }
        Ok(Protection { uffd, layout, busy: AtomicBool::new(false), _regions: regions })
    }

    /// Whether a window of the memory is open.
    pub fn has_window(&self) -> bool {
        self.busy.load(Ordering::SeqCst)
    }

    pub(super) fn free(&self) {
        self.busy.store(false, Ordering::SeqCst);
    }
}

/// The thread that answers write faults. Dropping it ends the thread.
pub(super) struct Answering {
    stop: Option<io::PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Answering {
    pub(super) fn start(protection: Arc<Protection>, core: Arc<Core>) -> io::Result<Answering> {
        let (stopped, stop) = io::pipe()?;
        let answer = move || {
            let mut batch = MessageBatch::new();
            loop {
                match protection.uffd.wait(stopped.as_fd()) {
                    Ok(Wait::Readable) => {}
                    Ok(Wait::Stop) => return,
                    Err(error) => return give_up(&protection, &core, &error),
                }
                if let Err(error) = protection.uffd.read(&mut batch) {
                    return give_up(&protection, &core, &error);
                }
                for message in batch.messages() {
                    let Message::Pagefault { address, .. } = message else { continue };
                    if let Err(errno) = core.answer(&*protection, address) {
                        core.fail(format!(
                            "cannot make the page at {address:#x} writable: {errno}"
                        ));
                    }
                }
            }
        };
        let thread = threads::spawn("window", answer)?;
        Ok(Answering { stop: Some(stop), thread: Some(thread) })
    }
}

/// Without this thread no page may stay protected.
fn give_up(protection: &Protection, core: &Core, error: &io::Error) {
    core.fail(format!("cannot read write faults: {error}"));
    core.close(protection);
}

impl Drop for Answering {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // Nothing in it panics.
            let _ = thread.join();
        }
    }
}
