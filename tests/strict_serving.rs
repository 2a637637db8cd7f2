//! `--jail strict`, `--uid` and `--gid` of `snap serve` and `snap keep`.

use std::ffi::OsStr;
use std::fs::Permissions;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::recorded_serving::vmm::Vmm;
use crate::strict::{has_no_open_folder, is_root, is_separate, of_threads, root_of};
use crate::support::{SNAP, Sample, needs_vm, restore, run, skip, snap};
use crate::talking::Talking;

/// A snapshot, and a folder for sockets beside it.
struct Place {
    sample: Sample,
    sockets: PathBuf,
}

impl Place {
    fn new() -> Place {
        let sample = Sample::small();
        let sockets = sample.folder.path().join("sockets");
        std::fs::create_dir(&sockets).expect("it is made");
        Place { sample, sockets }
    }

    fn socket(&self, name: &str) -> String {
        self.sockets.join(name).to_string_lossy().into_owned()
    }

    fn file(&self) -> &str {
        self.sample.file.to_str().expect("text")
    }

    fn serve(&self, options: &[&str]) -> Vec<String> {
        let serve = ["serve", self.file(), "--listen", &self.socket("pages")];
        [&serve, options].concat().into_iter().map(str::to_owned).collect()
    }

    fn keep(&self) -> Vec<String> {
        let listen = self.socket("keep");
        ["keep", "--listen", &listen, "--jail", "strict"].map(str::to_owned).into()
    }

    /// A guest whose memory is served.
    fn clone(&self) -> Vec<String> {
        let share = self.socket("pages");
        ["restore", self.file(), "--lazy", "--share", &share].map(str::to_owned).into()
    }

    /// A VMM in a process of its own, as Firecracker is one.
    fn vmm(&self) -> Vmm {
        let mut vmm = Vmm::start(&self.sockets.join("pages"));
        vmm.ok("map 64");
        vmm.ok("body new");
        vmm
    }

    /// The VMM finds in a page what the snapshot has there.
    #[track_caller]
    fn reads(&self, vmm: &mut Vmm, page: usize) {
        let raw = self.sample.folder.path().join("memory.raw");
        if !raw.exists() {
            let out = raw.to_str().expect("text");
            snap(["export", self.file(), "--format", "raw", "-o", out]).ok();
        }
        let memory = std::fs::read(&raw).expect("it is exported");
        let word = memory[page * 4096..][..8].try_into().expect("eight bytes");
        let expected = format!("{:x}", u64::from_le_bytes(word));
        assert_eq!(vmm.ask(&format!("read {page}")), Some(expected));
    }

    /// Lets all users read the snapshot, and returns a program that all may start.
    fn open_to_all(&self) -> PathBuf {
        let open = |path: &Path, mode| {
            std::fs::set_permissions(path, Permissions::from_mode(mode)).expect("it is ours");
        };
        open(self.sample.folder.path(), 0o755);
        open(&self.sample.file, 0o644);
        open(&self.sockets, 0o777);
        let program = self.sample.folder.path().join("snap");
        std::fs::copy(SNAP, &program).expect("it is copied");
        program
    }
}

fn started(args: Vec<String>, ready: &str) -> (Talking, String) {
    let mut process = Talking::snap(args);
    let line = process.prints(&[ready]);
    (process, line)
}

/// Core dumps are off, and no more files may be opened than now.
#[track_caller]
fn has_low_limits(process: u32) {
    let limits = std::fs::read_to_string(format!("/proc/{process}/limits")).expect("it runs");
    let limit = |name: &str| -> Vec<String> {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).expect("a limit");
        line.split_whitespace().take(2).map(str::to_owned).collect()
    };
    assert_eq!(limit("Max core file size"), ["0", "0"]);
    let files = limit("Max open files");
    assert_eq!(files[0], files[1]);
}

/// It has its own namespaces, and of the files only those that it needs.
#[track_caller]
fn is_strict(process: u32) {
    is_separate(process);
    has_no_open_folder(process);
    has_low_limits(process);
    assert!(of_threads(process, "Seccomp:").iter().all(|mode| mode == "2"));
    let names = root_of(process);
    assert!(names.contains(&"proc".to_owned()), "{names:?}");
    for outside in ["etc", "usr", "dev", "sys", "run", "root", "boot"] {
        assert!(!names.contains(&outside.to_owned()), "{names:?}");
    }
    let mounts = std::fs::read_to_string(format!("/proc/{process}/mounts")).expect("it runs");
    let root = mounts.lines().find(|line| line.split(' ').nth(1) == Some("/"));
    let root: Vec<_> = root.expect("a root").split(' ').collect();
    assert_eq!((root[2], &root[3][..3]), ("tmpfs", "ro,"));
}

#[test]
fn a_strict_server_serves_clones_other_vmms_and_figures() {
    needs_vm!();
    let place = Place::new();
    std::fs::write(place.sample.folder.path().join("other"), "").expect("it is written");
    let options = ["--jail", "strict", "--metrics", "0"];
    let (server, line) = started(place.serve(&options), "serving ");
    is_strict(server.id());
    let inside = |path: &Path| {
        let path = path.strip_prefix("/").expect("absolute");
        Path::new(&format!("/proc/{}/root", server.id())).join(path)
    };
    // The snapshot, not the file beside it.
    assert!(inside(&place.sample.file).exists());
    assert!(inside(&place.sockets).join("pages").exists());
    assert!(!inside(&place.sample.folder.path().join("other")).exists());

    restore(&place.sample.file, &["--lazy", "--share", &place.socket("pages"), "--beats", "2"])
        .ok();
    let mut vmm = place.vmm();
    place.reads(&mut vmm, 0);
    // The figures are at an address of the host's network.
    let (_, at) = line.split_once("http://").expect("the address");
    let address = at.trim_end().strip_suffix("/metrics").expect("the path");
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("it is taken");
    let mut figures = String::new();
    stream.read_to_string(&mut figures).expect("an answer");
    assert!(figures.contains("\nsnap_guests 1\n"), "{figures}");
    assert!(figures.contains("\nsnap_guests_total 2\n"), "{figures}");
    vmm.kill();
    server.interrupt();
    assert!(crate::support::names(&place.sockets).is_empty());
}

#[test]
fn guests_continue_when_a_strict_server_is_killed() {
    needs_vm!();
    let place = Place::new();
    let (mut keeper, _) = started(place.keep(), "keeping at");
    is_strict(keeper.id());
    let keep = place.socket("keep");
    let serve = || started(place.serve(&["--jail", "strict", "--keep", &keep]), "serving ").0;
    let mut server = serve();
    let mut clone = Talking::snap(place.clone());
    clone.beats(1);
    let mut vmm = place.vmm();
    place.reads(&mut vmm, 0);
    server.prints(&["served"]);
    for page in 1..4 {
        server.signal("KILL");
        keeper.prints(&["has ended, 2 guests wait"]);
        server = serve();
        keeper.prints(&["has taken over 2 guests"]);
        is_strict(server.id());
        clone.beats(2);
        // A page that no server has loaded for it yet.
        place.reads(&mut vmm, page * 16);
    }
    clone.interrupt();
    vmm.kill();
    server.interrupt();
    keeper.interrupt();
    assert!(crate::support::names(&place.sockets).is_empty());
}

/// `snap` of an ordinary user, for whom the devices have modes with which they can be used. A file of /proc is hidden by a
/// mount, as in containers: the kernel refuses a copy of /proc without it.
fn as_user(program: &Path, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    let script = "mount -t tmpfs none /mnt && mknod -m 666 /mnt/kvm c 10 232 && \
        mount --bind /mnt/kvm /dev/kvm && cp -a /dev/userfaultfd /mnt/uffd && chmod 666 /mnt/uffd && \
        mount --bind /mnt/uffd /dev/userfaultfd && mount --bind /dev/null /proc/version && \
        exec setpriv --reuid 12345 --regid 12345 --clear-groups --bounding-set -all --inh-caps -all \"$0\" \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).arg(program).args(args);
    command
}

#[test]
fn an_ordinary_user_has_strict_servers_of_own_guests() {
    needs_vm!();
    let test = "an_ordinary_user_has_strict_servers_of_own_guests";
    if !is_root(test) {
        return;
    }
    let place = Place::new();
    let program = place.open_to_all();
    let strict = place.serve(&["--jail", "strict"]);
    // In its user namespace, other users have no numbers.
    let others = [&strict[..], &["--allow-uid".into(), "0".into()]].concat();
    let refused = run(as_user(&program, &others));
    refused.failed(2, &["needs a user namespace", "--allow-uid", "--jail default"]);
    let user_65534 = {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
        command.args(["--bounding-set", "-all", "--inh-caps", "-all"]).arg(&program).args(&strict);
        command
    };
    run(user_65534).failed(2, &["would have its number, 65534"]);

    let mut keeper = Talking::start(as_user(&program, place.keep()));
    let allowed =
        run(as_user(&program, ["run", "--jail", "strict", "--beats", "1", "--memory", "64M"]));
    if allowed.stderr.contains("user namespace") {
        return skip(test, "this host allows no user namespaces");
    }
    keeper.prints(&["keeping at"]);
    let kept = [&strict[..], &["--keep".into(), place.socket("keep")]].concat();
    let serve = || {
        let mut server = Talking::start(as_user(&program, &kept));
        server.prints(&["serving "]);
        server
    };
    let mut server = serve();
    is_separate(server.id());
    assert!(!root_of(server.id()).contains(&"etc".to_owned()));
    let mut clone = Talking::start(as_user(&program, place.clone()));
    clone.beats(2);
    server.signal("KILL");
    keeper.prints(&["has ended, 1 guests wait"]);
    let next = serve();
    keeper.prints(&["has taken over 1 guests"]);
    server = next;
    clone.beats(2);
    // Root is another user, too.
    let root = snap(place.clone());
    assert_ne!(root.code, Some(0), "{}", root.stderr);
    server.prints(&["user"]);
    clone.interrupt();
    server.interrupt();
    keeper.interrupt();
}

#[test]
fn a_server_changes_its_user_and_serves_that_one() {
    needs_vm!();
    if !is_root("a_server_changes_its_user_and_serves_that_one") {
        return;
    }
    let place = Place::new();
    let program = place.open_to_all();
    for jail in ["strict", "default"] {
        let user = ["--jail", jail, "--uid", "12345", "--gid", "54321", "--socket-owner", "12345"];
        let (mut server, _) = started(place.serve(&user), "serving ");
        let is = |field, value: &str| {
            let found = of_threads(server.id(), field);
            assert!(found.iter().all(|found| found == value), "{field} {found:?}");
        };
        is("Uid:", "12345 12345 12345 12345");
        is("Gid:", "54321 54321 54321 54321");
        is("Groups:", "");
        is("CapPrm:", "0000000000000000");
        let beats = [place.clone(), vec!["--beats".into(), "2".into()]].concat();
        run(as_user(&program, &beats)).ok();
        // Root is served as before.
        snap(&beats).ok();
        let mut vmm = place.vmm();
        place.reads(&mut vmm, 63);
        vmm.kill();
        server.prints(&["ended after"]);
        server.interrupt();

        // It cannot kill a guest of root, and so refuses it where it might have to.
        let kill = [&user[..], &["--on-error", "kill"]].concat();
        let (mut server, _) = started(place.serve(&kill), "serving ");
        run(as_user(&program, &beats)).ok();
        assert_ne!(snap(&beats).code, Some(0));
        server.prints(&["may not signal process"]);
        server.interrupt();
    }
}

#[test]
fn what_a_strict_server_cannot_keep_is_refused_at_the_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path().to_str().expect("text");
    let listen = ["--listen", "none.sock"];
    let jails = [&["--jail", "strict"][..], &["--uid", "1"], &["--gid", "1"]];
    for (args, message) in [
        (&["serve", folder][..], "a server for each file"),
        (&["serve", "none.snap", "--record", "-o", "out.snap"], "--record"),
        (&["serve", "s3://bucket/none.snap"], "snap pull"),
        (&["serve", "none.snap", "--key-command", "true"], "--key-file"),
    ] {
        for jail in jails {
            snap([args, &listen, jail].concat()).failed(2, &["not possible with", message]);
        }
    }
    let refused = snap(["serve", "none.snap", "--listen", "s", "--jail", "off", "--uid", "1"]);
    refused.failed(2, &["parts of the jail"]);
    for command in [&["fork", "--vm", "none.sock"][..], &["mount", "none.snap", "none"]] {
        snap([command, jails[0]].concat()).failed(2, &["off, default"]);
    }
}
