//! A VMM for the tests of the server, in a process of its own: the test binary, started again. It has anonymous memory
//! and a userfaultfd, does the handshake of Firecracker, and executes commands from stdin.
#![allow(unsafe_code, dead_code, missing_docs, unreachable_pub)]

use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use pager::uffd::{Features, Uffd};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use super::support::{Memory, PAGE, is_lost, shuffled, stamp};

const STORM_THREADS: usize = 4;

const SOCKET: &str = "PAGER_TEST_VMM_SOCKET";

/// The process of a VMM, as the test sees it.
pub struct Vmm {
    pub child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Vmm {
    /// Starts one. The module that includes this one must have a test `vmm_process` that calls [`run`].
    pub fn start(socket: &Path) -> Vmm {
        let (_crate, own) = module_path!().split_once("::").expect("a module");
        let process = format!("{}vmm_process", own.strip_suffix("vmm").expect("its name"));
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", &process, "--nocapture", "--test-threads=1"])
            .env(SOCKET, socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("it starts");
        let stdin = child.stdin.take().expect("a pipe");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        Vmm { child, stdin, stdout }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn say(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").expect("it listens");
    }

    /// Sends a command and waits for the answer. `None` if the process has ended.
    pub fn ask(&mut self, command: &str) -> Option<String> {
        // A dead process does not read it.
        writeln!(self.stdin, "{command}").ok()?;
        self.answer()
    }

    /// As `ask`. A process that does not answer in time is killed: `None`.
    pub fn ask_within(&mut self, command: &str, limit: std::time::Duration) -> Option<String> {
        let (done, timer) = std::sync::mpsc::channel::<()>();
        let pid = self.pid().to_string();
        let watch = std::thread::spawn(move || {
            if timer.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                let _ = Command::new("kill").args(["-KILL", &pid]).status();
            }
        });
        let answer = self.ask(command);
        drop(done);
        watch.join().expect("no panic");
        answer
    }

    pub fn answer(&mut self) -> Option<String> {
        let mut line = String::new();
        while self.stdout.read_line(&mut line).is_ok_and(|len| len > 0) {
            // The test harness prints lines, too.
            if let Some(at) = line.find("vmm: ") {
                return Some(line[at + 5..].trim_end().to_owned());
            }
            line.clear();
        }
        None
    }

    #[track_caller]
    pub fn ok(&mut self, command: &str) {
        assert_eq!(self.ask(command).as_deref(), Some("ok"), "{command}");
    }

    pub fn kill(&mut self) {
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it ends");
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The process of the VMM. It does nothing without a socket.
pub fn run() {
    let Some(socket) = std::env::var_os(SOCKET) else {
        return;
    };
    let mut state = State { socket: socket.into(), ..State::default() };
    for line in std::io::stdin().lines() {
        let answer = state.handle(&line.expect("text"));
        let mut out = std::io::stdout();
        writeln!(out, "\nvmm: {answer}").expect("the test reads it");
        out.flush().expect("the test reads it");
    }
    // Not the exit of the test harness: its memory may have pages that are never loaded.
    std::process::exit(0);
}

/// Threads that work, each on its own pages, until they have to end.
struct Storm {
    until: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<u64, String>>>,
}

#[derive(Default)]
struct State {
    socket: std::path::PathBuf,
    memory: Option<Arc<Memory>>,
    uffd: Option<Uffd>,
    stream: Option<UnixStream>,
    storm: Option<Storm>,
    /// The file that a clone maps.
    file: Option<File>,
}

impl State {
    fn handle(&mut self, line: &str) -> String {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |at: usize| words[at].parse::<usize>().expect("a number");
        match words[0] {
            // `map PAGES`: private, registered memory.
            "map" => {
                self.map(Memory::map(number(1) * PAGE), Features::EVENT_REMOVE);
                "ok".into()
            }
            "map-quiet" => {
                self.map(Memory::map(number(1) * PAGE), Features::NONE);
                "ok".into()
            }
            // `map-huge N`: pages of 2 MiB.
            "map-huge" => {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
                match Memory::map_with(number(1) << 21, flags) {
                    Ok(memory) => {
                        let features = Features::EVENT_REMOVE.with(Features::MISSING_HUGETLBFS);
                        self.map(memory, features);
                        "ok".into()
                    }
                    Err(error) => format!("no huge pages: {error}"),
                }
            }
            // `share PAGES`: the memory of a clone, a private mapping of the file of the server.
            "share" => match self.share(number(1)) {
                Ok(()) => "ok".into(),
                Err(error) => format!("not shared: {error}"),
            },
            // `body FORM`: the handshake.
            "body" => self.handshake(words[1]),
            // `waiting PAGE FORM`: the handshake, while a thread waits for this page. The answer is the result of the
            // touch.
            "waiting" => {
                let memory = Arc::clone(self.memory.as_ref().expect("mapped before"));
                let page = number(1);
                let touch = std::thread::spawn(move || memory.read_by_syscall(page));
                while !self.uffd.as_ref().expect("mapped before").readable() {
                    std::thread::yield_now();
                }
                let sent = self.handshake(words[2]);
                if sent != "ok" {
                    return sent;
                }
                match touch.join().expect("no panic") {
                    Ok(byte) => format!("{byte:x}"),
                    Err(error) => format!("errno {}", error.raw_os_error().unwrap_or(0)),
                }
            }
            "read" => {
                let page = number(1);
                format!("{:x}", self.memory().read_u64(page * PAGE))
            }
            "syscall" => match self.memory().read_by_syscall(number(1)) {
                Ok(byte) => format!("{byte:x}"),
                Err(error) => format!("errno {}", error.raw_os_error().unwrap_or(0)),
            },
            "remove" => {
                self.memory().remove(number(1), number(2));
                "ok".into()
            }
            // The next message of the server. Empty if it has closed the connection.
            "failure" => {
                let mut line = String::new();
                let stream = self.stream.as_ref().expect("connected before");
                // A connection that is closed with unread bytes is reset.
                let _ = BufReader::new(stream).read_line(&mut line);
                line.trim_end().to_owned()
            }
            // `unruly PAGES`: touches pages, and makes the userfaultfd blocking, which the server has, too.
            "unruly" => {
                use std::os::fd::AsRawFd;
                let fd = self.uffd.as_ref().expect("mapped before").as_fd().as_raw_fd();
                let memory = self.memory();
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        std::thread::sleep(std::time::Duration::from_millis(5));
                        // SAFETY: takes numbers, and the descriptor is open.
                        assert_eq!(unsafe { libc::fcntl(fd, libc::F_SETFL, libc::O_RDWR) }, 0);
                    });
                    for page in 0..number(1) {
                        assert_eq!(memory.read_u64(page * PAGE + 8 * (page % 512)), stamp(page));
                    }
                });
                "ok".into()
            }
            // `user UID GID GROUP`: from now on it is another user, with one supplementary group. Its userfaultfd is
            // open already, as that of a program that gives up its rights.
            "user" => {
                let [uid, gid, group] = [1, 2, 3].map(|at| number(at) as u32);
                // SAFETY: takes one number by a valid address.
                assert_eq!(unsafe { libc::setgroups(1, &raw const group) }, 0);
                // SAFETY: takes numbers.
                assert_eq!(unsafe { libc::setresgid(gid, gid, gid) }, 0);
                // SAFETY: takes numbers.
                assert_eq!(unsafe { libc::setresuid(uid, uid, uid) }, 0);
                "ok".into()
            }
            "hang-up" => {
                self.stream = None;
                "ok".into()
            }
            // `check FIRST PAGES SEED`: each page has its stamp.
            "check" => {
                let memory = self.memory();
                for page in shuffled(number(2), number(3) as u64) {
                    let page = number(1) + page;
                    let found = memory.read_u64(page * PAGE + 8 * (page % 512));
                    if found != stamp(page) {
                        return format!("page {page} has {found:x}");
                    }
                }
                "ok".into()
            }
            // `storm SEED [lossy]`: reads, writes and (without shared memory) removes with four threads, until `calm`,
            // whose answer is their result.
            "storm" => {
                let until = Arc::new(AtomicBool::new(false));
                let start = |own| {
                    let memory = Arc::clone(self.memory.as_ref().expect("mapped before"));
                    let storm = Weather {
                        own,
                        seed: (number(1) * STORM_THREADS + own) as u64,
                        removes: self.file.is_none(),
                        lossy: words.get(2) == Some(&"lossy"),
                        until: Arc::clone(&until),
                    };
                    std::thread::spawn(move || storm.rage(&memory))
                };
                let threads = (0..STORM_THREADS).map(start).collect();
                self.storm = Some(Storm { until, threads });
                "ok".into()
            }
            "calm" => {
                let Storm { until, threads } = self.storm.take().expect("a storm");
                until.store(true, Ordering::Relaxed);
                let outcomes = threads.into_iter().map(|thread| thread.join().expect("no panic"));
                match outcomes.sum::<Result<u64, String>>() {
                    Ok(checked) => format!("ok {checked}"),
                    Err(wrong) => wrong,
                }
            }
            // `churn SEED`: touches and removes forever.
            "churn" => {
                let memory = self.memory();
                println!("\nvmm: churning");
                for seed in number(1).. {
                    for page in shuffled(memory.len() / PAGE, seed as u64) {
                        let word = memory.read_u64(page * PAGE);
                        assert!(word == 0 || word == stamp(page), "page {page}: {word:x}");
                        if (page + seed) % 7 == 0 {
                            memory.remove(page, 1);
                        }
                    }
                }
                unreachable!("the numbers never end")
            }
            other => panic!("unknown command {other}"),
        }
    }

    fn map(&mut self, memory: Memory, features: Features) {
        let uffd = Uffd::open(features, Features::NONE).expect("a userfaultfd");
        // SAFETY: a mapping that is only accessed by volatile operations.
        unsafe { uffd.register(memory.addr(), memory.len() as u64) }.expect("it is registered");
        (self.memory, self.uffd) = (Some(Arc::new(memory)), Some(uffd));
    }

    /// The handshake of a clone. The server may die in the middle of it.
    fn share(&mut self, pages: usize) -> std::io::Result<()> {
        let gone = || std::io::Error::other("the server is gone");
        let stream = UnixStream::connect(&self.socket)?;
        let len = pages * PAGE;
        let wanted = format!("{{\"share\":{{\"layers\":[\"test\"],\"memory_bytes\":{len}}}}}\n");
        send(&stream, wanted.as_bytes(), &[])?;
        let file = match receive_file(&stream)? {
            (Some(file), _) => file,
            (None, line) if line.is_empty() => return Err(gone()),
            (None, line) => return Err(std::io::Error::other(line)),
        };
        self.map(Memory::of_file(&file, len), Features::EVENT_REMOVE.with(Features::MISSING_SHMEM));
        let address = self.memory().addr();
        let region = format!(
            "[{{\"base_host_virt_addr\":{address},\"size\":{len},\"offset\":0,\"page_size\":4096}}]\n"
        );
        let uffd = [self.uffd.as_ref().expect("just made").as_fd()];
        send(&stream, region.as_bytes(), &uffd)?;
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line)?;
        (self.stream, self.file) = (Some(stream), Some(file));
        match line.trim_end() {
            "{\"accepted\":{}}" => Ok(()),
            "" => Err(gone()),
            other => Err(std::io::Error::other(other.to_owned())),
        }
    }

    fn memory(&self) -> &Memory {
        self.memory.as_ref().expect("mapped before")
    }

    fn handshake(&mut self, form: &str) -> String {
        let stream = match UnixStream::connect(&self.socket) {
            Ok(stream) => stream,
            Err(error) => return format!("not connected: {error}"),
        };
        if form == "silent" {
            self.stream = Some(stream);
            return "ok".into();
        }
        let memory = self.memory();
        let (addr, len) = (memory.addr(), memory.len() as u64);
        let region = |addr: u64, len: u64, offset: u64, page: &str| {
            format!(r#"{{"base_host_virt_addr":{addr},"size":{len},"offset":{offset},{page}}}"#)
        };
        let whole = |page: &str| format!("[{}]", region(addr, len, 0, page));
        let half = len / 2;
        let body = match form {
            "old" | "halves" => format!(
                "[{},{}]",
                region(addr, half, 0, r#""page_size_kib":4096"#),
                region(addr + half, half, half, r#""page_size_kib":4096,"later":{"a":[1]}"#)
            ),
            "huge" => whole(r#""page_size":2097152"#),
            "big" => {
                let padding = format!(r#""page_size":4096,"note":"{}""#, "x".repeat(300_000));
                whole(&padding)
            }
            "too-big" => {
                let padding = format!(r#""page_size":4096,"note":"{}""#, "x".repeat(2_000_000));
                whole(&padding)
            }
            "overlapping" => format!(
                "[{},{}]",
                region(addr, half + PAGE as u64, 0, r#""page_size":4096"#),
                region(addr + half, half - PAGE as u64, half + PAGE as u64, r#""page_size":4096"#)
            ),
            "beyond" => format!("[{}]", region(addr, len, 4096, r#""page_size":4096"#)),
            "wrapping" => {
                format!("[{}]", region(addr, u64::MAX - 4095, 0, r#""page_size":4096"#))
            }
            "endless" => {
                let all = u64::MAX - 4095;
                let both = [0, 4096].map(|at| region(at, all - at, 0, r#""page_size":4096"#));
                format!("[{}]", both.join(","))
            }
            "odd" => format!("[{}]", region(addr + 1, len, 0, r#""page_size":4096"#)),
            "garbage" => "\u{1}\u{2}garbage]".into(),
            "empty" => "[]".into(),
            _ => whole(r#""page_size":4096,"page_size_kib":4096"#),
        };
        let null = File::open("/dev/null").expect("there is one");
        let uffd = self.uffd.as_ref().expect("mapped before").as_fd();
        let (one, two, file) = ([uffd], [uffd, uffd], [null.as_fd()]);
        let (many, with_file) = ([uffd; 12], [null.as_fd(), uffd]);
        let bytes = body.as_bytes();
        let sent = match form {
            "no-descriptor" => send(&stream, bytes, &[]),
            "two" => send(&stream, bytes, &two),
            "many" => send(&stream, bytes, &many),
            "with-file" => send(&stream, bytes, &with_file),
            "noise" => send(&stream, b"hello", &[]),
            "figures" => send(&stream, b"{\"stats\":{}}\n", &[]),
            // As programs do that expect no answer.
            "quick" => {
                let sent = send(&stream, bytes, &one);
                drop(stream);
                return sent.map_or_else(|error| format!("not sent: {error}"), |()| "ok".into());
            }
            "file" => send(&stream, bytes, &file),
            "first-byte" => {
                send(&stream, &bytes[..1], &one).and_then(|()| send(&stream, &bytes[1..], &[]))
            }
            "last-byte" => {
                let (most, last) = bytes.split_at(bytes.len() - 1);
                most.chunks(7)
                    .try_for_each(|part| send(&stream, part, &[]))
                    .and_then(|()| send(&stream, last, &one))
            }
            "half-open" => send(&stream, &bytes[..20], &one),
            "left" => {
                let sent = send(&stream, &bytes[..20], &one);
                drop(stream);
                return if sent.is_ok() { "ok".into() } else { "not sent".into() };
            }
            _ => send(&stream, bytes, &one),
        };
        self.stream = Some(stream);
        sent.map_or_else(|error| format!("not sent: {error}"), |()| "ok".into())
    }
}

/// One thread of a storm. It works on every `STORM_THREADS`th page, and knows the right content of each.
struct Weather {
    own: usize,
    seed: u64,
    removes: bool,
    lossy: bool,
    until: Arc<AtomicBool>,
}

impl Weather {
    /// Returns how many pages were checked.
    fn rage(&self, memory: &Memory) -> Result<u64, String> {
        let pages = memory.len() / PAGE;
        // A page that cannot be loaded has no content, until it was removed.
        let first = |page| (!(self.lossy && is_lost(page))).then(|| stamp(page));
        let mut expected: Vec<Option<u64>> = (0..pages).map(first).collect();
        let mut checked = 0;
        let mut check = |page: usize, expected: Option<u64>| {
            checked += 1;
            let Some(expected) = expected else {
                return match memory.read_by_syscall(page).map_err(|error| error.raw_os_error()) {
                    Err(Some(libc::EFAULT)) => Ok(()),
                    found => Err(format!("page {page} is lost, and was read: {found:?}")),
                };
            };
            match memory.read_u64(page * PAGE) {
                found if found == expected => Ok(()),
                found => Err(format!("page {page} has {found:x} instead of {expected:x}")),
            }
        };
        let mut random = self.seed * 2 + 1;
        let mut next = |below: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random >> 33) as usize % below
        };
        while !self.until.load(Ordering::Relaxed) {
            let page = next(pages / STORM_THREADS) * STORM_THREADS + self.own;
            match (next(16), expected[page]) {
                (0..4, _) if self.removes => {
                    memory.remove(page, 1);
                    expected[page] = Some(0);
                }
                (4..7, Some(was)) => {
                    let byte = next(256) as u8;
                    memory.write(page * PAGE + 3, byte);
                    let mut bytes = was.to_ne_bytes();
                    bytes[3] = byte;
                    expected[page] = Some(u64::from_ne_bytes(bytes));
                }
                (_, now) => check(page, now)?,
            }
        }
        // All pages, including those that were never touched.
        (self.own..pages)
            .step_by(STORM_THREADS)
            .try_for_each(|page| check(page, expected[page]))?;
        Ok(checked)
    }
}

/// The line of acceptance with its descriptor, or another line.
fn receive_file(stream: &UnixStream) -> std::io::Result<(Option<File>, String)> {
    let mut bytes = [0; 256];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = rustix::net::recvmsg(stream, &mut into, &mut control, flags)?.bytes;
    let file = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next().map(File::from),
        _ => None,
    });
    Ok((file, String::from_utf8_lossy(&bytes[..received]).trim_end().to_owned()))
}

fn send(stream: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> std::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(12))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    let sent =
        rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    let mut stream = stream;
    stream.write_all(&bytes[sent..])
}
