//! The error of a KVM call.

use std::io;

/// A KVM call that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("{call} failed")]
#[non_exhaustive]
pub struct KvmError {
    /// Name of the call, as the kernel documentation spells it.
    pub call: &'static str,
    /// The kernel's error.
    #[source]
    pub source: io::Error,
}

/// Names the call in the error of a `kvm-ioctls` function.
pub(crate) trait NameCall<T> {
    fn call(self, call: &'static str) -> Result<T, KvmError>;
}

impl<T> NameCall<T> for Result<T, kvm_ioctls::Error> {
    fn call(self, call: &'static str) -> Result<T, KvmError> {
        self.map_err(|errno| KvmError { call, source: errno.into() })
    }
}
