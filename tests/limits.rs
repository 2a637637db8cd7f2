//! Limits that jailers, service managers and shells set (setrlimit(2), cgroups), and signals of that kind: the guest
//! keeps running, or the command ends with a message and a documented exit code, and no file is half written.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{Ran, SNAP, Sample, needs_vm, restore, run, skip, snap};
use crate::talking::{Talking, wait_until};

const MIB: u64 = 1 << 20;

/// `snap` with these arguments, under limits that `ulimit` sets.
fn limited(limits: &str, args: &[&str]) -> Ran {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{limits}; exec \"$0\" \"$@\""), SNAP]).args(args);
    run(command)
}

/// Guests that run with a control socket, in each mode.
const GUESTS: [&[&str]; 3] = [
    &["run", "--memory", "64M", "--work", "8M"],
    &["restore", "FILE"],
    &["restore", "--lazy", "FILE"],
];

struct Guest {
    talking: Talking,
    api: PathBuf,
    out: PathBuf,
}

impl Guest {
    /// It runs when this returns.
    fn start(args: &[&str], sample: &Sample) -> Self {
        let folder = sample.folder.path();
        let (api, out) = (folder.join("api.sock"), folder.join("out.snap"));
        let file = sample.file.to_str().expect("text");
        let args = args.iter().map(|arg| if *arg == "FILE" { file } else { arg });
        let args = args.chain(["--api", api.to_str().expect("text")]);
        let mut talking = Talking::snap(args);
        talking.beats(1);
        Self { talking, api, out }
    }

    /// Sets a limit of the process from outside.
    fn limit(&self, what: &str, value: &str) {
        let mut command = Command::new("prlimit");
        command.arg("--pid").arg(self.talking.id().to_string());
        let status = command.arg(format!("--{what}={value}")).status().expect("prlimit runs");
        assert!(status.success(), "{what}={value}");
    }

    /// In bytes, of proc_pid_status(5).
    fn uses(&self, what: &str) -> u64 {
        let path = format!("/proc/{}/status", self.talking.id());
        let status = std::fs::read_to_string(path).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix(what)?.strip_prefix(':'));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        kib.expect("it is reported").parse::<u64>().expect("a number") << 10
    }

    fn store(&self) -> Ran {
        let (out, api) = (self.out.to_str().expect("text"), self.api.to_str().expect("text"));
        snap(["create", out, "--vm", api, "--threads", "2"])
    }

    /// The snapshot is complete, and its guest runs.
    #[track_caller]
    fn check_stored(&mut self) {
        self.store().ok();
        snap(["verify".as_ref(), self.out.as_os_str()]).ok();
        assert_eq!(restore(&self.out, &["--beats", "2"]).ok().report()["bad_beats"], 0);
        std::fs::remove_file(&self.out).expect("it is there");
        self.talking.beats(2);
    }

    #[track_caller]
    fn end(self) {
        self.talking.interrupt();
    }
}

#[test]
fn a_file_above_the_size_limit_is_not_written() {
    // SIGXFSZ ended the process, without a message.
    needs_vm!();
    let sample = Sample::create(&["--memory", "64M", "--work", "16M"]);
    let out = sample.folder.path().join("out");
    let (file, out) = (sample.file.to_str().expect("text"), out.to_str().expect("text"));
    snap(["export", file, "--format", "raw", "-o", &format!("{out}.raw")]).ok();
    snap(["train", file, "--beats", "1", "-o", &format!("{out}.trained")]).ok();
    let (raw, trained) = (format!("{out}.raw"), format!("{out}.trained"));
    let before = sample.names();
    for args in [
        &["create", out, "--memory", "64M", "--work", "16M"][..],
        &["create", out, "--from", file, "--when", "output:beat 2"],
        &["import", &raw, "-o", out],
        &["flatten", file, "-o", out],
        &["flatten", file, "-o", &trained, "--force"],
        &["optimize", &trained, "-o", out],
        &["train", file, "--beats", "1", "-o", out],
        &["restore", "--lazy", "--record", file, "--beats", "1", "-o", out],
        &["export", file, "--format", "raw", "-o", out],
        &["export", file, "--format", "elf", "-o", out],
        &["info", file, "--map=map.svg"],
    ] {
        let args: Vec<_> =
            args.iter().map(|arg| arg.replace("map.svg", &format!("{out}.svg"))).collect();
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        // A picture is small.
        let (blocks, limit) = if args[0] == "info" { (2, "1 KiB") } else { (128, "64 KiB") };
        limited(&format!("ulimit -f {blocks}"), &args)
            .failed(1, &["File too large", limit, "RLIMIT_FSIZE", "ulimit -f", "LimitFSIZE"]);
        assert_eq!(sample.names(), before, "{args:?}");
    }
    snap(["verify", &trained]).ok();
    // The guest's output in a file.
    let log = format!("{out}.log");
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -f 1; exec \"$0\" restore \"$FILE\" > \"$LOG\"", SNAP]);
    command.env("FILE", file).env("LOG", &log);
    run(command).failed(1, &["cannot write the guest's output: File too large", "512 B"]);
}

#[test]
fn a_guest_that_cannot_be_snapshotted_keeps_running() {
    // This has ended guests.
    needs_vm!();
    let sample = Sample::create(&["--memory", "64M", "--work", "8M"]);
    for args in GUESTS {
        let mut guest = Guest::start(args, &sample);
        let before = sample.names();
        guest.limit("fsize", "65536:");
        guest.store().failed(1, &["out.snap: File too large", "64 KiB", "RLIMIT_FSIZE"]);
        guest.talking.beats(2);
        assert_eq!(sample.names(), before);
        guest.limit("fsize", "unlimited:");
        guest.check_stored();
        guest.end();
        assert_eq!(sample.names(), ["guest.snap"]);
    }
}

#[test]
fn ignored_signals_do_not_end_a_guest() {
    needs_vm!();
    let sample = Sample::small();
    for args in GUESTS {
        let mut guest = Guest::start(args, &sample);
        for name in ["XFSZ", "PIPE", "TTOU", "TTIN"] {
            guest.talking.signal(name);
            guest.talking.beats(2);
        }
        guest.check_stored();
        guest.end();
    }
}

#[test]
fn a_guest_whose_cpu_time_is_used_up_ends_cleanly() {
    needs_vm!();
    let sample = Sample::small();
    let guest = Guest::start(GUESTS[0], &sample);
    guest.limit("cpu", "1:unlimited");
    guest.talking.end().failed(130, &["RLIMIT_CPU", "interrupted"]);
    assert_eq!(sample.names(), ["guest.snap"]);
}

#[test]
fn address_space_that_runs_out_during_a_snapshot() {
    // An allocation that failed ended the process.
    needs_vm!();
    let sample = Sample::small();
    for (args, limit, of) in
        [(GUESTS[0], "as", "VmSize"), (GUESTS[2], "as", "VmSize"), (GUESTS[1], "data", "VmData")]
    {
        let mut guest = Guest::start(args, &sample);
        let before = sample.names();
        let mut stored = 0;
        // Besides the memory for a snapshot, the allocator may reserve 64 or 128 MiB for a thread.
        for room_mib in [0, 1, 2, 3, 4, 6, 8, 12, 20, 40, 80, 160, 320] {
            let bytes = guest.uses(of) + room_mib * MIB;
            guest.limit(limit, &format!("{bytes}:"));
            let ran = guest.store();
            match ran.code {
                Some(0) => {
                    stored += 1;
                    std::fs::remove_file(&guest.out).expect("it is there");
                }
                _ => drop(ran.failed(1, &["RLIMIT_AS"])),
            }
            guest.talking.beats(1);
            assert_eq!(sample.names(), before, "{room_mib} MiB");
        }
        guest.limit(limit, "unlimited:");
        guest.check_stored();
        guest.end();
        assert!((1..13).contains(&stored), "{stored} were stored");
    }
}

#[test]
fn a_command_below_a_limit_names_it() {
    needs_vm!();
    let sample = Sample::small();
    let folder = sample.folder.path();
    let (api, out) = (folder.join("api.sock"), folder.join("out"));
    let file = sample.file.to_str().expect("text");
    let (api, out) = (api.to_str().expect("text"), out.to_str().expect("text"));
    let lazy = ["restore", "--lazy", file, "--beats", "1", "--api", api];
    let create = ["create", out, "--memory", "64M", "--work", "4M"];
    let limits: Vec<_> = (5..24)
        .map(|files| format!("ulimit -n {files}"))
        // In KiB. With less there is no room for the program itself.
        .chain([52, 56, 64, 80, 90, 96, 100, 104].map(|mib| format!("ulimit -v {}", mib << 10)))
        .chain([4, 8, 40, 64, 68, 70, 72].map(|mib| format!("ulimit -d {}", mib << 10)))
        .collect();
    let (mut done, mut refused) = (0, 0);
    for limit in &limits {
        for args in [&lazy[..], &create] {
            let ran = limited(limit, args);
            match ran.code {
                Some(0) => done += 1,
                // Where the program itself, or its first thread, gets no memory.
                Some(127 | 134) => {}
                None if ran.stderr.contains("memory allocation of") => {}
                code => {
                    assert!(matches!(code, Some(1 | 4)), "{limit}: {code:?} {}", ran.stderr);
                    assert!(ran.stderr.contains("snap: "), "{limit}: {}", ran.stderr);
                    refused += 1;
                }
            }
            if ran.code == Some(0) && args[0] == "create" {
                snap(["verify", out]).ok();
                std::fs::remove_file(out).expect("it is there");
            }
            assert_eq!(sample.names(), ["guest.snap"], "{limit}, {args:?}");
        }
    }
    assert!(done > 0 && refused > 20, "{done} done, {refused} refused");
    // Limits that do not affect `snap`.
    for limit in ["ulimit -l 0", "ulimit -f 0", "ulimit -c 0", "ulimit -n 64; ulimit -l 0"] {
        limited(limit, &["restore", "--lazy", file, "--beats", "1"]).ok();
    }
}

#[test]
fn a_guest_without_free_descriptors() {
    needs_vm!();
    let sample = Sample::small();
    for args in GUESTS {
        let mut guest = Guest::start(args, &sample);
        // Open files stay open; no others can be opened.
        guest.limit("nofile", "3:");
        let (out, api) = (guest.out.to_str().expect("text"), guest.api.to_str().expect("text"));
        let mut client = Talking::snap(["create", out, "--vm", api]);
        client.prints(&["waiting for the guest at", "api.sock to be stored"]);
        guest.talking.beats(2);
        guest.limit("nofile", "1024:");
        client.end().ok();
        std::fs::remove_file(&guest.out).expect("it is there");
        // Enough for the client, and not for the file.
        let free = (0..).find(|number| !open(guest.talking.id(), *number)).expect("one is free");
        guest.limit("nofile", &format!("{}:", free + 1));
        guest.store().failed(1, &["Too many open files"]);
        guest.talking.beats(2);
        guest.limit("nofile", "1024:");
        guest.check_stored();
        guest.end();
    }
}

fn open(process: u32, number: u32) -> bool {
    Path::new(&format!("/proc/{process}/fd/{number}")).symlink_metadata().is_ok()
}

#[test]
fn a_guest_that_may_lock_no_memory_and_queue_no_signals() {
    needs_vm!();
    let sample = Sample::small();
    for args in GUESTS {
        let mut guest = Guest::start(args, &sample);
        guest.limit("memlock", "0:");
        guest.limit("sigpending", "0:");
        guest.check_stored();
        guest.end();
    }
}

#[test]
fn a_guest_that_may_have_no_more_threads() {
    needs_vm!();
    let sample = Sample::small();
    let test = "a_guest_that_may_have_no_more_threads";
    // RLIMIT_NPROC is not enforced for root, nor for users with its rights, some of which /dev/kvm needs. No other test
    // runs as this user, whose processes are counted.
    let as_other = |processes: u32, args: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65533", "--clear-groups", "--inh-caps=-all,+dac_override"]);
        command.args(["--ambient-caps=+dac_override", "--bounding-set=-all,+dac_override"]);
        command.arg("prlimit").arg(format!("--nproc={processes}")).arg(SNAP).args(args);
        command
    };
    let file = sample.file.to_str().expect("text");
    let beat = ["restore", file, "--beats", "1"];
    let can = as_other(100, &beat).output();
    if !can.as_ref().is_ok_and(|ran| ran.status.success()) {
        let why = can.map_or_else(|error| error.to_string(), |ran| Ran::from(ran).stderr);
        return skip(test, &format!("only root can become a user with some of its rights: {why}"));
    }
    let (api, out) = (sample.folder.path().join("api.sock"), sample.folder.path().join("out.snap"));
    let (api, out) = (api.to_str().expect("text"), out.to_str().expect("text"));
    let (mut not_begun, mut stored) = (0, 0);
    for processes in 1..12 {
        let mut guest = Talking::start(as_other(processes, &["restore", file, "--api", api]));
        if !guest.beats_or_ends() {
            let ran = guest.end();
            // 5: KVM itself gets no thread.
            let code = if ran.stderr.contains("KVM_RUN") { 5 } else { 1 };
            ran.failed(code, &["snap: ", "RLIMIT_NPROC"]);
            not_begun += 1;
            assert_eq!(sample.names(), ["guest.snap"]);
            continue;
        }
        let ran = snap(["create", out, "--vm", api]);
        match ran.code {
            Some(0) => {
                stored += 1;
                snap(["verify", out]).ok();
                std::fs::remove_file(out).expect("it is there");
            }
            // Only if a thread has ended since the start and another took its place: a snapshot needs one.
            _ => drop(ran.failed(1, &["RLIMIT_NPROC"])),
        }
        guest.beats(2);
        guest.interrupt();
        assert_eq!(sample.names(), ["guest.snap"]);
    }
    assert!(not_begun > 0 && stored > 0, "{not_begun} not begun, {stored} stored");
}

/// A cgroup for one test, removed when it is dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    /// With this controller, wherever it is mounted. `None`, and a message, if that is not permitted.
    fn new(controller: &str, test: &str) -> Option<Self> {
        let name = format!("snap-test-{controller}-{}", std::process::id());
        for parent in [format!("/sys/fs/cgroup/{controller}"), "/sys/fs/cgroup".to_owned()] {
            let folder = Path::new(&parent).join(&name);
            if std::fs::create_dir(&folder).is_err() {
                continue;
            }
            let group = Self(folder);
            if group.limit_file(controller).exists() {
                return Some(group);
            }
        }
        skip(test, &format!("this user may not make a cgroup with the controller `{controller}`"));
        None
    }

    fn limit_file(&self, controller: &str) -> PathBuf {
        let names: &[&str] = match controller {
            "memory" => &["memory.max", "memory.limit_in_bytes"],
            _ => &["pids.max"],
        };
        let mut paths = names.iter().map(|name| self.0.join(name));
        paths.clone().find(|path| path.exists()).or(paths.next_back()).expect("one at least")
    }

    fn limit(&self, controller: &str, value: &str) {
        std::fs::write(self.limit_file(controller), value).expect("it is taken");
    }

    fn take(&self, process: u32) {
        std::fs::write(self.0.join("cgroup.procs"), process.to_string()).expect("it is taken");
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // It is busy for a moment after its last process.
        for _ in 0..100 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

#[test]
fn a_guest_in_a_cgroup_without_room_for_threads() {
    needs_vm!();
    let sample = Sample::small();
    let test = "a_guest_in_a_cgroup_without_room_for_threads";
    let Some(group) = Cgroup::new("pids", test) else { return };
    for args in GUESTS {
        let mut guest = Guest::start(args, &sample);
        group.take(guest.talking.id());
        group.limit("pids", "1");
        guest.store().failed(1, &["no thread", "pids.max"]);
        guest.talking.beats(2);
        group.limit("pids", "max");
        guest.check_stored();
        guest.end();
    }
}

#[test]
fn a_guest_in_a_cgroup_with_little_memory() {
    needs_vm!();
    let sample = Sample::create(&["--memory", "128M", "--work", "64M"]);
    let test = "a_guest_in_a_cgroup_with_little_memory";
    let Some(group) = Cgroup::new("memory", test) else { return };
    let before = sample.names();
    // Enough for the guest's touched memory and for a writer with two threads, but less than the file.
    group.limit("memory", &(180 * MIB).to_string());
    let join = format!("echo $$ > {}/cgroup.procs", group.0.display());
    let out = sample.folder.path().join("out.snap");
    let out = out.to_str().expect("text");
    let file = sample.file.to_str().expect("text");
    for args in [
        &["create", out, "--memory", "128M", "--work", "64M", "--threads", "2"][..],
        &["flatten", file, "-o", out, "--threads", "2"],
    ] {
        limited(&join, args).ok();
        snap(["verify", out]).ok();
        std::fs::remove_file(out).expect("it is there");
    }
    limited(&join, &["restore", file, "--beats", "2"]).ok();
    limited(&join, &["restore", "--lazy", file, "--beats", "2"]).ok();
    // Less than the guest itself takes: the kernel kills the process, and no file is left.
    group.limit("memory", &(32 * MIB).to_string());
    for args in [
        &["create", out, "--memory", "128M", "--work", "64M"][..],
        &["restore", file, "--beats", "2"],
    ] {
        let ran = limited(&join, args);
        assert_eq!(ran.code, None, "{}", ran.stderr);
        assert_eq!(sample.names(), before);
    }
    wait_until("the cgroup is busy", || {
        std::fs::read_to_string(group.0.join("cgroup.procs")).is_ok_and(|ids| ids.is_empty())
    });
}
