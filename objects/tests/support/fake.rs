//! A server of objects that answers late, wrongly or not at all, and records its requests.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// A request that the server has received.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    pub(crate) method: String,
    pub(crate) path: String,
    /// The range of the answer.
    pub(crate) range: Range<u64>,
    pub(crate) if_match: Option<String>,
    pub(crate) started: Instant,
    pub(crate) ended: Instant,
    pub(crate) status: u16,
}

/// What happens to a request.
#[derive(Clone, Debug, Default)]
pub(crate) enum Fate {
    /// It is answered.
    #[default]
    Answer,
    /// The answer has this status, and an S3 error with this code.
    Status(u16, &'static str),
    /// The body and the connection end after this many bytes.
    Truncate(usize),
    /// The connection ends without an answer.
    Reset,
    /// The answer is of the whole object.
    NoRanges,
    /// The bytes of the body are flipped.
    Flip,
    /// The answer is delayed by this time.
    Late(Duration),
}

type Decide = dyn Fn(usize, &Received) -> Fate + Send + Sync;

struct Object {
    bytes: Arc<Vec<u8>>,
    etag: Option<String>,
}

#[derive(Default)]
struct State {
    objects: HashMap<String, Object>,
    received: Vec<Received>,
    decide: Option<Arc<Decide>>,
}

struct Shared {
    state: Mutex<State>,
    latency: Duration,
    /// Bytes a second of one connection.
    rate: Option<u64>,
    /// The link that all connections share.
    link: Option<Link>,
    now: AtomicUsize,
    most: AtomicUsize,
    number: AtomicUsize,
    etags: AtomicUsize,
}

/// The server. Its threads end with the process.
#[derive(Clone)]
pub(crate) struct Fake {
    shared: Arc<Shared>,
    pub(crate) address: SocketAddr,
}

impl Fake {
    /// A server whose first bytes come after this latency.
    pub(crate) fn start(latency: Duration) -> Self {
        Self::with_rate(latency, None)
    }

    /// A server that also limits the bytes a second of each connection.
    pub(crate) fn with_rate(latency: Duration, rate: Option<u64>) -> Self {
        Self::with(latency, rate, None)
    }

    /// A server whose connections share a link of this many bytes a second.
    pub(crate) fn with_link(latency: Duration, rate: u64) -> Self {
        let link = Link { rate, free_at: Mutex::new(Instant::now()) };
        Self::with(latency, None, Some(link))
    }

    fn with(latency: Duration, rate: Option<u64>, link: Option<Link>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it has an address");
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            latency,
            rate,
            link,
            now: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            number: AtomicUsize::new(0),
            etags: AtomicUsize::new(0),
        });
        let accepting = Arc::clone(&shared);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&accepting);
                // A client that goes away ends the connection.
                thread::spawn(move || _ = serve(&shared, stream));
            }
        });
        Self { shared, address }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.shared.state.lock().expect("no thread panics with it")
    }

    /// Puts an object at a path, `/a/b`, with a new ETag.
    pub(crate) fn put(&self, path: &str, bytes: impl Into<Vec<u8>>) {
        let number = self.shared.etags.fetch_add(1, Ordering::SeqCst);
        self.put_with(path, bytes, Some(format!("\"etag-{number}\"")));
    }

    pub(crate) fn put_with(&self, path: &str, bytes: impl Into<Vec<u8>>, etag: Option<String>) {
        let object = Object { bytes: Arc::new(bytes.into()), etag };
        self.state().objects.insert(path.into(), object);
    }

    pub(crate) fn remove(&self, path: &str) {
        self.state().objects.remove(path);
    }

    /// The paths of all objects.
    pub(crate) fn paths(&self) -> Vec<String> {
        self.state().objects.keys().cloned().collect()
    }

    pub(crate) fn bytes(&self, path: &str) -> Vec<u8> {
        self.state().objects[path].bytes.to_vec()
    }

    pub(crate) fn len_bytes(&self, path: &str) -> u64 {
        self.state().objects[path].bytes.len() as u64
    }

    /// Decides what happens to each request from now on, by its number, from 0.
    pub(crate) fn decide(&self, decide: impl Fn(usize, &Received) -> Fate + Send + Sync + 'static) {
        self.shared.number.store(0, Ordering::SeqCst);
        self.state().decide = Some(Arc::new(decide));
    }

    /// The requests since the last call.
    pub(crate) fn take_received(&self) -> Vec<Received> {
        // A client may get its answer a moment before the request is recorded.
        while self.shared.now.load(Ordering::SeqCst) > 0 {
            thread::yield_now();
        }
        std::mem::take(&mut self.state().received)
    }

    /// The most requests that were under way at the same time.
    pub(crate) fn most_concurrent(&self) -> usize {
        self.shared.most.load(Ordering::SeqCst)
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

/// The longest chain of requests. A request that started after another had ended may have needed its answer.
pub(crate) fn depth(received: &[Received]) -> usize {
    let mut by_start = received.to_vec();
    by_start.sort_by_key(|one| one.started);
    let mut depths: Vec<usize> = Vec::new();
    for one in &by_start {
        let before = by_start.iter().zip(&depths).filter(|(other, _)| other.ended <= one.started);
        depths.push(1 + before.map(|(_, depth)| *depth).max().unwrap_or(0));
    }
    depths.into_iter().max().unwrap_or(0)
}

/// Bytes of a block of the cache.
pub(crate) const BLOCK_BYTES: u64 = 128 << 10;

/// How often each block was sent.
pub(crate) fn times_sent(received: &[Received], path: &str) -> HashMap<u64, usize> {
    let mut times = HashMap::new();
    for one in received.iter().filter(|one| one.path == path && one.method == "GET") {
        for block in one.range.start / BLOCK_BYTES..one.range.end.div_ceil(BLOCK_BYTES) {
            *times.entry(block).or_default() += 1;
        }
    }
    times
}

/// How often each block of an object was sent as a whole.
pub(crate) fn whole_times_sent(
    received: &[Received],
    path: &str,
    len_bytes: u64,
) -> HashMap<u64, usize> {
    let mut times = HashMap::new();
    let sent = |one: &&Received| one.path == path && one.method == "GET" && one.status < 300;
    for one in received.iter().filter(sent) {
        for block in one.range.start.div_ceil(BLOCK_BYTES)..one.range.end.div_ceil(BLOCK_BYTES) {
            if ((block + 1) * BLOCK_BYTES).min(len_bytes) <= one.range.end {
                *times.entry(block).or_default() += 1;
            }
        }
    }
    times
}

struct Request {
    method: String,
    path: String,
    range: Option<String>,
    if_match: Option<String>,
}

fn read_request(reader: &mut BufReader<TcpStream>) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut request = Request { method, path, range: None, if_match: None };
    let mut body_bytes = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        let Some((name, value)) = line.split_once(':') else { continue };
        let value = value.trim().to_owned();
        match name.to_ascii_lowercase().as_str() {
            "range" => request.range = Some(value),
            "if-match" => request.if_match = Some(value),
            "content-length" => body_bytes = value.parse().unwrap_or(0),
            _ => {}
        }
    }
    std::io::copy(&mut reader.by_ref().take(body_bytes), &mut std::io::sink())?;
    Ok(Some(request))
}

fn serve(shared: &Shared, stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut out = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    while let Some(request) = read_request(&mut reader)? {
        let now = shared.now.fetch_add(1, Ordering::SeqCst) + 1;
        shared.most.fetch_max(now, Ordering::SeqCst);
        let keep_open = answer(shared, &request, &mut out);
        shared.now.fetch_sub(1, Ordering::SeqCst);
        if !keep_open? {
            break;
        }
    }
    Ok(())
}

/// Whether the connection stays.
fn answer(shared: &Shared, request: &Request, out: &mut TcpStream) -> std::io::Result<bool> {
    let started = Instant::now();
    let number = shared.number.fetch_add(1, Ordering::SeqCst);
    thread::sleep(shared.latency);
    let (object, decide) = {
        let state = shared.state.lock().expect("no thread panics with it");
        let object = state.objects.get(&request.path);
        let object = object.map(|object| (Arc::clone(&object.bytes), object.etag.clone()));
        (object, state.decide.clone())
    };
    let mut received = Received {
        method: request.method.clone(),
        path: request.path.clone(),
        range: 0..0,
        if_match: request.if_match.clone(),
        started,
        ended: started,
        status: 0,
    };
    let (bytes, etag) = object.clone().unwrap_or_default();
    let len = bytes.len() as u64;
    let range = request.range.as_deref().map(|text| parse(text, len));
    received.range = range.clone().flatten().unwrap_or(0..len);
    let fate = decide.map_or(Fate::Answer, |decide| decide(number, &received));
    if let Fate::Late(time) = fate {
        thread::sleep(time);
    }
    let other_etag = |wanted: &String| etag.as_ref() != Some(wanted);
    let (status, code) = match (&fate, &object, &range) {
        (Fate::Status(status, code), ..) => (*status, *code),
        (_, None, _) => (404, "NoSuchKey"),
        _ if request.if_match.as_ref().is_some_and(other_etag) => (412, "PreconditionFailed"),
        (Fate::NoRanges, ..) | (_, _, None) => (200, ""),
        (_, _, Some(None)) => (416, "InvalidRange"),
        _ => (206, ""),
    };
    received.status = status;
    let sent = match fate {
        Fate::Reset => Ok(false),
        _ if status >= 300 => {
            let body = format!("<Error><Code>{code}</Code><Message>hunter2</Message></Error>");
            let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n", body.len());
            let body = if request.method == "HEAD" { "" } else { &body };
            out.write_all((head + body).as_bytes()).map(|()| true)
        }
        fate => {
            let sent = if status == 200 { 0..len } else { received.range.clone() };
            received.range = sent.clone();
            let mut head = format!(
                "HTTP/1.1 {status} OK\r\ncontent-length: {}\r\nlast-modified: Tue, 03 Nov 2026 08:00:00 GMT\r\n",
                sent.end - sent.start
            );
            if status == 206 {
                let last = sent.end - 1;
                head += &format!("content-range: bytes {}-{last}/{len}\r\n", sent.start);
            }
            if let Some(etag) = &etag {
                head += &format!("etag: {etag}\r\n");
            }
            out.write_all((head + "\r\n").as_bytes())?;
            let body = &bytes[sent.start as usize..sent.end as usize];
            match (request.method.as_str(), fate) {
                ("HEAD", _) => Ok(true),
                (_, Fate::Truncate(after)) => {
                    let part = &body[..after.min(body.len())];
                    send(shared, out, part).map(|()| false)
                }
                (_, Fate::Flip) => {
                    let flipped: Vec<u8> = body.iter().map(|byte| !byte).collect();
                    send(shared, out, &flipped).map(|()| true)
                }
                _ => send(shared, out, body).map(|()| true),
            }
        }
    };
    received.ended = Instant::now();
    shared.state.lock().expect("no thread panics with it").received.push(received);
    sent
}

fn send(shared: &Shared, out: &mut TcpStream, bytes: &[u8]) -> std::io::Result<()> {
    let started = Instant::now();
    for (number, part) in (1..).zip(bytes.chunks(64 << 10)) {
        if let Some(link) = &shared.link {
            link.wait(part.len());
        }
        out.write_all(part)?;
        if let Some(rate) = shared.rate {
            let due = Duration::from_secs_f64((number * (64u64 << 10)) as f64 / rate as f64);
            thread::sleep(due.saturating_sub(started.elapsed()));
        }
    }
    Ok(())
}

/// A link with a rate: a token bucket.
struct Link {
    /// Bytes a second.
    rate: u64,
    free_at: Mutex<Instant>,
}

impl Link {
    /// How much time an idle link catches up on: a thread that sleeps wakes up late.
    const BURST: Duration = Duration::from_millis(1);

    /// Waits until these bytes have been sent. The parts of concurrent answers are sent in turn.
    fn wait(&self, len_bytes: usize) {
        let now = Instant::now();
        let sent_at = {
            let mut free_at = self.free_at.lock().expect("no thread panics with it");
            let from = (*free_at).max(now.checked_sub(Self::BURST).unwrap_or(now));
            *free_at = from + Duration::from_secs_f64(len_bytes as f64 / self.rate as f64);
            *free_at
        };
        thread::sleep(sent_at.saturating_duration_since(now));
    }
}

fn parse(range: &str, len: u64) -> Option<Range<u64>> {
    let (start, end) = range.strip_prefix("bytes=")?.split_once('-')?;
    let range = match (start, end) {
        ("", suffix) => len.saturating_sub(suffix.parse().ok()?)..len,
        (start, "") => start.parse().ok()?..len,
        (start, end) => start.parse().ok()?..(end.parse::<u64>().ok()? + 1).min(len),
    };
    (range.start < range.end).then_some(range)
}
