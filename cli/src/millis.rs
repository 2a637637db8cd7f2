//! Times in milliseconds for reports, with a resolution of a microsecond.

use std::time::{Duration, Instant, SystemTime};

pub(crate) fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// Milliseconds since 1970, by the host's clock. `None`: it shows an earlier time.
pub(crate) fn unix_ms(at: Instant) -> Option<f64> {
    let now = SystemTime::now().checked_sub(at.elapsed())?;
    Some(ms(now.duration_since(SystemTime::UNIX_EPOCH).ok()?))
}

pub(crate) fn ms_since(started: Instant, at: Option<Instant>) -> Option<f64> {
    at.map(|at| ms(at.saturating_duration_since(started)))
}
