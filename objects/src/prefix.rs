//! The beginning of addresses, up to the end of a host, folder or repository.

use std::fmt;
use std::str::FromStr;

use crate::url::{ObjectUrl, Scheme, UrlError};

/// The beginning of addresses, for example `s3://bucket/team`: the address itself, and all addresses in it. It ends where
/// a part of an address ends: `s3://bucket` has nothing of `s3://bucket-2`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct UrlPrefix(String);

impl UrlPrefix {
    /// Whether an address is in it.
    pub(crate) fn has(&self, url: &ObjectUrl) -> bool {
        let text = url.to_string();
        let Some(rest) = text.strip_prefix(&self.0) else { return false };
        let is_repository = url.scheme() == Scheme::Oci && self.0.matches('/').count() > 2;
        self.0.ends_with('/')
            || rest.is_empty()
            || rest.starts_with('/')
            || (is_repository && rest.starts_with([':', '@']))
    }
}

impl FromStr for UrlPrefix {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let (scheme, rest) = text.split_once("://").ok_or(UrlError::Scheme)?;
        if !Scheme::is_known(scheme) {
            return Err(UrlError::Scheme);
        }
        if rest.contains(['?', '#']) {
            return Err(UrlError::Query);
        }
        if rest.split('/').next().is_some_and(|host| host.contains('@')) {
            return Err(UrlError::Credentials);
        }
        match rest.trim_matches('/').is_empty() && scheme != "file" {
            true => Err(UrlError::Host),
            false => Ok(Self(text.to_owned())),
        }
    }
}

impl fmt::Display for UrlPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_where_a_part_ends() {
        let has = |prefix: &str, url: &str| {
            prefix.parse::<UrlPrefix>().unwrap().has(&url.parse().unwrap())
        };
        assert!(has("s3://bucket", "s3://bucket/a"));
        assert!(has("s3://bucket/", "s3://bucket/a"));
        assert!(has("s3://bucket/a", "s3://bucket/a/b"));
        assert!(has("oci://host:5000/team/guest", "oci://host:5000/team/guest:v1"));
        assert!(!has("s3://bucket", "s3://bucket-2/a"));
        assert!(!has("s3://bucket/a", "s3://bucket/ab"));
        assert!(!has("http://host", "http://host:8080/a"));
        assert!(!has("oci://host", "oci://host:5000/a:b"));
        assert!(!has("http://host", "https://host/a"));
        assert!(!has("file:///srv", "file:///srv2/a"));
    }

    #[test]
    fn what_is_no_prefix_is_refused() {
        for (text, error) in [
            ("bucket", UrlError::Scheme),
            ("ftp://host", UrlError::Scheme),
            ("s3://", UrlError::Host),
            ("https://u:hunter2@host", UrlError::Credentials),
            ("https://host/a?b", UrlError::Query),
        ] {
            assert_eq!(text.parse::<UrlPrefix>(), Err(error), "{text}");
        }
    }
}
