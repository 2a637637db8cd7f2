//! Opens the window of a pager.

use std::sync::Arc;

use super::absent;
use super::core::Core;
use super::error::WindowError;
use super::memory_window::{Memory, Window};
use super::options::{ReadMemory, WindowOptions};
use crate::install::register;
use crate::pager::Pager;
use crate::region::{PAGE_BYTES, Region};

impl Pager {
    /// Protects all memory that was installed from writes, while threads use it: see [`Window`]. `read` reads a page
    /// that is in memory.
    ///
    /// The caller makes sure that no memory is given back (madvise(2), or the balloon of a guest) from the call until
    /// the window is dropped. A page that is given back before it was read fails the window ([`Window::check`]), or lets
    /// its writers wait until the window is dropped.
    ///
    /// # Errors
    /// [`WindowError`]. Then nothing is protected. [`WindowError::Released`]: the population is complete. While the pager
    /// is about to let the memory go, this waits for it.
    pub fn window(&self, read: ReadMemory, options: WindowOptions) -> Result<Window, WindowError> {
        let shared = &self.shared;
        let foreign = shared._regions.iter().any(Region::is_foreign);
        if foreign || shared.backed || shared.layout.page_bytes() != PAGE_BYTES as u64 {
            return Err(WindowError::Unsupported);
        }
        let core = Core::new(shared.layout.clone(), read, options)
            .map_err(|error| WindowError::System { what: "memory for the page states", error })?;
        let core = Arc::new(core);
        shared.window.reserve(&core)?;
        // From here on, dropping the window makes all memory writable.
        let window = Window { core: Arc::clone(&core), memory: Memory::Paged(Arc::clone(shared)) };
        shared.present_window(&core)?;
        shared.window.wait_for_answers();
        for (index, slice) in shared.slices.iter().enumerate() {
            register::protection(&slice.filler.uffd, shared.layout.extents_of(index))
                .map_err(|(host_addr, errno)| WindowError::Register { host_addr, errno })?;
        }
        absent::fill(shared)?;
        core.arm(&**shared)?;
        Ok(window)
    }
}
