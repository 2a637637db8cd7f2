//! Connects the keyboard to the guest: each key immediately and without echo, except Ctrl-C, which ends `snap`. Asks for
//! passphrases.

use std::io::{self, ErrorKind, IsTerminal, Read};
use std::sync::Mutex;
use std::time::Duration;

use rustix::process::getpgrp;
use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios};
use vmm::VmHandle;
#[cfg(feature = "age")]
use zeroize::Zeroizing;

#[cfg(feature = "age")]
use crate::{stderr, waits::Wait};

/// The former settings of the terminal, while they are changed.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Restores the terminal when it is dropped.
pub(crate) struct Keyboard(());

/// While another job has the terminal, this is the time between two checks whether this one has it again. There is no
/// notification.
const LOOK: Duration = Duration::from_secs(1);

impl Keyboard {
    /// Passes typed or piped input to the guest, until the process ends. While another job has the terminal, it is left
    /// alone.
    pub(crate) fn connect(guest: VmHandle) -> io::Result<Self> {
        let terminal = io::stdin().is_terminal();
        if terminal && is_ours() {
            raw()?;
        }
        let pass = move || {
            let mut bytes = [0; 256];
            let mut stdin = io::stdin();
            loop {
                match stdin.read(&mut bytes) {
                    Ok(0) => return,
                    Ok(len) => {
                        // A guest that does not read loses the input beyond 64 KiB, as with a UART.
                        let _taken = guest.send_input(&bytes[..len]);
                    }
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    // In the background, with SIGTTIN blocked: EIO.
                    Err(_) if terminal && !is_ours() => {
                        while !is_ours() {
                            std::thread::sleep(LOOK);
                        }
                        if raw().is_err() {
                            return;
                        }
                    }
                    Err(_) => return,
                }
            }
        };
        std::thread::Builder::new().name("keyboard".into()).spawn(pass)?;
        Ok(Self(()))
    }
}

impl Drop for Keyboard {
    fn drop(&mut self) {
        restore();
    }
}

/// Whether this job has the terminal on stdin. A terminal without job control belongs to all processes.
fn is_ours() -> bool {
    rustix::termios::tcgetpgrp(io::stdin()).map_or(true, |group| group == getpgrp())
}

fn raw() -> io::Result<()> {
    let stdin = io::stdin();
    let before = rustix::termios::tcgetattr(&stdin)?;
    let mut raw = before.clone();
    raw.local_modes -= LocalModes::ICANON | LocalModes::ECHO;
    raw.special_codes[SpecialCodeIndex::VMIN] = 1;
    raw.special_codes[SpecialCodeIndex::VTIME] = 0;
    if let Ok(mut saved) = BEFORE.lock() {
        *saved = Some(before);
    }
    Ok(rustix::termios::tcsetattr(&stdin, OptionalActions::Now, &raw)?)
}

/// Most bytes of a passphrase.
#[cfg(feature = "age")]
const MOST_PASSPHRASE_BYTES: usize = 1024;

/// Why nothing could be asked for.
#[derive(Debug, thiserror::Error)]
#[cfg(feature = "age")]
pub(crate) enum AskError {
    #[error("stdin is no terminal that this process has")]
    NoTerminal,
    #[error("the terminal")]
    Terminal(#[from] io::Error),
    #[error("the input is longer than {MOST_PASSPHRASE_BYTES} bytes, or not text")]
    Input,
    #[error("the input has ended")]
    Ended,
}

/// Asks for a passphrase on stdin, without an echo. An interrupt ends the process.
#[cfg(feature = "age")]
pub(crate) fn passphrase(question: &str) -> Result<Zeroizing<String>, AskError> {
    let stdin = io::stdin();
    if !stdin.is_terminal() || !is_ours() {
        return Err(AskError::NoTerminal);
    }
    let before = rustix::termios::tcgetattr(&stdin).map_err(io::Error::from)?;
    let mut silent = before.clone();
    silent.local_modes -= LocalModes::ECHO;
    if let Ok(mut saved) = BEFORE.lock() {
        *saved = Some(before);
    }
    rustix::termios::tcsetattr(&stdin, OptionalActions::Flush, &silent).map_err(io::Error::from)?;
    stderr::print(question);
    let _waiting = Wait::unreported().begin();
    let line = line(&stdin);
    restore();
    stderr::print("\n");
    line
}

/// Reads a line past the buffer of the standard library, which is not erased.
#[cfg(feature = "age")]
fn line(stdin: &io::Stdin) -> Result<Zeroizing<String>, AskError> {
    let mut line = Zeroizing::new(Vec::with_capacity(MOST_PASSPHRASE_BYTES));
    let mut byte = Zeroizing::new([0]);
    while line.len() < MOST_PASSPHRASE_BYTES {
        match rustix::io::read(stdin, &mut byte[..]) {
            Ok(0) => return Err(AskError::Ended),
            Ok(_) if byte[0] == b'\n' => {
                let text = std::str::from_utf8(&line).map_err(|_| AskError::Input)?;
                return Ok(Zeroizing::new(text.to_owned()));
            }
            Ok(_) => line.push(byte[0]),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
    Err(AskError::Input)
}

/// Restores the terminal, if it was changed and no other job has it.
pub(crate) fn restore() {
    if let Ok(mut saved) = BEFORE.lock()
        && let Some(before) = saved.take()
        && is_ours()
    {
        // The process is ending: there is no way left to report an error.
        let _ = rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}
