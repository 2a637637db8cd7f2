//! The consumer's side of the guest's console.

/// Takes what the guest writes to its serial port.
///
/// Every function or closure `FnMut(&[u8]) -> ConsoleFlow + Send` is a console.
pub trait Console: Send {
    /// Takes the bytes of one exit of the guest, in order, never empty: one byte with most guests. A
    /// consumer that wants lines collects them itself, as `std::io::Stdout` does.
    ///
    /// Called on the vCPU's thread while the guest waits, so nothing the guest wrote is held back
    /// and the guest does not run until this returns. With [`ConsoleFlow::Pause`] it does not run
    /// after that either: its memory stays as it was when it wrote the last of `bytes`.
    ///
    /// A pause waits for it too: a console that waits for its reader must end that when
    /// [`VmHandle::on_stop`](crate::VmHandle::on_stop) says so.
    ///
    /// The serial port is locked meanwhile: [`VmHandle::send_input`](crate::VmHandle::send_input) called
    /// from here waits for itself. Send from another thread.
    fn write(&mut self, bytes: &[u8]) -> ConsoleFlow;
}

/// What the guest does after its console has taken some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConsoleFlow {
    /// Go on.
    Continue,
    /// Stop at exactly this instruction; see [`Stop::ConsolePause`](crate::Stop::ConsolePause).
    Pause,
}

impl<F: FnMut(&[u8]) -> ConsoleFlow + Send> Console for F {
    fn write(&mut self, bytes: &[u8]) -> ConsoleFlow {
        self(bytes)
    }
}
