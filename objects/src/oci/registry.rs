//! Requests to one repository of a registry: with a token, and to where the registry redirects them.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use object_store::Error as StoreError;
use object_store::client::{HttpError, HttpErrorKind};
use reqwest::header::{ACCEPT, LOCATION, RANGE, WWW_AUTHENTICATE};
use reqwest::{Client, RequestBuilder, Response, Url, redirect};
use tokio::sync::MutexGuard;

use super::credentials::{self, Credentials};
use super::reference::Reference;
use super::token::{Access, Challenge, parse_token};
use crate::answer;
use crate::retry::{CONNECT, IDLE, SILENCE};

/// Redirects of one request.
const MOST_HOPS: usize = 4;
const MOST_TOKEN_BYTES: usize = 64 << 10;
const MANIFEST_TYPES: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
                              application/vnd.docker.distribution.manifest.v2+json";

/// A client of one repository.
pub(crate) struct Registry {
    pub(super) host: String,
    pub(super) repository: String,
    pub(super) is_plain: bool,
    /// `pull`, or `pull,push`.
    actions: &'static str,
    credentials: Option<Credentials>,
    access: tokio::sync::Mutex<Access>,
    /// The last targets of redirects, by digest. They have signatures in them, and expire.
    targets: Mutex<HashMap<String, Url>>,
    client: Client,
}

/// Neither credentials nor tokens nor targets are shown.
impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Registry").field(&self.host).field(&self.repository).finish()
    }
}

impl Registry {
    /// A client for the repository of `key`. It reads docker's credentials, and sends no request.
    ///
    /// # Errors
    /// What is wrong with the configuration, without a secret.
    pub(crate) fn new(host: &str, key: &str, for_writing: bool) -> Result<Self, String> {
        let reference = Reference::parse(key).ok_or("it is no reference")?;
        let client = Client::builder()
            .redirect(redirect::Policy::none())
            .read_timeout(SILENCE)
            .connect_timeout(CONNECT)
            .pool_idle_timeout(IDLE)
            .user_agent(concat!("snap/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(Self {
            host: host.to_owned(),
            repository: reference.repository.to_owned(),
            is_plain: is_plain(host),
            actions: if for_writing { "pull,push" } else { "pull" },
            credentials: credentials::of(host)?,
            access: tokio::sync::Mutex::new(Access::Anonymous),
            targets: Mutex::default(),
            client: client.map_err(|_| "the HTTP client cannot be built")?,
        })
    }

    /// Whether docker's configuration has credentials for it.
    pub(crate) fn has_credentials(&self) -> bool {
        self.credentials.is_some()
    }

    /// A manifest, by tag or digest.
    pub(super) async fn manifest(&self, reference: &str) -> Result<Response, StoreError> {
        let url = self.url("manifests", reference)?;
        self.send(|client| client.get(url.clone()).header(ACCEPT, MANIFEST_TYPES)).await
    }

    /// Whether a blob is there.
    pub(crate) async fn has_blob(&self, digest: &str) -> Result<bool, StoreError> {
        let url = self.url("blobs", digest)?;
        let response = self.send(|client| client.head(url.clone())).await?;
        let status = response.status();
        match status.is_success() || status.is_redirection() {
            true => Ok(true),
            false if status.as_u16() == 404 => Ok(false),
            false => Err(failed("the registry does not say whether it has a blob")),
        }
    }

    /// A range of a blob. It is requested from where the registry has redirected the last request for this blob, as long
    /// as that accepts it: a signed address expires, and then the registry is asked again.
    pub(super) async fn blob(&self, digest: &str, range: &str) -> Result<Response, StoreError> {
        let known = self.targets().get(digest).cloned();
        if let Some(target) = known {
            let answer = self.direct(&target, range).await;
            if answer.as_ref().is_ok_and(|answer| answer.status().is_success()) {
                return answer;
            }
            self.targets().remove(digest);
            // The server behind it may be busy, and the registry would only redirect to it again.
            if answer.as_ref().is_ok_and(|answer| answer.status().is_server_error()) {
                return answer;
            }
        }
        let url = self.url("blobs", digest)?;
        let get = |client: &Client| client.get(url.clone()).header(RANGE, range);
        let mut response = self.send(get).await?;
        for _ in 0..MOST_HOPS {
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let target = self.target(&response)?;
            response = self.direct(&target, range).await?;
            if response.status().is_success() {
                self.targets().insert(digest.to_owned(), target);
            }
        }
        Err(invalid("the registry redirects too often"))
    }

    /// A request to the target of a redirect, which never gets the registry's token.
    async fn direct(&self, target: &Url, range: &str) -> Result<Response, StoreError> {
        execute(self.client.get(target.clone()).header(RANGE, range)).await
    }

    /// Where an answer redirects to.
    fn target(&self, answer: &Response) -> Result<Url, StoreError> {
        let location = answer.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        let target = location.and_then(|location| answer.url().join(location).ok());
        let target = target.ok_or_else(|| invalid("a redirect without a valid target"))?;
        match target.scheme() == "https" || (self.is_plain && target.scheme() == "http") {
            true => Ok(target),
            false => Err(invalid("the registry redirects to a server without TLS")),
        }
    }

    fn targets(&self) -> std::sync::MutexGuard<'_, HashMap<String, Url>> {
        self.targets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn url(&self, kind: &str, reference: &str) -> Result<Url, StoreError> {
        let scheme = if self.is_plain { "http" } else { "https" };
        let host = if self.host == "docker.io" { "registry-1.docker.io" } else { &self.host };
        let path = format!("{}/{kind}/{reference}", self.repository);
        let url = Url::parse(&format!("{scheme}://{host}/v2/{path}"));
        url.map_err(|_| invalid("the name of the registry's host is not valid"))
    }

    /// Sends a request to the registry. If it asks for a token, or refuses an expired one, the request is sent once more
    /// with a new token.
    async fn send(
        &self,
        request: impl Fn(&Client) -> RequestBuilder,
    ) -> Result<Response, StoreError> {
        let access = locked(&self.access, SILENCE).await?.clone();
        let response = execute(with(request(&self.client), &access)).await?;
        if response.status().as_u16() != 401 {
            return Ok(response);
        }
        match self.renew(&access, &response).await? {
            Some(access) => execute(with(request(&self.client), &access)).await,
            None => Ok(response),
        }
    }

    /// The access that the answer to a request with `used` asks for. Requests that fail at the same time get one token.
    async fn renew(&self, used: &Access, answer: &Response) -> Result<Option<Access>, StoreError> {
        let mut access = locked(&self.access, SILENCE).await?;
        if *access != *used {
            return Ok(Some(access.clone()));
        }
        let headers = answer.headers().get_all(WWW_AUTHENTICATE).iter();
        let challenge = headers.filter_map(|value| value.to_str().ok()).find_map(Challenge::parse);
        let new = match challenge {
            Some(Challenge::Bearer { realm, service }) => {
                Access::Bearer(self.token(&realm, service.as_deref()).await?)
            }
            Some(Challenge::Basic) => match &self.credentials {
                Some(credentials) => Access::Basic(credentials.clone()),
                None => return Ok(None),
            },
            None => return Ok(None),
        };
        if new == *used {
            return Ok(None);
        }
        access.clone_from(&new);
        Ok(Some(new))
    }

    /// A token for this repository, with the user's credentials if there are any.
    async fn token(&self, realm: &str, service: Option<&str>) -> Result<String, StoreError> {
        let mut url = Url::parse(realm).map_err(|_| invalid("the token server has no address"))?;
        // Credentials are sent there.
        if url.scheme() != "https" && !(self.is_plain && url.scheme() == "http") {
            return Err(invalid("the registry names a token server without TLS"));
        }
        let scope = format!("repository:{}:{}", self.repository, self.actions);
        url.query_pairs_mut().append_pair("scope", &scope);
        if let Some(service) = service {
            url.query_pairs_mut().append_pair("service", service);
        }
        let access = match &self.credentials {
            Some(credentials) => Access::Basic(credentials.clone()),
            None => Access::Anonymous,
        };
        let answer = execute(with(self.client.get(url), &access)).await?;
        if !answer.status().is_success() {
            return Err(failed("the token server gives no token"));
        }
        let answer = body(answer, MOST_TOKEN_BYTES).await?;
        parse_token(&answer).ok_or_else(|| invalid("the token server's answer has no token"))
    }

    /// How requests of `oci-client` are authorized. A registry may ask for nothing before the first write.
    pub(super) async fn access(&self) -> Result<Access, StoreError> {
        let known = locked(&self.access, SILENCE).await?.clone();
        if known != Access::Anonymous {
            return Ok(known);
        }
        let base = self.url("", "")?.join("/v2/");
        let base = base.map_err(|_| invalid("the name of the registry's host is not valid"))?;
        self.send(|client| client.get(base.clone())).await?;
        let found = locked(&self.access, SILENCE).await?.clone();
        Ok(match (found, &self.credentials) {
            (Access::Anonymous, Some(credentials)) => Access::Basic(credentials.clone()),
            (found, _) => found,
        })
    }
}

/// The access, when no other request renews it. The wait has a limit: while the token server is silent, requests would
/// otherwise wait for it one after the other, each for the time of all before it.
async fn locked(
    access: &tokio::sync::Mutex<Access>,
    limit: Duration,
) -> Result<MutexGuard<'_, Access>, StoreError> {
    tokio::time::timeout(limit, access.lock()).await.map_err(|_| {
        answer::missing("the token server does not answer another request in time");
        failed("the token server does not answer")
    })
}

fn with(request: RequestBuilder, access: &Access) -> RequestBuilder {
    match access {
        Access::Anonymous => request,
        Access::Bearer(token) => request.bearer_auth(token),
        Access::Basic(Credentials { user, password }) => request.basic_auth(user, Some(password)),
    }
}

/// Sends a request, and records its status for [`answer::meaning`].
async fn execute(request: RequestBuilder) -> Result<Response, StoreError> {
    match request.send().await {
        Ok(response) => {
            answer::status(response.status().as_u16());
            Ok(response)
        }
        Err(error) => Err(broken(error)),
    }
}

/// The whole body of an answer.
pub(super) async fn body(answer: Response, most_bytes: usize) -> Result<Vec<u8>, StoreError> {
    let mut answer = answer;
    let mut bytes = Vec::new();
    while let Some(part) = answer.chunk().await.map_err(broken)? {
        if bytes.len() + part.len() > most_bytes {
            return Err(invalid("the registry's answer is too long"));
        }
        bytes.extend_from_slice(&part);
    }
    Ok(bytes)
}

/// Records that a request had no answer. The error's own text has the address in it, and so perhaps a signature.
pub(super) fn broken(error: reqwest::Error) -> StoreError {
    let kind = match &error {
        error if error.is_timeout() => HttpErrorKind::Timeout,
        error if error.is_connect() => HttpErrorKind::Connect,
        _ => HttpErrorKind::Request,
    };
    answer::none(&HttpError::new(kind, error));
    failed("the registry does not answer")
}

/// An error of a request that has failed by its status.
pub(super) fn failed(what: &'static str) -> StoreError {
    StoreError::Generic { store: "OCI", source: what.into() }
}

/// The error of an answer that is not valid. Another try changes nothing.
pub(super) fn invalid(what: &'static str) -> StoreError {
    answer::refused(what);
    failed(what)
}

/// Whether a registry is spoken to without TLS: on this host, and where `$SNAP_OCI_HTTP` lists it.
fn is_plain(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let listed = std::env::var("SNAP_OCI_HTTP").unwrap_or_default();
    ["localhost", "127.0.0.1", "[::1]"].contains(&name)
        || listed.split(',').any(|listed| listed.trim() == host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_registries_of_this_host_are_spoken_to_without_tls() {
        for host in ["localhost", "localhost:5000", "127.0.0.1:5000", "[::1]:5000", "[::1]"] {
            assert!(is_plain(host), "{host}");
        }
        for host in ["registry.example:5000", "localhost.example", "127.0.0.1.example:80", "::1"] {
            assert!(!is_plain(host), "{host}");
        }
    }

    #[tokio::test]
    async fn the_wait_for_another_request_s_token_has_a_limit_and_is_a_temporary_failure() {
        let access = tokio::sync::Mutex::new(Access::Anonymous);
        let renewing = access.lock().await;
        let (result, seen) = answer::watched(locked(&access, Duration::from_millis(5))).await;
        let error = result.err().expect("it is locked");
        assert!(matches!(answer::meaning(&error, seen), answer::Meaning::Passing(_)));
        drop(renewing);
        assert!(locked(&access, Duration::from_millis(5)).await.is_ok());
    }

    #[test]
    fn a_client_shows_no_secret() {
        // A test of another module may have installed one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let registry = Registry {
            host: "host".into(),
            repository: "guest".into(),
            is_plain: true,
            actions: "pull",
            credentials: Some(Credentials { user: "u".into(), password: "hunter2".into() }),
            access: tokio::sync::Mutex::new(Access::Bearer("hunter2".into())),
            targets: Mutex::default(),
            client: Client::new(),
        };
        assert_eq!(format!("{registry:?}"), r#"Registry("host", "guest")"#);
    }
}
