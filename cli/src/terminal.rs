//! Connects the keyboard to the guest: each key immediately and without echo, except Ctrl-C, which ends `snap`.

use std::io::{self, ErrorKind, IsTerminal, Read};
use std::sync::Mutex;
use std::time::Duration;

use rustix::process::getpgrp;
use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios};
use vmm::VmHandle;

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
