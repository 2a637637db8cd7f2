//! The reader of a thread whose own reader has panicked.

use super::error::SourceError;
use super::load::{Load, PageReader};

/// Returns only errors.
pub(crate) struct Panicked;

impl PageReader for Panicked {
    fn load(&mut self, _source_offset: u64) -> Result<Load<'_>, SourceError> {
        Err(SourceError::permanent("the source panicked before"))
    }
}
