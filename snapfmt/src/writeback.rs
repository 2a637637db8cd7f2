//! Writing to the disk while there is still more to compress, so that the sync at the end is short.

use std::fs::File;
use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

/// Number of new bytes after which the kernel starts to write them.
const STEP_BYTES: u64 = 16 << 20;

/// A thread that syncs a file now and then.
#[derive(Debug)]
pub(crate) struct Writeback {
    requests: SyncSender<()>,
    thread: JoinHandle<io::Result<()>>,
    requested_at: u64,
}

impl Writeback {
    pub(crate) fn start(file: &File) -> io::Result<Self> {
        let file = file.try_clone()?;
        let (requests, received) = sync_channel(1);
        let sync = move || sync_when(&received, &file);
        let thread = std::thread::Builder::new().name("writeback".into()).spawn(sync)?;
        Ok(Self { requests, thread, requested_at: 0 })
    }

    /// The present length of the file.
    pub(crate) fn reached(&mut self, len: u64) {
        if len >= self.requested_at + STEP_BYTES {
            self.requested_at = len;
            // A thread that is busy or has failed needs no request.
            let _ = self.requests.try_send(());
        }
    }

    /// Waits for the thread. The kernel reports a failed write only once, to the first call that
    /// syncs. So an error of the thread is an error of the file.
    pub(crate) fn finish(self) -> io::Result<()> {
        drop(self.requests);
        self.thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the writeback thread panicked")))
    }
}

fn sync_when(received: &Receiver<()>, file: &File) -> io::Result<()> {
    while received.recv().is_ok() {
        file.sync_data()?;
    }
    Ok(())
}
