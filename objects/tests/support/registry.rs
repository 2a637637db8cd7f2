//! An OCI registry that asks for tokens, redirects reads of blobs to addresses that expire, and records its requests.

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use sha2::{Digest, Sha256};

/// A request, and the status of its answer.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) authorization: Option<String>,
    pub(crate) status: u16,
}

/// What the registry does.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) blobs: HashMap<String, Vec<u8>>,
    /// By tag and by digest.
    pub(crate) manifests: HashMap<String, Vec<u8>>,
    pub(crate) received: Vec<Received>,
    /// The tokens that are valid. `None`: none is asked for.
    pub(crate) tokens: Option<HashSet<String>>,
    /// The user and password, in base 64, that tokens are given to. `None`: to everyone.
    pub(crate) basic: Option<String>,
    tokens_given: usize,
    /// Whether reads of blobs are redirected.
    pub(crate) redirects: bool,
    /// Signed addresses with a smaller number have expired.
    pub(crate) expired: usize,
    signed: usize,
    /// Answers with ranges of blobs end after this many bytes, this many times.
    pub(crate) truncated: (usize, usize),
    /// Answers with ranges of blobs have at most this many bytes, and say so.
    pub(crate) most_range_bytes: Option<usize>,
    /// The status of the next uploads.
    pub(crate) failing_uploads: Vec<u16>,
}

#[derive(Clone)]
pub(crate) struct FakeRegistry {
    state: Arc<Mutex<State>>,
    pub(crate) address: SocketAddr,
}

struct Request {
    method: String,
    path: String,
    headers: HashMap<String, String>,
    body: Vec<u8>,
}

/// Status, headers, body.
type Answer = (u16, String, Vec<u8>);

pub(crate) fn digest_of(bytes: &[u8]) -> String {
    let digits = Sha256::digest(bytes);
    format!("sha256:{}", digits.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

impl FakeRegistry {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it has an address");
        let registry = Self { state: Arc::default(), address };
        let accepting = registry.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let registry = accepting.clone();
                // A client that goes away ends the connection.
                thread::spawn(move || _ = registry.serve(stream));
            }
        });
        registry
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics with it")
    }

    pub(crate) fn url(&self, reference: &str) -> String {
        format!("oci://{}/{reference}", self.address)
    }

    pub(crate) fn take_received(&self) -> Vec<Received> {
        std::mem::take(&mut self.state().received)
    }

    /// All tokens that were given are invalid from now on.
    pub(crate) fn expire_tokens(&self) {
        self.state().tokens = Some(HashSet::new());
    }

    /// All addresses that were given are invalid from now on.
    pub(crate) fn expire_redirects(&self) {
        let mut state = self.state();
        state.expired = state.signed;
    }

    fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut out = stream.try_clone()?;
        let mut reader = BufReader::new(stream);
        while let Some(request) = read(&mut reader)? {
            let (status, mut headers, body) = self.answer(&request);
            let mut state = self.state();
            let authorization = request.headers.get("authorization").cloned();
            let (method, path) = (request.method.clone(), request.path.clone());
            state.received.push(Received { method, path, authorization, status });
            let cut = match state.truncated {
                (at, times @ 1..) if status == 206 && body.len() > at => {
                    state.truncated = (at, times - 1);
                    Some(at)
                }
                _ => None,
            };
            drop(state);
            headers += &format!("content-length: {}\r\n", body.len());
            out.write_all(format!("HTTP/1.1 {status} X\r\n{headers}\r\n").as_bytes())?;
            if request.method != "HEAD" {
                out.write_all(&body[..cut.unwrap_or(body.len())])?;
            }
            if cut.is_some() {
                break;
            }
        }
        Ok(())
    }

    fn answer(&self, request: &Request) -> Answer {
        let mut state = self.state();
        let path = request.path.split('?').next().unwrap_or_default();
        if path == "/token" {
            return state.token(request);
        }
        if let Some(rest) = path.strip_prefix("/signed/") {
            // A token of the registry must not be sent there.
            assert_eq!(request.headers.get("authorization"), None, "{path}");
            let (number, digest) = rest.split_once('/').expect("two parts");
            let number: usize = number.parse().expect("a number");
            return match number >= state.expired {
                true => state.range(digest, request),
                false => (403, String::new(), b"<Code>AccessDenied</Code>hunter2".to_vec()),
            };
        }
        let authorization = request.headers.get("authorization").cloned().unwrap_or_default();
        let token = authorization.strip_prefix("Bearer ").unwrap_or_default();
        if state.tokens.as_ref().is_some_and(|tokens| !tokens.contains(token)) {
            let realm = format!("http://{}/token", self.address);
            let header = format!("www-authenticate: Bearer realm=\"{realm}\",service=\"fake\"\r\n");
            return (401, header, Vec::new());
        }
        if path == "/v2/" {
            return (200, String::new(), Vec::new());
        }
        match path.rsplit('/').collect::<Vec<_>>()[..] {
            [reference, "manifests", ..] => state.manifest(reference, request),
            [session, "uploads", "blobs", ..] => state.upload(session, request),
            [digest, "blobs", ..] => state.blob(digest, request, self.address),
            _ => (404, String::new(), Vec::new()),
        }
    }
}

impl State {
    fn token(&mut self, request: &Request) -> Answer {
        let authorization = request.headers.get("authorization");
        let expected = self.basic.as_ref().map(|basic| format!("Basic {basic}"));
        if expected.is_some() && authorization != expected.as_ref() {
            return (401, String::new(), b"hunter2".to_vec());
        }
        self.tokens_given += 1;
        let token = format!("hunter2token{}", self.tokens_given);
        let answer = format!("{{\"token\":\"{token}\",\"expires_in\":60}}");
        self.tokens.get_or_insert_default().insert(token);
        (200, String::new(), answer.into_bytes())
    }

    fn manifest(&mut self, reference: &str, request: &Request) -> Answer {
        if request.method == "PUT" {
            let digest = digest_of(&request.body);
            self.manifests.insert(reference.to_owned(), request.body.clone());
            self.manifests.insert(digest.clone(), request.body.clone());
            return (201, format!("location: /v2/x/manifests/{digest}\r\n"), Vec::new());
        }
        match self.manifests.get(reference) {
            Some(bytes) => (200, String::new(), bytes.clone()),
            None => (404, String::new(), b"{\"errors\":[]}".to_vec()),
        }
    }

    fn upload(&mut self, session: &str, request: &Request) -> Answer {
        if request.method == "POST" {
            let location = format!("{}{}", request.path, "session");
            return (202, format!("location: {location}\r\n"), Vec::new());
        }
        assert_eq!((request.method.as_str(), session), ("PUT", "session"));
        if let Some(status) = self.failing_uploads.pop() {
            return (status, String::new(), b"hunter2".to_vec());
        }
        let (_, digest) = request.path.split_once("digest=").expect("a digest");
        let digest = digest.replace("%3A", ":");
        assert_eq!(digest, digest_of(&request.body));
        self.blobs.insert(digest, request.body.clone());
        (201, "location: /v2/x\r\n".to_owned(), Vec::new())
    }

    fn blob(&mut self, digest: &str, request: &Request, address: SocketAddr) -> Answer {
        if !self.blobs.contains_key(digest) {
            return (404, String::new(), Vec::new());
        }
        if self.redirects && request.method == "GET" {
            let location = format!("http://{address}/signed/{}/{digest}?sig=hunter2", self.signed);
            self.signed += 1;
            return (307, format!("location: {location}\r\n"), Vec::new());
        }
        self.range(digest, request)
    }

    fn range(&self, digest: &str, request: &Request) -> Answer {
        let Some(bytes) = self.blobs.get(digest) else { return (404, String::new(), Vec::new()) };
        let range = request.headers.get("range").and_then(|range| range.strip_prefix("bytes="));
        let Some((start, last)) = range.and_then(|range| range.split_once('-')) else {
            return (200, String::new(), bytes.clone());
        };
        let start: usize = start.parse().expect("a number");
        let end = (last.parse::<usize>().expect("a number") + 1).min(bytes.len());
        let end = self.most_range_bytes.map_or(end, |most| end.min(start + most));
        let header = format!("content-range: bytes {start}-{}/{}\r\n", end - 1, bytes.len());
        (206, header, bytes[start..end].to_vec())
    }
}

fn read(reader: &mut BufReader<TcpStream>) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        let Some((name, value)) = line.split_once(':') else { continue };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let len = headers.get("content-length").and_then(|len| len.parse().ok()).unwrap_or(0);
    let mut body = vec![0; len];
    reader.read_exact(&mut body)?;
    Ok(Some(Request { method, path, headers, body }))
}
