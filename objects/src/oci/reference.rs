//! The part of an address after the registry's host: repository, and tag or digest.

/// For example `team/guest:v1`, or `team/guest@sha256:...`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reference<'a> {
    pub(crate) repository: &'a str,
    pub(crate) at: At<'a>,
}

/// What is meant in the repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At<'a> {
    /// The manifest that has this tag now.
    Tag(&'a str),
    /// The manifest or blob with this digest: `sha256:` and 64 hexadecimal digits.
    Digest(&'a str),
}

/// The limits of the distribution specification.
const MOST_REPOSITORY_BYTES: usize = 255;
const MOST_TAG_BYTES: usize = 128;

impl<'a> Reference<'a> {
    /// `None`: it has another form. All of its characters can be a part of a request's path.
    pub(crate) fn parse(text: &'a str) -> Option<Self> {
        let (repository, at) = match text.split_once('@') {
            Some((repository, digest)) => (repository, At::Digest(digest)),
            None => text.split_once(':').map(|(repository, tag)| (repository, At::Tag(tag)))?,
        };
        let is_valid = match at {
            At::Tag(tag) => is_tag(tag),
            At::Digest(digest) => is_digest(digest),
        };
        let is_valid = is_valid
            && repository.len() <= MOST_REPOSITORY_BYTES
            && repository.split('/').all(is_component);
        is_valid.then_some(Self { repository, at })
    }
}

/// Whether this is a SHA-256 digest. Others are not used.
pub(crate) fn is_digest(text: &str) -> bool {
    let digits = text.strip_prefix("sha256:").unwrap_or_default();
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    digits.len() == 64 && digits.bytes().all(is_digit)
}

fn is_tag(text: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.len() <= MOST_TAG_BYTES
        && text.bytes().next().is_some_and(is_word)
        && text.bytes().all(|byte| is_word(byte) || b".-".contains(&byte))
}

/// Lower-case letters and digits, with separators between them.
fn is_component(text: &str) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let ends_well = [text.bytes().next(), text.bytes().next_back()];
    ends_well.iter().all(|byte| byte.is_some_and(is_letter))
        && text.bytes().all(|byte| is_letter(byte) || b"._-".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_and_digests_are_distinguished() {
        let tag = Reference::parse("team/guest:v1.2").unwrap();
        assert_eq!((tag.repository, tag.at), ("team/guest", At::Tag("v1.2")));
        let digest = format!("sha256:{}", "0a".repeat(32));
        let text = format!("guest@{digest}");
        let by_digest = Reference::parse(&text).unwrap();
        assert_eq!((by_digest.repository, by_digest.at), ("guest", At::Digest(&digest)));
    }

    #[test]
    fn other_forms_are_refused() {
        for text in [
            "guest",
            "guest:",
            ":tag",
            "guest:a:b",
            "guest:-a",
            "../guest:a",
            "a//b:c",
            "guest:a/b",
            "guest:a b",
            "guest@sha256:00",
            "guest@md5:00",
            "gu%65st:a",
        ] {
            assert_eq!(Reference::parse(text), None, "{text}");
        }
        assert_eq!(Reference::parse(&format!("guest@sha256:{}", "0A".repeat(32))), None);
        assert_eq!(Reference::parse(&format!("guest:{}", "a".repeat(129))), None);
    }
}
