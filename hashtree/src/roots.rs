//! A list of roots, as `b3sum` prints it, and its signature, as `minisign` makes it.

use std::fmt;

use minisign_verify::{PublicKey, Signature};

use crate::root::{Root, WrongRoot};

/// Most bytes of a list: more than 700 lines with the longest names.
const MOST_BYTES: usize = 4 << 20;

/// The roots of the files of a chain: of the snapshot itself, its parent, and so on. Their order counts, and their names
/// do not: they are for the reader, and for `b3sum --check`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roots {
    files: Vec<(Root, String)>,
}

/// A text is no list of roots, or is not signed as it should be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RootsError {
    /// The list is too long to be one.
    #[error("a list of roots has at most {MOST_BYTES} bytes, this has {0}")]
    TooLong(usize),
    /// A line is not a root, two spaces and a name.
    #[error("line {line} of the list of roots is not a hash, two spaces and a name")]
    Line {
        /// The line, from 1.
        line: usize,
        /// What is wrong with its hash, if it is the hash.
        #[source]
        source: Option<WrongRoot>,
    },
    /// The list has no line.
    #[error("the list of roots is empty")]
    Empty,
    /// The key is not a public key of minisign.
    #[error("it is not a public key of minisign: {0}")]
    Key(minisign_verify::Error),
    /// The signature is not one of minisign.
    #[error("it is not a signature of minisign: {0}")]
    Signature(minisign_verify::Error),
    /// The signature is not that of the list by the key.
    #[error("the signature is not that of the list of roots by the required key: {0}")]
    Mismatch(minisign_verify::Error),
}

impl Roots {
    /// Adds the next file.
    pub fn push(&mut self, root: Root, name: impl Into<String>) {
        self.files.push((root, name.into()));
    }

    /// The roots, in the order of the chain.
    pub fn roots(&self) -> impl ExactSizeIterator<Item = Root> {
        self.files.iter().map(|(root, _)| *root)
    }

    /// The roots with the names of the files.
    pub fn files(&self) -> impl ExactSizeIterator<Item = (Root, &str)> {
        self.files.iter().map(|(root, name)| (*root, &**name))
    }

    /// Reads a list whose origin is known.
    ///
    /// # Errors
    /// [`RootsError`]
    pub fn parse(text: &str) -> Result<Self, RootsError> {
        if text.len() > MOST_BYTES {
            return Err(RootsError::TooLong(text.len()));
        }
        let mut roots = Self::default();
        for (number, line) in text.lines().enumerate() {
            let wrong = |source| RootsError::Line { line: number + 1, source };
            let (escaped, line) = match line.strip_prefix('\\') {
                Some(line) => (true, line),
                None => (false, line),
            };
            let (hash, name) = line.split_once("  ").ok_or_else(|| wrong(None))?;
            let root = hash.parse().map_err(|error| wrong(Some(error)))?;
            let name = if escaped { unescaped(name) } else { Some(name.to_owned()) };
            roots.push(root, name.ok_or_else(|| wrong(None))?);
        }
        if roots.files.is_empty() { Err(RootsError::Empty) } else { Ok(roots) }
    }

    /// Reads a list that was signed. `key` is the content of a public key's file, or its second line.
    ///
    /// # Errors
    /// [`RootsError`]
    pub fn parse_signed(text: &str, signature: &str, key: &str) -> Result<Self, RootsError> {
        if text.len() > MOST_BYTES {
            return Err(RootsError::TooLong(text.len()));
        }
        let key = key.trim_end();
        let key = match key.contains('\n') {
            true => PublicKey::decode(key),
            false => PublicKey::from_base64(key),
        };
        let signature = Signature::decode(signature).map_err(RootsError::Signature)?;
        let key = key.map_err(RootsError::Key)?;
        // The old form signs the text itself and not its hash; minisign has not written it by default since 2021.
        key.verify(text.as_bytes(), &signature, false).map_err(RootsError::Mismatch)?;
        Self::parse(text)
    }
}

impl fmt::Display for Roots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (root, name) in &self.files {
            // As b3sum does, so that each name is one line.
            if name.contains(['\\', '\n', '\r']) {
                let name = name.replace('\\', "\\\\").replace('\n', "\\n").replace('\r', "\\r");
                writeln!(f, "\\{root}  {name}")?;
            } else {
                writeln!(f, "{root}  {name}")?;
            }
        }
        Ok(())
    }
}

fn unescaped(name: &str) -> Option<String> {
    let mut plain = String::new();
    let mut chars = name.chars();
    while let Some(char) = chars.next() {
        plain.push(match char {
            '\\' => match chars.next()? {
                '\\' => '\\',
                'n' => '\n',
                'r' => '\r',
                _ => return None,
            },
            char => char,
        });
    }
    Some(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_back() {
        let mut roots = Roots::default();
        for name in ["guest.snap", "a folder/base\n\\.snap", "two  spaces"] {
            roots.push(Root(blake3::hash(name.as_bytes())), name);
        }
        assert_eq!(Roots::parse(&roots.to_string()).unwrap(), roots);
        assert_eq!(roots.to_string().lines().count(), 3);
    }

    #[test]
    fn what_is_no_list_is_refused_with_its_line() {
        let good = format!("{}  x\n", Root(blake3::hash(b"")));
        let of = |text: &str| Roots::parse(&format!("{good}{text}")).unwrap_err();
        for line in ["", "\n", "x  y", &good[1..], "\\", &good.replace("  ", " ")] {
            match Roots::parse(&format!("{good}{line}\n{good}")) {
                Err(RootsError::Line { line: 2, .. }) => {}
                other => panic!("{line:?}: {other:?}"),
            }
        }
        assert!(matches!(of("\\0  a"), RootsError::Line { line: 2, .. }));
        assert!(matches!(Roots::parse(""), Err(RootsError::Empty)));
        assert!(matches!(Roots::parse(&" ".repeat(MOST_BYTES + 1)), Err(RootsError::TooLong(_))));
    }
}
