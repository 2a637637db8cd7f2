//! The keyboard as the guest's: each key at once and without echo, but Ctrl-C stays ours.

use std::io::{self, IsTerminal, Read};
use std::sync::Mutex;

use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios};
use vmm::VmHandle;

/// How the terminal was before, while it is changed.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Puts the terminal back when it is dropped.
pub(crate) struct Keyboard(());

impl Keyboard {
    /// Passes what is typed, or piped in, to the guest, until the process ends.
    pub(crate) fn connect(guest: VmHandle) -> io::Result<Self> {
        if io::stdin().is_terminal() {
            raw()?;
        }
        let pass = move || {
            let mut bytes = [0; 256];
            let mut stdin = io::stdin();
            while let Ok(len @ 1..) = stdin.read(&mut bytes) {
                // A guest that takes nothing for 64 KiB long loses the rest, like a UART.
                let _taken = guest.send_input(&bytes[..len]);
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

/// Puts the terminal back as it was, if it was changed.
pub(crate) fn restore() {
    if let Ok(mut saved) = BEFORE.lock()
        && let Some(before) = saved.take()
    {
        // At the end of the process, and nobody left to tell.
        let _ = rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}
