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
    note(match causes(error).find_map(untrusted) {
        Some(reason) => Seen::Refused(reason),
        None => Seen::NoAnswer(reason(error)),
    });
}

/// Records that an answer is not valid.
pub(crate) fn refused(what: &str) {
    note(Seen::Refused(what.to_owned()));
}

fn causes<'a>(error: &'a HttpError) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    let first: &(dyn Error + 'static) = error;
    std::iter::successors(Some(first), |error| (*error).source())
}

/// An error of the TLS library about a certificate. It is inside of an I/O error, which does not return it as its
/// source.
fn untrusted(error: &(dyn Error + 'static)) -> Option<String> {
    let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    let inner = inner.and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match error.downcast_ref().or(inner) {
        Some(error @ rustls::Error::InvalidCertificate(_)) => Some(error.to_string()),
        _ => None,
    }
}

fn note(seen: Seen) {
    // Other requests of the client, for example for a token, may run outside of `watched`.
    let _ = SEEN.try_with(|place| *place.borrow_mut() = seen);
}

/// How the standard library begins an error of looking a host's name up.
const LOOK_UP: &str = "failed to lookup address information";

/// Why there was no answer: the kind, and the system's error. The text never contains an address or a header.
pub(crate) fn reason(error: &HttpError) -> String {
    let what = match error.kind() {
        HttpErrorKind::Connect => "cannot connect to the store",
        HttpErrorKind::Timeout => "the store does not answer in time",
        _ => "the connection to the store broke off",
    };
    let of_system = |error: &(dyn Error + 'static)| {
        let error = error.downcast_ref::<std::io::Error>()?;
        let text = error.to_string();
        (error.raw_os_error().is_some() || text.starts_with(LOOK_UP)).then_some(text)
    };
    match causes(error).find_map(of_system) {
        Some(text) => format!("{what}: {text}"),
        None => what.to_owned(),
    }
}

/// The meaning of a failed request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// The error is temporary.
    Passing(String),
    /// The credentials are not accepted: 401, 403, or an expired token.
    Credentials(u16),
    /// 404.
    NotFound,
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

pub(crate) fn meaning(error: &StoreError, seen: Seen) -> Meaning {
    match error {
        StoreError::NotFound { .. } => return Meaning::NotFound,
        StoreError::Precondition { .. } => return Meaning::Replaced,
        StoreError::AlreadyExists { .. } => return Meaning::Exists,
        _ => {}
    }
    match seen {
        Seen::NoAnswer(reason) => Meaning::Passing(reason),
        Seen::Refused(reason) => Meaning::Refused(None, Some(reason)),
        Seen::Nothing => match error {
            StoreError::PermissionDenied { .. } => Meaning::Credentials(403),
            StoreError::Unauthenticated { .. } => Meaning::Credentials(401),
            _ => Meaning::Refused(None, None),
        },
        Seen::Status(status) => {
            let code = code(&error.to_string());
            match status {
                401 | 403 => Meaning::Credentials(status),
                // S3 answers with this code.
                400 if code.as_deref().is_some_and(is_expiry) => Meaning::Credentials(status),
                404 | 410 => Meaning::NotFound,
                412 => Meaning::Replaced,
                416 => Meaning::NoSuchRange,
                200 => Meaning::NoRanges,
                408 | 425 | 429 | 500 | 502 | 503 | 504 => {
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
        assert_eq!(of(412, ""), Meaning::Replaced);
        assert_eq!(of(416, ""), Meaning::NoSuchRange);
        assert_eq!(of(200, ""), Meaning::NoRanges);
        // Not implemented: another try changes nothing.
        assert_eq!(of(501, ""), Meaning::Refused(Some(501), None));
    }

    #[test]
    fn only_a_code_is_taken_from_a_body() {
        assert_eq!(code("<Code>https://user:hunter2@host/</Code>"), None);
        assert_eq!(code("<Code></Code>"), None);
        assert_eq!(code("no code"), None);
    }
}
