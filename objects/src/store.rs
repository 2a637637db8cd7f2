//! The client of one bucket. It is built from the environment, and built again when its credentials are refused.

use std::fmt;
use std::sync::{Arc, Once, PoisonError, RwLock};

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::local::LocalFileSystem;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};
use tokio::sync::Mutex;

use crate::error::ObjectError;
use crate::oci::Registry;
use crate::retry::{CONNECT, IDLE, Retry, SILENCE};
use crate::url::{ObjectUrl, Scheme};
use crate::watching::Watching;

/// The clients of the bucket, server or file system of an address.
pub(crate) struct Store {
    of: ObjectUrl,
    /// How uploads are retried; `None`: this store is only read.
    uploads: Option<RetryConfig>,
    watching: Watching,
    /// Built for the first request: that reads all certificates which this host trusts, in about 5 ms. `None`: not yet.
    clients: RwLock<Option<Clients>>,
    /// One request reads the credentials again. Others that were refused meanwhile wait for it.
    renewing: Mutex<()>,
}

#[derive(Clone)]
pub(crate) struct Clients {
    /// It retries no request: `fetch` does, because it knows the bytes that were received.
    pub(crate) reading: Arc<dyn ObjectStore>,
    /// It retries requests itself, because only it knows the state of an upload.
    pub(crate) uploading: Arc<dyn ObjectStore>,
    /// The same, if it is a registry.
    pub(crate) registry: Option<Arc<Registry>>,
}

/// The clients are not shown: not all of them hide their credentials.
impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Store").field(&self.of.to_string()).finish()
    }
}

impl Store {
    /// A client that the environment configures, in each provider's own variables.
    pub(crate) fn open(url: &ObjectUrl) -> Result<Self, ObjectError> {
        Self::with(url, None)
    }

    /// As [`Store::open`], with a client that retries uploads.
    pub(crate) fn open_to_write(url: &ObjectUrl, retry: Retry) -> Result<Self, ObjectError> {
        let backoff = BackoffConfig {
            init_backoff: retry.first_pause,
            max_backoff: retry.longest_pause,
            base: 2.0,
        };
        let retry = RetryConfig { backoff, max_retries: usize::MAX, retry_timeout: retry.patience };
        Self::with(url, Some(retry))
    }

    fn with(url: &ObjectUrl, uploads: Option<RetryConfig>) -> Result<Self, ObjectError> {
        check_endpoint(url)?;
        let (watching, clients, renewing) = Default::default();
        Ok(Self { of: url.clone(), uploads, watching, clients, renewing })
    }

    /// A store with this client.
    #[cfg(test)]
    pub(crate) fn of_client(url: &ObjectUrl, client: Arc<dyn ObjectStore>) -> Self {
        let clients = Clients { reading: client.clone(), uploading: client, registry: None };
        let store = Self::open(url).expect("its settings are valid");
        Self { clients: RwLock::new(Some(clients)), ..store }
    }

    /// The clients for the next request.
    pub(crate) fn clients(&self) -> Result<Clients, ObjectError> {
        if let Some(clients) = &*self.clients.read().unwrap_or_else(PoisonError::into_inner) {
            return Ok(clients.clone());
        }
        let mut clients = self.clients.write().unwrap_or_else(PoisonError::into_inner);
        match &*clients {
            Some(clients) => Ok(clients.clone()),
            None => Ok(clients.insert(self.connect()?).clone()),
        }
    }

    fn connect(&self) -> Result<Clients, ObjectError> {
        // This may run a credential helper. Other requests continue meanwhile.
        tokio::task::block_in_place(|| connect(&self.of, self.uploads.as_ref(), &self.watching))
    }

    /// Reads the credentials again: from the environment, the files that it names, or the instance's metadata service.
    /// `refused` are the clients of the request that has failed: if another request has replaced them, nothing is read.
    pub(crate) async fn renew(&self, refused: &Clients) -> Result<(), ObjectError> {
        let _renewing = self.renewing.lock().await;
        if !Arc::ptr_eq(&self.clients()?.reading, &refused.reading) {
            return Ok(());
        }
        let clients = self.connect()?;
        *self.clients.write().unwrap_or_else(PoisonError::into_inner) = Some(clients);
        Ok(())
    }

    /// What is said after "access is denied".
    pub(crate) fn when_denied(&self) -> &'static str {
        let registry = self.clients().ok().and_then(|clients| clients.registry);
        match (self.of.scheme(), registry) {
            (Scheme::Http | Scheme::Https, _) => "; an HTTP server gets no credentials",
            (_, Some(registry)) if !registry.has_credentials() => {
                "; docker's configuration has no credentials for this registry"
            }
            _ => {
                ", also with credentials that were read again; some stores answer so for an object that is not there"
            }
        }
    }

    /// The server that the environment configures. It distinguishes objects of the same address.
    pub(crate) fn endpoint(url: &ObjectUrl) -> String {
        let names: &[&str] = match url.scheme() {
            Scheme::S3 => &["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"],
            Scheme::Az => &[
                "AZURE_STORAGE_ACCOUNT_NAME",
                "AZURE_STORAGE_ENDPOINT",
                "AZURE_ENDPOINT",
                "AZURE_USE_FABRIC_ENDPOINT",
                "AZURE_STORAGE_USE_EMULATOR",
                "AZURITE_BLOB_STORAGE_URL",
            ],
            // A service account's file may have the address of a server.
            Scheme::Gs => &[
                "GOOGLE_BASE_URL",
                "GOOGLE_SERVICE_ACCOUNT",
                "GOOGLE_SERVICE_ACCOUNT_PATH",
                "GOOGLE_SERVICE_ACCOUNT_KEY",
                "SERVICE_ACCOUNT",
            ],
            Scheme::Http | Scheme::Https | Scheme::File | Scheme::Oci => &[],
        };
        let values = names.iter().map(|name| std::env::var(name).unwrap_or_default());
        values.collect::<Vec<_>>().join("\n")
    }
}

fn connect(
    url: &ObjectUrl,
    uploads: Option<&RetryConfig>,
    watching: &Watching,
) -> Result<Clients, ObjectError> {
    static TLS: Once = Once::new();
    // Another library of the process may have chosen one already.
    TLS.call_once(|| _ = rustls::crypto::ring::default_provider().install_default());
    if url.scheme() == Scheme::Oci {
        let registry = Registry::new(url.host(), url.key().as_ref(), uploads.is_some());
        let registry = registry
            .map_err(|reason| ObjectError::Configuration { url: url.to_string(), reason })
            .map(Arc::new)?;
        let (reading, uploading) = (registry.clone(), registry.clone());
        return Ok(Clients { reading, uploading, registry: Some(registry) });
    }
    let never = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    let client = |retry| {
        client(url, retry, watching).map_err(|error| ObjectError::Configuration {
            url: url.to_string(),
            reason: without_secrets(&error.to_string(), std::env::vars_os()),
        })
    };
    let reading = client(never)?;
    let uploading = match uploads {
        Some(retry) => client(retry.clone())?,
        None => Arc::clone(&reading),
    };
    Ok(Clients { reading, uploading, registry: None })
}

/// A client of a bucket, server or file system.
fn client(
    url: &ObjectUrl,
    retry: RetryConfig,
    watching: &Watching,
) -> object_store::Result<Arc<dyn ObjectStore>> {
    let options = ClientOptions::new()
        .with_allow_http(allows_http(url.scheme()))
        // The time of a whole answer has no limit, but the time without bytes has one.
        .with_timeout_disabled()
        .with_read_timeout(SILENCE)
        .with_connect_timeout(CONNECT)
        .with_pool_idle_timeout(IDLE);
    let watching = watching.clone();
    Ok(match url.scheme() {
        Scheme::S3 => Arc::new(
            AmazonS3Builder::from_env()
                .with_bucket_name(url.host())
                .with_client_options(options)
                .with_retry(retry)
                .with_http_connector(watching)
                .build()?,
        ),
        Scheme::Gs => Arc::new(
            GoogleCloudStorageBuilder::from_env()
                .with_bucket_name(url.host())
                .with_client_options(options)
                .with_retry(retry)
                .with_http_connector(watching)
                .build()?,
        ),
        Scheme::Az => Arc::new(
            MicrosoftAzureBuilder::from_env()
                .with_container_name(url.host())
                .with_client_options(options)
                .with_retry(retry)
                .with_http_connector(watching)
                .build()?,
        ),
        Scheme::Http | Scheme::Https | Scheme::Oci => Arc::new(
            HttpBuilder::new()
                .with_url(format!("{}://{}", scheme_name(url), url.host()))
                .with_client_options(options)
                .with_retry(retry)
                .with_http_connector(watching)
                .build()?,
        ),
        Scheme::File => Arc::new(LocalFileSystem::new()),
    })
}

fn scheme_name(url: &ObjectUrl) -> &'static str {
    if url.scheme() == Scheme::Https { "https" } else { "http" }
}

/// The endpoint is plain HTTP, and the environment does not allow that: each request would fail without that reason.
fn check_endpoint(url: &ObjectUrl) -> Result<(), ObjectError> {
    let plain = url.scheme() == Scheme::S3
        && Store::endpoint(url).lines().any(|endpoint| endpoint.starts_with("http://"))
        && !allows_http(Scheme::S3);
    match plain {
        true => Err(ObjectError::Configuration {
            url: url.to_string(),
            reason: "its endpoint is plain HTTP, which AWS_ALLOW_HTTP=true allows".to_owned(),
        }),
        false => Ok(()),
    }
}

/// The variable with which a user allows plain HTTP.
fn variable_for_http(scheme: Scheme) -> Option<&'static str> {
    match scheme {
        Scheme::S3 => Some("AWS_ALLOW_HTTP"),
        Scheme::Gs => Some("GOOGLE_ALLOW_HTTP"),
        Scheme::Az => Some("AZURE_ALLOW_HTTP"),
        Scheme::Http | Scheme::Https | Scheme::Oci | Scheme::File => None,
    }
}

fn allows_http(scheme: Scheme) -> bool {
    let by_user = variable_for_http(scheme).and_then(|name| std::env::var(name).ok());
    scheme == Scheme::Http || by_user.is_some_and(|value| value == "true" || value == "1")
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime;

    #[test]
    fn a_store_shows_no_secret() {
        let url: ObjectUrl = "s3://bucket/guest".parse().unwrap();
        let store = Store::open(&url).unwrap();
        assert_eq!(format!("{store:?}"), r#"Store("s3://bucket/guest")"#);
    }

    #[test]
    fn concurrent_refusals_read_the_credentials_again_once() {
        let store = Store::open(&"http://host/guest".parse().unwrap()).unwrap();
        let reading = || store.clients().unwrap().reading;
        let refused = store.clients().unwrap();
        let both = async { futures_util::join!(store.renew(&refused), store.renew(&refused)) };
        let renewed = runtime::wait(async {
            store.renew(&refused).await.unwrap();
            let renewed = reading();
            let (first, second) = both.await;
            first.and(second).unwrap();
            renewed
        });
        let renewed = renewed.unwrap();
        assert!(!Arc::ptr_eq(&renewed, &refused.reading) && Arc::ptr_eq(&renewed, &reading()));
    }

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
