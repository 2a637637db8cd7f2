//! Lines on stderr.

use std::io::Write;

use rustix::event::{PollFd, PollFlags, Timespec};

use crate::foreign_text;

/// A pipe that is ready takes PIPE_BUF bytes, 4096, without waiting. Longer lines are cut.
const LONGEST: usize = 4000;

/// Prints a line without waiting: the line is dropped if the reader of stderr does not read at the moment. For threads
/// that have other work.
pub(crate) fn say(line: &str) {
    let mut stderr = std::io::stderr();
    let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let line = foreign_text::lines(line);
    let line = match line.char_indices().find(|(at, _)| *at >= LONGEST) {
        None => line,
        Some((end, _)) => format!("{}...\n", &line[..end]).into(),
    };
    if rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0) {
        // A closed stderr cannot be reported.
        let _ = stderr.write_all(line.as_bytes());
    }
}

/// Prints text, and waits for the reader. A closed stderr is no error: the exit code has the result.
pub(crate) fn print(text: &str) {
    let _ = std::io::stderr().write_all(foreign_text::lines(text).as_bytes());
}
