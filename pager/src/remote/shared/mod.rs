//! Memory that clones of one snapshot share: a file of decoded pages, of which each clone has a private mapping.

mod ahead;
#[cfg(feature = "vm-memory")]
mod clone;
mod image;
mod prefill;

pub(crate) use ahead::ImageLoader;
#[cfg(feature = "vm-memory")]
pub use clone::{ANSWER_TIMEOUT, ShareError, SharedClone};
pub(crate) use image::SharedImage;
pub(crate) use prefill::prefill;
