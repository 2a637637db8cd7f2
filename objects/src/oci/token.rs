//! What a registry asks for when it answers with 401, and a token from the server that it names.

use http_auth::parser::ChallengeParser;
use serde::Deserialize;

use super::credentials::Credentials;

/// How requests to a registry are authorized. It is never printed.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Access {
    /// Nothing was asked for yet.
    Anonymous,
    /// By a token. All of its bytes can be in a header.
    Bearer(String),
    Basic(Credentials),
}

/// What a registry asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// A token of this server.
    Bearer { realm: String, service: Option<String> },
    /// A user and a password.
    Basic,
}

impl Challenge {
    /// The first one in a header `WWW-Authenticate` that is known.
    pub(crate) fn parse(header: &str) -> Option<Self> {
        ChallengeParser::new(header).map_while(Result::ok).find_map(|challenge| {
            let value = |name: &str| {
                let mut params = challenge.params.iter();
                let found = params.find(|(found, _)| found.eq_ignore_ascii_case(name));
                found.map(|(_, value)| value.to_unescaped())
            };
            if challenge.scheme.eq_ignore_ascii_case("basic") {
                return Some(Self::Basic);
            }
            let is_bearer = challenge.scheme.eq_ignore_ascii_case("bearer");
            let realm = is_bearer.then(|| value("realm"))??;
            Some(Self::Bearer { realm, service: value("service") })
        })
    }
}

/// The answer of a token server. Some use one name and some the other.
#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
}

/// The token in an answer; `None` if there is none that can be in a header.
pub(crate) fn parse_token(answer: &[u8]) -> Option<String> {
    let answer: Answer = serde_json::from_slice(answer).ok()?;
    let token = answer.token.or(answer.access_token)?;
    (!token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic())).then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read() {
        let header = r#"Bearer realm="https://auth.example/token",service="registry.example",scope="repository:a:pull""#;
        let expected = Challenge::Bearer {
            realm: "https://auth.example/token".into(),
            service: Some("registry.example".into()),
        };
        assert_eq!(Challenge::parse(header), Some(expected));
        assert_eq!(Challenge::parse(r#"Basic realm="basic-realm""#), Some(Challenge::Basic));
        assert_eq!(Challenge::parse(r#"Negotiate, Basic realm="x""#), Some(Challenge::Basic));
        for header in ["", "Bearer", "Bearer service=\"x\"", "\u{0}"] {
            assert_eq!(Challenge::parse(header), None, "{header:?}");
        }
    }

    #[test]
    fn a_token_that_no_header_can_hold_is_refused() {
        assert_eq!(parse_token(br#"{"token":"abc","expires_in":60}"#).as_deref(), Some("abc"));
        assert_eq!(parse_token(br#"{"access_token":"abc"}"#).as_deref(), Some("abc"));
        for answer in [&b"{}"[..], br#"{"token":""}"#, br#"{"token":"a\nb"}"#, b"x"] {
            assert_eq!(parse_token(answer), None);
        }
    }
}
