//! The program `snap`, and snapshots that it makes.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

/// `snap` with a cache.
pub(crate) fn command(cache: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_snap"));
    command.args(args).env("SNAP_CACHE", cache).stdin(Stdio::null());
    command
}

pub(crate) fn run(cache: &Path, args: &[&str]) -> Output {
    finished(args, command(cache, args).output().unwrap())
}

fn finished(args: &[&str], output: Output) -> Output {
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// The report of a restore.
pub(crate) fn restore(cache: &Path, what: &str, options: &[&str]) -> Value {
    let args = [&["restore", "--lazy", "--report", "json", "--beats", "1", what], options].concat();
    serde_json::from_slice(&run(cache, &args).stderr).unwrap()
}

/// A restore that has started.
pub(crate) fn start_restore(cache: &Path, what: &str, options: &[&str]) -> Child {
    let args = [&["restore", "--lazy", "--report", "none", "--beats", "1", what], options].concat();
    command(cache, &args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// A snapshot of the demo guest.
pub(crate) fn create(folder: &Path, name: &str, options: &[&str]) -> PathBuf {
    let path = folder.join(name);
    run(folder, &[&["create", "--quiet", path.to_str().unwrap()], options].concat());
    path
}

/// The file and layers on it, each of some beats more; the last one.
pub(crate) fn layers(folder: &Path, base: &Path, layers: usize) -> PathBuf {
    (1..layers).fold(base.to_owned(), |parent, number| {
        let when = format!("output:beat {}", 5 + 2 * number);
        let parent = parent.to_str().unwrap();
        create(folder, &format!("layer-{number}"), &["--from", parent, "--when", &when])
    })
}
