//! Stdin and stdout as files that the user names `-`: bytes as they are, and waits that Ctrl-C ends.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use snapfmt::layout::PAGE_BYTES;

use crate::commands::Session;
use crate::exit::Interrupted;

/// Moved at once.
const PIECE_BYTES: usize = 1 << 20;
/// A pipe that is ready takes as much at once (pipe(7), PIPE_BUF): with more, a write may wait.
const PIPE_PIECE_BYTES: usize = 4096;
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
/// Between looks at whether the user has interrupted.
const LOOK_EVERY: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// So long nothing is said of a wait.
const SILENCE: Duration = Duration::from_secs(1);

/// Whether the user means stdin or stdout. (A file of that name is `./-`.)
pub(crate) fn is_meant(path: &Path) -> bool {
    path == Path::new("-")
}

/// All of stdin as a file that can be read anywhere. A regular file is taken as it is. What comes from a pipe is copied, zeros as holes, to a
/// file without a name in `folder`. `check` sees the first bytes, 8 or all that there are, before the rest is waited for.
pub(crate) fn stdin(
    folder: &Path,
    session: &Session,
    check: impl FnOnce(&[u8]) -> Result<()>,
) -> Result<File> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        bail!("stdin is a terminal; give a file, or the output of another program by a pipe");
    }
    let stdin = stdin.as_fd().try_clone_to_owned().context("cannot use stdin")?;
    let mut stdin = File::from(stdin);
    let is_file = stdin.metadata().context("cannot use stdin")?.is_file();
    let mut wait = Waiting::new("data on stdin", session);
    let mut source = match is_file && stdin.stream_position().context("cannot use stdin")? == 0 {
        true => return check_start(stdin, check),
        false => Source { stdin: &mut stdin, wait: &mut wait },
    };
    let copy = tempfile::tempfile_in(folder)
        .with_context(|| format!("cannot make a file for stdin in {}", folder.display()))?;
    let mut piece = vec![0; PIECE_BYTES];
    let mut len = source.fill(&mut piece[..8])?;
    check(&piece[..len])?;
    let mut at = 0;
    loop {
        len += source.fill(&mut piece[len..])?;
        write_data(&copy, &piece[..len], at)
            .with_context(|| format!("cannot copy stdin to {}", folder.display()))?;
        at += len as u64;
        if len < PIECE_BYTES {
            break;
        }
        len = 0;
    }
    copy.set_len(at).with_context(|| format!("cannot copy stdin to {}", folder.display()))?;
    Ok(copy)
}

fn check_start(file: File, check: impl FnOnce(&[u8]) -> Result<()>) -> Result<File> {
    let mut start = [0; 8];
    let len = file.metadata()?.len().min(8) as usize;
    file.read_exact_at(&mut start[..len], 0).context("cannot read stdin")?;
    check(&start[..len])?;
    Ok(file)
}

/// Stdin, of which a piece may come in parts.
struct Source<'a, 'b> {
    stdin: &'a mut File,
    wait: &'a mut Waiting<'b>,
}

impl Source<'_, '_> {
    /// Reads until the buffer is full or there is no more, and says how much it was.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let mut len = 0;
        while len < buffer.len() {
            self.wait.until(&*self.stdin, PollFlags::IN)?;
            match self.stdin.read(&mut buffer[len..]) {
                Ok(0) => break,
                Ok(read) => len += read,
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error).context("cannot read stdin"),
            }
        }
        Ok(len)
    }
}

/// Writes the pages that are not zero; the others stay holes.
fn write_data(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    let is_zero = |page: &[u8]| *page == ZEROS[..page.len()];
    let pages: Vec<(bool, usize)> =
        bytes.chunks(PAGE_BYTES).map(|page| (is_zero(page), page.len())).collect();
    let mut start = 0;
    for run in pages.chunk_by(|a, b| a.0 == b.0) {
        let end = start + run.iter().map(|page| page.1).sum::<usize>();
        if !run[0].0 {
            file.write_all_at(&bytes[start..end], at + start as u64)?;
        }
        start = end;
    }
    Ok(())
}

/// Stdout, to which bytes go in their order.
pub(crate) struct Stdout<'a> {
    file: File,
    piece_bytes: usize,
    wait: Waiting<'a>,
}

impl<'a> Stdout<'a> {
    /// Refuses a terminal, which would take the bytes for commands.
    pub(crate) fn new(session: &'a Session) -> Result<Self> {
        let stdout = io::stdout();
        if stdout.is_terminal() {
            bail!(
                "stdout is a terminal, which this would garble; give a file with -o, or a pipe to another program"
            );
        }
        let file = File::from(stdout.as_fd().try_clone_to_owned().context("cannot use stdout")?);
        let is_file = file.metadata().context("cannot use stdout")?.is_file();
        let piece_bytes = if is_file { PIECE_BYTES } else { PIPE_PIECE_BYTES };
        Ok(Self { file, piece_bytes, wait: Waiting::new("stdout to be read", session) })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn write_zeros(&mut self, mut len: u64) -> Result<()> {
        while len > 0 {
            let now = len.min(ZEROS.len() as u64);
            self.write_all(&ZEROS[..now as usize])?;
            len -= now;
        }
        Ok(())
    }

    pub(crate) fn write_all(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            self.wait.until(&self.file, PollFlags::OUT)?;
            match self.file.write(&bytes[..bytes.len().min(self.piece_bytes)]) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(written) => bytes = &bytes[written..],
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error).context("cannot write all of it to stdout"),
            }
        }
        Ok(())
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

/// Waits for another program, and says so when it takes long.
struct Waiting<'a> {
    what: &'static str,
    session: &'a Session,
    told: bool,
}

impl<'a> Waiting<'a> {
    fn new(what: &'static str, session: &'a Session) -> Self {
        Self { what, session, told: false }
    }

    fn until(&mut self, file: &File, ready: PollFlags) -> Result<()> {
        let mut since = None;
        loop {
            if self.session.interrupt.requested() {
                return Err(Interrupted.into());
            }
            let mut fds = [PollFd::new(file, ready)];
            match rustix::event::poll(&mut fds, Some(&LOOK_EVERY)) {
                Ok(0) => {}
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error).context("cannot wait"),
            }
            let since = *since.get_or_insert_with(Instant::now);
            if since.elapsed() > SILENCE
                && !std::mem::replace(&mut self.told, true)
                && !self.session.quiet
            {
                // A closed stderr is nobody to complain to.
                let _ = writeln!(io::stderr(), "snap: waiting for {}", self.what);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn zeros_become_holes_and_nothing_else_does() {
        let folder = tempfile::tempdir().unwrap();
        let file = tempfile::tempfile_in(folder.path()).unwrap();
        let mut bytes = vec![0; 16 * PAGE_BYTES + 100];
        bytes[3 * PAGE_BYTES + 7] = 1;
        bytes[4 * PAGE_BYTES] = 2;
        bytes[16 * PAGE_BYTES + 99] = 3;
        write_data(&file, &bytes, 8192).unwrap();
        let mut found = vec![9; bytes.len()];
        file.read_exact_at(&mut found, 8192).unwrap();
        assert!(found == bytes);
        assert_eq!(file.metadata().unwrap().len(), 8192 + bytes.len() as u64);
        assert!(file.metadata().unwrap().blocks() * 512 <= 4 * PAGE_BYTES as u64);
    }
}
