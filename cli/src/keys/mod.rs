//! The keys of sealed snapshots: the options that name them, the file or the command that has them.

#[cfg(feature = "age")]
mod age;
#[cfg(not(feature = "age"))]
#[path = "without_age.rs"]
mod age;
mod commands;
mod read;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use anyhow::{Context, Result, bail};
use snapfmt::{KeyProvider, SecretKey};

use age::AgeArgs;
use commands::{Commands, NO_WRAP_COMMAND};
use read::{open_private, read_key};

pub(crate) use age::is_age_file;

use crate::private_keys::shown;

/// Where the keys are. A key is in no option: other users can read the arguments of a process.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct KeyArgs {
    /// The key of sealed (encrypted) snapshots: a file of 32 bytes, or of 64 hex digits, that only its owner can read.
    /// What is read must be sealed with it, and snapshots that are written are sealed. See docs/sealing.md.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["key_command", "wrap_command"])]
    key_file: Option<PathBuf>,

    /// As --key-file, but `sh` runs this command for the key of each file: it gets the wrapped key on stdin, and writes the
    /// key (32 bytes, or 64 hex digits) to stdout. If it wraps with a public key, anyone can write a file that it opens: then
    /// --require-signature or --expect-root shows whether a file is authentic.
    #[arg(long, value_name = "CMD")]
    key_command: Option<String>,

    /// With --key-command, for each file that is written: this command gets its new key (32 bytes) on stdin, and writes
    /// the wrapped key to stdout.
    #[arg(long, value_name = "CMD")]
    wrap_command: Option<String>,

    #[command(flatten)]
    age: AgeArgs,

    /// A key file is read once: it may be a pipe, and its passphrase is asked for once.
    #[arg(skip)]
    read: Arc<OnceLock<Arc<dyn KeyProvider>>>,
}

impl KeyArgs {
    /// Whether a key is given.
    pub(crate) fn is_given(&self) -> bool {
        self.key_file.is_some() || self.run_commands() || self.age.is_given()
    }

    /// Whether an option is given that only matters for files that are written.
    pub(crate) fn is_given_to_write(&self) -> bool {
        self.wrap_command.is_some() || self.age.is_given_to_write()
    }

    /// Whether commands are run for keys.
    pub(crate) fn run_commands(&self) -> bool {
        self.key_command.is_some() || self.wrap_command.is_some()
    }

    /// The provider of the keys, if they are given.
    pub(crate) fn provider(&self) -> Result<Option<Arc<dyn KeyProvider>>> {
        if !self.is_given() {
            return Ok(None);
        }
        if let Some(provider) = self.read.get() {
            return Ok(Some(Arc::clone(provider)));
        }
        let provider: Arc<dyn KeyProvider> = match &self.key_file {
            Some(path) => Arc::new(key_in(path).with_context(|| shown(path))?),
            None if self.age.is_given() => self.age.provider()?,
            None => Arc::new(Commands {
                unwrap: self.key_command.clone(),
                wrap: self.wrap_command.clone(),
                known: Mutex::default(),
            }),
        };
        Ok(Some(Arc::clone(self.read.get_or_init(|| provider))))
    }

    /// Refuses keys with which no file could be written: before the work whose result would be lost.
    pub(crate) fn check_writes(&self) -> Result<()> {
        match (&self.key_command, &self.wrap_command) {
            (Some(_), None) => Err(NO_WRAP_COMMAND.into()),
            _ => self.age.check_writes(),
        }
    }

    /// Refuses a key file that cannot be read again by another `snap`: a pipe, or one with a passphrase.
    pub(crate) fn check_children_can_read(&self) -> Result<()> {
        for path in self.key_file.iter().chain(self.age.files()) {
            let found = std::fs::metadata(path).with_context(|| shown(path))?;
            if !found.is_file() {
                bail!(
                    "{}: this command starts others, which read the key again: give a regular file",
                    path.display()
                );
            }
        }
        self.age.check_children_can_read()
    }

    /// The same options, for another `snap`.
    pub(crate) fn options(&self) -> Vec<OsString> {
        let file = self.key_file.as_ref().map(|file| ("--key-file", file.into()));
        let command = self.key_command.as_ref().map(|command| ("--key-command", command.into()));
        let wrap = self.wrap_command.as_ref().map(|command| ("--wrap-command", command.into()));
        let given = [file, command, wrap].into_iter().flatten();
        let given = given.chain(self.age.options());
        given.flat_map(|(option, value): (&str, OsString)| [option.into(), value]).collect()
    }
}

/// The keys of a copy, beside those of the file that is read.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct NewKeyArgs {
    /// A key that opens the new file: as --key-file. May be given several times.
    #[arg(long, value_name = "FILE")]
    new_key_file: Vec<PathBuf>,

    /// A command that wraps the key of the new file: as --wrap-command. May be given several times.
    #[arg(long, value_name = "CMD")]
    new_wrap_command: Vec<String>,

    #[command(flatten)]
    age: age::NewAgeArgs,
}

impl NewKeyArgs {
    /// The providers of the new keys.
    pub(crate) fn providers(&self) -> Result<Vec<Arc<dyn KeyProvider>>> {
        let files = self.new_key_file.iter().map(|path| {
            let key_file = Some(path.clone());
            KeyArgs { key_file, ..KeyArgs::default() }
        });
        let commands = self.new_wrap_command.iter().map(|command| {
            let wrap_command = Some(command.clone());
            KeyArgs { wrap_command, ..KeyArgs::default() }
        });
        let age = KeyArgs { age: self.age.args(), ..KeyArgs::default() };
        let providers = files.chain(commands).chain([age]).map(|keys| keys.provider());
        Ok(providers.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }
}

fn key_in(path: &Path) -> Result<SecretKey> {
    Ok(read_key(open_private(path)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_file_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("key");
        std::fs::write(&path, [7; 32]).expect("it is written");
        let set = |mode| {
            let permissions = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(&path, permissions).expect("it is ours");
        };
        for mode in [0o600, 0o400] {
            set(mode);
            assert_eq!(key_in(&path).expect("it is private").bytes(), &[7; 32]);
        }
        for mode in [0o640, 0o604, 0o660, 0o622] {
            set(mode);
            let error = key_in(&path).expect_err("it is not private").to_string();
            assert_eq!(error, format!("other users can use this key (mode {mode:04o}): chmod 600"));
        }
        set(0o600);
        std::fs::write(&path, [7; 1 << 20]).expect("it is written");
        key_in(&path).expect_err("it is too long");
    }

    #[test]
    fn a_key_that_cannot_be_read_again_is_not_passed_on() {
        let keys = |path: &Path| KeyArgs { key_file: Some(path.into()), ..KeyArgs::default() };
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        keys(file.path()).check_children_can_read().expect("it is a regular file");
        let error = keys(Path::new("/dev/null")).check_children_can_read();
        assert!(error.expect_err("it is none").to_string().contains("give a regular file"));
    }
}
