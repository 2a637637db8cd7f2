//! Snapshots in object storage: read and restored by their address.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::fake_objects::Fake;
use crate::support::{Ran, SNAP, Sample, needs_vm, run};

/// `snap` with a cache of its own.
fn snap_with(cache: &TempDir, args: &[&str]) -> Ran {
    let mut command = Command::new(SNAP);
    command.args(args).env("SNAP_CACHE", cache.path());
    run(command)
}

fn served(file: &Path) -> (Fake, String) {
    let fake = Fake::start(Duration::from_millis(5));
    fake.put("/bucket/guest.snap", std::fs::read(file).expect("the snapshot is there"));
    let url = fake.url("/bucket/guest.snap");
    (fake, url)
}

#[test]
fn a_guest_is_restored_lazily_from_a_server() {
    needs_vm!();
    let sample = Sample::small();
    let (fake, url) = served(&sample.file);
    let cache = tempfile::tempdir().expect("a folder");
    let file = sample.file.to_str().expect("UTF-8");
    for how in [&["--lazy"][..], &[]] {
        let restore = |what: &str| {
            let args = [&["restore", what, "--until", "beat 5", "--report", "json", "--hash"], how];
            snap_with(&cache, &args.concat()).ok()
        };
        let (of_file, of_url) = (restore(file), restore(&url));
        assert!(of_url.stdout.contains("beat 5"), "{}", of_url.stdout);
        let beats = |ran: &Ran| ran.stdout.lines().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(beats(&of_file)[0], beats(&of_url)[0]);
    }
    assert!(!fake.take_asked().is_empty());
}
