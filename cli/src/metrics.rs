//! The figures of `snap serve` over HTTP: one path, one answer, one connection at a time.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use pager::serve::{METRICS_CONTENT_TYPE, ServerHandle};

use crate::http::{Connection, NoRequest, Patience, Request, write_response};

/// A connection that sends or takes nothing for this time is dropped, and the next one has its turn.
const LIMIT: Duration = Duration::from_secs(1);
const PATIENCE: Patience = Patience { idle: LIMIT, request: LIMIT };

/// Listens at the address.
pub(crate) fn listen(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).with_context(|| format!("cannot listen for metrics at {address}"))
}

/// Answers `GET /metrics` from now on, on a thread of its own. Returns the address: its port may have been 0.
pub(crate) fn serve(listener: TcpListener, server: ServerHandle) -> Result<SocketAddr> {
    let bound = listener.local_addr().context("cannot see the metrics' address")?;
    std::thread::Builder::new()
        .name("metrics".into())
        .spawn(move || {
            loop {
                match listener.accept() {
                    // A client that does not take its answer costs only its own connection.
                    Ok((stream, _)) => drop(answer(&stream, bound, &server)),
                    // The process may be out of descriptors: later there may be some.
                    Err(_) => std::thread::sleep(LIMIT),
                }
            }
        })
        .context("cannot start the thread for metrics")?;
    Ok(bound)
}

fn answer(mut stream: &TcpStream, bound: SocketAddr, server: &ServerHandle) -> std::io::Result<()> {
    stream.set_write_timeout(Some(LIMIT))?;
    let text = |status, message: &str| (status, "text/plain", format!("{message}\n"));
    let (status, content_type, body) = match Connection::new(stream).request(PATIENCE) {
        Ok(Request { host: Some(host), .. }) if !is_own_name(&host, bound) => {
            text(403, &format!("{host:?} is not a name of {}", bound.ip()))
        }
        Ok(request) => match (request.path.as_str(), request.method.as_str()) {
            ("/metrics", "GET") => (200, METRICS_CONTENT_TYPE, server.metrics()),
            ("/metrics", method) => text(405, &format!("{method} is not for /metrics: GET")),
            _ => text(404, "the figures are at /metrics"),
        },
        Err(NoRequest::Refused(status, message)) => text(status, &message),
        Err(NoRequest::Gone) => return Ok(()),
    };
    write_response(&mut stream, status, Some((content_type, &body)), false)
}

/// Whether a client that means this machine uses this name. An address of this machine only has no other names: a browser
/// that sends one has a page of another site open, whose name was made to point here (DNS rebinding).
fn is_own_name(host: &str, bound: SocketAddr) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    !bound.ip().is_loopback()
        || name.eq_ignore_ascii_case("localhost")
        || address.is_ok_and(|address| address.is_loopback())
}

/// A port of this machine only, or a whole address.
pub(crate) fn parse_address(text: &str) -> Result<SocketAddr, String> {
    if let Ok(port) = text.parse::<u16>() {
        return Ok(SocketAddr::from(([127, 0, 0, 1], port)));
    }
    text.parse().map_err(|_| format!("{text:?} is neither a port nor ADDRESS:PORT"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_alone_is_one_of_this_machine() {
        assert_eq!(parse_address("9100"), Ok("127.0.0.1:9100".parse().unwrap()));
        assert_eq!(parse_address("[::1]:80"), Ok("[::1]:80".parse().unwrap()));
        assert!(parse_address("localhost").is_err());
    }

    #[test]
    fn names_of_other_sites_are_refused_at_an_address_of_this_machine() {
        let [own, any] = ["127.0.0.1:9100", "0.0.0.0:9100"].map(|at| at.parse().unwrap());
        for host in ["localhost", "LOCALHOST:9100", "127.0.0.1:9100", "127.8.0.1", "[::1]:9100"] {
            assert!(is_own_name(host, own) && is_own_name(host, any), "{host}");
        }
        for host in
            ["", "example.com", "example.com:9100", "localhost.example.com", "10.0.0.1", ":80"]
        {
            assert!(!is_own_name(host, own) && is_own_name(host, any), "{host}");
        }
    }
}
