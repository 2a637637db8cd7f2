//! One connection between a port of the guest and a unix socket of the host: credit, and what is under way.
//!
//! From the host to the guest nothing is kept here: the socket's data goes into the guest's buffers by one
//! system call, when there is a buffer and credit. From the guest to the host the socket takes what it can; the
//! rest, at most [`BUFFER_BYTES`], waits here. That is the credit that the guest is given.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use super::packet::{HOST_CID, Header, NO_MORE_RECEIVED, NO_MORE_SENT, Op, STREAM};
use crate::virtio::fault::Fault;
use crate::virtio::memory::{DeviceMemory, Direction};
use crate::virtio::rings::Buffers;

/// Most bytes of the guest that wait for one socket.
pub(super) const BUFFER_BYTES: u32 = 64 << 10;
/// Most bytes of one packet to the guest.
const PACKET_MAX_BYTES: usize = 64 << 10;
const BOTH: u32 = NO_MORE_RECEIVED | NO_MORE_SENT;

/// The two ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    pub(super) ports: Ports,
    /// The guest has not answered the request yet.
    asked: bool,
    /// The next control packet to the guest, if there is one: a request, a response or a reset.
    announce: Option<Op>,
    /// An update of credit is due to the guest.
    send_credit: bool,
    credit: Credit,
    /// Credit was requested from the guest, which has not given any since.
    credit_asked: bool,
    /// Bytes from the guest that the socket did not take.
    waiting: VecDeque<u8>,
    /// The socket may have something to read.
    readable: bool,
    /// The directions that the guest has shut down, as its flags.
    guest_shutdown: u32,
    /// The directions that the host has shut down, and those of them that were sent to the guest.
    host_shutdown: u32,
    sent_shutdown: u32,
}

/// Bytes of both directions, counted modulo 2^32.
#[derive(Debug, Default)]
struct Credit {
    sent: u32,
    peer_buffer: u32,
    peer_forwarded: u32,
    forwarded: u32,
    sent_forwarded: u32,
}

impl Credit {
    /// How many bytes the guest can take. A guest that claims nonsense can take none.
    fn left(&self) -> u32 {
        self.peer_buffer.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }
}

impl Connection {
    /// A connection that a program of the host asks for.
    pub(super) fn to_guest(stream: UnixStream, ports: Ports) -> Connection {
        Connection { asked: true, ..Connection::new(stream, ports, Op::Request) }
    }

    /// A connection that the guest asks for with this packet.
    pub(super) fn from_guest(stream: UnixStream, ports: Ports, request: &Header) -> Connection {
        let mut connection = Connection::new(stream, ports, Op::Response);
        connection.take_credit(request);
        connection
    }

    fn new(stream: UnixStream, ports: Ports, announce: Op) -> Connection {
        Connection {
            stream,
            ports,
            asked: false,
            announce: Some(announce),
            send_credit: false,
            credit: Credit::default(),
            credit_asked: false,
            waiting: VecDeque::new(),
            readable: true,
            guest_shutdown: 0,
            host_shutdown: 0,
            sent_shutdown: 0,
        }
    }

    /// The socket has something to read, or takes something again.
    pub(super) fn host_changed(&mut self, readable: bool, hung_up: bool) {
        self.readable |= readable || hung_up;
        if hung_up {
            // It reads nothing any more; what it has written is still there.
            self.host_shutdown |= NO_MORE_RECEIVED;
            if self.asked {
                self.announce = Some(Op::Reset);
            }
        }
        self.flush();
    }

    /// A packet of the guest for this connection; `false` when it breaks the connection.
    pub(super) fn receive(
        &mut self,
        memory: &DeviceMemory,
        header: &Header,
        data: Buffers,
    ) -> Result<bool, Fault> {
        self.take_credit(header);
        match header.op {
            Op::Response if self.asked => {
                self.asked = false;
                // So few bytes into an empty socket: all of them or a broken one.
                let greeting = format!("OK {}\n", self.ports.host);
                return Ok(self.stream.write_all(greeting.as_bytes()).is_ok());
            }
            Op::Data if !self.asked && self.guest_shutdown & NO_MORE_SENT == 0 => {
                return self.forward(memory, data);
            }
            Op::Shutdown if !self.asked => {
                self.guest_shutdown |= header.flags & BOTH;
                self.flush();
            }
            Op::CreditUpdate => {}
            Op::CreditRequest => self.send_credit = true,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn take_credit(&mut self, header: &Header) {
        self.credit.peer_buffer = header.buf_alloc;
        self.credit.peer_forwarded = header.fwd_cnt;
        self.credit_asked &= self.credit.left() == 0;
    }

    /// Data from the guest to the socket.
    fn forward(&mut self, memory: &DeviceMemory, mut data: Buffers) -> Result<bool, Fault> {
        if data.len() + self.waiting.len() > BUFFER_BYTES as usize {
            // More than its credit.
            return Ok(false);
        }
        if self.waiting.is_empty() {
            let fd = self.stream.as_fd();
            match memory.transfer(fd, None, data.segments(), Direction::FromGuest)? {
                Ok(taken) => {
                    self.count_forwarded(taken);
                    data.split_front(taken);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Ok(false),
            }
        }
        self.waiting.extend(data.read_all(memory)?);
        Ok(true)
    }

    /// What waits, to the socket.
    fn flush(&mut self) {
        while !self.waiting.is_empty() {
            let (first, _) = self.waiting.as_slices();
            match self.stream.write(first) {
                Ok(taken) => {
                    self.waiting.drain(..taken);
                    self.count_forwarded(taken);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.waiting.clear();
                    self.announce = Some(Op::Reset);
                }
            }
        }
        if self.guest_shutdown & NO_MORE_SENT != 0 {
            // It fails where the other end is gone, which is as good.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        if self.guest_shutdown & NO_MORE_RECEIVED != 0 {
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if self.guest_shutdown == BOTH {
            self.announce = Some(Op::Reset);
        }
    }

    fn count_forwarded(&mut self, bytes: usize) {
        let credit = &mut self.credit;
        // At most `BUFFER_BYTES`.
        credit.forwarded = credit.forwarded.wrapping_add(bytes as u32);
        if credit.forwarded.wrapping_sub(credit.sent_forwarded) >= BUFFER_BYTES / 2 {
            self.send_credit = true;
        }
    }

    /// The header of the next packet to the guest, whose data is already in `room`; `None` when there is none.
    /// After a reset the connection has ended.
    pub(super) fn packet(
        &mut self,
        memory: &DeviceMemory,
        guest_cid: u64,
        room: &mut Buffers,
    ) -> Result<Option<Header>, Fault> {
        let (op, len, flags) = if let Some(op) = self.announce.take() {
            (op, 0, 0)
        } else if self.asked {
            return Ok(None);
        } else if self.send_credit {
            (Op::CreditUpdate, 0, 0)
        } else if let Some(len @ 1..) = self.read(memory, room)? {
            (Op::Data, len, 0)
        } else if self.announce.take().is_some() {
            (Op::Reset, 0, 0)
        } else if self.readable && self.credit.left() == 0 && !self.credit_asked {
            self.credit_asked = true;
            (Op::CreditRequest, 0, 0)
        } else if !self.readable && self.sent_shutdown != self.shutdown_to_send() {
            self.sent_shutdown = self.shutdown_to_send();
            (Op::Shutdown, 0, self.sent_shutdown)
        } else {
            return Ok(None);
        };
        // Every packet contains it.
        self.send_credit = false;
        self.credit.sent_forwarded = self.credit.forwarded;
        Ok(Some(Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len,
            kind: STREAM,
            op,
            flags,
            buf_alloc: BUFFER_BYTES,
            fwd_cnt: self.credit.forwarded,
        }))
    }

    /// Moves data of the socket into the guest's buffers, within its credit. Returns the number of bytes; `None`
    /// when the socket was not read.
    fn read(&mut self, memory: &DeviceMemory, room: &mut Buffers) -> Result<Option<u32>, Fault> {
        if self.guest_shutdown & NO_MORE_RECEIVED != 0 || self.host_shutdown & NO_MORE_SENT != 0 {
            self.readable = false;
        }
        let len = PACKET_MAX_BYTES.min(room.len()).min(self.credit.left() as usize);
        if !self.readable || len == 0 {
            return Ok(None);
        }
        let front = room.split_front(len).unwrap_or_default();
        let fd = self.stream.as_fd();
        match memory.transfer(fd, None, front.segments(), Direction::ToGuest)? {
            Ok(0) => {
                self.readable = false;
                self.host_shutdown |= NO_MORE_SENT;
                Ok(None)
            }
            Ok(len) => {
                // At most `PACKET_MAX_BYTES`.
                self.credit.sent = self.credit.sent.wrapping_add(len as u32);
                Ok(Some(len as u32))
            }
            Err(error) => {
                self.readable = false;
                if error.kind() != io::ErrorKind::WouldBlock {
                    self.announce = Some(Op::Reset);
                }
                Ok(None)
            }
        }
    }

    fn shutdown_to_send(&self) -> u32 {
        match self.guest_shutdown & NO_MORE_RECEIVED != 0 {
            // It takes nothing any more: nothing will be sent.
            true if self.host_shutdown != 0 => BOTH,
            _ => self.host_shutdown,
        }
    }
}
