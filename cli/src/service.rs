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

/// Notifies the service manager, if there is one, that clients can connect.
pub(crate) fn ready() {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty()) else {
        return;
    };
    if let Err(error) = send(&socket, b"READY=1") {
        say(&format!("snap: cannot notify the service manager: {error}\n"));
    }
}

fn send(socket: &OsStr, state: &[u8]) -> io::Result<()> {
    let sender = UnixDatagram::unbound()?;
    match socket.as_bytes().strip_prefix(b"@") {
        Some(name) => sender.send_to_addr(state, &SocketAddr::from_abstract_name(name)?)?,
        None => sender.send_to(state, socket)?,
    };
    Ok(())
}
