//! What tests of windows share.

use std::sync::Arc;

use pager::window::{Protection, ReadMemory, WindowError};

use super::{Memory, PAGE, userfaultfd_works};

/// Whether this kernel has what a window needs.
pub fn windows_work(test: &str) -> bool {
    if !userfaultfd_works(test) {
        return false;
    }
    let memory = Memory::map(PAGE);
    match Protection::new(vec![memory.whole()]) {
        Err(WindowError::Open(_)) => {
            eprintln!("SKIPPED {test}: no write protection");
            false
        }
        _ => true,
    }
}

pub fn reads(memory: &Arc<Memory>) -> ReadMemory {
    let memory = Arc::clone(memory);
    Arc::new(move |offset, buf: &mut [u8]| {
        for (at, word) in (offset as usize..).step_by(8).zip(buf.chunks_mut(8)) {
            word.copy_from_slice(&memory.read_u64(at).to_ne_bytes());
        }
        Ok(())
    })
}

/// The first and the last byte of a page.
pub fn ends(memory: &Memory, page: usize, value: u8) {
    memory.write(page * PAGE, value);
    memory.write(page * PAGE + PAGE - 1, value);
}
