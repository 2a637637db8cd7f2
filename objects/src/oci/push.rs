//! Writes to a registry, by `oci-client`.
//!
//! It gets the token that reads have, so that it never asks for one itself: it would hide the failure.

use std::io;

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};
use object_store::Error as StoreError;
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::manifest::OCI_IMAGE_MEDIA_TYPE;
use oci_client::secrets::RegistryAuth;
use oci_client::token_cache::{RegistryOperation, RegistryTokenType};
use oci_client::{Client, Reference};

use super::registry::{Registry, broken, failed, invalid};
use super::token::Access;
use crate::answer;
use crate::retry::CONNECT;

impl Registry {
    /// Uploads a blob in one request. Its bytes must have this digest and length: the registry checks them.
    pub(crate) async fn push_blob(
        &self,
        digest: &str,
        len_bytes: u64,
        bytes: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
    ) -> Result<(), StoreError> {
        let (client, reference) = (self.pusher().await?, self.reference("latest"));
        let bytes = bytes.map_err(OciDistributionError::IoError);
        let pushed = client.push_blob_stream(&reference, bytes, digest, Some(len_bytes)).await;
        pushed.map(drop).map_err(meant)
    }

    pub(super) async fn push_manifest(&self, tag: &str, bytes: Bytes) -> Result<(), StoreError> {
        let client = self.pusher().await?;
        let media_type = OCI_IMAGE_MEDIA_TYPE.parse();
        let media_type = media_type.map_err(|_| invalid("the type of a manifest is not valid"))?;
        let pushed = client.push_manifest_raw(&self.reference(tag), bytes, media_type).await;
        pushed.map(drop).map_err(meant)
    }

    fn reference(&self, tag: &str) -> Reference {
        Reference::with_tag(self.host.clone(), self.repository.clone(), tag.to_owned())
    }

    async fn pusher(&self) -> Result<Client, StoreError> {
        let access = self.access().await?;
        let reference = self.reference("latest");
        let protocol = match self.is_plain {
            true => ClientProtocol::HttpsExcept(vec![reference.resolve_registry().to_owned()]),
            false => ClientProtocol::Https,
        };
        let config = ClientConfig {
            protocol,
            // Not every registry takes a blob in parts.
            use_monolithic_push: true,
            // No limit of the silence: a server is silent until it has the whole blob.
            connect_timeout: Some(CONNECT),
            ..ClientConfig::default()
        };
        let client =
            Client::try_from(config).map_err(|_| invalid("the HTTP client cannot be built"))?;
        match access {
            Access::Anonymous => {}
            Access::Bearer(token) => {
                let auth = RegistryAuth::Bearer(token);
                client.store_auth_if_needed(reference.resolve_registry(), &auth).await;
            }
            Access::Basic(user) => {
                // Of these credentials it would first ask whether the registry wants them.
                let auth = RegistryAuth::Basic(user.user.clone(), user.password.clone());
                client.store_auth_if_needed(reference.resolve_registry(), &auth).await;
                let token = RegistryTokenType::Basic(user.user, user.password);
                client.tokens.insert(&reference, RegistryOperation::Push, token).await;
            }
        }
        Ok(client)
    }
}

/// Records the status of a failed request. Its text is dropped: it has the address and the server's answer in it.
fn meant(error: OciDistributionError) -> StoreError {
    match error {
        OciDistributionError::ServerError { code, .. } => answer::status(code),
        OciDistributionError::UnauthorizedError { .. } => answer::status(401),
        OciDistributionError::RequestError(error) => match error.status() {
            Some(status) => answer::status(status.as_u16()),
            None => return broken(error),
        },
        _ => {}
    }
    failed("the registry does not take it")
}
