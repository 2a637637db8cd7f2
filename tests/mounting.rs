//! `snap mount`: the bytes of its files, damage, and how it ends.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use snapfmt::{PageEntry, PageIndex, Snapshot};

use crate::import_export::{GIB, MIB, PAGE, Place, assert_same, cloud_hypervisor, noise, vmstate};
use crate::layers::two;
use crate::mounts::{Mounted, cached_bytes, host_can_mount, python};
use crate::support::{SNAP, Sample, names, needs_vm, run, signal, skip, snap};

/// Skips the rest of a test where nothing can be mounted.
macro_rules! needs_mount {
    ($test:literal) => {
        if !host_can_mount($test) {
            return;
        }
    };
}

/// 64 pages of noise, in chunks of 8, as `a.snap`; and their bytes.
fn noisy() -> (Place, Vec<u8>) {
    let place = Place::new();
    let bytes: Vec<u8> = (0..64).flat_map(|number| noise(number * 977 + 1)).collect();
    std::fs::write(place.path("image"), &bytes).expect("it can be written");
    place.import(&place.path("image"), &[]).ok();
    (place, bytes)
}

fn page(number: u64, file: &File) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; PAGE as usize];
    file.read_exact_at(&mut bytes, number * PAGE).map(|()| bytes)
}

/// Every file of a mount is the file of an export, with its holes.
#[track_caller]
fn assert_exported(place: &Place, mounted: &Mounted, formats: &[(&str, &str)]) {
    for (format, out) in formats {
        place.export(format, out).ok();
        let (exported, mounted) = (place.path(out), mounted.file(out));
        if exported.is_file() {
            assert_same(&exported, &mounted);
            continue;
        }
        assert_eq!(names(&mounted), names(&exported));
        for name in names(&exported) {
            assert_same(&exported.join(&name), &mounted.join(&name));
        }
    }
}

#[test]
fn a_raw_image_is_mounted_bit_for_bit_with_its_holes() {
    needs_mount!("a_raw_image_is_mounted_bit_for_bit_with_its_holes");
    let place = Place::new();
    let len = 5 * GIB + 3 * PAGE;
    let image = place.image("image", len, &[0, 3 * GIB - PAGE, 3 * GIB, 4 * GIB, len - PAGE]);
    place.import(&image, &[]).ok();
    let mut mounted = Mounted::start(&place.path("a.snap"), &[]);
    assert_eq!(names(&mounted.folder()), ["memory.core", "memory.raw"]);
    assert_same(&image, &mounted.file("memory.raw"));
    assert_exported(&place, &mounted, &[("raw", "memory.raw"), ("elf", "memory.core")]);
    let stat = mounted.file("memory.raw").metadata().expect("it is there");
    assert!(stat.blocks() * 512 <= 10 * MIB, "{} bytes", stat.blocks() * 512);
    assert_eq!(stat.permissions().mode() & 0o7777, 0o400);
    let write = File::options().write(true).open(mounted.file("memory.raw"));
    assert_eq!(write.err().map(|error| error.kind()), Some(ErrorKind::ReadOnlyFilesystem));
    assert_eq!(mounted.end("TERM").0, Some(130));
    assert!(!mounted.is_mounted());
}

#[test]
fn imports_are_mounted_in_their_own_form() {
    needs_mount!("imports_are_mounted_in_their_own_form");
    let place = Place::new();
    let memory = place.image("mem", 3 * GIB + MIB, &[0, MIB, 3 * GIB - PAGE, 3 * GIB]);
    std::fs::write(place.path("state"), vmstate(0x8664)).expect("it can be written");
    place.import(&memory, &["--vmstate", &place.text("state"), "--holes-are-zeros"]).ok();
    let mounted = Mounted::start(&place.path("a.snap"), &[]);
    assert_eq!(names(&mounted.folder()), ["firecracker", "memory.core", "memory.raw"]);
    assert_same(&memory, &mounted.file("firecracker/memory"));
    assert_same(&place.path("state"), &mounted.file("firecracker/vmstate"));
    assert_exported(&place, &mounted, &[("firecracker", "firecracker"), ("elf", "memory.core")]);

    // Blocks of virtio-mem touch each other, and the order in the file is not that of memory.
    let place = Place::new();
    let ranges =
        [(4 * GIB, 8 * MIB), (6 * MIB, 2 * MIB), (0, 6 * MIB), (4 * GIB + 8 * MIB, 2 * MIB)];
    place.import(&cloud_hypervisor(&place, &ranges), &[]).ok();
    let mounted = Mounted::start(&place.path("a.snap"), &[]);
    assert_eq!(names(&mounted.folder()), ["cloud-hypervisor", "memory.core", "memory.raw"]);
    let formats = [("cloud-hypervisor", "cloud-hypervisor"), ("elf", "memory.core")];
    assert_exported(&place, &mounted, &formats);
}

#[test]
fn a_chain_of_layers_is_one_file() {
    needs_mount!("a_chain_of_layers_is_one_file");
    let (folder, a, b) = two();
    let place = Place(folder);
    let layer = place.text("layer.snap");
    let (a, b) = (a.to_string_lossy(), b.to_string_lossy());
    snap(["rebase", &b, "--onto", &a, "-o", &layer]).ok();
    snap(["export", &b, "--format", "raw", "-o", &place.text("b.raw")]).ok();
    let mounted = Mounted::start(Path::new(&layer), &[]);
    assert_same(&place.path("b.raw"), &mounted.file("memory.raw"));
}

/// The pages of the chunk that has page 20, after one of its bytes was changed.
fn damage(place: &Place) -> Vec<u64> {
    let file = place.path("a.snap");
    let snapshot = Snapshot::open(&file).expect("it can be opened");
    let chunk = |number| match snapshot.entry(PageIndex(number)).expect("it is there") {
        PageEntry::Data { chunk, .. } => chunk.offset(),
        entry => panic!("{entry:?}"),
    };
    let damaged = chunk(20);
    let mut bytes = std::fs::read(&file).expect("it can be read");
    bytes[damaged as usize + 200] ^= 0x10;
    std::fs::write(&file, bytes).expect("it can be written");
    (0..64).filter(|number| chunk(*number as u32) == damaged).collect()
}

const SIGBUS_AT_PAGE: &str = "
import mmap, sys
file = open(sys.argv[1], 'rb')
memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)
print(memory[19 * 4096 - 1 - 8 * 4096], flush=True)
print(memory[20 * 4096])";

#[test]
fn a_flipped_byte_is_an_error_at_its_chunk_only() {
    needs_mount!("a_flipped_byte_is_an_error_at_its_chunk_only");
    for options in [&[][..], &["--prefetch", "all"], &["--populate", "off"]] {
        let (place, bytes) = noisy();
        let bad = damage(&place);
        assert_eq!(bad.len(), 8);
        let mut mounted = Mounted::start(&place.path("a.snap"), options);
        for _ in 0..2 {
            let file = File::open(mounted.file("memory.raw")).expect("it opens");
            for number in 0..64 {
                let read = page(number, &file);
                if bad.contains(&number) {
                    let errno = read.expect_err("it is damaged").raw_os_error();
                    assert_eq!(errno, Some(Errno::IO.raw_os_error()), "page {number}");
                } else {
                    let at = (number * PAGE) as usize;
                    let expected = &bytes[at..at + PAGE as usize];
                    assert!(read.expect("it can be read") == expected, "page {number}");
                }
            }
        }
        let mapped = mounted.python(SIGBUS_AT_PAGE, "memory.raw");
        // A process that a signal has killed has no code.
        assert_eq!((mapped.code, mapped.stdout.lines().count()), (None, 1), "{}", mapped.stderr);
        let (code, lines) = mounted.end("INT");
        assert_eq!(code, Some(130));
        let about: Vec<_> = lines.iter().filter(|line| line.contains("corrupt chunks")).collect();
        assert_eq!(about.len(), 1, "{lines:?}");
        for what in ["a.snap, memory.raw: ", "at offset", "checksum expected"] {
            assert!(about[0].contains(what), "{what} not in {lines:?}");
        }
    }
}

const READ_IN_TWO_STEPS: &str = "
import mmap, os, sys
file = os.open(sys.argv[1], os.O_RDONLY)
memory = mmap.mmap(file, 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)
print(memory[0], flush=True)
sys.stdin.readline()
print(memory[1], flush=True)
try:
    os.pread(file, 4096, 60 * 4096)
except OSError as error:
    print(error.errno != 0, flush=True)
print(memory[61 * 4096])";

/// What was loaded stays readable, and everything else is an error without a wait.
#[test]
fn a_killed_server_hangs_no_reader() {
    needs_mount!("a_killed_server_hangs_no_reader");
    let (place, bytes) = noisy();
    let file = place.path("a.snap");
    let mut mounted = Mounted::start(&file, &["--populate", "off"]);
    let folder = mounted.folder();
    let mut command = python(READ_IN_TWO_STEPS, &mounted.file("memory.raw"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut reader = command.spawn().expect("python3 runs");
    let mut lines = BufReader::new(reader.stdout.take().expect("a pipe")).lines();
    let mut next = || lines.next().and_then(Result::ok);
    assert_eq!(next(), Some(bytes[0].to_string()));
    let (code, _) = mounted.end("KILL");
    assert_eq!(code, None);
    let killed = Instant::now();
    reader.stdin.take().expect("a pipe").write_all(b"\n").expect("it reads");
    assert_eq!(next(), Some(bytes[1].to_string()), "a page that was loaded");
    assert_eq!(next(), Some("True".into()), "a page that was not");
    assert_eq!(next(), None, "SIGBUS");
    assert!(killed.elapsed() < Duration::from_secs(20));
    let _ = reader.wait();

    let dead = File::open(folder.join("memory.raw")).and_then(|file| page(62, &file));
    dead.expect_err("the server is dead");
    let text = folder.to_string_lossy();
    snap(["mount", &place.text("a.snap"), &text])
        .failed(1, &["server that has died", "fusermount3 -u"]);
    let mut unmount = Command::new("umount");
    unmount.arg(&folder);
    run(unmount).ok();
    assert!(!mounted.is_mounted());
    let mut again = Mounted::start_at(&file, &[], mounted.take_place());
    let whole = std::fs::read(again.file("memory.raw")).expect("it is served again");
    assert!(whole == bytes);
    assert_eq!(again.end("TERM").0, Some(130));
}

/// Also while it loads ahead: its threads end, the mount is removed, and readers get errors or data.
#[test]
fn a_server_that_is_killed_while_it_loads_hangs_nothing() {
    needs_mount!("a_server_that_is_killed_while_it_loads_hangs_nothing");
    let place = Place::new();
    let bytes: Vec<u8> = (0..4096).flat_map(|number| noise(number * 977 + 1)).collect();
    std::fs::write(place.path("image"), &bytes).expect("it can be written");
    place.import(&place.path("image"), &["--codec", "lz4"]).ok();
    for number in 0..30 {
        let mut mounted = Mounted::start(&place.path("a.snap"), &["--prefetch", "all"]);
        let reader = |name| {
            let mut command = Command::new("timeout");
            command.args(["20", "cat"]).arg(mounted.file(name)).stdout(Stdio::null());
            command.stderr(Stdio::null()).spawn().expect("timeout runs")
        };
        let readers = [reader("memory.raw"), reader("memory.raw"), reader("memory.core")];
        std::thread::sleep(Duration::from_millis(3 * number));
        assert_eq!(mounted.end("KILL").0, None);
        for mut reader in readers {
            let code = reader.wait().expect("it can be waited for").code();
            assert!(matches!(code, Some(0 | 1)), "{code:?}: 124 is a hang");
        }
        let mut unmount = Command::new("timeout");
        unmount.args(["20", "umount"]).arg(mounted.folder());
        run(unmount).ok();
    }
}

/// The first interrupt unmounts; files that are open are served until they are closed.
#[test]
fn an_interrupt_unmounts_and_open_files_stay() {
    needs_mount!("an_interrupt_unmounts_and_open_files_stay");
    let (place, bytes) = noisy();
    for name in ["INT", "TERM", "HUP"] {
        let mut mounted = Mounted::start(&place.path("a.snap"), &["--populate", "off"]);
        let file = File::open(mounted.file("memory.raw")).expect("it opens");
        signal(mounted.id(), name);
        mounted.wait_until_unmounted();
        assert_eq!(names(&mounted.folder()).len(), 0);
        let read = page(50, &file).expect("it is still served");
        assert!(read == bytes[50 * PAGE as usize..51 * PAGE as usize]);
        drop(file);
        assert_eq!(mounted.ended().0, Some(130), "{name}");
    }
    // The second one ends it.
    let mut mounted = Mounted::start(&place.path("a.snap"), &["--populate", "off"]);
    let file = File::open(mounted.file("memory.raw")).expect("it opens");
    signal(mounted.id(), "INT");
    mounted.wait_until_unmounted();
    assert_eq!(mounted.end("INT").0, Some(130));
    page(50, &file).expect_err("nothing serves it any more");
}

#[test]
fn whoever_unmounts_it_ends_it() {
    needs_mount!("whoever_unmounts_it_ends_it");
    let (place, _) = noisy();
    let mut mounted = Mounted::start(&place.path("a.snap"), &[]);
    let mut unmount = Command::new("umount");
    unmount.arg(mounted.folder());
    run(unmount).ok();
    assert_eq!(mounted.ended(), (Some(0), vec![]));

    // A mount that has taken its place stays.
    let mut first = Mounted::start(&place.path("a.snap"), &[]);
    let open = File::open(first.file("memory.raw")).expect("it opens");
    let mut detach = Command::new("umount");
    detach.arg("-l").arg(first.folder());
    run(detach).ok();
    let mut cover = Command::new("mount");
    cover.args(["-t", "tmpfs", "none"]).arg(first.folder());
    run(cover).ok();
    signal(first.id(), "TERM");
    // If the file was closed before the signal is seen, the mount would end by that.
    first.prints("to be closed");
    drop(open);
    assert_eq!(first.ended().0, Some(130));
    assert!(first.is_mounted(), "the tmpfs is still there");
}

#[test]
fn other_folders_are_refused() {
    let (place, _) = noisy();
    let (file, text) = (place.text("a.snap"), place.0.path().to_string_lossy().into_owned());
    snap(["mount", &file, &text]).failed(1, &[&text, "not empty"]);
    snap(["mount", &file, &file]).failed(1, &["a.snap", "not a directory"]);
    snap(["mount", &file, &place.text("missing")]).failed(1, &["missing", "No such file"]);
    snap(["mount", &place.text("image"), &text]).failed(3, &["image", "not a snapshot"]);
}

#[test]
fn without_the_device_it_says_so() {
    let (place, _) = noisy();
    std::fs::create_dir(place.path("mounted")).expect("it can be created");
    // A mount namespace whose /dev lacks it.
    let script = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && \
        { \"$SNAP\" mount \"$FILE\" \"$FOLDER\"; echo code $? >&2; }";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).env("SNAP", SNAP);
    command.env("FILE", place.path("a.snap")).env("FOLDER", place.path("mounted"));
    let ran = run(command);
    if !ran.stderr.contains("code") {
        return skip("without_the_device_it_says_so", "this user may not mount a tmpfs");
    }
    for what in ["code 4", "/dev/fuse", "No such file"] {
        assert!(ran.stderr.contains(what), "{what} not in {}", ran.stderr);
    }
}

/// A user without privileges mounts by fusermount3, where /dev/fuse is for all users as it usually is. No other user
/// sees the files, not even root.
#[test]
fn a_user_without_privileges_mounts() {
    let test = "a_user_without_privileges_mounts";
    needs_mount!("a_user_without_privileges_mounts");
    if Command::new("fusermount3").arg("-V").output().is_err() {
        return skip(test, "there is no fusermount3 (package fuse3)");
    }
    let (place, bytes) = noisy();
    let program = place.path("snap");
    std::fs::copy(SNAP, &program).expect("it can be copied");
    for (path, mode) in [(&program, 0o755), (&place.path("a.snap"), 0o644)] {
        let mode = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(path, mode).expect("it is ours");
    }
    let script = "
        mount -t tmpfs none /mnt && mknod -m 666 /mnt/fuse c 10 229 && mount --bind /mnt/fuse /dev/fuse
        chmod 755 . && mkdir mounted && chown 65534:65534 mounted
        as_nobody() { setpriv --reuid 65534 --regid 65534 --clear-groups \"$@\"; }
        setpriv --reuid 65534 --regid 65534 --clear-groups ./snap mount a.snap mounted & server=$!
        until as_nobody test -e mounted/memory.raw; do kill -0 $server || exit 9; sleep 0.01; done
        as_nobody cat mounted/memory.raw >copy
        cat mounted/memory.raw
        kill -TERM $server; wait $server; echo server $? >&2
        ls -A mounted >&2; echo unmounted >&2";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).current_dir(place.0.path());
    let ran = run(command).ok();
    assert!(std::fs::read(place.path("copy")).expect("it was read") == bytes);
    assert!(ran.stdout.is_empty());
    for what in ["Permission denied", "server 130\nunmounted\n"] {
        assert!(ran.stderr.contains(what), "{what} not in {}", ran.stderr);
    }
}

#[test]
fn other_users_read_if_they_are_allowed() {
    needs_mount!("other_users_read_if_they_are_allowed");
    let (place, bytes) = noisy();
    for (options, allowed) in [(&[][..], false), (&["--allow-other"], true)] {
        let mounted = Mounted::start(&place.path("a.snap"), options);
        let outside = mounted.folder().parent().expect("it has one").to_owned();
        let all = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(outside, all).expect("it is ours");
        let mut command = Command::new("cat");
        command.arg(mounted.file("memory.raw")).uid(65534).gid(65534);
        let read = command.output().expect("cat runs");
        assert_eq!(read.stdout == bytes, allowed, "{options:?}");
        assert_eq!(read.status.success(), allowed);
    }
}

/// Waits until this many bytes of a file are in the page cache.
#[track_caller]
fn wait_for_cached(file: &Path, bytes: u64) {
    let began = Instant::now();
    while cached_bytes(file) < bytes {
        assert!(began.elapsed() < Duration::from_secs(60), "{} bytes", cached_bytes(file));
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A guest of Firecracker that halts for each page that it waits for gets them all.
#[test]
fn memory_of_a_guest_with_asynchronous_page_faults_is_loaded_when_it_is_opened() {
    needs_mount!("memory_of_a_guest_with_asynchronous_page_faults_is_loaded_when_it_is_opened");
    let place = Place::new();
    let bytes: Vec<u8> = (0..1024).flat_map(|number| noise(number * 977 + 1)).collect();
    std::fs::write(place.path("image"), &bytes).expect("it can be written");
    for enabled in [true, false] {
        let mut state = vmstate(0x8664);
        // The MSR, its value, and the place of the checksum.
        state.extend(0x4b56_4d02_u64.to_le_bytes());
        state.extend(u64::from(enabled).to_le_bytes());
        state.extend([0; 8]);
        std::fs::write(place.path("state"), state).expect("it can be written");
        place.import(&place.path("image"), &["--vmstate", &place.text("state"), "--force"]).ok();
        let mounted = Mounted::start(&place.path("a.snap"), &[]);
        let memory = mounted.file("firecracker/memory");
        page(0, &File::open(&memory).expect("it opens")).expect("it can be read");
        if enabled {
            wait_for_cached(&memory, bytes.len() as u64);
        } else {
            assert!(cached_bytes(&memory) < MIB);
        }
    }
}

#[test]
fn a_working_set_is_loaded_when_a_file_is_read() {
    needs_mount!("a_working_set_is_loaded_when_a_file_is_read");
    needs_vm!();
    let sample = Sample::small();
    let file = sample.file.to_string_lossy();
    let trained = sample.folder.path().join("trained.snap");
    snap(["train", &file, "--beats", "1", "-o", &trained.to_string_lossy()]).ok();
    let info = snap(["info", "--json", &trained.to_string_lossy()]).ok().json();
    let pages = info["working_set"]["pages"].as_u64().expect("a number");
    let mounted = Mounted::start(&trained, &["--populate", "off"]);
    let memory = mounted.file("memory.raw");
    page(0, &File::open(&memory).expect("it opens")).expect("it can be read");
    wait_for_cached(&memory, pages * PAGE);
}

/// Opening a file loads what is to be there before it is touched.
#[test]
fn files_are_loaded_ahead() {
    needs_mount!("files_are_loaded_ahead");
    let place = Place::new();
    let bytes: Vec<u8> = (0..2048).flat_map(|number| noise(number * 977 + 1)).collect();
    std::fs::write(place.path("image"), &bytes).expect("it can be written");
    place.import(&place.path("image"), &[]).ok();
    for (options, loaded) in [
        (&["--prefetch", "all"][..], true),
        (&["--prefetch", "off", "--populate", "off"][..], false),
    ] {
        let mounted = Mounted::start(&place.path("a.snap"), options);
        let file = File::open(mounted.file("memory.raw")).expect("it opens");
        let cached = || cached_bytes(&mounted.file("memory.raw"));
        assert_eq!(page(7, &file).expect("it can be read"), bytes[7 * 4096..8 * 4096]);
        match loaded {
            true => wait_for_cached(&mounted.file("memory.raw"), bytes.len() as u64),
            false => assert!(cached() < MIB, "{} bytes", cached()),
        }
        let whole = std::fs::read(mounted.file("memory.raw")).expect("it can be read");
        assert!(whole == bytes);
    }
}
