//! The messages between a server and its keeper: one JSON object in each packet, with descriptors.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketType,
};
use rustix::process::Resource;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::error::KeepError;
use crate::failure::FailurePolicy;
use crate::remote::serve::credentials;
use crate::remote::serve::wire::connect_kind;
use crate::remote::serve::{AllowedUsers, SnapshotName};

/// The version of the messages and of the handover state. A keeper and a server need the same version.
pub(super) const VERSION: u32 = 3;
/// The limit of a packet.
const PACKET_LIMIT_BYTES: usize = 64 << 10;
/// Userfaultfd, connection, process (a pidfd), handover state.
pub(super) const DESCRIPTORS: usize = 4;

/// A message from a server.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ToKeeper {
    /// The first message. The answer is `Welcome`.
    Hello {
        version: u32,
        snapshot: SnapshotName,
        on_error: OnError,
        #[serde(default)]
        allow: AllowedUsers,
        /// The absolute path of the socket at which it is going to listen.
        #[serde(default)]
        path: Vec<u8>,
    },
    /// The server takes over a guest of a dead server, under this id. The answer is `Guest` or `NoGuest`.
    Take { id: u64 },
    /// The server listens. With its listening socket, and the socket to which the keeper sends its connections, each
    /// as [`Accepted`]. There is no answer. A `passed` socket is also that of a service manager.
    Listen { identity: (u64, u64), passed: bool },
    /// The server listens no longer. The keeper sends the connections that are left, and then closes that socket.
    Close {},
    /// A guest, with its descriptors. There is no answer. If it `shares` memory, it has ended when it closes its
    /// connection. It is the client of this `connection`, which waits no longer.
    Keep { id: u64, shares: bool, connection: Option<u64> },
    /// The client of this connection does not wait for a server any more. There is no answer.
    Release { connection: u64 },
    /// The guest with this id has ended. There is no answer.
    Forget { id: u64 },
}

/// An answer of the keeper.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FromKeeper {
    /// With the listening socket of a dead server at the same path, if there is one.
    Welcome {
        version: u32,
        orphan: Option<Orphan>,
    },
    Guest {
        shares: bool,
    },
    #[serde(rename = "nobody")]
    NoGuest {},
}

/// The listening socket of a dead server: the device and the inode of its name.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) struct Orphan {
    pub(crate) identity: (u64, u64),
}

/// A connection that the keeper has accepted for a server, with its descriptor. The keeper has a duplicate until it
/// gets `Keep` or `Release`.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(super) struct Accepted {
    pub(super) connection: u64,
}

/// [`FailurePolicy`] in messages.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum OnError {
    Poison,
    Kill,
}

impl From<FailurePolicy> for OnError {
    fn from(policy: FailurePolicy) -> OnError {
        match policy {
            FailurePolicy::Poison => OnError::Poison,
            FailurePolicy::Kill => OnError::Kill,
        }
    }
}

impl From<OnError> for FailurePolicy {
    fn from(policy: OnError) -> FailurePolicy {
        match policy {
            OnError::Poison => FailurePolicy::Poison,
            OnError::Kill => FailurePolicy::Kill,
        }
    }
}

/// Connects to the keeper at `path`.
pub(super) fn connect(path: &Path, timeout: Duration) -> Result<OwnedFd, KeepError> {
    let socket = connect_kind(path, SocketType::SEQPACKET, timeout)
        .map_err(|error| KeepError::System { what: "connect to the keeper", error })?;
    trusted(&socket)?;
    Ok(socket)
}

/// Checks that the other side runs as this user or as root, because each side relies on the other. Returns its process
/// id; 0 if it is in another PID namespace.
pub(super) fn trusted(socket: &OwnedFd) -> Result<i32, KeepError> {
    let what = "get the user of the other side";
    let found = credentials::of(socket).map_err(|error| KeepError::System { what, error })?;
    match found.is_own_or_root() {
        true => Ok(found.pid),
        false => Err(KeepError::User { uid: found.uid }),
    }
}

/// Sends one packet. If the queue is full, this waits, or fails if `flags` say so.
pub(super) fn send(
    socket: &OwnedFd,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> Result<(), KeepError> {
    let bytes = serde_json::to_vec(message).map_err(unclear)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(unclear("too many descriptors"));
    }
    let flags = flags | SendFlags::NOSIGNAL;
    loop {
        match rustix::net::sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, flags) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::PIPE | Errno::CONNRESET) => return Err(KeepError::Gone),
            Err(Errno::AGAIN) => return Err(KeepError::Full),
            Err(error) => return Err(system("send")(error)),
        }
    }
}

/// Receives one packet. `None` if there is none and `flags` say not to wait.
pub(super) fn receive<T: DeserializeOwned>(
    socket: &OwnedFd,
    flags: RecvFlags,
) -> Result<Option<(T, Vec<OwnedFd>)>, KeepError> {
    let mut bytes = vec![0; PACKET_LIMIT_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let received = loop {
        let mut into = [IoSliceMut::new(&mut bytes)];
        match rustix::net::recvmsg(socket, &mut into, &mut control, flags) {
            Ok(received) => break received,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::CONNRESET) => return Err(KeepError::Gone),
            Err(error) => return Err(system("receive")(error)),
        }
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    if received.bytes == 0 {
        return Err(KeepError::Gone);
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(unclear("a packet that is too long"));
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        // There was space for all expected descriptors, so that another reason has lost one.
        return Err(match descriptors.len() {
            DESCRIPTORS.. => unclear("a packet with too many descriptors"),
            _ => KeepError::DescriptorLost {
                limit: rustix::process::getrlimit(Resource::Nofile).current,
            },
        });
    }
    let message = serde_json::from_slice(&bytes[..received.bytes]).map_err(unclear)?;
    Ok(Some((message, descriptors)))
}

/// Drops the next packet, with its descriptors.
pub(super) fn drop_next(socket: &OwnedFd, flags: RecvFlags) -> Result<(), KeepError> {
    loop {
        match rustix::net::recv(socket, &mut [0_u8; 1], flags) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(system("receive")(error)),
        }
    }
}

pub(super) fn unclear(why: impl std::fmt::Display) -> KeepError {
    KeepError::Message { why: why.to_string() }
}

pub(super) fn system(what: &'static str) -> impl Fn(Errno) -> KeepError {
    move |error| KeepError::System { what, error: error.into() }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::net::{AddressFamily, SocketFlags};

    use super::*;

    /// Lost descriptors are reported with the right reason.
    #[test]
    fn too_many_descriptors_are_reported() {
        let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
        let pair = || rustix::net::socketpair(family, kind, SocketFlags::CLOEXEC, None);
        let (one, other) = pair().expect("a pair of sockets");
        let send_with = |count: usize| {
            let descriptors = vec![one.as_fd(); count];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
            let bytes =
                serde_json::to_vec(&ToKeeper::Keep { id: 1, shares: false, connection: None })
                    .expect("JSON");
            let sent = rustix::net::sendmsg(
                &one,
                &[IoSlice::new(&bytes)],
                &mut control,
                SendFlags::empty(),
            );
            sent.expect("it is sent");
        };
        send_with(DESCRIPTORS);
        let (_, descriptors) =
            receive::<ToKeeper>(&other, RecvFlags::empty()).expect("it is taken").expect("it came");
        assert_eq!(descriptors.len(), DESCRIPTORS);
        send_with(16);
        let error = receive::<ToKeeper>(&other, RecvFlags::empty()).expect_err("too many");
        assert!(error.to_string().contains("too many descriptors"), "{error}");
    }
}
