//! Why a source cannot return a page.

use std::error::Error;

/// Why a source cannot return a page.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct SourceError {
    kind: SourceErrorKind,
    message: String,
    #[source]
    cause: Option<Box<dyn Error + Send + Sync>>,
}

/// Whether a retry may help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceErrorKind {
    /// It may, as after a timeout or a lost connection.
    Transient,
    /// It does not, as after a failed checksum or in a truncated file.
    Permanent,
}

impl SourceError {
    /// An error after which a retry may help.
    pub fn transient(message: impl Into<String>) -> SourceError {
        SourceError { kind: SourceErrorKind::Transient, message: message.into(), cause: None }
    }

    /// An error after which a retry does not help.
    pub fn permanent(message: impl Into<String>) -> SourceError {
        SourceError { kind: SourceErrorKind::Permanent, message: message.into(), cause: None }
    }

    /// Adds the error that caused this one.
    #[must_use]
    pub fn caused_by(mut self, cause: impl Into<Box<dyn Error + Send + Sync>>) -> SourceError {
        self.cause = Some(cause.into());
        self
    }

    /// Whether a retry may help.
    pub fn kind(&self) -> SourceErrorKind {
        self.kind
    }
}
