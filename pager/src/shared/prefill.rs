//! Pages that clones will probably ask for get into the shared file before they do: loaded once, for all of them.

use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Weak};
use std::thread;

use super::SharedImage;
use crate::prefetch::{self, PageList};
use crate::source::Load;

/// Fills the file from the list on a thread of its own, which ends when nobody has the file any more. Where there is no
/// such thread, pages come when they are asked for.
pub(crate) fn prefill(image: &Arc<SharedImage>, list: PageList) {
    let image = Arc::downgrade(image);
    let fill = move || {
        // The source is somebody else's code, and the list a hint.
        let _ = panic::catch_unwind(AssertUnwindSafe(|| fill(&image, list)));
    };
    let _ = thread::Builder::new().name("prefill".into()).spawn(fill);
}

fn fill(image: &Weak<SharedImage>, list: PageList) -> Option<()> {
    let source = Arc::clone(image.upgrade()?.source());
    let (ranges, mut budget) = prefetch::within(list(), source.len_bytes());
    let mut sequence = source.sequence(SharedImage::PAGE_BYTES, ranges).ok()?;
    let mut runs = Vec::with_capacity(512);
    loop {
        let image = image.upgrade()?;
        // Zero pages stay holes; a page that cannot be had has its say when somebody waits for it.
        if let Ok(Load::Pages(loaded)) = sequence.next(&|offset: u64| image.lacks(offset))? {
            budget = budget.checked_sub(loaded.bytes.len() as u64)?;
            image.fill(&loaded, None, &mut runs).ok()?;
        }
    }
}
