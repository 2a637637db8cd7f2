//! Times in milliseconds for reports, with a resolution of a microsecond.

use std::time::{Duration, Instant};

pub(crate) fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

pub(crate) fn ms_since(started: Instant, at: Option<Instant>) -> Option<f64> {
    at.map(|at| ms(at.saturating_duration_since(started)))
}
