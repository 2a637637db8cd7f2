//! Adds the pages that clones will probably need to the shared file in advance, once for all of them.

use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Weak};

use super::SharedImage;
use crate::background::page_list::{self, PageList};
use crate::region::PAGE_BYTES;
use crate::source::load::Load;
use crate::threads;

/// Adds the listed pages on a separate thread, which ends when the file is closed. If the thread cannot be started,
/// only faults load pages.
pub(crate) fn prefill(image: &Arc<SharedImage>, list: PageList) {
    let image = Arc::downgrade(image);
    let fill = move || {
        // The source may panic, and the list is only a hint.
        let _ = panic::catch_unwind(AssertUnwindSafe(|| fill(&image, list)));
    };
    let _ = threads::spawn("prefill", fill);
}

fn fill(image: &Weak<SharedImage>, list: PageList) -> Option<()> {
    let source = Arc::clone(image.upgrade()?.source());
    let (ranges, mut budget) = page_list::within(list(), source.len_bytes());
    let mut sequence = source.sequence(PAGE_BYTES, ranges).ok()?;
    let mut runs = Vec::with_capacity(512);
    loop {
        let image = image.upgrade()?;
        // Zero pages stay holes. The error of a page is reported when a thread touches it.
        if let Ok(Load::Pages(loaded)) = sequence.next(&|offset: u64| image.lacks(offset))? {
            budget = budget.checked_sub(loaded.bytes.len() as u64)?;
            image.fill(&loaded, None, &mut runs).ok()?;
        }
    }
}
