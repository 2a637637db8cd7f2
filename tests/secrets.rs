//! Where a credential must not be found.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The files about a process that others may read, or that a report of an error contains.
const PROC: [&str; 8] =
    ["cmdline", "comm", "maps", "smaps", "stat", "status", "mountinfo", "limits"];

/// Files are read up to here.
const MOST_BYTES: u64 = 64 << 20;

fn has(bytes: &[u8], secret: &str) -> bool {
    bytes.windows(secret.len()).any(|window| window == secret.as_bytes())
}

fn paths_in(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("it is there").flatten();
    entries.map(|entry| entry.path()).collect()
}

/// Checks that no file in the folder has one of the secrets in its name or content.
#[track_caller]
pub(crate) fn not_in_folder(folder: &Path, secrets: &[&str]) {
    for path in paths_in(folder) {
        if path.is_dir() {
            not_in_folder(&path, secrets);
            continue;
        }
        let bytes = fs::read(&path).expect("it can be read");
        for secret in secrets {
            let name = path.to_string_lossy();
            assert!(!has(&bytes, secret) && !name.contains(secret), "{}", path.display());
        }
    }
}

/// Checks that no part of `/proc` about a process has one of the secrets in it, except its memory and the environment
/// that its user has given it; nor has a file that it has open, except its executable.
#[track_caller]
pub(crate) fn not_in_proc(pid: u32, secrets: &[&str]) {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let threads = paths_in(&process.join("task")).into_iter().map(|thread| thread.join("comm"));
    let files = PROC.iter().map(|name| process.join(name)).chain(threads);
    let mut seen = 0;
    for path in files {
        // A thread may have ended.
        let Ok(bytes) = fs::read(&path) else { continue };
        seen += bytes.len();
        assert!(secrets.iter().all(|secret| !has(&bytes, secret)), "{}", path.display());
    }
    assert!(seen > 1000);
    for descriptor in paths_in(&process.join("fd")) {
        let Ok(target) = fs::read_link(&descriptor) else { continue };
        let mut bytes = target.to_string_lossy().into_owned().into_bytes();
        if target.is_file() {
            let file = fs::File::open(&target).expect("it can be read");
            file.take(MOST_BYTES).read_to_end(&mut bytes).expect("it can be read");
        }
        assert!(secrets.iter().all(|secret| !has(&bytes, secret)), "{}", target.display());
    }
}
