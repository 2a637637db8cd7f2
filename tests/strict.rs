//! `--jail strict`, `--chroot`, `--uid` and `--gid`: what is left to the process of a guest.

use std::path::Path;
use std::process::Command;

use crate::control::Vm;
use crate::support::{SNAP, Sample, needs_vm, run, signal, skip, snap};
use crate::talking::Talking;

/// Whether this user may make namespaces without a user namespace, and change its user.
pub(crate) fn is_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skip(test, "this user is not root");
    }
    root
}

/// A field of all threads of a process, from proc(5).
pub(crate) fn of_threads(process: u32, field: &str) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).expect("it runs");
    let statuses =
        tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("status")).ok());
    let of = |status: String| {
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        line.expect(field).split_whitespace().collect::<Vec<_>>().join(" ")
    };
    statuses.map(of).collect()
}

/// All threads of a process are in other namespaces than this one.
#[track_caller]
pub(crate) fn is_separate(process: u32) {
    for kind in ["mnt", "net", "ipc", "uts"] {
        let own = std::fs::read_link(format!("/proc/self/ns/{kind}")).expect("there is /proc");
        let tasks = std::fs::read_dir(format!("/proc/{process}/task")).expect("it runs");
        for task in tasks {
            let link = task.expect("it runs").path().join("ns").join(kind);
            let Ok(found) = std::fs::read_link(&link) else { continue };
            assert_ne!(found, own, "{}", link.display());
        }
    }
}

/// What is left of the file system of a process, without the content of folders.
pub(crate) fn root_of(process: u32) -> Vec<String> {
    crate::support::names(Path::new(&format!("/proc/{process}/root")))
}

#[test]
fn a_restored_guest_runs_with_an_empty_root() {
    needs_vm!();
    let sample = Sample::create(&["--memory", "64M", "--work", "4M"]);
    let file = sample.file.to_string_lossy();
    for mode in [&[][..], &["--lazy"]] {
        let mut snap = Talking::snap([&["restore", &*file, "--jail", "strict"][..], mode].concat());
        snap.beats(3);
        is_separate(snap.id());
        let root = format!("/proc/{}/root", snap.id());
        // Only the folders that lead to the snapshot and to the process itself.
        assert!(!root_of(snap.id()).contains(&"etc".to_owned()), "{:?}", root_of(snap.id()));
        assert!(!Path::new(&root).join("proc/1").exists());
        assert!(Path::new(&root).join("proc/self/stat").exists());
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", snap.id()));
        let limits = limits.expect("there is /proc");
        let core = limits.lines().find(|line| line.starts_with("Max core file size"));
        let core: Vec<_> = core.expect("a limit").split_whitespace().collect();
        assert_eq!(core[4..6], ["0", "0"]);
        snap.interrupt();
    }
}

#[test]
fn a_strict_jail_writes_its_snapshot_and_nothing_else() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let strict = ["--jail", "strict"];
    let (base, layer) = (at("base.snap"), at("layer.snap"));
    snap([&["create", &*base, "--memory", "64M", "--work", "4M"], &strict[..]].concat()).ok();
    let when = ["--when", "after:100ms"];
    snap([&["create", &*layer, "--from", &*base], &when[..], &strict].concat()).ok();
    let hot = at("hot.snap");
    let record = ["--lazy", "--record", "-o", &hot, "--beats", "2"];
    snap([&["restore", &*layer], &record[..], &strict].concat()).ok();
    assert_eq!(crate::support::names(folder.path()), ["base.snap", "hot.snap", "layer.snap"]);
    snap(["restore", &*hot, "--lazy", "--beats", "3", "--jail", "strict"]).ok();
    // A relative path is relative to the same folder as before.
    let mut command = Command::new(SNAP);
    command.current_dir(folder.path());
    command.args(["create", "relative.snap", "--memory", "64M", "--work", "4M"]).args(strict);
    run(command).ok();
    assert!(folder.path().join("relative.snap").exists());
}

/// The place of a file in the new root was once made in the folder itself, and emptied the file.
#[test]
fn a_socket_named_by_the_parent_folder_leaves_what_is_in_its_folder() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a folder");
    let (before, beside) = (folder.path().join("a"), folder.path().join("b"));
    for folder in [&before, &beside] {
        std::fs::create_dir(folder).expect("a new folder");
    }
    let file = beside.join("guest.snap");
    snap(["create", &*file.to_string_lossy(), "--memory", "64M", "--work", "4M"]).ok();
    let bytes = std::fs::read(&file).expect("it was written");
    let mut command = Command::new(SNAP);
    command.current_dir(&before).args(["restore", "../b/guest.snap", "--api", "../b/vm.sock"]);
    command.args(["--beats", "1", "--jail", "strict"]);
    run(command).ok();
    assert!(std::fs::read(&file).expect("it is still there") == bytes);
    assert_eq!(crate::support::names(&beside), ["guest.snap"]);
}

#[test]
fn sockets_are_removed_and_requests_for_files_are_refused_with_a_reason() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a folder");
    let mut vm =
        Vm::start(folder.path(), &["run", "--memory", "64M", "--work", "4M", "--jail", "strict"]);
    vm.beats(1);
    let out = folder.path().join("out.snap");
    let socket = vm.socket.to_string_lossy().into_owned();
    let refused = snap(["create", &*out.to_string_lossy(), "--vm", &socket]);
    refused.failed(1, &["--jail strict", "--chroot DIR"]);
    vm.beats(1);
    vm.interrupt();
    assert!(crate::support::names(folder.path()).is_empty());
}

#[test]
fn in_a_chroot_clients_name_files_of_it() {
    needs_vm!();
    if !is_root("in_a_chroot_clients_name_files_of_it") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path().join("root");
    std::fs::create_dir(&root).expect("it is made");
    for jail in ["strict", "default"] {
        let root = root.to_string_lossy();
        let args = ["run", "--memory", "64M", "--work", "4M", "--jail", jail, "--chroot", &root];
        let mut vm = Vm::start(folder.path(), &args);
        for kind in [&[][..], &["--live"]] {
            let out = format!("/{jail}{}.snap", kind.len());
            let socket = vm.socket.to_string_lossy().into_owned();
            snap([&["create", &*out, "--vm", &socket], kind].concat()).ok();
            let file = Path::new(&*root).join(&out[1..]);
            snap(["restore", &*file.to_string_lossy(), "--beats", "2"]).ok();
        }
        vm.beats(1);
        signal(vm.child.as_ref().expect("it runs").id(), "INT");
        vm.end().failed(130, &["interrupted"]);
        // Its name is not in the root, and so stays. The next guest replaces it.
        assert!(vm.socket.exists());
    }
}

/// A folder that is open could be a way out of the new root, by names that begin with /proc/self/fd.
#[track_caller]
pub(crate) fn has_no_open_folder(process: u32) {
    let fds = std::fs::read_dir(format!("/proc/{process}/fd")).expect("it runs");
    for fd in fds.map(|fd| fd.expect("it runs").path()) {
        let is_folder = std::fs::metadata(&fd).is_ok_and(|found| found.is_dir());
        assert!(!is_folder, "{:?}", std::fs::read_link(&fd));
    }
}

#[test]
fn restored_guests_in_another_root_have_no_folder_and_are_reset() {
    needs_vm!();
    if !is_root("restored_guests_in_another_root_have_no_folder_and_are_reset") {
        return;
    }
    let sample = Sample::create(&["--memory", "64M", "--work", "4M"]);
    let file = sample.file.to_string_lossy().into_owned();
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path().join("root");
    std::fs::create_dir(&root).expect("it is made");
    let root = root.to_string_lossy().into_owned();
    for jail in [&["strict"][..], &["default", "--chroot", &root]] {
        for mode in [&[][..], &["--lazy"]] {
            let args = [&["restore", &*file, "--jail"], jail, mode].concat();
            let mut vm = Vm::start(folder.path(), &args);
            vm.beats(1);
            has_no_open_folder(vm.child.as_ref().expect("it runs").id());
            for _ in 0..2 {
                snap(["reset", "--vm", &*vm.socket.to_string_lossy()]).ok();
                vm.beats(1);
            }
            signal(vm.child.as_ref().expect("it runs").id(), "INT");
            vm.end().failed(130, &["interrupted"]);
        }
    }
}

#[test]
fn all_threads_have_the_user_that_is_asked_for() {
    needs_vm!();
    if !is_root("all_threads_have_the_user_that_is_asked_for") {
        return;
    }
    let sample = Sample::create(&["--memory", "64M", "--work", "4M"]);
    let file = sample.file.to_string_lossy();
    for jail in ["strict", "default"] {
        let user = ["--uid", "12345", "--gid", "54321", "--jail", jail];
        let mut snap = Talking::snap([&["restore", &*file, "--lazy"], &user[..]].concat());
        snap.beats(2);
        let is = |field, value: &str| {
            let found = of_threads(snap.id(), field);
            assert!(found.len() >= 3, "{field} {found:?}");
            assert!(found.iter().all(|found| found == value), "{field} {found:?}");
        };
        is("Uid:", "12345 12345 12345 12345");
        is("Gid:", "54321 54321 54321 54321");
        is("Groups:", "");
        is("CapPrm:", "0000000000000000");
        snap.interrupt();
    }
}

/// The folders that lead to its files are made by `snap`, and the guest's process has another user than the one that made
/// them.
#[test]
fn the_folders_of_an_empty_root_do_not_depend_on_the_umask() {
    use std::os::unix::fs::PermissionsExt;
    needs_vm!();
    if !is_root("the_folders_of_an_empty_root_do_not_depend_on_the_umask") {
        return;
    }
    let sample = Sample::create(&["--memory", "64M", "--work", "4M"]);
    for umask in ["000", "077", "777"] {
        let mut command = Command::new("sh");
        let user = ["--uid", "12345", "--gid", "54321", "--jail", "strict"];
        command.args(["-c", "umask $0; exec \"$@\"", umask, SNAP, "restore", "--lazy"]);
        command.arg(&sample.file).args(user);
        let mut snap = Talking::start(command);
        snap.beats(2);
        let root = format!("/proc/{}/root", snap.id());
        // The file itself is mounted: these lead to it.
        for folder in sample.folder.path().ancestors().filter(|folder| folder.parent().is_some()) {
            let made = Path::new(&root).join(folder.strip_prefix("/").expect("it is absolute"));
            let made = std::fs::metadata(&made).expect("it is made").permissions().mode();
            assert_eq!(made & 0o7777, 0o755, "umask {umask}, {}", folder.display());
        }
        snap.interrupt();
    }
}

/// In a user namespace there would be no such user: refused at the start, before sockets are bound.
#[test]
fn another_user_needs_the_namespace_of_the_host() {
    needs_vm!();
    if !is_root("another_user_needs_the_namespace_of_the_host") {
        return;
    }
    let sample = Sample::create(&["--memory", "64M", "--work", "4M"]);
    let socket = sample.folder.path().join("pages.sock");
    let (file, socket) = (sample.file.to_string_lossy(), socket.to_string_lossy());
    for args in [&["restore", &*file, "--beats", "1"][..], &["serve", &*file, "--listen", &*socket]]
    {
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", SNAP]).args(args);
        command.args(["--jail", "strict", "--uid", "65533", "--gid", "65533"]);
        run(command).failed(2, &["CAP_SYS_ADMIN", "--jail default"]);
    }
    assert!(!Path::new(&*socket).exists());
}

#[test]
fn an_ordinary_user_has_a_strict_jail_by_a_user_namespace() {
    needs_vm!();
    let test = "an_ordinary_user_has_a_strict_jail_by_a_user_namespace";
    if !is_root(test) {
        return;
    }
    let sample = Sample::create(&["--memory", "64M", "--work", "4M"]);
    let open = |path: &Path, mode| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("it is ours");
    };
    open(sample.folder.path(), 0o755);
    open(&sample.file, 0o644);
    // The program is perhaps in a folder that others may not enter.
    let program = sample.folder.path().join("snap");
    std::fs::copy(SNAP, &program).expect("it is copied");
    // For this user, /dev/kvm has a mode with which it may use it.
    let script = "mount -t tmpfs none /mnt && mknod -m 666 /mnt/kvm c 10 232 && \
        mount --bind /mnt/kvm /dev/kvm && \
        exec setpriv --reuid 12345 --regid 12345 --clear-groups --bounding-set -all --inh-caps -all \
        \"$SNAP\" restore --beats 2 --jail strict \"$FILE\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).env("SNAP", &program).env("FILE", &sample.file);
    let ran = run(command);
    if ran.stderr.contains("user namespace") {
        // What it does not allow is said.
        ran.failed(4, &["cannot make a user namespace", "--jail default"]);
        return skip(test, "this host allows no user namespaces");
    }
    ran.ok();
}

#[test]
fn what_a_jail_cannot_keep_is_refused_at_the_start() {
    let file = "none.snap";
    for (args, message) in [
        (&["run", "--jail", "off", "--uid", "1"][..], "parts of the jail"),
        (
            &["run", "--jail", "strict", "--key-command", "true", "--wrap-command", "true"],
            "--key-file",
        ),
        (&["create", file, "--chroot", "/"], "the output is written after"),
    ] {
        snap(args.iter().copied()).failed(2, &[message]);
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = folder.path().join("options.json");
    std::fs::write(&config, r#"{"jail": "strict"}"#).expect("it is written");
    let refused = snap(["run", "--config", &*config.to_string_lossy()]);
    refused.failed(2, &["--jail strict", "not possible with --config"]);
    let refused = snap(["create", file, "--vm", "none.sock", "--jail", "strict"]);
    refused.failed(2, &["another process runs the guest"]);
}
