//! Printing to a reader that may close the pipe early, as `head` does.

use std::fmt::Display;
use std::io::{self, BufWriter, StdoutLock, Write};

use anyhow::Result;
use serde::Serialize;

use crate::foreign_text;
use crate::waits::Wait;

/// Passes a buffered stdout to `write`. A reader that closes the pipe early, as `head` does, is no error.
pub(crate) fn to_stdout(write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let mut stdout = BufWriter::with_capacity(64 << 10, Awaited(io::stdout().lock()));
    let written = write(&mut stdout).and_then(|()| Ok(stdout.flush()?));
    match written {
        Err(error) if is_closed(&error) => {
            // Bytes that are still buffered would fail again when it is dropped.
            let _ = stdout.into_parts();
            Ok(())
        }
        written => written,
    }
}

/// Stdout, whose reader may stop reading for any time. An interrupt ends the wait. The wait is not reported, because
/// the message would appear in the middle of the reader's output.
struct Awaited(StdoutLock<'static>);

impl Write for Awaited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _waiting = Wait::unreported().begin();
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        let _waiting = Wait::unreported().begin();
        self.0.flush()
    }
}

/// Prints a line.
pub(crate) fn print_line(line: impl Display) -> Result<()> {
    print_text(format!("{line}\n"))
}

/// Prints text that has its own newlines.
pub(crate) fn print_text(text: impl Display) -> Result<()> {
    to_stdout(|out| Ok(out.write_all(foreign_text::lines(&text.to_string()).as_bytes())?))
}

/// Prints a value as JSON.
pub(crate) fn print_json(value: &impl Serialize) -> Result<()> {
    print_line(foreign_text::json(value)?)
}

fn is_closed(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<io::Error>();
    io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
