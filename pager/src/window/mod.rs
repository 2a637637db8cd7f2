//! One point in time of memory that threads continue to write.
//!
//! All pages are protected from writes while the threads run ([`Window::open`] or [`Pager::window`](crate::Pager::window)).
//! Then they pause for a moment, and [`Window::cut`] fixes the bytes of all pages. When they run again, a write to a
//! page that is not saved yet waits until its bytes were copied. [`Window::read`] returns the bytes of the cut, each
//! page once. `docs/live-snapshots.md` has the states of a page and the proof.

mod absent;
pub(crate) mod core;
mod error;
mod memory_window;
#[cfg(test)]
mod model;
mod of_pager;
mod options;
mod pager_window;
mod phase;
mod protection;
mod rounds;
pub(crate) mod slot;
mod staging;
mod states;
#[cfg(test)]
mod tests;

pub use error::WindowError;
pub use memory_window::Window;
pub use options::{ReadMemory, WindowOptions, WindowStats};
pub use protection::Protection;
