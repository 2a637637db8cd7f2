//! Waits for a server that may send nothing, and notices meanwhile that the caller has cancelled.

use std::future::Future;
use std::ops::ControlFlow;
use std::pin::pin;
use std::time::Duration;

use crate::error::ObjectError;

/// The time between two checks.
const CHECK: Duration = Duration::from_millis(100);

/// Whether the caller has cancelled.
pub(crate) type Cancelled<'a> = &'a (dyn Fn() -> ControlFlow<()> + Sync);

/// The result of `work`, or [`ObjectError::Cancelled`]: then `work` is dropped.
pub(crate) async fn unless_cancelled<T>(
    cancelled: Cancelled<'_>,
    work: impl Future<Output = T>,
) -> Result<T, ObjectError> {
    let mut work = pin!(work);
    loop {
        match tokio::time::timeout(CHECK, &mut work).await {
            Ok(result) => return Ok(result),
            Err(_) if cancelled().is_break() => return Err(ObjectError::Cancelled),
            Err(_) => {}
        }
    }
}
