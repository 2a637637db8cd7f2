//! The first message of a client, and its checks.
//!
//! Two kinds of clients use the same socket. The first byte distinguishes them: `[` begins the message of the handshake
//! of Firecracker, `{` the line of another request.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use serde::{Deserialize, Serialize};

use super::error::RefuseError;
use super::wire::{self, SocketReader};
use crate::region::Region;
use crate::uffd::{Features, ForeignUffd};

/// One region as Firecracker describes it. Fields unknown here are ignored.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct RegionMessage {
    pub(crate) base_host_virt_addr: u64,
    pub(crate) size: u64,
    pub(crate) offset: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) page_size: Option<u64>,
    /// The same value. Despite its name it is in bytes, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) page_size_kib: Option<u64>,
}

/// The request of other clients, in one line.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    /// The file with the memory, for a clone that shares it.
    Share(SnapshotName),
    /// The statistics of all clients.
    Stats {},
}

/// An answer of the server to a clone, in one line.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    Accepted {},
    Refused(String),
    /// A page could not be loaded.
    Failure(String),
}

impl Answer {
    /// Sends the answer, and a descriptor with it.
    pub(crate) fn send(
        &self,
        stream: &UnixStream,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<(), RefuseError> {
        let line = serde_json::to_string(self).map_err(RefuseError::Message)?;
        wire::send_line(stream, &line, descriptor)
            .map_err(|error| RefuseError::System { what: "answer", error })
    }
}

/// The name of a snapshot. The name that a clone requests must be equal to that of the server.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct SnapshotName {
    /// The ids of the layers, newest first.
    pub layers: Vec<String>,
    /// The size of guest memory in bytes.
    pub memory_bytes: u64,
}

impl std::fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} bytes)", self.layers.join(" on "), self.memory_bytes)
    }
}

/// The first message of a client.
#[derive(Debug)]
pub(crate) enum Hello {
    /// Fill its private memory.
    Fill {
        regions: Vec<RegionMessage>,
        descriptor: OwnedFd,
    },
    Request(Request),
}

/// Receives the first message.
pub(crate) fn receive(reader: &mut SocketReader<'_>) -> Result<Hello, RefuseError> {
    while reader.bytes.is_empty() {
        reader.receive()?;
    }
    if reader.bytes[0] == b'{' {
        let line = reader.line()?;
        return match reader.descriptors.len() {
            0 => Ok(Hello::Request(serde_json::from_slice(&line).map_err(RefuseError::Message)?)),
            found => Err(RefuseError::Descriptors { found, expected: 0 }),
        };
    }
    let regions = loop {
        // The message has no length: it ends with the JSON. Parsing only when it may be complete keeps many small parts
        // cheap.
        if reader.bytes.trim_ascii_end().last() == Some(&b']') || reader.bytes[0] != b'[' {
            match serde_json::from_slice(&reader.bytes) {
                Ok(regions) => break regions,
                Err(error) if error.is_eof() => {}
                Err(error) => return Err(RefuseError::Message(error)),
            }
        }
        reader.receive()?;
    };
    // The descriptor comes with any part of the message, or after it.
    while reader.descriptors.is_empty() {
        reader.receive()?;
    }
    Ok(Hello::Fill { regions, descriptor: reader.descriptor()? })
}

/// Waits for a message, and reads it without taking it out of the queue, so that another server finds it there. `None`:
/// it is of another kind, or it is not whole in one part, as Firecracker sends it.
pub(crate) fn peek(reader: &mut SocketReader<'_>) -> Result<Option<Hello>, RefuseError> {
    let (bytes, descriptors) = reader.peek()?;
    let Ok([descriptor]) = <[OwnedFd; 1]>::try_from(descriptors) else {
        return Ok(None);
    };
    match serde_json::from_slice(&bytes) {
        Ok(regions) => {
            reader.bytes = bytes;
            Ok(Some(Hello::Fill { regions, descriptor }))
        }
        Err(_) => Ok(None),
    }
}

/// The regions, each checked by itself. The start of the pager checks that they fit together and into the source.
pub(crate) fn regions(messages: &[RegionMessage]) -> Result<Vec<Region>, RefuseError> {
    if messages.is_empty() {
        return Err(RefuseError::NoRegion);
    }
    let to_region = |(region, message): (usize, &RegionMessage)| {
        let page_bytes = match (message.page_size, message.page_size_kib) {
            (Some(one), Some(other)) if one != other => None,
            (one, other) => one.or(other),
        };
        let page_bytes = page_bytes.and_then(|bytes| usize::try_from(bytes).ok());
        let page_bytes = page_bytes.ok_or(RefuseError::PageSize { region })?;
        let RegionMessage { base_host_virt_addr, size, offset, .. } = *message;
        Region::foreign(base_host_virt_addr, size, page_bytes, offset)
            .map_err(|error| RefuseError::Region { region, error })
    };
    messages.iter().enumerate().map(to_region).collect()
}

/// The userfaultfd, of which a server can answer all events.
pub(crate) fn userfaultfd(descriptor: OwnedFd) -> Result<ForeignUffd, RefuseError> {
    let uffd = received(descriptor).map_err(RefuseError::Userfaultfd)?;
    let features = uffd.features();
    let refuse = |why| Err(RefuseError::Features { features: features.bits(), why });
    if !features.contains(Features::EVENT_REMOVE) {
        // Pages that were given back would get their old content again.
        return refuse("removed pages must be reported (EVENT_REMOVE)");
    }
    let unserved = Features::EVENT_FORK.with(Features::EVENT_REMAP);
    if features.common(unserved) != Features::NONE {
        return refuse("forks and moved memory cannot be served (EVENT_FORK, EVENT_REMAP)");
    }
    Ok(uffd)
}

#[allow(unsafe_code)]
pub(super) fn received(descriptor: OwnedFd) -> Result<ForeignUffd, crate::uffd::ForeignUffdError> {
    // SAFETY: it came over a socket whose other end is another process (see `Peer::of`). The only
    // userfaultfd that a server makes for its own memory, that of `SharedImage`, never leaves it.
    unsafe { ForeignUffd::new(descriptor) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;

    fn parsed(parts: &[&[u8]]) -> Result<Hello, RefuseError> {
        let (mut client, server) = UnixStream::pair().expect("a pair of sockets");
        for part in parts {
            client.write_all(part).expect("it is taken");
        }
        drop(client);
        receive(&mut SocketReader::new(&server, Duration::from_secs(60)))
    }

    #[test]
    fn each_invalid_message_has_its_error() {
        assert!(matches!(parsed(&[b"hello"]), Err(RefuseError::Message(_))));
        assert!(matches!(parsed(&[b"[1]"]), Err(RefuseError::Message(_))));
        assert!(matches!(parsed(&[b"[] x]"]), Err(RefuseError::Message(_))));
        assert!(matches!(parsed(&[b"[{\"size\":1}]"]), Err(RefuseError::Message(_))));
        assert!(matches!(parsed(&[b"[", b"{"]), Err(RefuseError::Left { bytes: 2, .. })));
        assert!(matches!(parsed(&[b"[]"]), Err(RefuseError::Left { bytes: 2, descriptors: 0 })));
        assert!(matches!(parsed(&[b""]), Err(RefuseError::Left { bytes: 0, .. })));
        assert!(matches!(parsed(&[b"{\"dance\":{}}\n"]), Err(RefuseError::Message(_))));
    }

    #[test]
    fn a_silent_client_is_given_up() {
        let (_client, server) = UnixStream::pair().expect("a pair of sockets");
        let refused = receive(&mut SocketReader::new(&server, Duration::from_millis(10)));
        assert!(matches!(refused, Err(RefuseError::TimedOut { bytes: 0, .. })));
    }

    #[test]
    fn both_size_fields_are_taken_and_must_agree() {
        let message = |fields: &str| -> Vec<RegionMessage> {
            let text = format!(
                "[{{\"base_host_virt_addr\":4096,\"size\":8192,\"offset\":0,{fields},\"new\":[1]}}]"
            );
            serde_json::from_str(&text).expect("unknown fields are ignored")
        };
        for fields in [
            "\"page_size\":4096",
            "\"page_size_kib\":4096",
            "\"page_size\":4096,\"page_size_kib\":4096",
        ] {
            assert_eq!(regions(&message(fields)).expect("it is a region")[0].page_bytes(), 4096);
        }
        let differ = message("\"page_size\":4096,\"page_size_kib\":4");
        assert!(matches!(regions(&differ), Err(RefuseError::PageSize { region: 0 })));
        let none = message("\"x\":0");
        assert!(matches!(regions(&none), Err(RefuseError::PageSize { region: 0 })));
        let odd = message("\"page_size\":5000");
        assert!(matches!(regions(&odd), Err(RefuseError::Region { region: 0, .. })));
        assert!(matches!(regions(&[]), Err(RefuseError::NoRegion)));
    }
}
