//! The limit of open files in words.

/// The limit as text for an error message.
pub(crate) fn limit_text(limit: &Option<u64>) -> String {
    limit.map_or("any number of".into(), |limit| limit.to_string())
}
