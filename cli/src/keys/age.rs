//! Keys by age (<https://age-encryption.org>): files are wrapped for public keys, and opened by private ones.
//!
//! A slot has a whole age file, as one of `--wrap-command 'age -r ...'` has. So each opens what the other has wrapped.

use std::ffi::OsString;
use std::fmt;
use std::io::{self, BufReader, Read, Write};
use std::iter;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use age::armor::ArmoredReader;
use age::{DecryptError, Decryptor, Encryptor, Identity, IdentityFile, scrypt, ssh, x25519};
use anyhow::{Context, Result};
use snapfmt::{KeyError, KeyProvider, KeySlot, KeySlots, SecretKey};
use zeroize::Zeroizing;

use super::read::{PrivateFileError, open_private, read_key};
use crate::private_keys::shown;
use crate::terminal::{self, AskError};

/// Identities and recipients.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct AgeArgs {
    /// As --key-file, but the key of each file is wrapped by age, and this file opens it: identities of age-keygen, also with a
    /// passphrase, or an OpenSSH private key (ed25519). May be given several times. Anyone who has a public key can write a
    /// file that it opens: --require-signature or --expect-root shows whether a file is authentic.
    #[arg(long = "identity", value_name = "FILE", conflicts_with_all = ["key_file", "key_command", "wrap_command"])]
    identities: Vec<PathBuf>,

    /// With --identity, or alone: who can open the files that are written: age1... or ssh-ed25519 .... May be given several
    /// times.
    #[arg(long = "recipient", value_name = "RECIPIENT", conflicts_with_all = ["key_file", "key_command", "wrap_command"])]
    recipients: Vec<Recipient>,
}

/// Recipients of a copy.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct NewAgeArgs {
    /// Who can open the new file: as --recipient. May be given several times.
    #[arg(long, value_name = "RECIPIENT")]
    new_recipient: Vec<Recipient>,
}

impl NewAgeArgs {
    pub(super) fn args(&self) -> AgeArgs {
        AgeArgs { identities: Vec::new(), recipients: self.new_recipient.clone() }
    }
}

impl AgeArgs {
    pub(super) fn is_given(&self) -> bool {
        !self.identities.is_empty() || self.is_given_to_write()
    }

    pub(super) fn is_given_to_write(&self) -> bool {
        !self.recipients.is_empty()
    }

    /// Reads the identities, and asks for their passphrases.
    pub(super) fn provider(&self) -> Result<Arc<dyn KeyProvider>> {
        let mut identities = Vec::new();
        for path in &self.identities {
            let read = Private::read(path).and_then(|private| private.open(path));
            identities.extend(read.with_context(|| shown(path))?);
        }
        Ok(Arc::new(Keys { identities, recipients: self.recipients.clone() }))
    }

    pub(super) fn check_writes(&self) -> Result<()> {
        match self.is_given() && !self.is_given_to_write() {
            true => Err(NO_RECIPIENT.into()),
            false => Ok(()),
        }
    }

    pub(super) fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.identities.iter()
    }

    /// Refuses identities whose passphrase another `snap` would have to ask for.
    pub(super) fn check_children_can_read(&self) -> Result<()> {
        for path in &self.identities {
            let private = Private::read(path).with_context(|| shown(path))?;
            if !matches!(private, Private::Open(_)) {
                return Err(AgeError::Children).with_context(|| shown(path));
            }
        }
        Ok(())
    }

    pub(super) fn options(&self) -> impl Iterator<Item = (&'static str, OsString)> {
        let identities = self.identities.iter().map(|path| ("--identity", path.into()));
        let recipients = self.recipients.iter().map(|key| ("--recipient", (&key.text).into()));
        identities.chain(recipients)
    }
}

/// Whether a wrapped key is an age file.
pub(crate) fn is_age_file(wrapped: &[u8]) -> bool {
    [&b"age-encryption.org/"[..], ARMOR].iter().any(|start| wrapped.starts_with(start))
}

const ARMOR: &[u8] = b"-----BEGIN AGE ENCRYPTED FILE-----";
/// Most bytes of a wrapped key. The time that age needs for a header grows with the square of its lines, and a file may be
/// forged. One for a single recipient has less than 400 bytes.
const MOST_WRAPPED_BYTES: usize = 8 << 10;
/// Most bytes of a file with identities.
const MOST_IDENTITY_BYTES: usize = 64 << 10;
/// Most work that a passphrase may cost, as a power of two: 1 GiB of memory.
const MOST_WORK_LOG2: u8 = 20;

/// Why keys by age cannot be used. No message has a part of a private key.
#[derive(Debug, thiserror::Error)]
enum AgeError {
    #[error("--{option} is needed: {reason}")]
    NotGiven { option: &'static str, reason: &'static str },
    #[error(transparent)]
    File(#[from] PrivateFileError),
    #[error("cannot read it")]
    Read(#[from] io::Error),
    #[error("a file of identities has at most {MOST_IDENTITY_BYTES} bytes")]
    TooLong,
    #[error(
        "it has no identity: give a file of age-keygen (AGE-SECRET-KEY-1...), or an OpenSSH private key of the kind ed25519"
    )]
    NoIdentity,
    #[error("only OpenSSH keys of the kind ed25519 can open a snapshot")]
    SshKind,
    #[error("its passphrase cannot be asked for")]
    Ask(#[from] AskError),
    #[error("the passphrase does not open it")]
    Passphrase,
    #[error("its passphrase costs more work (2^{required}) than is accepted (2^{MOST_WORK_LOG2})")]
    Work { required: u8 },
    #[error(
        "this command starts others, which would ask for its passphrase again: give an identity without one"
    )]
    Children,
    #[error("cannot wrap a key for {recipient}")]
    Wrap { recipient: String, source: Box<age::EncryptError> },
}

const NO_RECIPIENT: AgeError =
    AgeError::NotGiven { option: "recipient", reason: "a sealed snapshot is written" };
const NO_IDENTITY: AgeError =
    AgeError::NotGiven { option: "identity", reason: "a sealed snapshot is read" };

impl From<AgeError> for KeyError {
    fn from(error: AgeError) -> Self {
        Self::Provider(Box::new(error))
    }
}

/// A public key.
#[derive(Clone)]
struct Recipient {
    text: String,
    key: PublicKey,
}

#[derive(Clone)]
enum PublicKey {
    Age(x25519::Recipient),
    Ssh(ssh::Recipient),
}

impl FromStr for Recipient {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let key = if text.starts_with("ssh-") {
            match text.parse() {
                Ok(key @ ssh::Recipient::SshEd25519(..)) => PublicKey::Ssh(key),
                Ok(_) => return Err("of OpenSSH, only keys of the kind ed25519 are supported"),
                Err(_) => return Err("this is no public key of OpenSSH"),
            }
        } else {
            let key = text.parse::<x25519::Recipient>();
            PublicKey::Age(key.map_err(|_| "give a public key: age1... or ssh-ed25519 ...")?)
        };
        Ok(Self { text: text.to_owned(), key })
    }
}

impl fmt::Debug for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Recipient {
    fn wrap(&self, file_key: &SecretKey) -> Result<KeySlot, AgeError> {
        let key: &dyn age::Recipient = match &self.key {
            PublicKey::Age(key) => key,
            PublicKey::Ssh(key) => key,
        };
        let wrap = || {
            let mut wrapped = Vec::new();
            let mut writer =
                Encryptor::with_recipients(iter::once(key))?.wrap_output(&mut wrapped)?;
            writer.write_all(file_key.bytes())?;
            writer.finish()?;
            Ok(wrapped)
        };
        let wrapped = wrap().map_err(|source: age::EncryptError| {
            let (recipient, source) = (self.text.clone(), Box::new(source));
            AgeError::Wrap { recipient, source }
        })?;
        Ok(KeySlot::new(KeySlot::EXTERNAL, wrapped))
    }
}

type Identities = Vec<Box<dyn Identity + Send + Sync>>;

/// A file of identities.
enum Private {
    Open(Identities),
    /// An age file, which a passphrase opens.
    Age(Zeroizing<Vec<u8>>),
    /// A private key of OpenSSH with a passphrase.
    Ssh(ssh::Identity),
}

impl Private {
    fn read(path: &Path) -> Result<Self, AgeError> {
        let mut content = Zeroizing::new(Vec::with_capacity(MOST_IDENTITY_BYTES + 1));
        let file = open_private(path)?;
        file.take(MOST_IDENTITY_BYTES as u64 + 1).read_to_end(&mut content)?;
        if content.len() > MOST_IDENTITY_BYTES {
            return Err(AgeError::TooLong);
        }
        if is_age_file(&content) {
            return Ok(Self::Age(content));
        }
        if content.starts_with(b"-----BEGIN") {
            let identity = ssh::Identity::from_buffer(&content[..], None);
            return match identity.map_err(|_| AgeError::NoIdentity)? {
                ssh::Identity::Unsupported(_) => Err(AgeError::SshKind),
                identity @ ssh::Identity::Encrypted(_) => Ok(Self::Ssh(ed25519(identity)?)),
                identity @ ssh::Identity::Unencrypted(_) => {
                    Ok(Self::Open(vec![Box::new(ed25519(identity)?)]))
                }
            };
        }
        Ok(Self::Open(listed(&content[..])?))
    }

    /// The identities. If they have a passphrase, it is asked for.
    fn open(self, path: &Path) -> Result<Identities, AgeError> {
        let ask = || terminal::passphrase(&format!("passphrase of {}: ", path.display()));
        match self {
            Self::Open(identities) => Ok(identities),
            Self::Age(content) => opened(&content, ask()?),
            Self::Ssh(ssh::Identity::Encrypted(key)) => {
                let key = key.decrypt(secret(ask()?)).map_err(|_| AgeError::Passphrase)?;
                Ok(vec![Box::new(ssh::Identity::from(key))])
            }
            Self::Ssh(_) => Err(AgeError::SshKind),
        }
    }
}

fn secret(passphrase: Zeroizing<String>) -> age::secrecy::SecretString {
    passphrase.as_str().into()
}

fn ed25519(identity: ssh::Identity) -> Result<ssh::Identity, AgeError> {
    match ssh::Recipient::try_from(identity.clone()) {
        Ok(ssh::Recipient::SshEd25519(..)) => Ok(identity),
        _ => Err(AgeError::SshKind),
    }
}

/// The identities in an age file that a passphrase opens.
fn opened(content: &[u8], passphrase: Zeroizing<String>) -> Result<Identities, AgeError> {
    let decryptor = Decryptor::new_buffered(ArmoredReader::new(content));
    let decryptor = decryptor.map_err(|_| AgeError::NoIdentity)?;
    if !decryptor.is_scrypt() {
        return Err(AgeError::NoIdentity);
    }
    let mut identity = scrypt::Identity::new(secret(passphrase));
    identity.set_max_work_factor(MOST_WORK_LOG2);
    let decrypted = decryptor.decrypt(iter::once(&identity as &dyn Identity));
    let decrypted = decrypted.map_err(|error| match error {
        DecryptError::ExcessiveWork { required, .. } => AgeError::Work { required },
        _ => AgeError::Passphrase,
    })?;
    listed(BufReader::new(decrypted.take(MOST_IDENTITY_BYTES as u64)))
}

/// The identities in a file of age-keygen.
fn listed(content: impl io::BufRead) -> Result<Identities, AgeError> {
    // Its errors have no part of the content.
    let file = IdentityFile::from_buffer(content).map_err(|_| AgeError::NoIdentity)?;
    match file.into_identities() {
        Ok(identities) if !identities.is_empty() => Ok(identities),
        _ => Err(AgeError::NoIdentity),
    }
}

/// Opens and wraps the keys of files.
struct Keys {
    identities: Identities,
    recipients: Vec<Recipient>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").field("recipients", &self.recipients).finish_non_exhaustive()
    }
}

impl KeyProvider for Keys {
    fn unwrap_key(&self, keys: &KeySlots) -> Result<SecretKey, KeyError> {
        if self.identities.is_empty() {
            return Err(NO_IDENTITY.into());
        }
        let of_age = |slot: &&KeySlot| {
            slot.kind == KeySlot::EXTERNAL
                && is_age_file(&slot.bytes)
                && slot.bytes.len() <= MOST_WRAPPED_BYTES
        };
        let mut slots = keys.slots.iter().filter(of_age).peekable();
        if slots.peek().is_none() {
            let kinds = keys.slots.iter().map(|slot| slot.kind).collect();
            return Err(KeyError::NoSlot { wanted: "an identity of age", kinds });
        }
        // A slot that is damaged is like one of other keys: the header's authentication code covers all of them.
        slots.find_map(|slot| self.unwrap(&slot.bytes)).ok_or(KeyError::Wrong)
    }

    fn wrap_key(&self, file_key: &SecretKey, _: uuid::Uuid) -> Result<Vec<KeySlot>, KeyError> {
        if self.recipients.is_empty() {
            return Err(NO_RECIPIENT.into());
        }
        let slots = self.recipients.iter().map(|recipient| recipient.wrap(file_key));
        Ok(slots.collect::<Result<_, _>>()?)
    }
}

impl Keys {
    fn unwrap(&self, wrapped: &[u8]) -> Option<SecretKey> {
        let decryptor = Decryptor::new_buffered(ArmoredReader::new(wrapped)).ok()?;
        let identities = self.identities.iter().map(|identity| &**identity as &dyn Identity);
        read_key(decryptor.decrypt(identities).ok()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ssh-keygen -t ed25519, and with the passphrase "tree".
    const SSH: &str = include_str!("../../../tests/keys/ed25519");
    const SSH_PUBLIC: &str = include_str!("../../../tests/keys/ed25519.pub");
    const SSH_PROTECTED: &str = include_str!("../../../tests/keys/ed25519-passphrase");
    const RSA_PUBLIC: &str = include_str!("../../../tests/keys/rsa.pub");

    fn pair() -> (x25519::Identity, Recipient) {
        let identity = x25519::Identity::generate();
        let recipient = identity.to_public().to_string().parse().expect("it is one");
        (identity, recipient)
    }

    fn keys(identities: Identities, recipients: Vec<Recipient>) -> Keys {
        Keys { identities, recipients }
    }

    fn slots(slots: Vec<KeySlot>) -> KeySlots {
        KeySlots::new(uuid::Uuid::nil(), slots).expect("a file can have them")
    }

    /// A file that only its owner can use.
    fn private(content: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(content).expect("it is written");
        file
    }

    #[test]
    fn each_recipient_has_a_slot_that_its_identity_opens() {
        let ((one, to_one), (two, to_two), (three, _)) = (pair(), pair(), pair());
        let key = SecretKey::random().expect("random");
        let wrapped = keys(Vec::new(), vec![to_one, to_two]).wrap_key(&key, uuid::Uuid::nil());
        let wrapped = slots(wrapped.expect("it is wrapped"));
        assert_eq!(wrapped.slots.len(), 2);
        for identity in [one, two] {
            let opened = keys(vec![Box::new(identity)], Vec::new()).unwrap_key(&wrapped);
            assert_eq!(opened.expect("it is one of them").bytes(), key.bytes());
        }
        let other = keys(vec![Box::new(three)], Vec::new());
        assert!(matches!(other.unwrap_key(&wrapped), Err(KeyError::Wrong)));
        let plain = slots(vec![KeySlot::new(KeySlot::EXTERNAL, b"gpg".to_vec())]);
        assert!(matches!(other.unwrap_key(&plain), Err(KeyError::NoSlot { .. })));
    }

    #[test]
    fn keys_of_openssh_open_and_wrap() {
        let recipient: Recipient = SSH_PUBLIC.trim_end().parse().expect("it is one");
        let identities = Private::read(private(SSH.as_bytes()).path()).expect("it is one");
        let Private::Open(identities) = identities else { panic!("it has no passphrase") };
        let (key, keys) = (SecretKey::random().expect("random"), keys(identities, vec![recipient]));
        let wrapped = slots(keys.wrap_key(&key, uuid::Uuid::nil()).expect("it is wrapped"));
        assert_eq!(keys.unwrap_key(&wrapped).expect("it is opened").bytes(), key.bytes());
        let protected = Private::read(private(SSH_PROTECTED.as_bytes()).path());
        assert!(matches!(protected, Ok(Private::Ssh(_))));
        for wrong in [RSA_PUBLIC, "ssh-ed25519 AAAA", "age1", "", "AGE-SECRET-KEY-1"] {
            wrong.trim_end().parse::<Recipient>().expect_err(wrong);
        }
    }

    #[test]
    fn damaged_slots_open_nothing() {
        let (identity, recipient) = pair();
        let keys = keys(vec![Box::new(identity)], vec![recipient]);
        let key = SecretKey::random().expect("random");
        let slot = keys.wrap_key(&key, uuid::Uuid::nil()).expect("it is wrapped").remove(0);
        for at in 0..slot.bytes.len() {
            let mut bytes = slot.bytes.clone();
            bytes[at] ^= 1;
            assert!(keys.unwrap(&bytes).is_none(), "byte {at}");
            assert!(keys.unwrap(&slot.bytes[..at]).is_none(), "{at} bytes");
        }
        // Longer contents than a key has.
        let [long, short] = [64 << 10, 31].map(|len| {
            let recipient = match &keys.recipients[0].key {
                PublicKey::Age(key) => key.clone(),
                PublicKey::Ssh(_) => panic!("it is one of age"),
            };
            age::encrypt(&recipient, &vec![7; len]).expect("it is encrypted")
        });
        assert!(keys.unwrap(&long).is_none() && keys.unwrap(&short).is_none());
    }

    #[test]
    fn identities_with_a_passphrase_are_opened_by_it_only() {
        let (identity, _) = pair();
        let text = age::secrecy::ExposeSecret::expose_secret(&identity.to_string()).to_owned();
        let mut recipient = scrypt::Recipient::new("tree".into());
        recipient.set_work_factor(4);
        let binary = age::encrypt(&recipient, text.as_bytes()).expect("it is encrypted");
        let armored = age::encrypt_and_armor(&recipient, text.as_bytes()).expect("it is encrypted");
        for content in [binary, armored.into_bytes()] {
            let read = Private::read(private(&content).path()).expect("it is one");
            let Private::Age(read) = read else { panic!("it has a passphrase") };
            assert_eq!(opened(&read, "tree".to_owned().into()).expect("it opens it").len(), 1);
            let wrong = opened(&read, "bush".to_owned().into()).map(drop);
            assert!(matches!(wrong, Err(AgeError::Passphrase)));
        }
        // A file for a public key has no passphrase.
        let other = age::encrypt(&identity.to_public(), text.as_bytes()).expect("encrypted");
        assert!(matches!(opened(&other, "tree".to_owned().into()), Err(AgeError::NoIdentity)));
    }

    #[test]
    fn files_that_are_no_identities_are_refused() {
        for content in
            [&b""[..], b"# only a comment\n", b"secret", b"-----BEGIN X-----\n", &[0xff; 9]]
        {
            let refused = Private::read(private(content).path()).map(drop);
            assert!(matches!(refused, Err(AgeError::NoIdentity)), "{content:?}: {refused:?}");
        }
        let long = Private::read(private(&[b'#'; MOST_IDENTITY_BYTES + 1]).path()).map(drop);
        assert!(matches!(long, Err(AgeError::TooLong)));
    }
}
