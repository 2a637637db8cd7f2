//! What differs between clones of one snapshot, and what does not (`docs/uniqueness.md`).

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::control::Vm;
use crate::kernel;
use crate::networks::HostTap;
use crate::serving::Serving;
use crate::support::{Ran, Sample, needs_vm, snap};
use crate::virtio_guest::{request, show};

const GENERATION_ID: u32 = 0xf_0000;
const GENERATION_COUNTER: u32 = 0xf_1068;
/// Where the guest keeps what it has seen of the counter.
const SEEN: u32 = 0x40_0000;
const RESULT: u32 = 0x40_1000;
/// The configurations of the vsock and of the network interface.
const CONTEXT_ID: u32 = 0xd000_0100;
const MAC: u32 = 0xd000_1100;

/// Prints bytes, each as two letters A to P, and a newline.
fn print(gpa: u32, bytes: u32) -> Vec<u8> {
    [
        &[0xbe][..], // mov esi, gpa
        &gpa.to_le_bytes(),
        &[0xb9], // mov ecx, bytes
        &bytes.to_le_bytes(),
        &[0x66, 0xba, 0xf8, 0x03], // mov dx, 0x3f8
        // 1: mov al, [esi]; shr al, 4; add al, 'A'; out dx, al
        &[0x8a, 0x06, 0xc0, 0xe8, 0x04, 0x04, b'A', 0xee],
        // mov al, [esi]; and al, 15; add al, 'A'; out dx, al
        &[0x8a, 0x06, 0x24, 0x0f, 0x04, b'A', 0xee],
        // inc esi; dec ecx; jnz 1b; mov al, '\n'; out dx, al
        &[0x46, 0x49, 0x75, 0xed, 0xb0, b'\n', 0xee],
    ]
    .concat()
}

/// Keeps the lower half of the generation counter, and requests a snapshot. Then it prints N if the counter is new with
/// the next instruction, or else S; the counter, and the generation id.
fn compares(end: &[u8]) -> Vec<u8> {
    let keep = [
        &[0xa1][..], // mov eax, [counter]
        &GENERATION_COUNTER.to_le_bytes(),
        &[0xa3], // mov [seen], eax
        &SEEN.to_le_bytes(),
    ];
    let compare = [
        &[0xa1][..], // mov eax, [counter]
        &GENERATION_COUNTER.to_le_bytes(),
        &[0x3b, 0x05], // cmp eax, [seen]
        &SEEN.to_le_bytes(),
        // mov al, 'N'; jne +2; mov al, 'S'
        &[0xb0, b'N', 0x75, 0x02, 0xb0, b'S'],
        &[0xa2], // mov [result], al
        &RESULT.to_le_bytes(),
    ];
    [
        keep.concat(),
        request(),
        compare.concat(),
        show(RESULT),
        print(GENERATION_COUNTER, 8),
        print(GENERATION_ID, 16),
        end.to_vec(),
    ]
    .concat()
}

/// The guest's snapshot, in a folder with its kernel.
fn snapshotted(code: &[u8], devices: &[&str]) -> Sample {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    fs::write(path("kernel"), kernel::elf(code, true, 0)).expect("it is written");
    let file = folder.path().join("guest.snap");
    let create = ["create", &path("guest.snap"), "--kernel", &path("kernel")];
    snap(create.iter().chain(devices)).ok();
    Sample { folder, file }
}

/// The counter and the id that a clone has printed. It has found that the counter is new.
#[track_caller]
fn generation(lines: &[String]) -> (String, String) {
    assert_eq!((lines.len(), &lines[0][..]), (3, "N"), "{lines:?}");
    assert_eq!((lines[1].len(), lines[2].len()), (16, 32), "{lines:?}");
    (lines[1].clone(), lines[2].clone())
}

fn lines(ran: &Ran) -> Vec<String> {
    ran.stdout.lines().map(str::to_owned).collect()
}

#[track_caller]
fn all_differ(generations: &[(String, String)]) {
    for (index, one) in generations.iter().enumerate() {
        for other in &generations[..index] {
            assert!(one.0 != other.0 && one.1 != other.1, "{generations:?}");
        }
    }
}

/// A program that looks at the counter before it uses something that must be unique cannot miss that it is a clone.
#[test]
fn each_clone_sees_a_new_generation_with_its_next_instruction() {
    needs_vm!();
    let sample = snapshotted(&compares(&kernel::power_off()), &[]);
    let file = sample.file.to_str().expect("text");
    let serving = Serving::start(&sample);
    let socket = serving.socket.to_str().expect("text");
    let mut seen = Vec::new();
    for mode in [
        &[][..],
        &["--lazy"],
        &["--lazy", "--populate", "full"],
        &["--lazy", "--share", socket],
        &["--lazy", "--share", socket],
    ] {
        let ran = snap([&["restore", file], mode].concat()).ok();
        seen.push(generation(&lines(&ran)));
    }
    all_differ(&seen);
    assert_eq!(serving.end("TERM"), Some(130));
}

#[test]
fn each_reset_is_a_new_generation() {
    needs_vm!();
    // jmp to itself
    let sample = snapshotted(&compares(&[0xeb, 0xfe]), &[]);
    let file = sample.file.to_str().expect("text");
    for mode in [&["--lazy"][..], &[]] {
        let args = [&["restore", file], mode].concat();
        let mut vm = Vm::start_paused(sample.folder.path(), &args);
        let mut seen = Vec::new();
        for _ in 0..4 {
            seen.push(generation(&[vm.line(), vm.line(), vm.line()]));
            snap(["reset".as_ref(), "--vm".as_ref(), vm.socket.as_os_str()]).ok();
        }
        all_differ(&seen);
        vm.interrupt();
    }
}

/// Addresses are those of the snapshot. A clone gets others only by options.
#[test]
fn addresses_are_the_same_unless_others_are_given() {
    needs_vm!();
    let name = format!("snapu{}", std::process::id());
    let Some(tap) = HostTap::new("addresses_are_the_same", &name) else { return };
    let code = [request(), print(CONTEXT_ID, 8), print(MAC, 6), kernel::power_off()].concat();
    let folder = tempfile::tempdir().expect("a folder");
    let vsock = |cid: u32, name: &str| format!("{cid},{}", folder.path().join(name).display());
    let net = format!("tap={},mac=02:00:00:00:00:01", tap.0);
    let sample = snapshotted(&code, &["--vsock", &vsock(3, "a"), "--net", &net]);
    let file = sample.file.to_str().expect("text");
    let (same_net, first) = (format!("tap={}", tap.0), vsock(3, "b"));
    let ran = snap(["restore", file, "--net", &same_net, "--vsock", &first]).ok();
    assert_eq!(lines(&ran), ["ADAAAAAAAAAAAAAA", "ACAAAAAAAAAB"]);
    let (other_net, other) = (format!("tap={},mac=02:00:00:00:00:0f", tap.0), vsock(16, "c"));
    let ran = snap(["restore", file, "--net", &other_net, "--vsock", &other]).ok();
    assert_eq!(lines(&ran), ["BAAAAAAAAAAAAAAA", "ACAAAAAAAAAP"]);
}

/// The lines of a file, when it has as many.
#[track_caller]
fn written(path: &Path, count: usize) -> Vec<String> {
    let began = Instant::now();
    loop {
        let text = fs::read_to_string(path).unwrap_or_default();
        let lines: Vec<_> = text.lines().map(str::to_owned).collect();
        if lines.len() >= count && text.ends_with('\n') {
            return lines;
        }
        assert!(began.elapsed() < LONG, "{text:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

const LONG: Duration = Duration::from_secs(60);

/// In the default jail, in which no process can be started.
#[test]
fn the_command_of_on_restore_is_run_once_with_the_generation_of_the_guest() {
    needs_vm!();
    // jmp to itself
    let sample = snapshotted(&compares(&[0xeb, 0xfe]), &[]);
    let file = sample.file.to_str().expect("text");
    let id = snap(["info", file, "--json"]).ok().json()["id"].clone();
    for mode in [&["--lazy"][..], &[]] {
        let out = sample.folder.path().join("ran");
        let say = "echo \"$SNAP_ID $SNAP_GENERATION_ID $SNAP_API\"";
        let hook = format!("test -S \"$SNAP_API\" && {say} >> {}; echo noise", out.display());
        let args = [&["restore", file, "--paused", "--on-restore", &hook], mode].concat();
        let mut vm = Vm::start_paused(sample.folder.path(), &args);
        let paused = vm.ask("GET", "/vm", &serde_json::Value::Null);
        assert_eq!(paused.1["state"], "Paused", "{paused:?}");
        assert!(!out.exists(), "it was run before the guest");
        vm.ask("PATCH", "/vm", &serde_json::json!({ "state": "Resumed" }));
        let (_, printed) = generation(&[vm.line(), vm.line(), vm.line()]);
        let printed = printed
            .bytes()
            .map(|letter| char::from(b"0123456789abcdef"[usize::from(letter - b'A')]));
        let expected = format!(
            "{} {} {}",
            id.as_str().expect("text"),
            printed.collect::<String>(),
            vm.socket.display()
        );
        assert_eq!(written(&out, 1), std::slice::from_ref(&expected));
        // A reset is no restore.
        snap(["reset".as_ref(), "--vm".as_ref(), vm.socket.as_os_str()]).ok();
        generation(&[vm.line(), vm.line(), vm.line()]);
        vm.interrupt();
        assert_eq!(written(&out, 1), std::slice::from_ref(&expected));
        fs::remove_file(out).expect("it is there");
    }
}

#[test]
fn a_guest_whose_command_of_on_restore_fails_is_stopped() {
    needs_vm!();
    let sample = snapshotted(&compares(&[0xeb, 0xfe]), &[]);
    let file = sample.file.to_str().expect("text");
    for (command, why) in [
        ("exit 3", "exit status 3; the guest was stopped"),
        ("no-such-program", "exit status 127"),
        ("kill -9 $PPID", "the shell that runs the command was killed"),
    ] {
        for jail in ["default", "off"] {
            let began = Instant::now();
            let args = ["restore", file, "--lazy", "--for", "90s", "--jail", jail];
            snap(args.into_iter().chain(["--on-restore", command])).failed(1, &[why]);
            assert!(began.elapsed() < LONG, "it was not stopped");
        }
    }
    // A guest that ends by itself does not wait for the command, and a restore that fails runs none.
    let ran = sample.folder.path().join("ran");
    let touch = format!("touch {}", ran.display());
    snap(["restore", file, "--memory", "1G", "--on-restore", &touch]).failed(1, &["--memory"]);
    assert!(!ran.exists());
    snap(["restore", file, "--for", "50ms", "--on-restore", "sleep 30"]).ok();
}
