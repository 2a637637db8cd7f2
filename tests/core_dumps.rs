//! A core dump of `snap` has no memory of its guest.

use crate::support::{Sample, needs_vm};
use crate::talking::Talking;

/// Bytes of the guest's memory.
const GUEST_BYTES: u64 = 64 << 20;

/// The mappings of a process that are a quarter as long as the memory of the guest, or longer, and whether each is left out of core dumps
/// (proc(5), the flag `dd` of `VmFlags`).
fn large_mappings(process: u32) -> Vec<(String, bool)> {
    let smaps = std::fs::read_to_string(format!("/proc/{process}/smaps")).expect("it runs");
    let mut large = Vec::new();
    let mut mapping = ("", 0);
    for line in smaps.lines() {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let number = |text| u64::from_str_radix(text, 16).ok();
        if let Some((start, end)) = range.and_then(|(a, b)| Some((number(a)?, number(b)?))) {
            mapping = (line, end - start);
        }
        if let Some(flags) = line.strip_prefix("VmFlags:")
            && mapping.0.contains(" rw")
            && mapping.1 >= GUEST_BYTES / 4
        {
            large.push((mapping.0.to_owned(), flags.split(' ').any(|flag| flag == "dd")));
        }
    }
    large
}

#[test]
fn guest_memory_is_left_out_of_core_dumps() {
    needs_vm!();
    let sample = Sample::create(&["--memory", "64M", "--work", "4M"]);
    let file = sample.file.to_string_lossy();
    for mode in [&[][..], &["--lazy"], &["--lazy", "--populate", "off"]] {
        let mut snap = Talking::snap([&["restore", &*file][..], mode].concat());
        snap.beats(1);
        let large = large_mappings(snap.id());
        assert!(!large.is_empty(), "{mode:?}");
        assert!(large.iter().all(|(_, left_out)| *left_out), "{mode:?}: {large:?}");
    }
}
