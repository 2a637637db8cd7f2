//! Stdin and stdout as files with the name `-`: raw bytes, and waits that Ctrl-C ends.
//!
//! A thread reads or writes while the other one works. The program at the other end may delay it for any time: see
//! [`waits`](crate::waits).

use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::thread;

use anyhow::{Context, Result, bail};
use snapfmt::layout::PAGE_BYTES;

use crate::waits::Wait;

/// The size of a block.
const BLOCK_BYTES: usize = 1 << 20;
/// The number of blocks that are being moved.
const BLOCKS: usize = 3;
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
const DATA: &str = "data on stdin";
const READER: &str = "stdout to be read";

/// Whether the user means stdin or stdout. (A file of that name is `./-`.)
pub(crate) fn is_meant(path: &Path) -> bool {
    path == Path::new("-")
}

/// Where the bytes of a file from stdin come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The user has redirected a file.
    File,
    /// They were copied from a pipe: zeros became holes.
    Stream,
}

/// All of stdin as a file that can be read at any offset. A regular file is used directly. The bytes of a pipe are
/// copied, zeros as holes, to a file without a name in `folder`. `check` gets the first 8 bytes, or all of a shorter
/// input, before the rest is read.
pub(crate) fn stdin(
    folder: &Path,
    check: impl FnOnce(&[u8]) -> Result<()>,
) -> Result<(File, Origin)> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        bail!("stdin is a terminal; give a file, or the output of another program by a pipe");
    }
    let stdin = stdin.as_fd().try_clone_to_owned().context("cannot use stdin")?;
    let mut stdin = File::from(stdin);
    let is_file = stdin.metadata().context("cannot use stdin")?.is_file();
    if is_file && stdin.stream_position().context("cannot use stdin")? == 0 {
        let mut start = [0; 8];
        let len = stdin.metadata().context("cannot use stdin")?.len().min(8) as usize;
        stdin.read_exact_at(&mut start[..len], 0).context("cannot read stdin")?;
        check(&start[..len])?;
        return Ok((stdin, Origin::File));
    }
    let failed = || format!("cannot copy stdin to {}", folder.display());
    let copy = tempfile::tempfile_in(folder).with_context(failed)?;
    let mut source = Source::new(stdin)?;
    let mut block = vec![0; BLOCK_BYTES];
    let (mut at, mut len) = (0, source.fill(&mut block[..8])?);
    check(&block[..len])?;
    loop {
        len += source.fill(&mut block[len..])?;
        write_data(&copy, &block[..len], at).with_context(failed)?;
        at += len as u64;
        if len < BLOCK_BYTES {
            break;
        }
        len = 0;
    }
    copy.set_len(at).with_context(failed)?;
    Ok((copy, Origin::Stream))
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

/// Stdin, read by a thread.
struct Source {
    read: Receiver<io::Result<Vec<u8>>>,
    /// Received bytes that were not taken yet.
    rest: Vec<u8>,
}

impl Source {
    fn new(mut stdin: File) -> Result<Self> {
        let (reader, read) = sync_channel(BLOCKS);
        let body = move || {
            let mut block = vec![0; BLOCK_BYTES];
            loop {
                let outcome = match stdin.read(&mut block) {
                    // The end: the other side notices that the channel is closed.
                    Ok(0) => return,
                    Ok(len) => Ok(block[..len].to_vec()),
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    Err(error) => Err(error),
                };
                let is_error = outcome.is_err();
                if reader.send(outcome).is_err() || is_error {
                    return;
                }
            }
        };
        thread::Builder::new()
            .name("stdin".into())
            .spawn(body)
            .context("cannot start the thread that reads stdin")?;
        Ok(Self { read, rest: Vec::new() })
    }

    /// Fills the buffer as far as bytes are available, and returns their number.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let mut len = 0;
        while len < buffer.len() {
            if self.rest.is_empty() {
                match receive(&self.read, DATA) {
                    None => break,
                    Some(read) => self.rest = read.context("cannot read stdin")?,
                }
            }
            let now = self.rest.len().min(buffer.len() - len);
            buffer[len..len + now].copy_from_slice(&self.rest[..now]);
            self.rest.drain(..now);
            len += now;
        }
        Ok(len)
    }
}

/// Stdout, written by a thread: bytes in their order.
pub(crate) struct Stdout {
    file: File,
    block: Vec<u8>,
    full: Sender<Vec<u8>>,
    /// Blocks that were written are returned for reuse.
    written: Receiver<io::Result<Vec<u8>>>,
}

impl Stdout {
    /// Refuses a terminal, which would interpret the bytes as commands.
    pub(crate) fn new() -> Result<Self> {
        let stdout = io::stdout();
        if stdout.is_terminal() {
            bail!(
                "stdout is a terminal, which these bytes would garble; give a file with -o, or a pipe to another program"
            );
        }
        let file = File::from(stdout.as_fd().try_clone_to_owned().context("cannot use stdout")?);
        let mut to = file.try_clone().context("cannot use stdout")?;
        let (full, blocks) = channel::<Vec<u8>>();
        let (writer, written) = channel();
        for _ in 1..BLOCKS {
            let _ = writer.send(Ok(Vec::with_capacity(BLOCK_BYTES)));
        }
        let body = move || {
            for mut block in blocks {
                let outcome = to.write_all(&block).map(|()| {
                    block.clear();
                    block
                });
                let is_error = outcome.is_err();
                if writer.send(outcome).is_err() || is_error {
                    return;
                }
            }
        };
        thread::Builder::new()
            .name("stdout".into())
            .spawn(body)
            .context("cannot start the thread that writes stdout")?;
        Ok(Self { file, block: Vec::with_capacity(BLOCK_BYTES), full, written })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// A buffer that is written.
    fn empty(&self) -> io::Result<Vec<u8>> {
        receive(&self.written, READER).unwrap_or_else(|| Err(ErrorKind::BrokenPipe.into()))
    }

    /// Waits until all is written.
    pub(crate) fn finish(self) -> Result<()> {
        let Self { block, full, written, .. } = self;
        let _ = full.send(block);
        drop(full);
        for _ in 0..BLOCKS {
            receive(&written, READER).context(NOT_ALL)?.context(NOT_ALL)?;
        }
        Ok(())
    }
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(BLOCK_BYTES - self.block.len()));
            self.block.extend_from_slice(now);
            bytes = later;
            if self.block.len() == BLOCK_BYTES {
                let empty = self.empty()?;
                // A thread that has ended has sent its error, which is received next.
                let _ = self.full.send(std::mem::replace(&mut self.block, empty));
            }
        }
        Ok(())
    }

    /// Only [`Stdout::finish`] waits until all is written.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What has failed, for the errors of [`Stdout`].
pub(crate) const NOT_ALL: &str = "cannot write all of it to stdout";

/// The next result of a thread that waits for another program; `None` after its end.
fn receive<T>(from: &Receiver<T>, what: &'static str) -> Option<T> {
    let _waiting = Wait::new(move || what.into()).begin();
    from.recv().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn only_zeros_become_holes() {
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
