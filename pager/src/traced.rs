//! Spans of the crate `tracing`. Without the feature of that name, no code is generated.

/// Does the work in a span of this name, with the source offset of the page.
macro_rules! traced {
    ($name:literal, $source_offset:expr, $work:expr) => {{
        #[cfg(feature = "tracing")]
        let _entered = tracing::trace_span!($name, source_offset = $source_offset).entered();
        $work
    }};
}

pub(crate) use traced;
