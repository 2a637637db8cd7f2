//! The keys of sealed snapshots: the options that name them, the file or the command that has them.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result, bail};
use snapfmt::{KeyError, KeyProvider, KeySlot, KeySlots, SecretKey};
use zeroize::Zeroizing;

use crate::interrupt::spawn_unblocked;
use crate::waits::Wait;

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

    /// The key file is read once: it may be a pipe.
    #[arg(skip)]
    read: Arc<OnceLock<Arc<dyn KeyProvider>>>,
}

impl KeyArgs {
    /// Whether a key is given.
    pub(crate) fn is_given(&self) -> bool {
        self.key_file.is_some() || self.key_command.is_some() || self.wrap_command.is_some()
    }

    /// Whether an option is given that only matters for files that are written.
    pub(crate) fn is_given_to_write(&self) -> bool {
        self.wrap_command.is_some()
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
            Some(path) => Arc::new(key_in(path).with_context(|| path.display().to_string())?),
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
            _ => Ok(()),
        }
    }

    /// Refuses a key file that cannot be read again by another `snap`, such as a pipe.
    pub(crate) fn check_children_can_read(&self) -> Result<()> {
        let Some(path) = &self.key_file else { return Ok(()) };
        let found = std::fs::metadata(path).with_context(|| path.display().to_string())?;
        if !found.is_file() {
            bail!(
                "{}: this command starts others, which read the key again: give a regular file",
                path.display()
            );
        }
        Ok(())
    }

    /// The same options, for another `snap`.
    pub(crate) fn options(&self) -> Vec<OsString> {
        let file = self.key_file.as_ref().map(|file| ("--key-file", file.into()));
        let command = self.key_command.as_ref().map(|command| ("--key-command", command.into()));
        let wrap = self.wrap_command.as_ref().map(|command| ("--wrap-command", command.into()));
        let given = [file, command, wrap].into_iter().flatten();
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
}

impl NewKeyArgs {
    /// The providers of the new keys.
    pub(crate) fn providers(&self) -> Result<Vec<Arc<dyn KeyProvider>>> {
        let files = self
            .new_key_file
            .iter()
            .map(|path| KeyArgs { key_file: Some(path.clone()), ..KeyArgs::default() });
        let commands = self
            .new_wrap_command
            .iter()
            .map(|command| KeyArgs { wrap_command: Some(command.clone()), ..KeyArgs::default() });
        let providers = files.chain(commands).map(|keys| keys.provider());
        Ok(providers.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }
}

fn key_in(path: &Path) -> Result<SecretKey> {
    let file = File::open(path)?;
    let mode = file.metadata()?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        bail!("other users can use this key (mode {mode:04o}): chmod 600");
    }
    Ok(read_key(file)?)
}

/// Reads a key of either form. All of what was read is erased from memory.
fn read_key(mut from: impl Read) -> Result<SecretKey, ReadKeyError> {
    let mut content = Zeroizing::new([0; SecretKey::MOST_FILE_BYTES + 1]);
    let mut len = 0;
    while len < content.len() {
        match from.read(&mut content[len..]) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(SecretKey::parse(&content[..len])?)
}

#[derive(Debug, thiserror::Error)]
enum ReadKeyError {
    #[error("cannot read the key")]
    Read(#[from] io::Error),
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// Commands that unwrap and wrap the keys of files.
#[derive(Debug)]
struct Commands {
    unwrap: Option<String>,
    wrap: Option<String>,
    /// Wrapped keys and what they unwrap to: a command may ask a person or a server.
    known: Mutex<Vec<(Vec<u8>, SecretKey)>>,
}

/// Why such a command gave no key. Its output is not in the message.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error("--{option} is needed: {reason}")]
    NotGiven { option: &'static str, reason: &'static str },
    #[error("--{option}: the command cannot be run")]
    Run { option: &'static str, source: io::Error },
    #[error("--{option}: the command failed: {status}")]
    Failed { option: &'static str, status: std::process::ExitStatus },
    #[error("--{option}: the output of the command")]
    Output { option: &'static str, source: ReadKeyError },
    #[error("--{option}: the output of the command has {found} bytes, allowed are 1 to {most}")]
    Length { option: &'static str, found: usize, most: usize },
}

const NO_WRAP_COMMAND: CommandError =
    CommandError::NotGiven { option: "wrap-command", reason: "a sealed snapshot is written" };

impl From<CommandError> for KeyError {
    fn from(error: CommandError) -> Self {
        Self::Provider(Box::new(error))
    }
}

impl KeyProvider for Commands {
    fn unwrap_key(&self, keys: &KeySlots) -> Result<SecretKey, KeyError> {
        let option = "key-command";
        let reason = "a sealed snapshot is read";
        let Some(command) = &self.unwrap else {
            return Err(CommandError::NotGiven { option, reason }.into());
        };
        let mut last = None;
        for slot in keys.slots.iter().filter(|slot| slot.kind == KeySlot::EXTERNAL) {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((_, key)) = known.iter().find(|(wrapped, _)| *wrapped == slot.bytes) {
                return Ok(key.clone());
            }
            let unwrapped = run(option, command, &slot.bytes, |output| {
                read_key(output).map_err(|source| CommandError::Output { option, source })
            });
            match unwrapped {
                Ok(key) => {
                    known.push((slot.bytes.clone(), key.clone()));
                    return Ok(key);
                }
                Err(error) => last = Some(error),
            }
        }
        Err(match last {
            Some(error) => error.into(),
            None => KeyError::NoSlot {
                wanted: "a command",
                kinds: keys.slots.iter().map(|slot| slot.kind).collect(),
            },
        })
    }

    fn wrap_key(&self, file_key: &SecretKey, _: uuid::Uuid) -> Result<Vec<KeySlot>, KeyError> {
        let option = "wrap-command";
        let Some(command) = &self.wrap else { return Err(NO_WRAP_COMMAND.into()) };
        let most = KeySlots::MOST_BYTES;
        let wrapped = run(option, command, file_key.bytes(), |output| {
            let mut wrapped = Vec::new();
            let read = output.take(most as u64 + 1).read_to_end(&mut wrapped);
            read.map_err(|source| CommandError::Run { option, source })?;
            match wrapped.len() {
                1.. if wrapped.len() <= most => Ok(wrapped),
                found => Err(CommandError::Length { option, found, most }),
            }
        })?;
        Ok(vec![KeySlot::new(KeySlot::EXTERNAL, wrapped)])
    }
}

/// Runs a command with `input`, which is less than a pipe holds, and reads its output.
fn run<T>(
    option: &'static str,
    command: &str,
    input: &[u8],
    read: impl FnOnce(&mut dyn Read) -> Result<T, CommandError>,
) -> Result<T, CommandError> {
    let failed = |source| CommandError::Run { option, source };
    // An interrupt leaves time: the recording of a guest that was interrupted is written after it, with a key.
    let _waiting = Wait::new(move || format!("the command of --{option}")).hears().begin();
    let mut shell = Command::new("sh");
    shell.args(["-c", command]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = spawn_unblocked(&mut shell).map_err(failed)?;
    // Dropped at the end of this statement: the command sees the end of its input.
    let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input));
    let output = match child.stdout.take() {
        Some(mut stdout) => read(&mut stdout),
        None => Err(failed(io::ErrorKind::BrokenPipe.into())),
    };
    let status = child.wait().map_err(failed)?;
    // A command whose output is not read to its end may end by SIGPIPE. Otherwise its own message has the cause.
    let is_too_long = matches!(output, Err(CommandError::Length { .. }));
    if !status.success() && !is_too_long {
        return Err(CommandError::Failed { option, status });
    }
    match written {
        // It has a key without the wrapped one.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => output,
        written => written.map_err(failed).and(output),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commands(unwrap: &str, wrap: &str) -> KeyArgs {
        KeyArgs {
            key_command: Some(unwrap.into()),
            wrap_command: Some(wrap.into()),
            ..KeyArgs::default()
        }
    }

    #[test]
    fn a_key_file_is_private() {
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

    #[test]
    fn commands_wrap_and_unwrap() {
        // A cipher for tests: the digits of the key.
        let keys = commands("xxd -r -p", "xxd -p -c 32").provider();
        let keys = keys.expect("none is run yet").expect("they are given");
        let (key, seal_id) = (SecretKey::random().expect("random"), uuid::Uuid::new_v4());
        let Ok(slots) = keys.wrap_key(&key, seal_id) else { return };
        let [slot] = &slots[..] else { panic!("one command, one slot") };
        assert_eq!(slot.kind, KeySlot::EXTERNAL);
        let hex: String = key.bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(slot.bytes.trim_ascii_end(), hex.as_bytes());
    }

    #[test]
    fn a_command_that_fails_is_named_and_its_output_is_not() {
        let wrap = |command: &str| {
            let keys = commands("true", command).provider().expect("given").expect("given");
            let key = SecretKey::random().expect("random");
            keys.wrap_key(&key, uuid::Uuid::new_v4()).map_err(|error| error.to_string())
        };
        assert_eq!(
            wrap("cat; exit 3").expect_err("it fails"),
            "--wrap-command: the command failed: exit status: 3"
        );
        assert!(wrap("true").expect_err("it is empty").contains("has 0 bytes"));
        assert!(wrap("head -c 70000 /dev/zero").expect_err("too much").contains("has 655"));
        assert_eq!(wrap("echo wrapped").expect("it has an output")[0].bytes, b"wrapped\n");
    }
}
