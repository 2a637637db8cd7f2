//! The protocol of service managers such as systemd: a listening socket that was passed (sd_listen_fds(3)), and
//! readiness (sd_notify(3)).

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};

use anyhow::{Context, Result, bail};
use listenfd::ListenFd;

use crate::stderr::say;

/// The listening socket that the service manager has passed to this process, if it has.
pub(crate) fn passed_socket() -> Result<Option<UnixListener>> {
    let mut passed = ListenFd::from_env();
    match passed.len() {
        0 => Ok(None),
        1 => passed.take_unix_listener(0).context("the passed socket cannot be used"),
        sockets => bail!("{sockets} sockets were passed by the service manager, expected one"),
    }
}

/// The service manager that waits for this process, if there is one.
pub(crate) struct Manager(Option<UnixDatagram>);

impl Manager {
    /// Connects to it, while this process may still do that.
    pub(crate) fn connect() -> Self {
        let named = std::env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty());
        let connected = named.map(|socket| connected(&socket)).transpose();
        Self(connected.unwrap_or_else(|error| {
            report(&error);
            None
        }))
    }

    /// Notifies it that clients can connect.
    pub(crate) fn ready(self) {
        if let Some(Err(error)) = self.0.map(|socket| socket.send(b"READY=1")) {
            report(&error);
        }
    }
}

fn report(error: &io::Error) {
    say(&format!("snap: cannot notify the service manager: {error}\n"));
}

fn connected(socket: &OsStr) -> io::Result<UnixDatagram> {
    let sender = UnixDatagram::unbound()?;
    match socket.as_bytes().strip_prefix(b"@") {
        Some(name) => sender.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
        None => sender.connect(socket)?,
    }
    Ok(sender)
}
