//! Spans of the crate `tracing`, where the feature of that name is on; without it nothing is compiled in.

/// Does the work within a span of that name, which knows the page's offset in the source.
macro_rules! traced {
    ($name:literal, $source_offset:expr, $work:expr) => {{
        #[cfg(feature = "tracing")]
        let _entered = tracing::trace_span!($name, source_offset = $source_offset).entered();
        $work
    }};
}

pub(crate) use traced;
