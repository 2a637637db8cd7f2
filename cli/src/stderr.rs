//! A word on stderr that waits for nobody.

use std::io::Write;

use rustix::event::{PollFd, PollFlags, Timespec};

/// Says a line, unless whoever reads stderr takes nothing at the moment: what says it has more to do than to wait.
pub(crate) fn say(line: &str) {
    let mut stderr = std::io::stderr();
    let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    // A pipe that is ready takes PIPE_BUF bytes at once, which no line has.
    if rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0) {
        // A closed stderr is nobody to complain to.
        let _ = stderr.write_all(line.as_bytes());
    }
}
