//! Commands that have the keys of files: age, gpg, the client of a key server.

use std::io::{self, Read, Write};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use snapfmt::{KeyError, KeyProvider, KeySlot, KeySlots, SecretKey};

use super::read::{ReadKeyError, read_key};
use crate::interrupt::spawn_unblocked;
use crate::waits::Wait;

/// Commands that unwrap and wrap the keys of files.
#[derive(Debug)]
pub(super) struct Commands {
    pub(super) unwrap: Option<String>,
    pub(super) wrap: Option<String>,
    /// Wrapped keys and what they unwrap to: a command may ask a person or a server.
    pub(super) known: Mutex<Vec<(Vec<u8>, SecretKey)>>,
}

/// Why such a command gave no key. Its output is not in the message.
#[derive(Debug, thiserror::Error)]
pub(super) enum CommandError {
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

pub(super) const NO_WRAP_COMMAND: CommandError =
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

    fn commands(unwrap: &str, wrap: &str) -> Commands {
        let (unwrap, wrap) = (Some(unwrap.to_owned()), Some(wrap.to_owned()));
        Commands { unwrap, wrap, known: Mutex::default() }
    }

    #[test]
    fn commands_wrap_and_unwrap() {
        // A cipher for tests: the digits of the key.
        let keys = commands("xxd -r -p", "xxd -p -c 32");
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
            let keys = commands("true", command);
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
