//! Random combinations with processes: servers that are killed and started again, guests with private memory and clones
//! that share, which read, write, remove and are killed, errors of the source; and one keeper that outlives them all.
//! Every page that is read is checked by its content.
//!
//!     SNAP_CHAOS_SECONDS=600 SNAP_CHAOS_SEED=7 cargo test -p snapvm-pager --release --features serve --test chaos_served -- --nocapture
#![allow(missing_docs)]

#[path = "support/daemon.rs"]
mod daemon;
mod support;
#[path = "support/vmm.rs"]
mod vmm;

use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

use daemon::{Daemon, Keeping};
use support::{HUNG, Random, chaos_seed, number_from_env, rss_kib, userfaultfd_works, watchdog};
use vmm::Vmm;

const PAGES: usize = 1024;
const GUESTS: usize = 4;
/// The allowed growth of this process, which has the keeper, between two calm moments.
const KEPT_KIB: u64 = 4096;
type Step = fn(&mut Chaos);
/// The actions, each as often as it is listed, after there are enough guests.
const STEPS: [(&str, Step); 10] = [
    ("the server is killed", Chaos::kill_server),
    ("the server is killed", Chaos::kill_server),
    ("the server is killed", Chaos::kill_server),
    ("a guest is killed", Chaos::kill_guest_and_wait),
    ("a guest is killed", Chaos::kill_guest_and_wait),
    ("a guest and the server are killed", Chaos::kill_both),
    ("the server is killed in a handshake", Chaos::kill_server_in_a_handshake),
    ("a guest is checked", Chaos::check_one),
    ("a pause", Chaos::pause_long),
    ("a pause", Chaos::pause_long),
];

/// Not a test: the process of a VMM.
#[test]
fn vmm_process() {
    vmm::run();
}

/// Not a test: the process of a server.
#[test]
fn daemon_process() {
    daemon::run();
}

#[test]
fn chaos() {
    if !userfaultfd_works("chaos") {
        return;
    }
    let seconds = number_from_env("SNAP_CHAOS_SECONDS").unwrap_or(4);
    let seed = chaos_seed();
    eprintln!("chaos: {seconds} s, SNAP_CHAOS_SEED={seed}");
    let mut chaos = Chaos::start(seed);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut calm_at = Instant::now() + Duration::from_secs(1);
    while Instant::now() < end {
        chaos.step();
        if Instant::now() > calm_at {
            chaos.calm();
            calm_at = Instant::now() + Duration::from_secs(10);
        }
    }
    chaos.calm();
    eprintln!("chaos: {:?}", chaos.counts);
    drop(chaos.server);
    assert_eq!(chaos.keeping.finish(), 0, "no guest is left");
}

#[derive(Debug, Default)]
struct Counts {
    guests: u64,
    clones: u64,
    pages_checked: u64,
    servers_killed: u64,
    taken_over: u64,
    guests_killed: u64,
    calm_moments: u64,
}

struct Chaos {
    folder: tempfile::TempDir,
    random: Random,
    keeping: Keeping,
    server: Daemon,
    guests: Vec<Vmm>,
    counts: Counts,
    /// The descriptors of a server without guests: before and after it has created a file to share.
    server_files: [usize; 2],
    /// The descriptors and the memory of this process in the first calm moment.
    own: Option<(usize, u64)>,
    steps: Sender<&'static str>,
}

impl Chaos {
    fn start(seed: u64) -> Chaos {
        let folder = tempfile::tempdir().expect("a folder");
        let keeping = Keeping::start(folder.path(), Duration::from_secs(3600));
        let server = Daemon::start(folder.path(), PAGES, "lossy");
        let before = files(server.child.id());
        let mut chaos = Chaos {
            folder,
            random: Random::new(seed),
            keeping,
            server,
            guests: Vec::new(),
            counts: Counts::default(),
            server_files: [before, before],
            own: None,
            steps: watchdog(),
        };
        chaos.add_guest("share");
        drop(chaos.guests.pop());
        chaos.server.expect("Ended");
        // The shared file, and its userfaultfd.
        chaos.server_files[1] = before + 2;
        chaos.until_nothing_is_left();
        chaos
    }

    fn step(&mut self) {
        if self.guests.len() < GUESTS {
            self.begin("a new guest");
            let kind = ["map", "share"][self.random.below(2)];
            return self.add_guest(kind);
        }
        let (name, step) = STEPS[self.random.below(STEPS.len())];
        self.begin(name);
        step(self);
    }

    fn begin(&self, step: &'static str) {
        self.steps.send(step).expect("the watchdog lives");
    }

    fn pause(&mut self, most_us: usize) {
        thread::sleep(Duration::from_micros(self.random.below(most_us) as u64));
    }

    fn pause_long(&mut self) {
        self.pause(20_000);
    }

    fn kill_guest_and_wait(&mut self) {
        self.kill_guest();
        self.server.expect("Ended");
    }

    fn kill_both(&mut self) {
        self.kill_guest();
        self.kill_server();
    }

    fn check_one(&mut self) {
        let guest = self.random.below(self.guests.len());
        let guest = self.guests.swap_remove(guest);
        self.check(guest);
        self.server.expect("Ended");
    }

    fn add_guest(&mut self, kind: &str) {
        let mut guest = Vmm::start(&daemon::socket(self.folder.path()));
        guest.ok(&format!("{kind} {PAGES}"));
        if kind == "map" {
            guest.ok("body new");
        }
        self.server.expect("Served");
        self.set_going(guest);
        self.counts.clones += u64::from(kind == "share");
    }

    fn set_going(&mut self, mut guest: Vmm) {
        guest.ok(&format!("storm {} lossy", self.counts.guests));
        self.guests.push(guest);
        self.counts.guests += 1;
    }

    fn kill_guest(&mut self) {
        let guest = self.random.below(self.guests.len());
        self.guests.swap_remove(guest).kill();
        self.counts.guests_killed += 1;
    }

    fn kill_server(&mut self) {
        self.pause(3000);
        assert_eq!(self.next_server(), self.guests.len());
    }

    /// For a clone in its handshake: either the next server takes it over, or it gets the error that no server does.
    fn kill_server_in_a_handshake(&mut self) {
        let mut guest = Vmm::start(&daemon::socket(self.folder.path()));
        guest.say(&format!("share {PAGES}"));
        self.pause(3000);
        self.next_server();
        if guest.answer().as_deref() == Some("ok") {
            self.set_going(guest);
            self.counts.clones += 1;
        }
    }

    /// Kills the server and starts another one. Returns how many guests that one takes over.
    fn next_server(&mut self) -> usize {
        self.server.end();
        self.keeping.expect("Lost");
        self.server = Daemon::start(self.folder.path(), PAGES, "lossy");
        let event = self.keeping.expect("TakenOver");
        let guests = event.split_once("guests: ").and_then(|(_, rest)| rest.split_once(' '));
        let guests = guests.and_then(|(number, _)| number.parse().ok()).expect("a number");
        self.server.takes_over(guests);
        self.counts.servers_killed += 1;
        self.counts.taken_over += guests as u64;
        guests
    }

    /// Lets a guest check all of its pages, and end.
    fn check(&mut self, mut guest: Vmm) {
        let found = guest.ask("calm").expect("it lives");
        let checked = found.strip_prefix("ok ").and_then(|pages| pages.parse::<u64>().ok());
        self.counts.pages_checked += checked.expect(&found);
    }

    /// After all guests have ended, the server and the keeper hold nothing of them.
    fn calm(&mut self) {
        self.begin("a calm moment");
        for guest in std::mem::take(&mut self.guests) {
            self.check(guest);
            self.server.expect("Ended");
        }
        self.until_nothing_is_left();
        self.counts.calm_moments += 1;
    }

    /// Descriptors are closed a moment after the event.
    fn until_nothing_is_left(&mut self) {
        let (own_files, own_kib) =
            *self.own.get_or_insert_with(|| (files(std::process::id()), rss_kib()));
        let begun = Instant::now();
        loop {
            let server = files(self.server.child.id());
            let own = files(std::process::id());
            if self.server_files.contains(&server) && own <= own_files {
                break;
            }
            assert!(begun.elapsed() < HUNG / 2, "{server} and {own} descriptors are left");
            thread::yield_now();
        }
        assert!(rss_kib() <= own_kib + KEPT_KIB, "from {own_kib} to {} KiB", rss_kib());
    }
}

fn files(process: u32) -> usize {
    std::fs::read_dir(format!("/proc/{process}/fd")).expect("it lives").count()
}
