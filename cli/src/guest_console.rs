//! Passes the guest's serial output to the user, and detects the output that ends the run.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use snapvm::FirstOutput;
use vmm::{Console, ConsoleFlow};

/// The output at which the console stops the guest, at exactly that byte.
#[derive(Clone, Debug, Default)]
pub(crate) struct Until {
    /// This many whole lines with this beginning.
    pub(crate) lines: Option<(&'static str, u64)>,
    /// These bytes.
    pub(crate) pattern: Option<Vec<u8>>,
}

/// The beginning of the demo guest's line when it is ready to be snapshotted.
pub(crate) const READY: &str = "ready ";
/// The beginning of the demo guest's line after each beat.
pub(crate) const BEAT: &str = "beat ";

impl Until {
    /// This many whole lines with this beginning.
    pub(crate) fn lines(prefix: &'static str, count: u64) -> Self {
        Self { lines: Some((prefix, count)), pattern: None }
    }
}

/// What the console has seen, for other threads.
#[derive(Clone, Default)]
pub(crate) struct Seen(Arc<SeenInner>);

#[derive(Default)]
struct SeenInner {
    first_output: FirstOutput,
    beats: AtomicU64,
    bad_beats: AtomicU64,
    output_error: OnceLock<io::Error>,
    done: AtomicBool,
    tail: Mutex<Vec<u8>>,
}

/// Output kept for error messages and for `snap demo`.
const TAIL_BYTES: usize = 4096;

impl Seen {
    pub(crate) fn first_output(&self) -> &FirstOutput {
        &self.0.first_output
    }

    /// Lines of the demo guest that began with `beat `, and those among them that were not `ok`.
    pub(crate) fn beats(&self) -> (u64, u64) {
        (self.0.beats.load(Ordering::SeqCst), self.0.bad_beats.load(Ordering::SeqCst))
    }

    /// Why the output could not be written. A pipe that its reader has closed is one of the reasons.
    pub(crate) fn output_error(&self) -> Option<&io::Error> {
        self.0.output_error.get()
    }

    /// Whether the console has requested the end.
    pub(crate) fn is_done(&self) -> bool {
        self.0.done.load(Ordering::SeqCst)
    }

    /// The last line that is not empty, for a message.
    pub(crate) fn last_line(&self) -> String {
        match self.tail().lines().rev().map(str::trim).find(|line| !line.is_empty()) {
            None => "it has written nothing".into(),
            Some(line) => format!("its last line: {:?}", line.chars().take(80).collect::<String>()),
        }
    }

    /// The last of the output.
    pub(crate) fn tail(&self) -> String {
        let tail = self.0.tail.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&tail).into_owned()
    }
}

/// A console that copies to `out` and checks what it copies.
pub(crate) struct GuestConsole<W> {
    out: W,
    until: Until,
    seen: Seen,
    /// The beginning of the present line, as far as it is checked.
    line: Vec<u8>,
    /// The last bytes, one less than the pattern has.
    window: Vec<u8>,
    /// Output that `out` has not taken yet, because the guest was to stop. It comes first when the guest continues.
    rest: VecDeque<u8>,
}

/// Only this much of a line is checked.
const LINE_BYTES: usize = 256;

impl<W: Write + Send> GuestConsole<W> {
    pub(crate) fn new(out: W, until: Until) -> (Self, Seen) {
        let seen = Seen::default();
        let (line, window, rest) = (Vec::new(), Vec::new(), VecDeque::new());
        (Self { out, until, seen: seen.clone(), line, window, rest }, seen)
    }

    fn watch(&mut self, byte: u8) -> ConsoleFlow {
        let mut flow = ConsoleFlow::Continue;
        if byte == b'\n' {
            if self.line.starts_with(BEAT.as_bytes()) {
                self.seen.0.beats.fetch_add(1, Ordering::SeqCst);
                if !self.line.trim_ascii_end().ends_with(b" ok") {
                    self.seen.0.bad_beats.fetch_add(1, Ordering::SeqCst);
                }
            }
            if let Some((prefix, left)) = &mut self.until.lines
                && self.line.starts_with(prefix.as_bytes())
            {
                *left = left.saturating_sub(1);
                if *left == 0 {
                    flow = ConsoleFlow::Pause;
                }
            }
            self.line.clear();
        } else if self.line.len() < LINE_BYTES {
            self.line.push(byte);
        }
        if let Some(pattern) = &self.until.pattern {
            self.window.push(byte);
            if self.window.ends_with(pattern) {
                flow = ConsoleFlow::Pause;
            }
            let excess = (self.window.len() + 1).saturating_sub(pattern.len());
            self.window.drain(..excess);
        }
        flow
    }

    /// Writes as much output as `out` takes: see `GuestOutput`.
    fn hand_on(&mut self) -> io::Result<()> {
        while !self.rest.is_empty() {
            let (first, _) = self.rest.as_slices();
            match self.out.write(first) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(taken) => drop(self.rest.drain(..taken)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        self.out.flush()
    }
}

impl<W: Write + Send> Console for GuestConsole<W> {
    fn write(&mut self, bytes: &[u8]) -> ConsoleFlow {
        self.seen.0.first_output.note();
        let mut tail = self.seen.0.tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend_from_slice(bytes);
        let excess = tail.len().saturating_sub(TAIL_BYTES);
        tail.drain(..excess);
        drop(tail);
        let mut flow = ConsoleFlow::Continue;
        for byte in bytes {
            // The guest has already written all of these bytes, so all are checked.
            if self.watch(*byte) == ConsoleFlow::Pause {
                flow = ConsoleFlow::Pause;
            }
        }
        self.rest.extend(bytes);
        // The reader has closed the pipe: the run has no purpose any more.
        if let Err(error) = self.hand_on() {
            self.rest.clear();
            self.seen.0.output_error.get_or_init(|| error);
            flow = ConsoleFlow::Pause;
        }
        if flow == ConsoleFlow::Pause {
            self.seen.0.done.store(true, Ordering::SeqCst);
        }
        flow
    }

    /// Ends the line in which the guest was, so that readers of lines see no mix of two.
    fn guest_was_reset(&mut self) {
        self.window.clear();
        if !self.line.is_empty() {
            self.line.clear();
            self.rest.push_back(b'\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beats_are_counted_by_lines_however_they_are_cut() {
        let until = Until::lines(BEAT, 2);
        let (mut console, seen) = GuestConsole::new(Vec::new(), until);
        for part in ["ready\nbe", "at 1 ok", "\n", "beat 2 BAD page=1"] {
            assert_eq!(console.write(part.as_bytes()), ConsoleFlow::Continue);
        }
        assert_eq!(console.write(b"\n"), ConsoleFlow::Pause);
        assert_eq!(seen.beats(), (2, 1));
        assert_eq!(console.out, b"ready\nbeat 1 ok\nbeat 2 BAD page=1\n");
    }

    #[test]
    fn a_line_ends_where_a_guest_is_reset() {
        let (mut console, seen) = GuestConsole::new(Vec::new(), Until::lines(BEAT, 1));
        console.write(b"beat 7");
        console.guest_was_reset();
        console.guest_was_reset();
        assert_eq!(console.write(b"beat 1 ok\n"), ConsoleFlow::Pause);
        assert_eq!(seen.beats(), (1, 0));
        assert_eq!(console.out, b"beat 7\nbeat 1 ok\n");
    }

    #[test]
    fn the_last_line_is_bounded_and_harmless() {
        let (mut console, seen) = GuestConsole::new(Vec::new(), Until::default());
        assert_eq!(seen.last_line(), "it has written nothing");
        console.write(b"one\r\n\x1b[2Jtwo\r\n\r\n");
        assert_eq!(seen.last_line(), r#"its last line: "\u{1b}[2Jtwo""#);
        console.write(&[b'x'; 1000]);
        assert!(seen.last_line().len() < 100);
    }

    #[test]
    fn a_pattern_is_found_across_writes_and_overlaps() {
        for parts in [vec!["aab"], vec!["a", "a", "b"], vec!["xaaa", "b"]] {
            let until = Until { lines: None, pattern: Some(b"aab".to_vec()) };
            let (mut console, _) = GuestConsole::new(Vec::new(), until);
            let (last, first) = parts.split_last().unwrap();
            for part in first {
                assert_eq!(console.write(part.as_bytes()), ConsoleFlow::Continue);
            }
            assert_eq!(console.write(last.as_bytes()), ConsoleFlow::Pause);
        }
    }
}
