//! The address of an object: its store, and its key there.

use std::fmt;
use std::str::FromStr;

use object_store::path::Path;

use crate::oci::Reference;

/// The address of an object, for example `s3://bucket/team/guest`.
///
/// It holds no credentials: an address with a user, a password or a query, which may be a signature, is refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ObjectUrl {
    scheme: Scheme,
    /// The bucket or container, or host and port. Empty for files.
    host: String,
    key: Path,
}

/// The kinds of stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Scheme {
    S3,
    Gs,
    Az,
    Http,
    Https,
    File,
    Oci,
}

impl Scheme {
    const ALL: [(Self, &str); 7] = [
        (Self::S3, "s3"),
        (Self::Gs, "gs"),
        (Self::Az, "az"),
        (Self::Http, "http"),
        (Self::Https, "https"),
        (Self::File, "file"),
        (Self::Oci, "oci"),
    ];

    /// Whether addresses begin with this.
    pub(crate) fn is_known(name: &str) -> bool {
        Self::ALL.iter().any(|(_, known)| *known == name)
    }

    fn name(self) -> &'static str {
        let found = Self::ALL.iter().find(|(scheme, _)| *scheme == self);
        found.map_or("", |(_, name)| name)
    }
}

/// Why a text is not the address of an object. It does not repeat the text, which may have a password in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UrlError {
    /// The part before `://` is missing or unknown.
    #[error("an address begins with s3://, gs://, az://, http://, https://, oci:// or file://")]
    Scheme,
    /// There is a user or a password in it.
    #[error(
        "credentials are not given in an address: see the environment variables of the provider"
    )]
    Credentials,
    /// There is a query or a fragment in it.
    #[error("an address has no query and no fragment: signed URLs are not supported")]
    Query,
    /// There is no bucket, or no host.
    #[error("the address has no bucket or host")]
    Host,
    /// There is no key, or one that no object can have.
    #[error("the address has no key of an object after the bucket or host")]
    Key,
    /// It does not have the form of an address in a registry.
    #[error(
        "an address in a registry is oci://HOST/REPOSITORY:TAG or oci://HOST/REPOSITORY@sha256:DIGEST"
    )]
    Reference,
}

impl ObjectUrl {
    /// The address of another object in the same bucket: `name` in the folder of this one.
    ///
    /// # Errors
    /// [`UrlError::Key`]; [`UrlError::Reference`] in a registry, whose objects have digests and no names.
    pub fn beside(&self, name: &str) -> Result<Self, UrlError> {
        if self.scheme == Scheme::Oci {
            return Err(UrlError::Reference);
        }
        let folder = self.key.as_ref().rsplit_once('/').map_or("", |(folder, _)| folder);
        let key = match folder {
            "" => name.to_owned(),
            folder => format!("{folder}/{name}"),
        };
        // The parser would remove a slash at the end.
        let parsed = Path::parse(&key).ok().filter(|_| !name.is_empty() && !name.ends_with('/'));
        Ok(Self { key: parsed.ok_or(UrlError::Key)?, ..self.clone() })
    }

    /// The repository of an address in a registry.
    pub(crate) fn repository(&self) -> Option<&str> {
        let reference = Reference::parse(self.key.as_ref()).filter(|_| self.scheme == Scheme::Oci);
        reference.map(|reference| reference.repository)
    }

    /// The address of the blob or manifest with a digest, in the same repository.
    pub(crate) fn with_digest(&self, digest: &str) -> Result<Self, UrlError> {
        let reference = Reference::parse(self.key.as_ref()).ok_or(UrlError::Reference)?;
        let key = format!("{}@{digest}", reference.repository);
        Reference::parse(&key).ok_or(UrlError::Reference)?;
        Ok(Self { key: Path::parse(key).map_err(|_| UrlError::Reference)?, ..self.clone() })
    }

    pub(crate) fn scheme(&self) -> Scheme {
        self.scheme
    }

    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    pub(crate) fn key(&self) -> &Path {
        &self.key
    }
}

impl FromStr for ObjectUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let (scheme, rest) = text.split_once("://").ok_or(UrlError::Scheme)?;
        let found = Scheme::ALL.iter().find(|(_, name)| *name == scheme);
        let (scheme, _) = *found.ok_or(UrlError::Scheme)?;
        let (host, key) = rest.split_once('/').ok_or(match scheme {
            Scheme::File => UrlError::Key,
            _ => UrlError::Host,
        })?;
        if host.contains('@') {
            return Err(UrlError::Credentials);
        }
        // Buckets accept keys with these characters, but a signed URL must not be taken for a key.
        if rest.contains(['?', '#']) {
            return Err(UrlError::Query);
        }
        if host.is_empty() != (scheme == Scheme::File) {
            return Err(UrlError::Host);
        }
        let parsed = match scheme {
            Scheme::Http | Scheme::Https => Path::from_url_path(key),
            _ => Path::parse(key),
        };
        if scheme == Scheme::Oci && (!is_host(host) || Reference::parse(key).is_none()) {
            return Err(UrlError::Reference);
        }
        let key = parsed.ok().filter(|key| !key.as_ref().is_empty() && !rest.ends_with('/'));
        Ok(Self { scheme, host: host.to_owned(), key: key.ok_or(UrlError::Key)? })
    }
}

/// Whether this is the name or address of a host, perhaps with a port. It becomes a part of each request's address.
fn is_host(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-:[]".contains(&byte))
}

impl fmt::Display for ObjectUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}/{}", self.scheme.name(), self.host, self.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        for text in [
            "s3://bucket/guest.snap",
            "gs://bucket/team/guest",
            "az://container/a/b/c",
            "http://127.0.0.1:8000/guest.snap",
            "https://host.example/folder/guest.snap",
            "file:///tmp/bucket/guest",
            "oci://registry.example:5000/team/guest:v1.2_3",
            "oci://[::1]:5000/guest@sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        ] {
            let url: ObjectUrl = text.parse().expect(text);
            assert_eq!(url.to_string(), text);
        }
    }

    #[test]
    fn an_object_beside_another_is_in_the_same_bucket() {
        let url: ObjectUrl = "s3://bucket/team/guest".parse().unwrap();
        let beside = url.beside("objects/x.snap").unwrap();
        assert_eq!(beside.to_string(), "s3://bucket/team/objects/x.snap");
        let top: ObjectUrl = "s3://bucket/guest".parse().unwrap();
        assert_eq!(top.beside("a").unwrap().to_string(), "s3://bucket/a");
        for name in ["../other", "/absolute", "a//b", ""] {
            assert_eq!(url.beside(name), Err(UrlError::Key), "{name}");
        }
    }

    #[test]
    fn a_possible_secret_is_refused_and_not_repeated() {
        let refused = |text: &str| text.parse::<ObjectUrl>().unwrap_err();
        assert_eq!(refused("https://user:hunter2@host/a"), UrlError::Credentials);
        assert_eq!(refused("https://host/a?X-Amz-Signature=hunter2"), UrlError::Query);
        assert!(!refused("https://user:hunter2@host/a").to_string().contains("hunter2"));
        assert_eq!(refused("s3://bucket"), UrlError::Host);
        assert_eq!(refused("s3://bucket/"), UrlError::Key);
        assert_eq!(refused("s3:///key"), UrlError::Host);
        assert_eq!(refused("file://host/key"), UrlError::Host);
        assert_eq!(refused("s3://bucket/a/../b"), UrlError::Key);
        assert_eq!(refused("ftp://host/key"), UrlError::Scheme);
        for text in
            ["oci://host/repo", "oci://host/repo:", "oci://host/Repo:tag", "oci://h%st/repo:tag"]
        {
            assert_eq!(refused(text), UrlError::Reference, "{text}");
        }
        assert_eq!(refused("oci://user:hunter2@host/repo:tag"), UrlError::Credentials);
    }
}
