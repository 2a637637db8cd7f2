//! The demo guest boots, beats, and leaves exactly the expected content in memory.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{GIB, Lines, MIB, guest_memory, kvm_or_skip, run_to_pause, stop_of};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm::demo::{DemoConfig, DemoPlan, PAGE_BYTES, WALKED_OF_256, page_bytes};
use vmm::{PausedVm, Payload, Stop, memory_layout};

fn demo(work_bytes: u64) -> Payload {
    Payload::Demo(DemoConfig::new(work_bytes))
}

fn assert_work_area(memory: &GuestMemoryMmap, memory_bytes: u64, work_bytes: u64, beat: u64) {
    let layout = memory_layout(memory_bytes).unwrap();
    let plan = DemoPlan::new(&DemoConfig::new(work_bytes), &layout).unwrap();
    let mut found = vec![0; PAGE_BYTES as usize];
    for page in 0..plan.pages() {
        memory.read_slice(&mut found, GuestAddress(plan.page_gpa(page))).unwrap();
        assert!(found == page_bytes(page, beat, WALKED_OF_256), "page {page} after beat {beat}");
    }
}

#[test]
fn fills_and_rewrites_its_memory_as_described() {
    if !kvm_or_skip("fills_and_rewrites_its_memory_as_described") {
        return;
    }
    let console = Lines::pausing_after(1);
    let memory = guest_memory(64 * MIB);
    let vm = PausedVm::boot(Arc::clone(&memory), &demo(16 * MIB), console.clone()).unwrap();
    let vm = run_to_pause(vm);
    let ready = console.take();
    assert!(ready[0].starts_with("ready memory=64 work=16 pages="), "{ready:?}");
    assert_work_area(&memory, 64 * MIB, 16 * MIB, 0);

    console.pause_after(11);
    let _vm = run_to_pause(vm);
    let expected: Vec<String> = (1..=11).map(|beat| format!("beat {beat} ok")).collect();
    assert_eq!(console.take(), expected);
    assert_work_area(&memory, 64 * MIB, 16 * MIB, 11);
}

#[test]
fn beats_in_memory_of_any_size() {
    if !kvm_or_skip("beats_in_memory_of_any_size") {
        return;
    }
    for (memory_bytes, work_bytes) in [
        (6 * MIB, 4 * MIB),
        (3 * GIB, 8 * MIB),
        (3 * GIB + 2 * MIB, 4 * MIB),
        (4 * GIB, 12 * MIB),
        (16 * GIB, 4 * MIB),
    ] {
        let console = Lines::pausing_after(4);
        let memory = guest_memory(memory_bytes);
        let vm = PausedVm::boot(Arc::clone(&memory), &demo(work_bytes), console.clone()).unwrap();
        let _vm = run_to_pause(vm);
        let lines = console.take();
        let ready = format!("ready memory={} work={} ", memory_bytes / MIB, work_bytes / MIB);
        assert!(lines[0].starts_with(&ready), "{lines:?}");
        assert_eq!(lines[1..], ["beat 1 ok", "beat 2 ok", "beat 3 ok"]);
        assert_work_area(&memory, memory_bytes, work_bytes, 3);
    }
}

#[test]
fn detects_every_kind_of_damage() {
    if !kvm_or_skip("detects_every_kind_of_damage") {
        return;
    }
    let memory_bytes = 64 * MIB;
    let plan =
        DemoPlan::new(&DemoConfig::new(8 * MIB), &memory_layout(memory_bytes).unwrap()).unwrap();
    let walked: Vec<u64> =
        (0..plan.pages()).filter(|&p| vmm::demo::in_working_set(p, WALKED_OF_256)).collect();
    // A page lost, a page of an older beat, one flipped bit.
    let stale = walked
        .iter()
        .copied()
        .find(|&page| {
            vmm::demo::page_version(page, 5, WALKED_OF_256)
                > vmm::demo::page_version(page, 4, WALKED_OF_256)
        })
        .unwrap();
    let mut flipped = page_bytes(walked[7], 5, WALKED_OF_256);
    flipped[4095] ^= 0x80;
    for (page, bytes) in [
        (walked[3], vec![0; 4096]),
        (stale, page_bytes(stale, 4, WALKED_OF_256)),
        (walked[7], flipped),
    ] {
        let console = Lines::pausing_after(6);
        let memory = guest_memory(memory_bytes);
        let vm = PausedVm::boot(Arc::clone(&memory), &demo(8 * MIB), console.clone()).unwrap();
        let vm = run_to_pause(vm);
        assert_eq!(console.take()[5], "beat 5 ok");
        memory.write_slice(&bytes, GuestAddress(plan.page_gpa(page))).unwrap();
        console.pause_after(1);
        let _vm = run_to_pause(vm);
        assert_eq!(console.take(), [format!("beat 6 BAD page={page:016x}")]);
    }
}

#[test]
fn times_the_first_entry_and_exit() {
    if !kvm_or_skip("times_the_first_entry_and_exit") {
        return;
    }
    let console = Lines::pausing_after(1);
    let vm = PausedVm::boot(guest_memory(64 * MIB), &demo(4 * MIB), console).unwrap();
    assert_eq!((vm.first_entry(), vm.first_exit()), (None, None));
    let running = vm.resume().unwrap();
    assert_eq!(stop_of(&running), Stop::ConsolePause);
    let (entry, exit) = (running.first_entry().unwrap(), running.first_exit().unwrap());
    assert!(entry < exit && exit.elapsed() < entry.elapsed());
    let vm = running.pause().unwrap();
    assert_eq!((vm.first_entry(), vm.first_exit()), (Some(entry), Some(exit)));
}
