//! How a window is kept, and what it has done.

use std::io;
use std::sync::Arc;

/// Reads memory at a source offset, in whole pages. It must not write to the memory, and not wait for a thread that
/// does.
pub type ReadMemory = Arc<dyn Fn(u64, &mut [u8]) -> io::Result<()> + Send + Sync>;

/// How a window is kept.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct WindowOptions {
    /// The most memory for copies of pages that were written before they were saved, in bytes. When it is full, writes
    /// wait for [`Window::read`](super::Window::read).
    pub staging_bytes: usize,
    /// Whether the window has one cut after the other: see [`Window::end_cut`](super::Window::end_cut). Between them,
    /// the first write to each block of 64 KiB waits for an answer.
    pub tracks: bool,
}

impl Default for WindowOptions {
    /// 64 MiB of copies, and one cut.
    fn default() -> WindowOptions {
        WindowOptions { staging_bytes: 64 << 20, tracks: false }
    }
}

/// What a window has done so far: see [`Window::stats`](super::Window::stats).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WindowStats {
    /// Writes that had to wait, before and after the cut.
    pub faults: u64,
    /// Bytes that were copied before they were written.
    pub copied_bytes: u64,
    /// How often a write has waited for room for its copy.
    pub waits: u64,
}
