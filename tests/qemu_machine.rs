//! A QEMU for a test: `$SNAP_QEMU`, or `qemu-system-x86_64` in `$PATH`, with a guest that counts on its serial port.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::skip;

/// What the guest runs: it fills each 64 KiB of 0x10000..0x80000 with the number of its real-mode segment, and then writes
/// the lower byte of a counter in memory to its serial port, again and again.
const BOOT: [u8; 49] = [
    0xfa, // cli
    0x31, 0xc0, // xor ax, ax
    0x8e, 0xd8, // mov ds, ax
    0xc7, 0x06, 0x00, 0x06, 0x00, 0x00, // mov word [0x600], 0
    0xb8, 0x00, 0x10, // mov ax, 0x1000
    0x8e, 0xc0, // fill: mov es, ax
    0x31, 0xff, // xor di, di
    0xb9, 0x00, 0x80, // mov cx, 0x8000
    0xf3, 0xab, // rep stosw
    0x05, 0x00, 0x10, // add ax, 0x1000
    0x3d, 0x00, 0x80, // cmp ax, 0x8000
    0x75, 0xef, // jne fill
    0xff, 0x06, 0x00, 0x06, // next: inc word [0x600]
    0xa1, 0x00, 0x06, // mov ax, [0x600]
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xee, // out dx, al
    0xb9, 0xff, 0xff, // mov cx, 0xffff
    0xe2, 0xfe, // wait: loop wait
    0xeb, 0xee, // jmp next
];

/// What the guest has in 0x10000..0x80000.
pub(crate) fn filled() -> Vec<u8> {
    let segment = |number: u16| (number << 12).to_le_bytes().repeat(0x8000);
    (1..8).flat_map(segment).collect()
}

/// A machine, and where it has its files.
pub(crate) struct Guest<'a> {
    pub(crate) folder: &'a Path,
    /// The option `-machine`: its type first.
    pub(crate) machine: &'a str,
    /// The size of its memory, in MiB.
    pub(crate) mib: &'a str,
}

/// A QEMU that runs. It is killed when this is dropped.
pub(crate) struct Qemu {
    process: Child,
    lines: BufReader<UnixStream>,
    serial: PathBuf,
}

const PATIENCE: Duration = Duration::from_secs(60);

#[track_caller]
fn wait_for<T>(what: &str, mut get: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = get() {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "waited for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether there is a QEMU that knows mapped-ram (9.0 or later). If not, this prints why, and the test is skipped; with
/// `SNAP_REQUIRE_QEMU` set, that is a failure.
pub(crate) fn host_has_qemu(test: &str) -> bool {
    let version = program().arg("--version").output();
    let text = version.as_ref().map(|output| String::from_utf8_lossy(&output.stdout));
    let number = |text: &str| text.split("version ").nth(1)?.split('.').next()?.parse().ok();
    let reason = match (&version, text) {
        (Err(error), _) if error.kind() == ErrorKind::NotFound => "no QEMU here".to_owned(),
        (Err(error), _) => error.to_string(),
        (_, Ok(text)) if number(&text).is_some_and(|major: u32| major >= 9) => return true,
        (_, text) => format!("no QEMU 9.0 or later: {text:?}"),
    };
    assert!(std::env::var_os("SNAP_REQUIRE_QEMU").is_none(), "{test} was skipped: {reason}");
    skip(test, &reason);
    false
}

fn program() -> Command {
    Command::new(std::env::var_os("SNAP_QEMU").unwrap_or("qemu-system-x86_64".into()))
}

impl Guest<'_> {
    /// Starts QEMU. `name` is for its files.
    #[track_caller]
    pub(crate) fn start(&self, name: &str, more: &[&str]) -> Qemu {
        let path = |suffix: &str| self.folder.join(format!("{name}.{suffix}"));
        let text = |suffix: &str| path(suffix).to_string_lossy().into_owned();
        let mut disk = BOOT.to_vec();
        disk.resize(510, 0);
        disk.extend([0x55, 0xaa]);
        disk.resize(63 * 512, 0);
        std::fs::write(path("disk"), disk).expect("it can be written");
        let drive = format!("file={},format=raw,if=none,id=disk,snapshot=on", text("disk"));
        // Its firmware boots from this controller without more memory.
        let controller: &[_] = match self.machine.starts_with("q35") {
            true => &["-device", "piix3-ide,id=more", "-device", "ide-hd,drive=disk,bus=more.0"],
            false => &["-device", "ide-hd,drive=disk"],
        };
        let serial = format!("file:{}", text("serial"));
        let socket = format!("unix:{},server=on,wait=off", text("qmp"));
        let mut command = program();
        command.args(["-accel", "tcg", "-display", "none", "-nic", "none", "-drive", &drive]);
        command.args(["-serial", &serial, "-qmp", &socket, "-m", self.mib]);
        command.args(["-machine", self.machine]).args(controller).args(more);
        let process = command.stdin(Stdio::null()).spawn().expect("QEMU starts");
        let stream = wait_for("QEMU's socket", || UnixStream::connect(path("qmp")).ok());
        stream.set_read_timeout(Some(PATIENCE)).expect("it can be set");
        let mut qemu = Qemu { process, lines: BufReader::new(stream), serial: path("serial") };
        qemu.line();
        qemu.ask("qmp_capabilities", json!({}));
        qemu
    }

    /// Starts QEMU with the state of a mapped-ram file. It does not run on yet.
    #[track_caller]
    pub(crate) fn restore(&self, name: &str, file: &Path, more: &[&str]) -> Qemu {
        let mut qemu = self.start(name, &[&["-S", "-incoming", "defer"], more].concat());
        qemu.set_mapped_ram();
        qemu.ask("migrate-incoming", json!({ "uri": format!("file:{}", file.display()) }));
        qemu.wait_until_migrated();
        wait_for("the restored guest", || {
            (qemu.ask("query-status", json!({}))["status"] == "paused").then_some(())
        });
        qemu
    }
}

impl Qemu {
    #[track_caller]
    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("QEMU answers");
        serde_json::from_str(&line).expect("JSON")
    }

    /// A command and its result.
    #[track_caller]
    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.lines.get_mut(), "{request}").expect("QEMU reads");
        loop {
            let mut answer = self.line();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(result) = answer.get_mut("return") {
                return result.take();
            }
        }
    }

    fn set_mapped_ram(&mut self) {
        let on = json!([{ "capability": "mapped-ram", "state": true }]);
        self.ask("migrate-set-capabilities", json!({ "capabilities": on }));
    }

    fn wait_until_migrated(&mut self) {
        wait_for("the migration", || {
            let found = self.ask("query-migrate", json!({}));
            assert_ne!(found["status"], "failed", "{found}");
            (found["status"] == "completed").then_some(())
        });
    }

    /// Writes its state to a mapped-ram file.
    #[track_caller]
    pub(crate) fn save(&mut self, file: &Path) {
        self.set_mapped_ram();
        self.ask("migrate", json!({ "uri": format!("file:{}", file.display()) }));
        self.wait_until_migrated();
    }

    /// Guest-physical memory.
    #[track_caller]
    pub(crate) fn memory(&mut self, gpa: u64, len_bytes: u64) -> Vec<u8> {
        let file = self.serial.with_extension("memory");
        let size = json!({ "val": gpa, "size": len_bytes, "filename": file });
        self.ask("pmemsave", size);
        std::fs::read(&file).expect("it is there")
    }

    /// Waits until the guest has counted so far, and stops it. The bytes of its serial port.
    #[track_caller]
    pub(crate) fn stop_after(&mut self, count: usize) -> Vec<u8> {
        let serial = self.serial.clone();
        let read = || std::fs::read(&serial).unwrap_or_default();
        // The firmware writes nothing to it.
        wait_for("the guest to count", || (read().len() >= count).then_some(()));
        self.ask("stop", json!({}));
        read()
    }

    /// The bytes of the guest's serial port so far, after it was continued.
    #[track_caller]
    pub(crate) fn run_on(&mut self) -> Vec<u8> {
        self.ask("cont", json!({}));
        self.stop_after(3)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
