//! The HTTP client of a store: it records what a server answers before `object_store` turns that into an error without
//! a status.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService, ReqwestConnector,
};

use crate::answer;

/// The services that give an instance or a container its credentials, at AWS, Google Cloud and Azure.
const METADATA_HOSTS: [&str; 5] = [
    "169.254.169.254",
    "169.254.170.2",
    "169.254.170.23",
    "metadata.google.internal",
    "[fd00:ec2::254]",
];

/// Makes clients. Clones are of the same store.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watching {
    /// Whether a metadata service has ever answered. Then it exists, and a lost answer is temporary.
    has_metadata: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Watched {
    client: HttpClient,
    has_metadata: Arc<AtomicBool>,
}

impl HttpConnector for Watching {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let client = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(Watched { client, has_metadata: Arc::clone(&self.has_metadata) }))
    }
}

#[async_trait]
impl HttpService for Watched {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let is_metadata = request.uri().host().is_some_and(is_metadata);
        let answer = self.client.execute(request).await;
        match &answer {
            Ok(response) if is_metadata => {
                self.has_metadata.store(true, Ordering::Relaxed);
                answer::metadata_status(response.status().as_u16());
            }
            Err(error) if is_metadata => {
                answer::no_metadata(error, self.has_metadata.load(Ordering::Relaxed));
            }
            Ok(response) => answer::status(response.status().as_u16()),
            Err(error) => answer::none(error),
        }
        answer
    }
}

/// Whether this is the host of a metadata service.
fn is_metadata(host: &str) -> bool {
    let of_user = std::env::var("AWS_METADATA_ENDPOINT").unwrap_or_default();
    let of_user = of_user.split_once("://").map_or("", |(_, rest)| rest);
    let end = of_user.find([':', '/']).unwrap_or(of_user.len());
    METADATA_HOSTS.contains(&host) || (!host.is_empty() && host == &of_user[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_services_are_distinguished_from_stores() {
        assert!(is_metadata("169.254.169.254") && is_metadata("metadata.google.internal"));
        assert!(!is_metadata("s3.eu-central-1.amazonaws.com") && !is_metadata(""));
    }
}
