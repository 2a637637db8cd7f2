//! Where loading ahead of faults is decided and done.
//!
//! | module | content |
//! |---|---|
//! | `prefetch`, `page_list` | installs a list of pages that will probably be needed |
//! | `prefetch_progress` | how far that is |
//! | `populate` | loads all other pages |
//! | `loading`, `claim` | mark the pages that are being loaded, so that none is loaded twice |
//! | `ended` | lets background threads notice that the pager stops |

pub(crate) mod claim;
mod ended;
pub(crate) mod loading;
pub(crate) mod page_list;
pub(crate) mod populate;
pub(crate) mod prefetch;
pub(crate) mod prefetch_progress;
