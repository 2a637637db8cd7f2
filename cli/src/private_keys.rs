//! Private keys in messages. No option takes one, but it may be given by mistake, in place of a public key or of a file, and
//! messages repeat what was given. They end up in logs, which others read.

use std::borrow::Cow;
use std::path::Path;

use clap::error::{ContextKind, ContextValue};

/// How keys of age begin, in upper case or lower case.
const OF_AGE: [&str; 2] = ["AGE-SECRET-KEY-", "AGE-PLUGIN-"];
/// How keys of OpenSSH and others begin and end.
const PEM: (&str, &str) = ("-----BEGIN ", "-----END");
const HIDDEN: &str = "...";
/// Digits of a key in hex.
const HEX_DIGITS: usize = 2 * snapfmt::SecretKey::BYTES;

/// The text without the private keys in it that can be recognised.
pub(crate) fn hidden(text: &str) -> Cow<'_, str> {
    let mut shown = String::new();
    let mut rest = text;
    while let Some((start, end)) = first_in(rest) {
        shown.push_str(&rest[..start]);
        shown.push_str(HIDDEN);
        rest = &rest[end..];
    }
    match shown.is_empty() {
        true => Cow::Borrowed(text),
        false => Cow::Owned(shown + rest),
    }
}

/// What is hidden of the first private key in a text: all behind its beginning.
fn first_in(text: &str) -> Option<(usize, usize)> {
    // As long as `text`, with characters at the same places.
    let upper = text.to_ascii_uppercase();
    let of_age = OF_AGE.iter().filter_map(|start| {
        let start = upper.find(start)? + start.len();
        let is_of_key = |c: char| c.is_ascii_alphanumeric() || c == '-';
        let end = start + text[start..].find(|c| !is_of_key(c)).unwrap_or(text.len() - start);
        // Advice says how such keys begin: AGE-SECRET-KEY-1.
        (end - start > 1).then_some((start, end))
    });
    let pem = text.find(PEM.0).map(|start| {
        let start = start + PEM.0.len();
        (start, start + text[start..].find(PEM.1).unwrap_or(text.len() - start))
    });
    of_age.chain(pem).min()
}

/// A file with a key in messages. If it is not there, it may be the key itself.
pub(crate) fn shown(path: &Path) -> String {
    let text = path.display().to_string();
    let is_hex = text.len() == HEX_DIGITS && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    match is_hex && !path.exists() {
        true => "a file with a key is needed, and what is given may be the key itself".into(),
        false => text,
    }
}

/// Ends the process as [`clap::Error::exit`] does. No private key is printed; of the options that take public keys, no value.
pub(crate) fn exit(mut error: clap::Error) -> ! {
    let takes_public_keys = |option: &str| {
        ["--recipient ", "--new-recipient "].iter().any(|known| option.starts_with(known))
    };
    if let Some(ContextValue::String(option)) = error.get(ContextKind::InvalidArg)
        && takes_public_keys(option)
    {
        error.insert(ContextKind::InvalidValue, ContextValue::String(HIDDEN.into()));
    }
    let text = error.render().to_string();
    match hidden(&text) {
        Cow::Borrowed(_) => error.exit(),
        Cow::Owned(text) => {
            crate::stderr::print(&text);
            std::process::exit(error.exit_code())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_beginning_of_a_private_key_is_shown() {
        for (text, expected) in [
            ("'AGE-SECRET-KEY-1QQPZ' is no file", "'AGE-SECRET-KEY-...' is no file"),
            ("age-secret-key-1qqpz", "age-secret-key-..."),
            ("a AGE-PLUGIN-X-1QQ, AGE-SECRET-KEY-1Q", "a AGE-PLUGIN-..., AGE-SECRET-KEY-..."),
            (
                "ü-----BEGIN A KEY-----\nb3\n-----END A KEY-----: no",
                "ü-----BEGIN ...-----END A KEY-----: no",
            ),
            ("-----BEGIN A KEY-----\\nb3", "-----BEGIN ..."),
        ] {
            assert_eq!(hidden(text), expected);
        }
        for text in ["", "age1t7rxyev2z3rw82stdl: no private key", "ssh-ed25519 AAAA"] {
            assert!(matches!(hidden(text), Cow::Borrowed(same) if same == text));
        }
    }

    #[test]
    fn a_key_in_place_of_its_file_is_not_shown() {
        let key = "5c".repeat(32);
        assert!(!shown(Path::new(&key)).contains("5c"));
        assert_eq!(shown(Path::new(&key[1..])), key[1..]);
    }
}
