//! A guest that is reset, again and again, has each time the memory of its snapshot, and continues from there.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use pager::Populate;
use snapfmt::{Progress, ReadAt, Snapshot, WriteOptions};
use snapvm::interchange::{Export, ExportFormat};
use snapvm::{
    BootConfig, MemoryFrom, ResetError, RestoreConfig, RunningVm, SnapshotError, StagedOutput, Vm,
};
use vmm::demo::DemoConfig;
use vmm::{ConsoleFlow, Payload};

/// How often each guest is reset: 50 times, or $SNAP_RESETS.
fn resets() -> usize {
    std::env::var("SNAP_RESETS").ok().map_or(50, |text| text.parse().expect("a number"))
}

fn can_run(test: &str) -> bool {
    let Err(error) = vmm::probe() else { return true };
    assert!(std::env::var_os("SNAP_REQUIRE_VM").is_none(), "{test} needs KVM: {error}");
    eprintln!("SKIPPED {test}: {error}");
    false
}

fn go(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The lines that a demo guest has written.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<String>>, Arc<AtomicUsize>);

impl Lines {
    fn console(&self) -> impl FnMut(&[u8]) -> ConsoleFlow + Send + use<> {
        let lines = self.clone();
        move |bytes| {
            lines.0.lock().expect("no panic").push_str(&String::from_utf8_lossy(bytes));
            lines
                .1
                .fetch_add(bytes.iter().filter(|byte| **byte == b'\n').count(), Ordering::SeqCst);
            ConsoleFlow::Continue
        }
    }

    fn wait_for(&self, count: usize) {
        while self.1.load(Ordering::SeqCst) < count {
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// The lines so far, and the beginning of the next one.
    fn take(&self) -> Vec<String> {
        let mut text = self.0.lock().expect("no panic");
        self.1.store(0, Ordering::SeqCst);
        std::mem::take(&mut *text).split('\n').map(str::to_owned).collect()
    }
}

fn booted(lines: &Lines) -> RunningVm {
    let payload = Payload::Demo(DemoConfig::new(8 << 20));
    let vm = BootConfig::new(32 << 20, payload).boot(lines.console(), Vec::new());
    vm.expect("it boots").resume().expect("it runs")
}

/// A demo guest after two beats or more, and the number of its next one.
fn saved(file: &Path) -> (Arc<Snapshot>, usize) {
    let lines = Lines::default();
    let vm = booted(&lines);
    lines.wait_for(3);
    let mut vm = vm.pause().expect("it pauses");
    vm.snapshot(file, &WriteOptions::default(), &go).expect("it is written");
    // The first line is no beat, and the last one is not whole.
    let next_beat = lines.take().len() - 1;
    (Arc::new(Snapshot::open(file).expect("it opens")), next_beat)
}

fn memory_of(vm: &Vm) -> Vec<u8> {
    let reader = vm.memory().reader();
    let mut bytes = vec![0; reader.len_bytes().expect("it has a length") as usize];
    reader.read_exact_at(&mut bytes, 0).expect("it is read");
    bytes
}

fn put_back(vm: &mut Vm) -> u64 {
    vm.reset(&go).expect("it is reset").memory_bytes
}

fn is_reset_again_and_again(
    config: &RestoreConfig,
    writes_are_known: bool,
    next: &str,
    expected: &[u8],
) {
    let lines = Lines::default();
    let mut vm = config.restore(lines.console()).expect("it is restored").vm;
    for round in 0..resets() {
        let running = vm.resume().expect("it runs");
        // Sometimes it has done nothing, sometimes all of its work several times.
        match round % 10 {
            0 => {}
            9 => lines.wait_for(12),
            _ => thread::sleep(Duration::from_micros(round as u64 * 977 % 7000)),
        }
        vm = running.pause().expect("it pauses");
        put_back(&mut vm);
        let (last, whole) = {
            let mut lines = lines.take();
            (lines.pop(), lines)
        };
        let lost = whole.iter().position(|line| !line.ends_with(" ok"));
        assert!(lost.is_none(), "round {round}: {whole:?}");
        if let Some(first) = whole.first() {
            // The first line may have been begun before the snapshot.
            assert!(first.ends_with(next), "round {round}: {whole:?}, {last:?}");
        }
        // Reading it loads all of it, which is another way to use memory.
        if round % 5 < 2 {
            assert!(memory_of(&vm) == expected, "round {round}");
        }
    }
    put_back(&mut vm);
    assert!(memory_of(&vm) == expected);
    if writes_are_known {
        put_back(&mut vm);
        assert_eq!(put_back(&mut vm), 0, "a second reset in a row has nothing to do");
    }
}

/// Resets guests that are restored in these ways, which get a raw image of the memory. With each is whether it records
/// which pages are written to.
fn memory_is_that_of_the_snapshot_each_time(
    ways: impl Fn(&dyn Fn() -> RestoreConfig, &Path) -> Vec<(RestoreConfig, bool)>,
) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("a.snap");
    let (snapshot, next_beat) = saved(&file);
    let next = format!("{next_beat} ok");
    let mut expected = vec![0; snapshot.header().memory_bytes as usize];
    snapshot.memory().read_exact_at(&mut expected, 0).expect("it is read");
    let raw = folder.path().join("raw");
    let export = Export::new(&snapshot, ExportFormat::Raw).expect("it has all");
    let out = StagedOutput::new(&raw, export.shape(), false).expect("it is new");
    export.write(&out, &go).expect("it is written");
    out.publish().expect("it appears");
    let config = || RestoreConfig::new(Arc::clone(&snapshot), &file);
    for (config, writes_are_known) in ways(&config, &raw) {
        is_reset_again_and_again(&config, writes_are_known, &next, &expected);
    }
}

#[test]
fn memory_that_is_loaded_when_it_is_touched_is_reset() {
    if !can_run("memory_that_is_loaded_when_it_is_touched_is_reset") {
        return;
    }
    memory_is_that_of_the_snapshot_each_time(|config, raw| {
        let lazy = |populate| config().populate(populate, None);
        vec![
            (lazy(Populate::Off), false),
            (lazy(Populate::Off).quick_resets(true), true),
            (lazy(Populate::Auto).quick_resets(true), true),
            (lazy(Populate::Full), false),
            (lazy(Populate::Full).quick_resets(true), true),
            (config().memory(MemoryFrom::Image(raw.to_owned())), true),
        ]
    });
}

#[test]
fn memory_that_is_loaded_first_is_reset() {
    if !can_run("memory_that_is_loaded_first_is_reset") {
        return;
    }
    memory_is_that_of_the_snapshot_each_time(|config, _| {
        let eager = || config().memory(MemoryFrom::Eager);
        vec![(eager().quick_resets(true), true), (eager(), false)]
    });
}

#[test]
fn what_cannot_be_reset_says_so_and_continues() {
    if !can_run("what_cannot_be_reset_says_so_and_continues") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("a.snap");
    let (snapshot, _) = saved(&file);
    let lines = Lines::default();
    let mut vm = booted(&lines).pause().expect("it pauses");
    let error = vm.reset(&go).expect_err("there is no snapshot");
    assert!(matches!(error, ResetError::NotRestored), "{error}");
    let running = vm.resume().expect("it runs");
    lines.wait_for(3);
    drop(running);

    let config = RestoreConfig::new(Arc::clone(&snapshot), &file);
    let recorded = config.memory(MemoryFrom::Recorded);
    let mut vm = recorded.restore(lines.console()).expect("it is restored").vm;
    let error = vm.reset(&go).expect_err("it is recorded");
    assert!(matches!(error, ResetError::Recorded), "{error}");

    // Of a guest with a live snapshot, until that is dropped.
    let config = RestoreConfig::new(snapshot, &file);
    let mut vm = config.restore(lines.console()).expect("it is restored").vm;
    let armed = match vm.arm(Default::default()) {
        Ok(armed) => armed,
        Err(SnapshotError::Window(error)) => return eprintln!("SKIPPED the rest: {error}"),
        Err(error) => panic!("{error}"),
    };
    let cut = vm.cut(armed).expect("it is cut");
    let error = vm.reset(&go).expect_err("a live snapshot exists");
    assert!(matches!(error, ResetError::Busy), "{error}");
    drop(cut);
    put_back(&mut vm);
}
