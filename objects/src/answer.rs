//! The meaning of a failed request: to retry it, to read the credentials again, or to give up.

use std::cell::RefCell;
use std::error::Error;

use object_store::Error as StoreError;
use object_store::client::{HttpError, HttpErrorKind};

tokio::task_local! {
    static SEEN: RefCell<Seen>;
}

/// The last answer to a request.
#[derive(Clone, Debug, Default)]
pub(crate) enum Seen {
    /// No request was sent: a local file, or an error before that.
    #[default]
    Nothing,
    /// A status.
    Status(u16),
    /// No answer, and why.
    NoAnswer(String),
    /// The metadata service of this host, which is asked if the environment has no credentials, gives none.
    NoCredentials { reason: String, is_passing: bool },
    /// Another try changes nothing: the server has no certificate that this host trusts, or its answer is not valid.
    Refused(String),
}

/// Runs a request, and returns its result and the last answer to it.
pub(crate) async fn watched<F: Future>(request: F) -> (F::Output, Seen) {
    SEEN.scope(RefCell::default(), async {
        let result = request.await;
        (result, SEEN.with(|seen| seen.take()))
    })
    .await
}

/// Records that an answer has arrived.
pub(crate) fn status(status: u16) {
    note(Seen::Status(status));
}

/// Records that no answer has arrived.
pub(crate) fn none(error: &HttpError) {
    let plain = || causes(error).any(|cause| cause.to_string() == BAD_SCHEME);
    let plain = || plain().then(|| PLAIN_HTTP.to_owned());
    note(match causes(error).find_map(untrusted).or_else(plain) {
        Some(reason) => Seen::Refused(reason),
        None => Seen::NoAnswer(reason(error)),
    });
}

/// Records that no request was sent, because of a temporary error.
pub(crate) fn missing(reason: &str) {
    note(Seen::NoAnswer(reason.to_owned()));
}

/// Records an answer of a metadata service. It is the last one only if it has no credentials in it.
pub(crate) fn metadata_status(status: u16) {
    let reason = format!("{METADATA} answers with HTTP {status}");
    note(Seen::NoCredentials { reason, is_passing: is_passing(status) });
}

/// Records that a metadata service does not answer. That is temporary if there is one.
pub(crate) fn no_metadata(error: &HttpError, is_there: bool) {
    let reason = reason_of(METADATA, error);
    note(Seen::NoCredentials { reason, is_passing: is_there });
}

/// Records that an answer is not valid.
pub(crate) fn refused(what: &str) {
    note(Seen::Refused(what.to_owned()));
}

fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error| (*error).source())
}

/// An error of the TLS library. It is inside of I/O errors, which do not return what is in them as their source.
fn of_tls<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    match error.downcast_ref::<std::io::Error>() {
        Some(outer) => of_tls(outer.get_ref()?),
        None => error.downcast_ref(),
    }
}

/// A certificate that is not trusted, or a server that has no version or cipher that is allowed here.
fn untrusted(error: &(dyn Error + 'static)) -> Option<String> {
    match of_tls(error)? {
        error @ (rustls::Error::InvalidCertificate(_) | rustls::Error::PeerIncompatible(_)) => {
            Some(error.to_string())
        }
        _ => None,
    }
}

/// The system's error, of a store that is a folder.
fn of_files(error: &StoreError) -> Option<String> {
    let mut errors = causes(error).filter_map(|error| error.downcast_ref::<std::io::Error>());
    errors.find(|error| error.raw_os_error().is_some()).map(ToString::to_string)
}

fn note(seen: Seen) {
    // Other requests of the client, for example for a token, may run outside of `watched`.
    let _ = SEEN.try_with(|place| *place.borrow_mut() = seen);
}

/// The error of `reqwest` for an address without TLS.
const BAD_SCHEME: &str = "URL scheme is not allowed";
const PLAIN_HTTP: &str = "its endpoint is plain HTTP, which AWS_ALLOW_HTTP=true, GOOGLE_ALLOW_HTTP=true or \
                          AZURE_ALLOW_HTTP=true allows";

/// How the standard library begins an error of looking a host's name up.
const LOOK_UP: &str = "failed to lookup address information";

const STORE: &str = "the store";
const METADATA: &str = "the metadata service of this host";

/// Why there was no answer: the kind, and the system's error. The text never contains an address or a header.
pub(crate) fn reason(error: &HttpError) -> String {
    reason_of(STORE, error)
}

fn reason_of(server: &str, error: &HttpError) -> String {
    let what = match error.kind() {
        HttpErrorKind::Connect => format!("cannot connect to {server}"),
        HttpErrorKind::Timeout => format!("{server} does not answer in time"),
        _ => format!("the connection to {server} broke off"),
    };
    let of_system = |error: &(dyn Error + 'static)| {
        if let Some(error) = of_tls(error) {
            return Some(error.to_string());
        }
        let error = error.downcast_ref::<std::io::Error>()?;
        let text = error.to_string();
        (error.raw_os_error().is_some() || text.starts_with(LOOK_UP)).then_some(text)
    };
    match causes(error).find_map(of_system) {
        Some(text) => format!("{what}: {text}"),
        None => what,
    }
}

/// The meaning of a failed request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// The error is temporary.
    Passing(String),
    /// The credentials are not accepted: 401, 403, or an expired token.
    Credentials(u16),
    /// The environment has no credentials, and why.
    NoCredentials(String),
    /// 404.
    NotFound,
    /// There is no such bucket. Also 404 of a request that writes.
    NoBucket,
    /// 412.
    Replaced,
    /// 416: the object does not have these bytes.
    NoSuchRange,
    /// The whole object was sent, not the range.
    NoRanges,
    /// 409, and 412 of a request that creates: it is there already.
    Exists,
    /// Any other error, with the store's code for it, or with what is wrong with its certificate or answer.
    Refused(Option<u16>, Option<String>),
}

impl Meaning {
    /// The meaning for a request that creates an object: that is not found if its bucket is not.
    pub(crate) fn of_write(self) -> Self {
        match self {
            Self::NotFound => Self::NoBucket,
            other => other,
        }
    }
}

fn is_passing(status: u16) -> bool {
    matches!(status, 408 | 425 | 429 | 500 | 502 | 503 | 504)
}

/// What S3 and Google Cloud, and Azure, call a bucket that does not exist.
const NO_BUCKET: [&str; 2] = ["NoSuchBucket", "ContainerNotFound"];

fn not_found(error: &StoreError) -> Meaning {
    match code(&error.to_string()).is_some_and(|code| NO_BUCKET.contains(&&*code)) {
        true => Meaning::NoBucket,
        false => Meaning::NotFound,
    }
}

pub(crate) fn meaning(error: &StoreError, seen: Seen) -> Meaning {
    let is_of_store = !matches!(seen, Seen::NoCredentials { .. });
    match error {
        StoreError::NotFound { .. } if is_of_store => return not_found(error),
        StoreError::Precondition { .. } if is_of_store => return Meaning::Replaced,
        StoreError::AlreadyExists { .. } if is_of_store => return Meaning::Exists,
        _ => {}
    }
    match seen {
        Seen::NoCredentials { reason, is_passing: true } => Meaning::Passing(reason),
        Seen::NoAnswer(reason) => Meaning::Passing(reason),
        Seen::Refused(reason) => Meaning::Refused(None, Some(reason)),
        Seen::NoCredentials { reason, .. } => Meaning::NoCredentials(reason),
        Seen::Nothing => match error {
            StoreError::PermissionDenied { .. } => Meaning::Credentials(403),
            StoreError::Unauthenticated { .. } => Meaning::Credentials(401),
            error => Meaning::Refused(None, of_files(error)),
        },
        Seen::Status(status) => {
            let code = code(&error.to_string());
            match status {
                401 | 403 => Meaning::Credentials(status),
                // S3 answers with this code.
                400 if code.as_deref().is_some_and(is_expiry) => Meaning::Credentials(status),
                404 | 410 => not_found(error),
                412 => Meaning::Replaced,
                416 => Meaning::NoSuchRange,
                200 => Meaning::NoRanges,
                status if is_passing(status) => {
                    let code = code.map_or(String::new(), |code| format!(": {code}"));
                    Meaning::Passing(format!("the store answers with HTTP {status}{code}"))
                }
                _ => Meaning::Refused(Some(status), code),
            }
        }
    }
}

fn is_expiry(code: &str) -> bool {
    matches!(code, "ExpiredToken" | "TokenRefreshRequired" | "ExpiredTokenException")
}

/// The code of an S3 or Azure error, `<Code>SlowDown</Code>`: letters and digits only, so nothing else of the body.
fn code(text: &str) -> Option<String> {
    let (_, rest) = text.split_once("<Code>")?;
    let (code, _) = rest.split_once("</Code>")?;
    let fits = (1..=64).contains(&code.len()) && code.chars().all(|c| c.is_ascii_alphanumeric());
    fits.then(|| code.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(text: &str) -> StoreError {
        StoreError::Generic { store: "S3", source: text.into() }
    }

    #[test]
    fn answers_are_distinguished() {
        let of = |status, text: &str| meaning(&generic(text), Seen::Status(status));
        let busy = "<Error><Code>SlowDown</Code><Message>hunter2</Message></Error>";
        let passing = "the store answers with HTTP 503: SlowDown".to_owned();
        assert_eq!(of(503, busy), Meaning::Passing(passing));
        assert!(matches!(of(429, ""), Meaning::Passing(_)));
        assert_eq!(of(403, ""), Meaning::Credentials(403));
        assert_eq!(of(400, "<Code>ExpiredToken</Code>"), Meaning::Credentials(400));
        let bad = Some("InvalidRequest".to_owned());
        assert_eq!(of(400, "<Code>InvalidRequest</Code>"), Meaning::Refused(Some(400), bad));
        assert_eq!(of(404, ""), Meaning::NotFound);
        assert_eq!(of(404, "<Code>NoSuchKey</Code>"), Meaning::NotFound);
        assert_eq!(of(404, "<Code>NoSuchBucket</Code>"), Meaning::NoBucket);
        assert_eq!(of(404, "").of_write(), Meaning::NoBucket);
        assert_eq!(of(412, ""), Meaning::Replaced);
        assert_eq!(of(416, ""), Meaning::NoSuchRange);
        assert_eq!(of(200, ""), Meaning::NoRanges);
        // Not implemented: another try changes nothing.
        assert_eq!(of(501, ""), Meaning::Refused(Some(501), None));
    }

    #[tokio::test]
    async fn a_metadata_service_without_credentials_is_no_missing_object() {
        let of = async |status| {
            let error = StoreError::NotFound { path: "guest".into(), source: "404".into() };
            let ((), seen) = watched(async { metadata_status(status) }).await;
            meaning(&error, seen)
        };
        let says = |status| format!("the metadata service of this host answers with HTTP {status}");
        assert_eq!(of(404).await, Meaning::NoCredentials(says(404)));
        assert_eq!(of(403).await, Meaning::NoCredentials(says(403)));
        assert_eq!(of(503).await, Meaning::Passing(says(503)));
    }

    #[test]
    fn an_error_of_the_tls_library_is_found_in_the_i_o_errors_around_it() {
        let unknown = rustls::CertificateError::UnknownIssuer;
        let inner = std::io::Error::other(rustls::Error::InvalidCertificate(unknown));
        let error = HttpError::new(HttpErrorKind::Connect, std::io::Error::other(inner));
        assert!(causes(&error).find_map(untrusted).is_some());
        let other = HttpError::new(HttpErrorKind::Connect, std::io::Error::other("other"));
        assert_eq!(causes(&other).find_map(untrusted), None);
    }

    #[test]
    fn only_a_code_is_taken_from_a_body() {
        assert_eq!(code("<Code>https://user:hunter2@host/</Code>"), None);
        assert_eq!(code("<Code></Code>"), None);
        assert_eq!(code("no code"), None);
    }
}
