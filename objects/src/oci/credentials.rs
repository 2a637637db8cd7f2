//! The user's credentials for a registry, from docker's configuration: `docker login` has written them.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use docker_credential::{CredentialRetrievalError as Failed, DockerCredential};

/// A user and a password. They are never printed.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Credentials {
    pub(crate) user: String,
    pub(crate) password: String,
}

/// The name under which docker keeps the credentials of its own registry.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";
/// What a credential helper says when it has none for the registry.
const NOT_FOUND: &str = "credentials not found";

/// The credentials for a registry: from `auths` in docker's file, or from the credential helper that it names. `None`:
/// there are none, and requests are anonymous.
///
/// # Errors
/// What is wrong, without any content of the file or output of the helper.
pub(crate) fn of(host: &str) -> Result<Option<Credentials>, String> {
    let Some(path) = path() else { return Ok(None) };
    let shown = path.display();
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("cannot open {shown}: {error}")),
    };
    let server = if host == "docker.io" { DOCKER_HUB } else { host };
    let found = docker_credential::get_credential_from_reader(io::BufReader::new(file), server);
    match found {
        Ok(DockerCredential::UsernamePassword(user, password)) => {
            Ok(Some(Credentials { user, password }))
        }
        Ok(DockerCredential::IdentityToken(_)) => Err(format!(
            "{shown} has an identity token for {host}, which is not supported: log in with a password or an access \
             token"
        )),
        Err(Failed::NoCredentialConfigured) => Ok(None),
        Err(Failed::HelperFailure { stdout, stderr, .. })
            if stdout.contains(NOT_FOUND) || stderr.contains(NOT_FOUND) =>
        {
            Ok(None)
        }
        // Its output may have a secret in it.
        Err(Failed::HelperFailure { .. } | Failed::MalformedHelperResponse) => {
            Err(format!("the credential helper for {host} that {shown} names has failed"))
        }
        Err(Failed::HelperCommunicationError) => {
            Err(format!("the credential helper for {host} that {shown} names cannot be run"))
        }
        Err(_) => Err(format!("{shown} has no valid credentials for {host}")),
    }
}

/// Docker's file of credentials.
fn path() -> Option<PathBuf> {
    let named = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let folder = named("DOCKER_CONFIG").or_else(|| Some(named("HOME")?.join(".docker")))?;
    Some(folder.join("config.json"))
}
