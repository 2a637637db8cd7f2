//! The client of one bucket. It is built from the environment, and built again when its credentials are refused.

use std::sync::{Arc, Once, PoisonError, RwLock};

use async_trait::async_trait;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService, ReqwestConnector,
};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::local::LocalFileSystem;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};

use crate::answer;
use crate::error::ObjectError;
use crate::oci::Registry;
use crate::retry::{CONNECT, IDLE, Retry, SILENCE};
use crate::url::{ObjectUrl, Scheme};

/// The client of the bucket, server or file system of an address.
#[derive(Debug)]
pub(crate) struct Store {
    of: ObjectUrl,
    retry: RetryConfig,
    for_writing: bool,
    client: RwLock<Connected>,
}

#[derive(Clone, Debug)]
struct Connected {
    objects: Arc<dyn ObjectStore>,
    /// The same, if it is a registry.
    registry: Option<Arc<Registry>>,
}

impl<T: ObjectStore> From<T> for Connected {
    fn from(store: T) -> Self {
        Self { objects: Arc::new(store), registry: None }
    }
}

impl Store {
    /// A client that the environment configures, in each provider's own variables. It retries no request: `fetch` does,
    /// because it knows the bytes that were received.
    pub(crate) fn open(url: &ObjectUrl) -> Result<Self, ObjectError> {
        Self::with(url, RetryConfig { max_retries: 0, ..RetryConfig::default() }, false)
    }

    /// A client that retries requests itself, because only it knows the state of an upload.
    pub(crate) fn open_to_write(url: &ObjectUrl, retry: Retry) -> Result<Self, ObjectError> {
        let backoff = BackoffConfig {
            init_backoff: retry.first_pause,
            max_backoff: retry.longest_pause,
            base: 2.0,
        };
        let retry = RetryConfig { backoff, max_retries: usize::MAX, retry_timeout: retry.patience };
        Self::with(url, retry, true)
    }

    fn with(url: &ObjectUrl, retry: RetryConfig, for_writing: bool) -> Result<Self, ObjectError> {
        let client = RwLock::new(connect(url, &retry, for_writing)?);
        Ok(Self { of: url.clone(), retry, for_writing, client })
    }

    pub(crate) fn client(&self) -> Arc<dyn ObjectStore> {
        self.connected().objects
    }

    /// The registry, if it is one.
    pub(crate) fn registry(&self) -> Option<Arc<Registry>> {
        self.connected().registry
    }

    fn connected(&self) -> Connected {
        self.client.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the credentials again: from the environment, the files that it names, or the instance's metadata service.
    pub(crate) fn renew(&self) -> Result<(), ObjectError> {
        let client = connect(&self.of, &self.retry, self.for_writing)?;
        *self.client.write().unwrap_or_else(PoisonError::into_inner) = client;
        Ok(())
    }

    /// The server that the environment configures. It distinguishes objects of the same address.
    pub(crate) fn endpoint(url: &ObjectUrl) -> String {
        let names: &[&str] = match url.scheme() {
            Scheme::S3 => &["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"],
            Scheme::Az => &["AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT"],
            Scheme::Gs => &["GOOGLE_BASE_URL"],
            Scheme::Http | Scheme::Https | Scheme::File | Scheme::Oci => &[],
        };
        let values = names.iter().map(|name| std::env::var(name).unwrap_or_default());
        values.collect::<Vec<_>>().join("\n")
    }
}

fn connect(
    url: &ObjectUrl,
    retry: &RetryConfig,
    for_writing: bool,
) -> Result<Connected, ObjectError> {
    static TLS: Once = Once::new();
    // Another library of the process may have chosen one already.
    TLS.call_once(|| _ = rustls::crypto::ring::default_provider().install_default());
    check_endpoint(url)?;
    let options = ClientOptions::new()
        .with_allow_http(url.scheme() == Scheme::Http)
        // The time of a whole answer has no limit, but the time without bytes has one.
        .with_timeout_disabled()
        .with_read_timeout(SILENCE)
        .with_connect_timeout(CONNECT)
        .with_pool_idle_timeout(IDLE);
    let built: object_store::Result<Connected> = match url.scheme() {
        Scheme::S3 => AmazonS3Builder::from_env()
            .with_bucket_name(url.host())
            .with_client_options(s3_options(options))
            .with_retry(retry.clone())
            .with_http_connector(Watching)
            .build()
            .map(Connected::from),
        Scheme::Gs => GoogleCloudStorageBuilder::from_env()
            .with_bucket_name(url.host())
            .with_client_options(options)
            .with_retry(retry.clone())
            .with_http_connector(Watching)
            .build()
            .map(Connected::from),
        Scheme::Az => MicrosoftAzureBuilder::from_env()
            .with_container_name(url.host())
            .with_client_options(options)
            .with_retry(retry.clone())
            .with_http_connector(Watching)
            .build()
            .map(Connected::from),
        Scheme::Http | Scheme::Https => HttpBuilder::new()
            .with_url(format!("{}://{}", scheme_name(url), url.host()))
            .with_client_options(options)
            .with_retry(retry.clone())
            .with_http_connector(Watching)
            .build()
            .map(Connected::from),
        Scheme::File => Ok(LocalFileSystem::new().into()),
        Scheme::Oci => return connect_registry(url, for_writing),
    };
    built.map_err(|error| ObjectError::Configuration {
        url: url.to_string(),
        reason: without_secrets(&error.to_string(), std::env::vars_os()),
    })
}

fn connect_registry(url: &ObjectUrl, for_writing: bool) -> Result<Connected, ObjectError> {
    let registry = Registry::new(url.host(), url.key().as_ref(), for_writing);
    let registry = registry
        .map_err(|reason| ObjectError::Configuration { url: url.to_string(), reason })
        .map(Arc::new)?;
    Ok(Connected { objects: registry.clone(), registry: Some(registry) })
}

fn scheme_name(url: &ObjectUrl) -> &'static str {
    if url.scheme() == Scheme::Https { "https" } else { "http" }
}

/// The endpoint is plain HTTP, and the environment does not allow that: each request would fail without that reason.
fn check_endpoint(url: &ObjectUrl) -> Result<(), ObjectError> {
    let plain = url.scheme() == Scheme::S3
        && Store::endpoint(url).lines().any(|endpoint| endpoint.starts_with("http://"))
        && !allows_http();
    match plain {
        true => Err(ObjectError::Configuration {
            url: url.to_string(),
            reason: "its endpoint is plain HTTP, which AWS_ALLOW_HTTP=true allows".to_owned(),
        }),
        false => Ok(()),
    }
}

fn allows_http() -> bool {
    std::env::var("AWS_ALLOW_HTTP").is_ok_and(|value| value == "true" || value == "1")
}

/// The options given here replace those of the environment, so plain HTTP is allowed here if the user has set it.
fn s3_options(options: ClientOptions) -> ClientOptions {
    options.with_allow_http(allows_http())
}

/// The text without the values of variables that look like secrets.
fn without_secrets(
    text: &str,
    environment: impl Iterator<Item = (std::ffi::OsString, std::ffi::OsString)>,
) -> String {
    const SECRET: [&str; 7] =
        ["KEY", "SECRET", "TOKEN", "SAS", "PASSWORD", "CREDENTIAL", "ACCOUNT"];
    let mut text = text.to_owned();
    for (name, value) in environment {
        let (Some(name), Some(value)) = (name.to_str(), value.to_str()) else { continue };
        let name = name.to_ascii_uppercase();
        // Shorter values may occur in ordinary words.
        if value.len() >= 6 && SECRET.iter().any(|part| name.contains(part)) {
            text = text.replace(value, "(not shown)");
        }
    }
    text
}

/// Records a server's answer before the client turns it into an error without a status.
#[derive(Debug)]
struct Watching;

#[derive(Debug)]
struct Watched(HttpClient);

impl HttpConnector for Watching {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let client = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(Watched(client)))
    }
}

#[async_trait]
impl HttpService for Watched {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let answer = self.0.execute(request).await;
        match &answer {
            Ok(response) => answer::status(response.status().as_u16()),
            Err(error) => answer::none(error),
        }
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_values_of_secret_variables_are_not_shown() {
        let environment = [
            ("AWS_SECRET_ACCESS_KEY", "hunter2hunter2"),
            ("AZURE_STORAGE_SAS_KEY", "sig=abcdef"),
            ("AWS_REGION", "eu-central-1"),
        ];
        let environment = environment.map(|(name, value)| (name.into(), value.into()));
        let text = "cannot parse hunter2hunter2 or sig=abcdef in eu-central-1";
        assert_eq!(
            without_secrets(text, environment.into_iter()),
            "cannot parse (not shown) or (not shown) in eu-central-1"
        );
    }
}
