//! A server for the memory of other processes: virtual machines that send their userfaultfd over a unix socket. It
//! speaks the handshake of Firecracker (`mem_backend` of type `Uffd`).
//!
//! Each client has its own threads: a silent, hostile or dead client delays no other. The protocol, which clients are
//! trusted, and what happens after failures: `docs/serving.md`.

mod arrivals;
mod client;
pub(crate) mod credentials;
mod error;
mod event;
mod given;
pub(crate) mod handshake;
mod kept_socket;
mod metrics;
mod no_room;
mod options;
mod peer;
pub(crate) mod poison;
mod refused;
mod server;
mod session;
mod socket;
mod spare;
mod state;
pub(crate) mod wire;

pub use error::{BindError, RefuseError};
pub use event::{Consequence, OnEvent, ServeEvent};
pub(crate) use given::Given;
#[cfg(feature = "vm-memory")]
pub(crate) use handshake::Answer;
pub use handshake::SnapshotName;
pub use kept_socket::KeeperLink;
pub use metrics::METRICS_CONTENT_TYPE;
pub use options::{AllowedUsers, KeepAt, Prefetched, ServeOptions};
pub(crate) use peer::Peer;
pub use peer::check_user;
pub use server::{Server, ServerHandle};
pub use socket::{LOCK_TIMEOUT, Socket, SocketAccess};
pub use wire::connect;
