//! A guest continues in another VM without a difference.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::time::Instant;

use common::{GIB, LOST_ONCE, Lines, MIB, guest_memory, kvm_or_skip, run_to_pause};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm::demo::{DemoConfig, DemoPlan};
use vmm::state::{STATE_KIND, STATE_VERSION};
use vmm::{PausedVm, Payload, RestoreError, RestoreOptions, VmState, memory_layout};

const WORK_BYTES: u64 = 8 * MIB;

/// A demo guest paused after a number of beats: its memory, and its state as bytes.
fn saved_guest(memory_bytes: u64, beats: usize) -> (Arc<GuestMemoryMmap>, Vec<u8>) {
    let console = Lines::pausing_after(beats + 1);
    let memory = guest_memory(memory_bytes);
    let payload = Payload::Demo(DemoConfig::new(WORK_BYTES));
    let vm = PausedVm::boot(Arc::clone(&memory), &payload, console).unwrap();
    let state = run_to_pause(vm).state().unwrap().encode();
    (memory, state)
}

fn decode(bytes: &[u8]) -> VmState {
    VmState::decode(STATE_KIND, STATE_VERSION, bytes).unwrap()
}

/// The parts of memory that the guest uses, in bytes.
fn contents(memory: &GuestMemoryMmap, memory_bytes: u64) -> Vec<u8> {
    let config = DemoConfig::new(WORK_BYTES);
    let plan = DemoPlan::new(&config, &memory_layout(memory_bytes).unwrap()).unwrap();
    let mut bytes = vec![0; (2 * MIB + WORK_BYTES) as usize];
    let (tables, work) = bytes.split_at_mut(2 * MIB as usize);
    memory.read_slice(tables, GuestAddress(0)).unwrap();
    let (low, high) = work.split_at_mut(WORK_BYTES as usize / 2);
    memory.read_slice(low, GuestAddress(plan.page_gpa(0))).unwrap();
    memory.read_slice(high, GuestAddress(plan.page_gpa(plan.pages() / 2))).unwrap();
    bytes
}

fn copy(memory: &GuestMemoryMmap, memory_bytes: u64) -> Arc<GuestMemoryMmap> {
    let bytes = contents(memory, memory_bytes);
    let target = guest_memory(memory_bytes);
    let config = DemoConfig::new(WORK_BYTES);
    let plan = DemoPlan::new(&config, &memory_layout(memory_bytes).unwrap()).unwrap();
    let (tables, work) = bytes.split_at(2 * MIB as usize);
    let (low, high) = work.split_at(WORK_BYTES as usize / 2);
    target.write_slice(tables, GuestAddress(0)).unwrap();
    target.write_slice(low, GuestAddress(plan.page_gpa(0))).unwrap();
    target.write_slice(high, GuestAddress(plan.page_gpa(plan.pages() / 2))).unwrap();
    target
}

/// Restores a copy of the guest, takes beats 4 to 6, and returns what is in its memory then, and
/// how often it accessed memory whose slot was not registered yet.
fn three_more_beats(
    memory: &GuestMemoryMmap,
    memory_bytes: u64,
    state: &[u8],
    options: &RestoreOptions,
) -> (Vec<u8>, u64) {
    let console = Lines::pausing_after(3);
    let memory = copy(memory, memory_bytes);
    let vm =
        PausedVm::restore(Arc::clone(&memory), &decode(state), console.clone(), options).unwrap();
    let vm = run_to_pause(vm);
    assert_eq!(console.take(), ["beat 4 ok", "beat 5 ok", "beat 6 ok"]);
    (contents(&memory, memory_bytes), vm.late_accesses())
}

#[test]
fn the_next_beat_follows_and_memory_is_the_same_each_time() {
    if !kvm_or_skip("the_next_beat_follows_and_memory_is_the_same_each_time") {
        return;
    }
    for memory_bytes in [64 * MIB, 4 * GIB] {
        let (memory, state) = saved_guest(memory_bytes, 3);
        let all = RestoreOptions::default();
        let (once, late) = three_more_beats(&memory, memory_bytes, &state, &all);
        let (twice, _) = three_more_beats(&memory, memory_bytes, &state, &all);
        assert_eq!(late, 0, "all memory was registered from the start");
        assert!(once == twice, "memory differs between two runs");
        // The guest that was never restored.
        let (memory, _) = saved_guest(memory_bytes, 6);
        assert!(contents(&memory, memory_bytes) == once, "memory differs from an unbroken run");
    }
}

#[test]
fn memory_that_is_registered_late_is_accessible() {
    if !kvm_or_skip("memory_that_is_registered_late_is_accessible") {
        return;
    }
    let memory_bytes = 4 * GIB;
    let (memory, state) = saved_guest(memory_bytes, 3);
    let (all, _) = three_more_beats(&memory, memory_bytes, &state, &RestoreOptions::default());
    // Code, tables and stack only: each half of the working area is accessed as MMIO first. Many times,
    // because the vCPU races with the thread that registers slots, until the vCPU was first once.
    let (mut late_accesses, mut rounds) = (0, 0);
    let began = Instant::now();
    while rounds < 20 || (late_accesses == 0 && began.elapsed() < LOST_ONCE) {
        rounds += 1;
        let first = RestoreOptions::default().register_first(std::iter::once(0..4096).collect());
        let (found, late) = three_more_beats(&memory, memory_bytes, &state, &first);
        assert!(found == all, "memory differs when it is registered late");
        late_accesses += late;
    }
    assert!(late_accesses > 0, "in {rounds} rounds no access met memory that was not registered");
}

#[test]
fn a_restored_guest_saves_the_same_state() {
    if !kvm_or_skip("a_restored_guest_saves_the_same_state") {
        return;
    }
    let (memory, bytes) = saved_guest(64 * MIB, 3);
    let options = RestoreOptions::default();
    let mut vm = PausedVm::restore(memory, &decode(&bytes), Lines::default(), &options).unwrap();
    let (before, after) = (decode(&bytes), vm.state().unwrap());
    let (old, new) = (&before.vcpus()[0], &after.vcpus()[0]);
    assert_eq!(old.regs.0, new.regs.0);
    assert_eq!(old.sregs.0, new.sregs.0);
    assert_eq!(old.xcrs.0, new.xcrs.0);
    assert_eq!(old.xsave.0.region, new.xsave.0.region);
    assert_eq!(old.debugregs.0, new.debugregs.0);
    assert_eq!(old.events.0, new.events.0);
    assert_eq!(old.mp_state.0, new.mp_state.0);
    assert_eq!(old.tsc_khz, new.tsc_khz);
    assert_eq!(before.serial(), after.serial());
    assert_eq!(before.memory(), after.memory());
    // Time stamps advance; every other register is unchanged.
    let fixed = |state: &vmm::state::VcpuState| -> Vec<(u32, u64)> {
        let counts = |index: u32| matches!(index, 0x10 | 0x3b | 0x6e0);
        state.msrs.iter().map(|m| (m.0.index, m.0.data)).filter(|m| !counts(m.0)).collect()
    };
    assert_eq!(fixed(old), fixed(new));
    // The time stamp counter comes after all but its deadline.
    let tsc = old.msrs.iter().position(|msr| msr.0.index == 0x10).unwrap();
    assert!(old.msrs.len() - tsc <= 2);
}

#[test]
fn foreign_memory_and_foreign_state_are_refused() {
    if !kvm_or_skip("foreign_memory_and_foreign_state_are_refused") {
        return;
    }
    let (_, state) = saved_guest(64 * MIB, 0);
    let restore = |memory_bytes, state: &VmState| {
        let memory = guest_memory(memory_bytes);
        PausedVm::restore(memory, state, Lines::default(), &RestoreOptions::default())
            .err()
            .unwrap()
    };
    let error = restore(32 * MIB, &decode(&state));
    assert!(matches!(error, RestoreError::Memory(_)), "{error}");

    let mut refused = decode(&state);
    refused.vcpus_mut()[0].msrs[0].0.index = 0xdead_0001;
    let error = restore(64 * MIB, &refused);
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(error.to_string(), "vCPU 0 cannot be restored");
    assert!(cause.contains("MSR 0xdead0001"), "{cause}");
}
