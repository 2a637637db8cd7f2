//! Damage that is found only while the guest runs: the guest stops with a message, never hangs, and never sees zeros
//! instead of a page.

use std::io::{BufRead, BufReader, Read};
use std::process::Command;

use snapfmt::{PageEntry, Snapshot};

use crate::support::{SNAP, Sample, end_of, needs_vm, start};

/// The offsets of all chunks.
pub(crate) fn chunks(sample: &Sample) -> Vec<u64> {
    let snapshot = Snapshot::open(&sample.file).expect("it opens");
    let mut offsets = Vec::new();
    snapshot
        .for_each_entry(0..snapshot.leaf_count(), |_, entry| {
            if let PageEntry::Data { chunk, .. } = entry {
                offsets.push(chunk.offset());
            }
            Ok(())
        })
        .expect("the index can be read");
    offsets.dedup();
    offsets
}

/// Flips a bit in each chunk of the later half.
pub(crate) fn damage_later_half(sample: &Sample) {
    let chunks = chunks(sample);
    let mut bytes = std::fs::read(&sample.file).expect("it can be read");
    for offset in &chunks[chunks.len() / 2..] {
        bytes[*offset as usize + 200] ^= 0x10;
    }
    std::fs::write(&sample.file, bytes).expect("it can be written");
}

#[test]
fn a_flipped_chunk_is_found_when_it_is_faulted() {
    needs_vm!();
    let sample = Sample::small();
    let chunks = chunks(&sample);
    let mut bytes = std::fs::read(&sample.file).expect("it can be read");
    // All except the first chunks, which hold the guest's own code and tables: so it runs, and then touches one of the
    // others.
    for offset in &chunks[chunks.len() / 2..] {
        bytes[*offset as usize + 200] ^= 0x10;
    }
    std::fs::write(&sample.file, bytes).expect("it can be written");
    let messages = ["guest.snap", "corrupt chunks at offset", "checksum expected", "found"];
    let lazy = sample.restore(&["--lazy", "--beats", "3"]);
    assert!(!lazy.stdout.contains("BAD"), "{}", lazy.stdout);
    lazy.failed(5, &messages).failed(5, &["guest stopped"]);
    // An eager restore finds it before the guest runs.
    let eager = sample.restore(&["--beats", "3"]);
    assert!(eager.stdout.is_empty(), "{}", eager.stdout);
    eager.failed(3, &messages);
}

#[test]
fn with_the_policy_kill_the_process_is_killed_with_a_message() {
    needs_vm!();
    let sample = Sample::small();
    let mut bytes = std::fs::read(&sample.file).expect("it can be read");
    for offset in chunks(&sample) {
        bytes[offset as usize + 200] ^= 0x10;
    }
    std::fs::write(&sample.file, bytes).expect("it can be written");
    let killed = sample.restore(&["--lazy", "--on-error", "kill", "--beats", "3"]);
    assert_eq!(killed.code, None, "not ended by a signal: {}", killed.stderr);
    assert!(killed.stderr.contains("checksum expected"), "{}", killed.stderr);
}

#[test]
fn a_flipped_index_leaf_is_found_when_it_is_used() {
    needs_vm!();
    let sample = Sample::small();
    let snapshot = Snapshot::open(&sample.file).expect("it opens");
    let leaves = snapshot.sections().iter().find(|s| s.kind.to_string() == "index leaves");
    let leaves = *leaves.expect("there is an index");
    let mut bytes = std::fs::read(&sample.file).expect("it can be read");
    bytes[(leaves.end() - 9) as usize] ^= 1;
    std::fs::write(&sample.file, bytes).expect("it can be written");
    let messages = ["corrupt index leaves at offset", "expected", "found"];
    sample.restore(&["--lazy", "--beats", "3"]).failed(5, &messages);
    sample.restore(&["--beats", "3"]).failed(3, &messages);
}

#[test]
fn a_file_cut_short_under_a_running_guest_stops_it() {
    needs_vm!();
    // Small chunks and many pages: its first beat takes the guest thousands of faults.
    let options = ["--memory", "256M", "--work", "192M", "--chunk-pages", "1", "--codec", "raw"];
    let sample = Sample::create(&options);
    let mut command = Command::new(SNAP);
    command.arg("restore").arg("--lazy").arg(&sample.file).args(["--beats", "1000000"]);
    let mut child = start(command);
    while !threads(child.id()).iter().any(|name| name == "vcpu0") {
        std::thread::yield_now();
    }
    let file = std::fs::File::options().write(true).open(&sample.file).expect("it opens");
    file.set_len(5000).expect("it can be cut");
    let mut stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
    let mut output = String::new();
    // The guest may have loaded all its pages before the cut. Then it beats forever, and is ended here.
    while stdout.read_line(&mut output).expect("output is text") > 0 {
        if output.lines().count() > 40 {
            crate::support::signal(child.id(), "INT");
            stdout.read_to_string(&mut output).expect("output is text");
        }
    }
    let ended = end_of(child);
    let stderr = String::from_utf8_lossy(&ended.stderr);
    assert!(!output.contains("BAD"), "{output}");
    if ended.status.code() == Some(130) {
        assert!(output.lines().count() > 40, "{output}{stderr}");
        return;
    }
    assert_eq!(ended.status.code(), Some(5), "{output}{stderr}");
    assert!(stderr.contains("cannot read"), "{stderr}");
}

/// The names of a process' threads.
fn threads(process: u32) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten();
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm"));
    tasks.flatten().filter_map(|task| Some(name(task).ok()?.trim().to_owned())).collect()
}

#[test]
fn a_page_that_only_the_hash_reads_fails_it() {
    needs_vm!();
    // One beat touches a quarter of the pages; the hash reads them all.
    let sample = Sample::create(&["--memory", "64M", "--work", "8M", "--chunk-pages", "1"]);
    let mut bytes = std::fs::read(&sample.file).expect("it can be read");
    let chunks = chunks(&sample);
    let mut found_by_the_hash = false;
    for offset in &chunks[chunks.len() - 20..] {
        let at = *offset as usize + 200;
        bytes[at] ^= 0x10;
        std::fs::write(&sample.file, &bytes).expect("it can be written");
        bytes[at] ^= 0x10;
        if sample.restore(&["--lazy", "--beats", "1"]).code == Some(0) {
            let messages = ["corrupt chunks at offset", "checksum expected"];
            sample.restore(&["--lazy", "--beats", "1", "--hash"]).failed(5, &messages);
            found_by_the_hash = true;
            break;
        }
    }
    assert!(found_by_the_hash);
}

#[test]
fn a_snapshot_of_another_memory_size_is_refused() {
    needs_vm!();
    let sample = Sample::create(&["--memory", "4G", "--work", "8M"]);
    let messages = ["--memory 3 GiB expected, found 4 GiB", "guest.snap"];
    sample.restore(&["--memory", "3G", "--beats", "1"]).failed(1, &messages);
    sample.restore(&["--memory", "3G", "--lazy", "--beats", "1"]).failed(1, &messages);
}
