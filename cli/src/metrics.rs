//! The figures of `snap serve` over HTTP: one path, one answer, one connection at a time.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use pager::serve::{METRICS_CONTENT_TYPE, ServerHandle};

/// No request that is meant for this is longer.
const REQUEST_LIMIT_BYTES: usize = 8 << 10;
/// A connection that says or takes nothing for so long is dropped, and the next one has its turn.
const PATIENCE: Duration = Duration::from_secs(1);

/// Answers `GET /metrics` at the address from now on, on a thread of its own. Answers the address: its port may have
/// been 0.
pub(crate) fn serve(address: SocketAddr, server: ServerHandle) -> Result<SocketAddr> {
    let listener = TcpListener::bind(address)
        .with_context(|| format!("cannot listen for metrics at {address}"))?;
    let bound = listener.local_addr().context("cannot see the metrics' address")?;
    std::thread::Builder::new()
        .name("metrics".into())
        .spawn(move || {
            loop {
                match listener.accept() {
                    // Who does not listen to the answer has not asked.
                    Ok((stream, _)) => drop(answer(&stream, &server)),
                    // Out of descriptors, say: later there may be some.
                    Err(_) => std::thread::sleep(PATIENCE),
                }
            }
        })
        .context("cannot start the thread for metrics")?;
    Ok(bound)
}

fn answer(mut stream: &TcpStream, server: &ServerHandle) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut request = Vec::new();
    let mut piece = [0; 1024];
    // Not longer than its time in all, however slowly it comes.
    let deadline = std::time::Instant::now() + PATIENCE;
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let len = stream.read(&mut piece)?;
        request.extend_from_slice(&piece[..len]);
        if len == 0 || request.len() > REQUEST_LIMIT_BYTES || std::time::Instant::now() > deadline {
            return Ok(());
        }
    }
    let (status, body) = match request.starts_with(b"GET /metrics ") {
        true => ("200 OK", server.metrics()),
        false => ("404 Not Found", "the figures are at /metrics\n".into()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {METRICS_CONTENT_TYPE}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())
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
}
