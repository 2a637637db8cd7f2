//! What a restore tells its caller while it is under way.

use std::any::Any;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use snapfmt::Progress;

/// A step of a restore that may wait for something else: a slow disk, another process.
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
        /// It is given up after this long.
        timeout: Duration,
    },
    /// KVM is given the machine's state; some pages of a lazy restore are read for that.
    BuildMachine {
        /// The snapshot.
        file: &'a Path,
    },
}

/// Told of a restore's steps, on the calling thread unless noted.
pub trait Observer: Send + Sync {
    /// A step begins; it ends when the returned value is dropped.
    fn step(&self, _step: Step<'_>) -> Box<dyn Any> {
        Box::new(())
    }

    /// An eager restore has loaded a part; `Break` cancels it. Called on the threads that load.
    fn loaded(&self, _progress: Progress) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    /// A device's socket was made at `path`. It is removed with the VM, and left behind by a process that is killed.
    fn made_socket(&self, _path: &Path) {}
}

/// Listens to nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}
