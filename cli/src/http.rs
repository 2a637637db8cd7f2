//! As much of HTTP/1.1 as the control socket and the figures of `snap serve` speak (RFC 9112): requests and responses
//! with a length.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};

/// Longest request line with all headers.
const HEAD_BYTES: usize = 8 << 10;
const HEADERS: usize = 32;
/// Longest body, of a request and of a response.
const BODY_BYTES: usize = 64 << 10;

/// A request as it came.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    /// The host, and a port, that the client means.
    pub(crate) host: Option<String>,
    pub(crate) body: Vec<u8>,
    /// Whether the client may send another one.
    pub(crate) keep_alive: bool,
}

/// Writes a response. The body has a content type.
pub(crate) fn write_response(
    out: &mut impl Write,
    status: u16,
    body: Option<(&str, &str)>,
    keep_alive: bool,
) -> io::Result<()> {
    let reason = match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    };
    let mut response = format!("HTTP/1.1 {status} {reason}\r\n");
    if let Some((content_type, body)) = body {
        let len = body.len();
        response += &format!("Content-Type: {content_type}\r\nContent-Length: {len}\r\n");
    }
    response += if keep_alive { "\r\n" } else { "Connection: close\r\n\r\n" };
    response += body.map_or("", |(_, body)| body);
    out.write_all(response.as_bytes())
}

/// Why there is no request.
#[derive(Debug)]
pub(crate) enum NoRequest {
    /// The client has gone, or said nothing for too long.
    Gone,
    /// The client gets this status and message, and the connection ends.
    Refused(u16, String),
}

/// The bytes of a connection: what came too early waits here for the next request.
pub(crate) struct Connection<'a, S> {
    stream: &'a S,
    bytes: Vec<u8>,
}

/// Times that a client has.
#[derive(Clone, Copy)]
pub(crate) struct Patience {
    /// Until it begins a request.
    pub(crate) idle: Duration,
    /// For all of a request, once it has begun.
    pub(crate) request: Duration,
}

impl<'a, S: AsFd> Connection<'a, S>
where
    &'a S: Read + Write,
{
    pub(crate) fn new(stream: &'a S) -> Self {
        Self { stream, bytes: Vec::new() }
    }

    /// The next request.
    pub(crate) fn request(&mut self, patience: Patience) -> Result<Request, NoRequest> {
        if self.bytes.is_empty() {
            self.read_more(Instant::now() + patience.idle).map_err(|_| NoRequest::Gone)?;
        }
        let deadline = Instant::now() + patience.request;
        let (head, head_bytes) = loop {
            if let Some(head) = Head::parse(&self.bytes)? {
                break head;
            }
            if self.bytes.len() >= HEAD_BYTES {
                return Err(refused(431, "the request's head is longer than 8 KiB"));
            }
            self.read_more(deadline)?;
        };
        if head.expects_continue {
            let written = { self.stream }.write_all(b"HTTP/1.1 100 Continue\r\n\r\n");
            written.map_err(|_| NoRequest::Gone)?;
        }
        let end = head_bytes + head.body_bytes;
        while self.bytes.len() < end {
            self.read_more(deadline)?;
        }
        let body = self.bytes[head_bytes..end].to_vec();
        self.bytes.drain(..end);
        let Head { method, path, host, keep_alive, .. } = head;
        Ok(Request { method, path, host, body, keep_alive })
    }

    /// Reads what there is, once.
    fn read_more(&mut self, deadline: Instant) -> Result<(), NoRequest> {
        let left = deadline.saturating_duration_since(Instant::now());
        let late = || refused(408, "the request took too long");
        if left.is_zero() {
            return Err(late());
        }
        set_socket_timeout(self.stream, Timeout::Recv, Some(left)).map_err(|_| NoRequest::Gone)?;
        let mut bytes = [0; 4096];
        match { self.stream }.read(&mut bytes) {
            Ok(0) => Err(NoRequest::Gone),
            Ok(len) => {
                self.bytes.extend_from_slice(&bytes[..len]);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(late()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(_) => Err(NoRequest::Gone),
        }
    }
}

fn refused(status: u16, message: &str) -> NoRequest {
    NoRequest::Refused(status, message.to_owned())
}

/// A request without its body.
struct Head {
    method: String,
    path: String,
    host: Option<String>,
    body_bytes: usize,
    keep_alive: bool,
    expects_continue: bool,
}

impl Head {
    /// The head at the beginning of `bytes` and its length, if all of it is there.
    fn parse(bytes: &[u8]) -> Result<Option<(Head, usize)>, NoRequest> {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        let head_bytes = match request.parse(bytes) {
            Ok(httparse::Status::Complete(len)) => len,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(httparse::Error::TooManyHeaders) => {
                return Err(refused(431, "more than 32 headers"));
            }
            Err(error) => return Err(refused(400, &format!("not an HTTP/1.1 request: {error}"))),
        };
        let (Some(method), Some(path), Some(version)) =
            (request.method, request.path, request.version)
        else {
            return Err(refused(400, "not an HTTP/1.1 request"));
        };
        let mut head = Head {
            method: method.to_owned(),
            path: path.to_owned(),
            host: None,
            body_bytes: 0,
            keep_alive: version == 1,
            expects_continue: false,
        };
        let mut length = None;
        for header in request.headers.iter() {
            let value = std::str::from_utf8(header.value).unwrap_or_default().trim();
            let is = |name: &str| header.name.eq_ignore_ascii_case(name);
            if is("Content-Length") {
                let number = value.bytes().all(|byte| byte.is_ascii_digit());
                let bytes = value.parse::<usize>().ok().filter(|_| number);
                match bytes {
                    _ if length.is_some() => return Err(refused(400, "two lengths")),
                    None => return Err(refused(400, "Content-Length is no length")),
                    Some(bytes) if bytes > BODY_BYTES => {
                        return Err(refused(413, "the request's body is longer than 64 KiB"));
                    }
                    Some(bytes) => length = Some(bytes),
                }
            } else if is("Host") {
                if head.host.replace(value.to_owned()).is_some() {
                    return Err(refused(400, "two hosts"));
                }
            } else if is("Transfer-Encoding") {
                return Err(refused(501, "no transfer encodings: give a Content-Length"));
            } else if is("Connection") {
                head.keep_alive &= !value.eq_ignore_ascii_case("close");
            } else if is("Expect") {
                head.expects_continue = value.eq_ignore_ascii_case("100-continue");
            }
        }
        head.body_bytes = length.unwrap_or(0);
        Ok(Some((head, head_bytes)))
    }
}

/// Reads a response to its end: the status and the body.
pub(crate) fn read_response(stream: &mut impl Read) -> io::Result<(u16, Vec<u8>)> {
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut bytes = Vec::new();
    let limit = (HEAD_BYTES + BODY_BYTES) as u64;
    match stream.take(limit).read_to_end(&mut bytes) {
        // It has answered, and did not read the request: see Clients::add.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset && !bytes.is_empty() => {}
        read => drop(read?),
    }
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    match response.parse(&bytes) {
        Ok(httparse::Status::Complete(head_bytes)) => {
            let status = response.code.ok_or_else(|| invalid("a response without a status"))?;
            Ok((status, bytes[head_bytes..].to_vec()))
        }
        Ok(httparse::Status::Partial) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(_) => Err(invalid("the answer is not HTTP")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    const PATIENCE: Patience =
        Patience { idle: Duration::from_secs(60), request: Duration::from_secs(60) };

    fn requests(bytes: &[u8], count: usize) -> Vec<Result<Request, NoRequest>> {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(bytes).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let mut connection = Connection::new(&server);
        (0..count).map(|_| connection.request(PATIENCE)).collect()
    }

    #[track_caller]
    fn refusal(bytes: &[u8]) -> (u16, String) {
        match requests(bytes, 1).pop() {
            Some(Err(NoRequest::Refused(status, message))) => (status, message),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn requests_that_come_together_are_taken_apart() {
        let bytes = b"PATCH /vm HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}GET / HTTP/1.1\r\n\
            Connection: close\r\n\r\n";
        let mut requests = requests(bytes, 3).into_iter();
        let first = requests.next().unwrap().unwrap();
        assert_eq!((first.method.as_str(), first.path.as_str()), ("PATCH", "/vm"));
        assert_eq!((first.body.as_slice(), first.keep_alive), (b"{}".as_slice(), true));
        let second = requests.next().unwrap().unwrap();
        assert_eq!((second.path.as_str(), second.body.len()), ("/", 0));
        assert!(!second.keep_alive);
        assert!(matches!(requests.next(), Some(Err(NoRequest::Gone))));
    }

    #[test]
    fn what_is_too_long_is_refused_before_it_is_read() {
        let long = [b"GET /".as_slice(), &[b'x'; HEAD_BYTES]].concat();
        assert_eq!(refusal(&long).0, 431);
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(HEADERS + 1));
        assert_eq!(refusal(many.as_bytes()).0, 431);
        assert_eq!(refusal(b"PUT / HTTP/1.1\r\nContent-Length: 65537\r\n\r\n").0, 413);
        assert_eq!(refusal(b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n").0, 501);
    }

    #[test]
    fn what_is_not_http_is_refused() {
        for bytes in [
            &b"\x16\x03\x01\x02\x00\x01\x00"[..],
            b"hello\r\n\r\n",
            b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            b"GET / HTTP/1.1\r\nContent-Length: +1\r\n\r\n",
            b"GET / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
            b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        ] {
            assert_eq!(refusal(bytes).0, 400, "{}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn a_request_that_does_not_end_is_given_up() {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(b"GET / HTTP/1.1\r\n").unwrap();
        let patience =
            Patience { idle: Duration::from_secs(60), request: Duration::from_millis(5) };
        match Connection::new(&server).request(patience) {
            Err(NoRequest::Refused(status, _)) => assert_eq!(status, 408),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_response_is_read_as_it_was_written() {
        let mut bytes = Vec::new();
        write_response(&mut bytes, 409, Some(("text/plain", "so\n")), false).unwrap();
        let (status, body) = read_response(&mut bytes.as_slice()).unwrap();
        assert_eq!((status, body.as_slice()), (409, &b"so\n"[..]));
    }
}
