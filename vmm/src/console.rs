//! The consumer's side of the guest's console.

/// Takes what the guest writes to its serial port.
///
/// Every function or closure `FnMut(&[u8]) -> ConsoleFlow + Send` is a console.
pub trait Console: Send {
    /// Takes the bytes of one exit of the guest, in order. They are never empty; with most guests it is one
    /// byte. A consumer that needs lines collects them itself, as `std::io::Stdout` does.
    ///
    /// It is called on the vCPU's thread while the guest waits, so the guest does not run until it returns. After
    /// [`ConsoleFlow::Pause`] the guest does not run either: its memory does not change after it wrote the last of
    /// `bytes`.
    ///
    /// A pause waits for this function too. A console that waits for its reader must stop waiting when
    /// [`VmHandle::on_stop`](crate::VmHandle::on_stop) calls its function.
    ///
    /// The serial port is locked during the call, so [`VmHandle::send_input`](crate::VmHandle::send_input)
    /// called from here is a deadlock. Send from another thread.
    fn write(&mut self, bytes: &[u8]) -> ConsoleFlow;

    /// The guest was put back to an earlier time ([`PausedVm::reset`](crate::PausedVm::reset)): what it writes next does
    /// not continue what it wrote before.
    fn guest_was_reset(&mut self) {}
}

/// What the guest does after its console has taken some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConsoleFlow {
    /// The guest continues.
    Continue,
    /// The guest stops at exactly this instruction: see [`Stop::ConsolePause`](crate::Stop::ConsolePause).
    Pause,
}

impl<F: FnMut(&[u8]) -> ConsoleFlow + Send> Console for F {
    fn write(&mut self, bytes: &[u8]) -> ConsoleFlow {
        self(bytes)
    }
}
