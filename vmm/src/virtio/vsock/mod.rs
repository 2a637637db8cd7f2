//! The socket device (virtio 1.2, 5.10): streams between ports of the guest and unix sockets of the host.
//!
//! - `packet`: headers.
//! - `connection`: one stream.
//! - `host`: the unix sockets.
//!
//! The crate `virtio-vsock` parses packets too, but it returns their data as slices of guest memory. A device here
//! never accesses such data (see `memory`): system calls move it.
//!
//! Connections do not survive a snapshot. A restored driver gets an event (VIRTIO_VSOCK_EVENT_TRANSPORT_RESET): it
//! closes its connections and reads the context id again. Until it has handled the event, the device does nothing
//! else, because the driver would close newer connections too.

mod connection;
mod host;
mod packet;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::EventSet;

use self::connection::{Connection, Ports};
use self::host::Greeting;
pub use self::host::{VsockError, VsockHost};
use self::packet::{HEADER_BYTES, HOST_CID, Header, Op, STREAM};
use super::device::{Backend, HostWatcher};
use super::fault::Fault;
use super::memory::DeviceMemory;
use super::rings::{Buffers, Rings};
use super::state::BackendState;

/// Socket device.
pub(super) const DEVICE_ID: u32 = 19;
const TO_GUEST: usize = 0;
const FROM_GUEST: usize = 1;
const EVENTS: usize = 2;
/// Most connections at a time, including those with an incomplete greeting. Each has a descriptor.
const CONNECTIONS_MAX: usize = 256;
/// Most refusals that wait for a buffer of the guest. With more, no packet is taken until the guest offers one.
const REFUSALS_MAX: usize = 64;
/// Ports of the host for connections to the guest begin here.
const HOST_PORTS_START: u32 = 1 << 30;
/// `struct virtio_vsock_event` with VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: [u8; 4] = [0; 4];
/// The descriptor of the socket that connections come from; others have higher numbers.
const LISTENER: u32 = 0;

pub(super) struct Vsock {
    host: VsockHost,
    config: [u8; 8],
    watcher: Option<HostWatcher>,
    /// By the number that their descriptor is watched with.
    greetings: HashMap<u32, (UnixStream, Greeting)>,
    connections: HashMap<u32, Connection>,
    by_ports: HashMap<Ports, u32>,
    /// Connections that may have something for the guest, each at most once.
    ready: VecDeque<u32>,
    refusals: VecDeque<Header>,
    notice: Notice,
    last_token: u32,
    last_port: u32,
}

/// Whether a restored driver knows that its connections are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Notice {
    Taken,
    Due,
    /// The driver offers the event's buffer again after it has handled the event: then the index has changed.
    Given {
        offered: u16,
    },
}

impl Vsock {
    pub(super) fn new(host: VsockHost) -> Vsock {
        Vsock {
            config: host.state().guest_cid.to_le_bytes(),
            host,
            watcher: None,
            greetings: HashMap::new(),
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            refusals: VecDeque::new(),
            notice: Notice::Taken,
            last_token: LISTENER,
            last_port: HOST_PORTS_START,
        }
    }

    fn has_room(&self) -> bool {
        self.connections.len() + self.greetings.len() < CONNECTIONS_MAX
    }

    /// Accepts the programs that wait at the socket.
    fn accept(&mut self) {
        while let Ok((stream, _)) = self.host.listener.accept() {
            // Connections above the limit are closed.
            if self.has_room()
                && stream.set_nonblocking(true).is_ok()
                && let Ok(token) = self.watch(&stream)
            {
                self.greetings.insert(token, (stream, Greeting::default()));
                self.greet(token);
            }
        }
    }

    fn watch(&mut self, stream: &UnixStream) -> io::Result<u32> {
        loop {
            self.last_token = self.last_token.wrapping_add(1);
            let token = self.last_token;
            if token != LISTENER
                && !self.connections.contains_key(&token)
                && !self.greetings.contains_key(&token)
            {
                let Some(watcher) = &self.watcher else { return Err(io::ErrorKind::Other.into()) };
                return watcher.watch(token, stream).map(|()| token);
            }
        }
    }

    /// Reads on in a greeting; when it is there, the guest is to be asked.
    fn greet(&mut self, token: u32) {
        let Some((stream, greeting)) = self.greetings.get_mut(&token) else { return };
        let Some(asked) = greeting.read(stream).transpose() else { return };
        if let (Some((stream, _)), Ok(guest)) = (self.greetings.remove(&token), asked) {
            let ports = self.free_ports(guest);
            self.insert(token, Connection::to_guest(stream, ports));
        }
    }

    fn free_ports(&mut self, guest: u32) -> Ports {
        loop {
            self.last_port = self.last_port.wrapping_add(1).max(HOST_PORTS_START);
            let ports = Ports { host: self.last_port, guest };
            if !self.by_ports.contains_key(&ports) {
                return ports;
            }
        }
    }

    fn insert(&mut self, token: u32, connection: Connection) {
        self.by_ports.insert(connection.ports, token);
        self.connections.insert(token, connection);
        self.make_ready(token);
    }

    fn remove(&mut self, token: u32) {
        if let Some(connection) = self.connections.remove(&token) {
            self.by_ports.remove(&connection.ports);
        }
        self.ready.retain(|&ready| ready != token);
    }

    fn make_ready(&mut self, token: u32) {
        if !self.ready.contains(&token) {
            self.ready.push_back(token);
        }
    }

    /// Whether the driver knows what it must, before anything else is done.
    fn give_notice(&mut self, rings: &mut Rings<'_>) -> Result<bool, Fault> {
        match self.notice {
            Notice::Taken => {}
            Notice::Due => {
                let Some(request) = rings.pop(EVENTS)? else { return Ok(false) };
                if request.writable.write(rings.memory, &TRANSPORT_RESET)? != TRANSPORT_RESET.len()
                {
                    return Err(Fault::Driver("a buffer for events that is too small"));
                }
                self.notice = Notice::Given { offered: rings.offered(EVENTS)? };
                rings.push_used(EVENTS, request.head, TRANSPORT_RESET.len())?;
                return Ok(false);
            }
            Notice::Given { offered } => {
                if rings.offered(EVENTS)? == offered {
                    return Ok(false);
                }
                self.notice = Notice::Taken;
            }
        }
        Ok(true)
    }

    /// Takes one packet of the guest; `false` when there is none.
    fn take(&mut self, rings: &mut Rings<'_>) -> Result<bool, Fault> {
        if self.refusals.len() >= REFUSALS_MAX {
            return Ok(false);
        }
        let Some(mut request) = rings.pop(FROM_GUEST)? else { return Ok(false) };
        let mut bytes = [0; HEADER_BYTES];
        if !request.readable.read_front(rings.memory, &mut bytes)? {
            return Err(Fault::Driver("a packet without a header"));
        }
        let header = Header::parse(&bytes);
        let Some(data) = request.readable.split_front(header.len as usize) else {
            return Err(Fault::Driver("a packet that is shorter than its header gives"));
        };
        self.receive(rings.memory, &header, data)?;
        rings.push_used(FROM_GUEST, request.head, 0)?;
        Ok(true)
    }

    fn receive(
        &mut self,
        memory: &DeviceMemory,
        header: &Header,
        data: Buffers,
    ) -> Result<(), Fault> {
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let known = self.by_ports.get(&ports).copied();
        let to_host = header.dst_cid == HOST_CID
            && header.src_cid == self.host.state().guest_cid
            && header.kind == STREAM;
        let accepted = match (header.op, known) {
            _ if !to_host => false,
            (Op::Reset, _) => {
                known.into_iter().for_each(|token| self.remove(token));
                return Ok(());
            }
            (Op::Request, None) => self.connect(ports, header).is_ok(),
            (Op::Request, Some(token)) => {
                self.remove(token);
                false
            }
            (_, None) => false,
            (_, Some(token)) => {
                let connection = self.connections.get_mut(&token);
                let good = match connection {
                    Some(connection) => connection.receive(memory, header, data)?,
                    None => false,
                };
                if good {
                    self.make_ready(token);
                } else {
                    self.remove(token);
                }
                good
            }
        };
        if !accepted && header.op != Op::Reset {
            self.refusals.push_back(header.refusal());
        }
        Ok(())
    }

    /// A connection that the guest asks for.
    fn connect(&mut self, ports: Ports, request: &Header) -> io::Result<()> {
        if !self.has_room() {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let stream = self.host.connect(ports.host)?;
        let token = self.watch(&stream)?;
        self.insert(token, Connection::from_guest(stream, ports, request));
        Ok(())
    }

    /// Sends the guest one packet; `false` when there is none, or no buffer for it.
    fn give(&mut self, rings: &mut Rings<'_>) -> Result<bool, Fault> {
        if self.refusals.is_empty() && self.ready.is_empty() {
            return Ok(false);
        }
        let Some(mut request) = rings.pop(TO_GUEST)? else { return Ok(false) };
        let memory = rings.memory;
        let Some(front) = request.writable.split_front(HEADER_BYTES) else {
            return Err(Fault::Driver("a buffer for packets that is too small"));
        };
        if request.writable.len() == 0 || request.readable.len() != 0 {
            return Err(Fault::Driver("a buffer for packets that is not one"));
        }
        let Some(header) = self.next_packet(memory, &mut request.writable)? else {
            rings.unpop(TO_GUEST);
            return Ok(false);
        };
        front.write(memory, &header.to_bytes())?;
        rings.push_used(TO_GUEST, request.head, HEADER_BYTES + header.len as usize)?;
        Ok(true)
    }

    /// Connections take turns.
    fn next_packet(
        &mut self,
        memory: &DeviceMemory,
        room: &mut Buffers,
    ) -> Result<Option<Header>, Fault> {
        if let Some(refusal) = self.refusals.pop_front() {
            return Ok(Some(refusal));
        }
        let guest_cid = self.host.state().guest_cid;
        while let Some(token) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&token) else { continue };
            match connection.packet(memory, guest_cid, room)? {
                None => {}
                Some(header) => {
                    match header.op {
                        Op::Reset => self.remove(token),
                        _ => self.ready.push_back(token),
                    }
                    return Ok(Some(header));
                }
            }
        }
        Ok(None)
    }

    fn forget_all(&mut self) {
        self.greetings.clear();
        self.connections.clear();
        self.by_ports.clear();
        self.ready.clear();
        self.refusals.clear();
    }
}

impl Backend for Vsock {
    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[128, 128, 16]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn serve(&mut self, rings: &mut Rings<'_>, _queue: usize) -> Result<bool, Fault> {
        // Even if the driver does not notify: a packet from one queue is answered in the other.
        if !self.give_notice(rings)? {
            return Ok(false);
        }
        let taken = self.take(rings)?;
        Ok(self.give(rings)? || taken)
    }

    fn connect(&mut self, watcher: HostWatcher) -> io::Result<()> {
        watcher.watch(LISTENER, &self.host.listener)?;
        self.watcher = Some(watcher);
        Ok(())
    }

    fn host_changed(&mut self, token: u32, events: EventSet) -> usize {
        let hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        if token == LISTENER {
            self.accept();
        } else if let Some(connection) = self.connections.get_mut(&token) {
            connection.host_changed(events.contains(EventSet::IN), hung_up);
            self.make_ready(token);
        } else {
            self.greet(token);
        }
        TO_GUEST
    }

    fn reset(&mut self) {
        self.forget_all();
        self.notice = Notice::Taken;
    }

    fn restored(&mut self) {
        self.notice = Notice::Due;
    }

    fn state(&self) -> BackendState {
        BackendState::Vsock(self.host.state().clone())
    }
}
