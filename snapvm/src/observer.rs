//! Reports the progress of a restore to its caller.

use std::any::Any;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use snapfmt::Progress;

/// A step of a restore that may wait for a slow disk or another process.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Step<'a> {
    /// The file's machine state and its devices' files are read.
    ReadState {
        /// The snapshot.
        file: &'a Path,
    },
    /// A raw image is opened.
    OpenImage {
        /// The image.
        image: &'a Path,
    },
    /// A page server is asked to share its memory.
    AskServer {
        /// Its socket.
        socket: &'a Path,
        /// The restore fails if the server has not answered after this time.
        timeout: Duration,
    },
    /// A device's socket is created. [`Observer::made_socket`] follows if that succeeds.
    MakeSocket {
        /// Its name.
        path: &'a Path,
    },
    /// The state of the machine is set in KVM. A lazy restore reads some pages for that.
    BuildMachine {
        /// The snapshot.
        file: &'a Path,
    },
}

/// Receives the steps of a restore, on the calling thread unless noted.
pub trait Observer: Send + Sync {
    /// A step begins; it ends when the returned value is dropped.
    fn step(&self, _step: Step<'_>) -> Box<dyn Any> {
        Box::new(())
    }

    /// An eager restore has loaded a part of memory; `Break` cancels it. This is called on the loading threads.
    fn loaded(&self, _progress: Progress) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    /// A device's socket was created at `path`. It is removed with the VM. A process that is killed leaves it behind.
    fn made_socket(&self, _path: &Path) {}
}

/// An observer that does nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}
