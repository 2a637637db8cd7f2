//! The keyboard as the guest's: each key at once and without echo, but Ctrl-C stays ours.

use std::io::{self, ErrorKind, IsTerminal, Read};
use std::sync::Mutex;
use std::time::Duration;

use rustix::process::getpgrp;
use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios};
use vmm::VmHandle;

/// How the terminal was before, while it is changed.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Puts the terminal back when it is dropped.
pub(crate) struct Keyboard(());

/// While another job has the terminal, it is looked at so often whether this one has it again. Nothing tells.
const LOOK: Duration = Duration::from_secs(1);

impl Keyboard {
    /// Passes what is typed, or piped in, to the guest, until the process ends. A terminal that another job has is left
    /// alone for as long as it does.
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
                        // A guest that takes nothing for 64 KiB long loses the rest, like a UART.
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

/// Whether this job has the terminal that stdin is. One without jobs is everybody's.
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

/// Puts the terminal back as it was, if it was changed and no other job has it.
pub(crate) fn restore() {
    if let Ok(mut saved) = BEFORE.lock()
        && let Some(before) = saved.take()
        && is_ours()
    {
        // The process is ending: there is no way left to report an error.
        let _ = rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}
