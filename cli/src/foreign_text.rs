//! Text that others have chosen: names and descriptions in a snapshot, in a bucket or from a server. Characters that
//! drive a terminal, or that change the order of what it shows, are escaped wherever `snap` prints text.

use std::borrow::Cow;

use anyhow::Result;
use serde::Serialize;

/// Text that may have several lines.
pub(crate) fn lines(text: &str) -> Cow<'_, str> {
    escaped(
        text,
        |c| is_harmful(c) && !matches!(c, '\n' | '\t'),
        |c| c.escape_default().to_string(),
    )
}

/// Text of one line. A newline in it, which could begin a line that looks like one of `snap`, is escaped too.
pub(crate) fn one_line(text: &str) -> Cow<'_, str> {
    escaped(text, is_harmful, |c| c.escape_default().to_string())
}

/// A value as JSON for people and programs.
pub(crate) fn json(value: &impl Serialize) -> Result<String> {
    Ok(escaped_json(&serde_json::to_string_pretty(value)?))
}

/// The same on one line.
pub(crate) fn json_line(value: &impl Serialize) -> Result<String> {
    Ok(escaped_json(&serde_json::to_string(value)?))
}

fn escaped_json(text: &str) -> String {
    // A harmful character other than the newlines between the values is in a string, where JSON has an escape for it.
    let in_json = |c: char| format!("\\u{:04x}", u32::from(c));
    escaped(text, |c| is_harmful(c) && c != '\n', in_json).into_owned()
}

fn escaped(
    text: &str,
    harmful: impl Fn(char) -> bool,
    escape: impl Fn(char) -> String,
) -> Cow<'_, str> {
    if !text.contains(&harmful) {
        return Cow::Borrowed(text);
    }
    let each = text.chars().map(|c| if harmful(c) { escape(c) } else { c.into() });
    Cow::Owned(each.collect())
}

/// Control characters (C0, DEL, C1), and those of Unicode that change the direction of text. All are below U+10000.
fn is_harmful(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_drives_a_terminal_is_escaped_and_other_text_is_not() {
        assert_eq!(lines("grüße\tan\nalle ☂"), "grüße\tan\nalle ☂");
        assert_eq!(lines("a\x1b[2J\u{9b}31m\r\x7f"), "a\\u{1b}[2J\\u{9b}31m\\r\\u{7f}");
        assert_eq!(lines("\u{202e}pans"), "\\u{202e}pans");
        assert_eq!(one_line("a\nsnap: all is well"), "a\\nsnap: all is well");
    }

    #[test]
    fn json_has_the_same_value_when_it_is_read_back() {
        let value = serde_json::json!({ "k\u{9b}": ["\x1b\x7f\u{202e}", "a\nb", "ü"], "n": 1 });
        let text = json(&value).unwrap();
        assert!(text.chars().all(|c| c == '\n' || !is_harmful(c)), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }
}
