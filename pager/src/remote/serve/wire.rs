//! Messages with descriptors over a unix stream socket, with limits of size, descriptors and time.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use rustix::process::Resource;

use super::error::RefuseError;
use super::given::Given;

/// The limit of a message. It is enough for some thousand regions.
pub(crate) const MESSAGE_LIMIT_BYTES: usize = 1 << 20;
/// The number of descriptors that are received with one part. The kernel closes any further ones.
const DESCRIPTORS_RECEIVED: usize = 4;
/// How much is read of a message that is left in the queue. The kernel cuts longer messages of a sender into parts.
const PEEKED_BYTES: usize = 64 << 10;
/// How long a server that ends waits for the message of a client that has connected before.
const LAST_MOMENT: Duration = Duration::from_millis(50);
/// The pause between two attempts, where poll(2) cannot report when the next one succeeds.
pub(crate) const RETRY: Duration = Duration::from_millis(10);

/// Receives messages from a connection.
#[derive(Debug)]
pub(crate) struct SocketReader<'a> {
    stream: &'a UnixStream,
    deadline: Instant,
    allowed: Duration,
    /// Readable when the server ends.
    ending: Option<BorrowedFd<'a>>,
    is_ending: bool,
    /// Received bytes that were not used yet.
    pub(crate) bytes: Vec<u8>,
    pub(crate) descriptors: Vec<OwnedFd>,
    /// A descriptor was sent and did not arrive.
    pub(crate) lost: bool,
}

impl<'a> SocketReader<'a> {
    /// A reader that receives until `allowed` has passed from now.
    pub(crate) fn new(stream: &'a UnixStream, allowed: Duration) -> SocketReader<'a> {
        let deadline = Instant::now() + allowed;
        let (bytes, descriptors) = (Vec::new(), Vec::new());
        SocketReader {
            stream,
            deadline,
            allowed,
            ending: None,
            is_ending: false,
            bytes,
            descriptors,
            lost: false,
        }
    }

    /// From the moment on at which `ending` is readable, this waits only for a message that is already there, or almost.
    pub(crate) fn ended_by(self, ending: BorrowedFd<'a>) -> SocketReader<'a> {
        SocketReader { ending: Some(ending), ..self }
    }

    /// Waits for a message, and reads its beginning without taking it out of the queue. Returns its bytes and
    /// descriptors.
    pub(crate) fn peek(&mut self) -> Result<(Vec<u8>, Vec<OwnedFd>), RefuseError> {
        self.wait()?;
        let (mut buffer, mut descriptors) = (vec![0; PEEKED_BYTES], Vec::new());
        let received = self.receive_now(&mut buffer, &mut descriptors, RecvFlags::PEEK)?;
        buffer.truncate(received.map_or(0, |(bytes, _)| bytes));
        Ok((buffer, descriptors))
    }

    /// What has arrived, by one recvmsg(2): its number of bytes. `None`: nothing.
    fn receive_now(
        &self,
        buffer: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
        more: RecvFlags,
    ) -> Result<Option<(usize, ReturnFlags)>, RefuseError> {
        let mut space =
            [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_RECEIVED))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            self.stream,
            &mut [IoSliceMut::new(buffer)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT | more,
        );
        let received = match received {
            Ok(received) => received,
            Err(Errno::INTR | Errno::AGAIN) => return Ok(None),
            Err(Errno::CONNRESET) => return Err(self.left()),
            Err(error) => return Err(system("receive")(error)),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(arrived) = message {
                descriptors.extend(arrived);
            }
        }
        Ok(Some((received.bytes, received.flags)))
    }

    /// Waits for more bytes or descriptors.
    pub(crate) fn receive(&mut self) -> Result<(), RefuseError> {
        loop {
            self.wait()?;
            let (mut buffer, mut descriptors) = ([0; 16 << 10], Vec::new());
            let Some((bytes, flags)) =
                self.receive_now(&mut buffer, &mut descriptors, RecvFlags::empty())?
            else {
                continue;
            };
            let arrived = descriptors.len();
            self.descriptors.append(&mut descriptors);
            self.lost |= flags.contains(ReturnFlags::CTRUNC);
            let fits = self.bytes.len() + bytes <= MESSAGE_LIMIT_BYTES;
            if fits {
                self.bytes.extend_from_slice(&buffer[..bytes]);
            }
            // There was space for more descriptors, so that another reason has lost one.
            if self.lost && arrived < DESCRIPTORS_RECEIVED {
                let limit = rustix::process::getrlimit(Resource::Nofile).current;
                return Err(RefuseError::DescriptorLost { limit });
            }
            if self.descriptors.len() > 1 {
                let found = self.descriptors.len();
                return Err(RefuseError::Descriptors { found, expected: 1 });
            }
            if bytes == 0 {
                return Err(self.left());
            }
            if !fits {
                return Err(RefuseError::TooLong { limit_bytes: MESSAGE_LIMIT_BYTES });
            }
            return Ok(());
        }
    }

    /// The next line, without the newline.
    pub(crate) fn line(&mut self) -> Result<Vec<u8>, RefuseError> {
        let mut searched = 0;
        loop {
            if let Some(at) = self.bytes[searched..].iter().position(|&byte| byte == b'\n') {
                let rest = self.bytes.split_off(searched + at + 1);
                let mut line = std::mem::replace(&mut self.bytes, rest);
                line.pop();
                return Ok(line);
            }
            searched = self.bytes.len();
            self.receive()?;
        }
    }

    /// The descriptor that has arrived with the message.
    pub(crate) fn descriptor(&mut self) -> Result<OwnedFd, RefuseError> {
        self.descriptors.pop().ok_or(RefuseError::Descriptors { found: 0, expected: 1 })
    }

    /// What the sender has sent so far.
    pub(crate) fn into_given(self) -> Given {
        let names_memory = self.bytes.first() == Some(&b'[');
        Given { descriptors: self.descriptors, lost: self.lost, names_memory }
    }

    fn left(&self) -> RefuseError {
        RefuseError::Left { bytes: self.bytes.len(), descriptors: self.descriptors.len() }
    }

    fn wait(&mut self) -> Result<(), RefuseError> {
        loop {
            let mut fds = vec![PollFd::new(self.stream, PollFlags::IN)];
            fds.extend(self.ending.map(|ending| PollFd::from_borrowed_fd(ending, PollFlags::IN)));
            let left = self.deadline.saturating_duration_since(Instant::now());
            match rustix::event::poll(&mut fds, Some(&timespec(left))) {
                Err(Errno::INTR) => continue,
                Err(error) => return Err(system("wait for the client")(error)),
                Ok(_) => {}
            }
            if !fds[0].revents().is_empty() && !left.is_zero() {
                return Ok(());
            }
            if fds.get(1).is_some_and(|ending| !ending.revents().is_empty()) {
                self.ending = None;
                self.is_ending = true;
                self.deadline = self.deadline.min(Instant::now() + LAST_MOMENT);
            } else if left.is_zero() {
                return Err(self.late());
            }
        }
    }

    fn late(&self) -> RefuseError {
        if self.is_ending {
            return RefuseError::Ending;
        }
        RefuseError::TimedOut {
            after: self.allowed,
            bytes: self.bytes.len(),
            descriptors: self.descriptors.len(),
        }
    }
}

/// Connects to the unix socket at `path`. If its queue of connections is full, because its process is busy or stopped,
/// this tries again until `timeout` has passed.
///
/// # Errors
/// As connect(2), and [`io::ErrorKind::TimedOut`] after `timeout`.
pub fn connect(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let stream = UnixStream::from(connect_kind(path, SocketType::STREAM, timeout)?);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// As [`connect`]. The socket is non-blocking.
pub(crate) fn connect_kind(
    path: &Path,
    kind: SocketType,
    timeout: Duration,
) -> io::Result<OwnedFd> {
    let deadline = Instant::now() + timeout;
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return Ok(socket),
            // The queue is full. poll(2) does not report when that changes.
            Err(Errno::AGAIN) if Instant::now() < deadline => thread::sleep(RETRY),
            Err(Errno::AGAIN) => return Err(timed_out(timeout)),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The error of a connection that was not accepted.
fn timed_out(timeout: Duration) -> io::Error {
    let what = format!("no connection was accepted within {timeout:?}: its process may be stopped");
    io::Error::new(io::ErrorKind::TimedOut, what)
}

/// Sends a line, and a descriptor with it. This does not wait: if the receiver does not read, it fails.
///
/// # Errors
/// As sendmsg(2).
pub(crate) fn send_line(
    stream: &UnixStream,
    line: &str,
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let bytes = format!("{line}\n").into_bytes();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.as_slice();
    if descriptor.is_some() {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let mut sent =
        rustix::net::sendmsg(stream.as_fd(), &[IoSlice::new(&bytes)], &mut control, flags)?;
    while sent < bytes.len() {
        sent += rustix::net::send(stream.as_fd(), &bytes[sent..], flags)?;
    }
    Ok(())
}

pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

fn system(what: &'static str) -> impl Fn(Errno) -> RefuseError {
    move |error| RefuseError::System { what, error: error.into() }
}
