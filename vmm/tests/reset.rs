//! A guest that is reset in place is the guest that a restore makes.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::{Lines, MIB, guest_memory, kvm_or_skip, run_to_pause};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm::demo::DemoConfig;
use vmm::state::{STATE_KIND, STATE_VERSION, VcpuState};
use vmm::{Clock, PausedVm, Payload, ResetError, RestoreOptions, Stop, VmState};

const MEMORY_BYTES: u64 = 64 * MIB;

fn whole(memory: &GuestMemoryMmap) -> Vec<u8> {
    let mut bytes = vec![0; MEMORY_BYTES as usize];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

/// A demo guest after three beats: its memory, and its state.
fn saved() -> (Vec<u8>, Vec<u8>) {
    let memory = guest_memory(MEMORY_BYTES);
    let payload = Payload::Demo(DemoConfig::new(8 * MIB));
    let vm = PausedVm::boot(Arc::clone(&memory), &payload, Lines::pausing_after(4)).unwrap();
    let state = run_to_pause(vm).state().unwrap().encode();
    (whole(&memory), state)
}

fn decode(bytes: &[u8]) -> VmState {
    VmState::decode(STATE_KIND, STATE_VERSION, bytes).unwrap()
}

fn restored(bytes: &[u8], state: &[u8], console: &Lines) -> (PausedVm, Arc<GuestMemoryMmap>) {
    let memory = guest_memory(MEMORY_BYTES);
    memory.write_slice(bytes, GuestAddress(0)).unwrap();
    let options = RestoreOptions::default().clock(Clock::Keep).record_writes(true);
    let vm = PausedVm::restore(Arc::clone(&memory), &decode(state), console.clone(), &options);
    (vm.unwrap(), memory)
}

fn tsc(state: &VcpuState) -> u64 {
    state.msrs.iter().find(|msr| msr.0.index == 0x10).unwrap().0.data
}

/// The parts of the state that do not depend on when they are read.
fn lasting(state: &VmState) -> Vec<String> {
    let vcpu = &state.vcpus()[0];
    let counts = |index: u32| matches!(index, 0x10 | 0x3b | 0x6e0);
    let msrs = vcpu.msrs.iter().map(|msr| (msr.0.index, msr.0.data));
    let mut pit = state.irqchip().pit.0;
    // When the host has set it.
    pit.channels.iter_mut().for_each(|channel| channel.count_load_time = 0);
    vec![
        format!("{:?}", vcpu.regs.0),
        format!("{:?}", vcpu.sregs.0),
        format!("{:?}", vcpu.xcrs.0),
        format!("{:?}", vcpu.xsave.0.region),
        format!("{:?}", vcpu.debugregs.0),
        format!("{:?}", vcpu.events.0),
        format!("{:?}", vcpu.mp_state.0),
        format!("{:?}", vcpu.lapic.0),
        format!("{:?}", msrs.filter(|msr| !counts(msr.0)).collect::<Vec<_>>()),
        format!("{pit:?}"),
        format!("{:?}", state.serial()),
        format!("{:?}", state.memory()),
    ]
}

#[test]
fn a_reset_guest_is_a_restored_one() {
    if !kvm_or_skip("a_reset_guest_is_a_restored_one") {
        return;
    }
    let (bytes, state) = saved();
    let (mut fresh, _) = restored(&bytes, &state, &Lines::default());
    let expected = fresh.state().unwrap();
    let console = Lines::pausing_after(5);
    let (mut vm, memory) = restored(&bytes, &state, &console);
    for round in 0..3 {
        vm = run_to_pause(vm);
        let lines = console.take();
        assert_eq!((lines.len(), &lines[0][..], &lines[4][..]), (5, "beat 4 ok", "beat 8 ok"));
        assert!(whole(&memory) != bytes, "it has written");
        // All that was written is recorded, and not everything is.
        let written = vm.take_written().unwrap().expect("it is recorded");
        let written_bytes: u64 = written.iter().map(|range| range.end - range.start).sum();
        assert!(written_bytes < MEMORY_BYTES / 4, "{written_bytes} bytes");
        for range in written {
            let part = &bytes[range.start as usize..range.end as usize];
            memory.write_slice(part, GuestAddress(range.start)).unwrap();
        }
        assert!(whole(&memory) == bytes, "round {round}: a written page is not recorded");
        vm.reset(&decode(&state), &[], Clock::Keep).unwrap();
        assert!(whole(&memory) == bytes, "a reset of the machine writes nothing");
        let found = vm.state().unwrap();
        assert_eq!(lasting(&found), lasting(&expected));
        // KVM has not taken the value for one that is to be synchronized with the present.
        let saved = tsc(&decode(&state).vcpus()[0]);
        let since = tsc(&found.vcpus()[0]).wrapping_sub(saved);
        assert!(since / u64::from(found.vcpus()[0].tsc_khz) < 5000, "{since} ticks");
        console.pause_after(5);
    }
    run_to_pause(vm);
    assert_eq!(console.take()[0], "beat 4 ok");
}

#[test]
fn a_state_of_another_guest_is_refused_and_a_stopped_guest_stays_so() {
    if !kvm_or_skip("a_state_of_another_guest_is_refused_and_a_stopped_guest_stays_so") {
        return;
    }
    let (bytes, state) = saved();
    let other = {
        let memory = guest_memory(32 * MIB);
        let payload = Payload::Demo(DemoConfig::new(8 * MIB));
        PausedVm::boot(memory, &payload, Lines::default()).unwrap().state().unwrap()
    };
    let console = Lines::pausing_after(1);
    let (mut vm, _) = restored(&bytes, &state, &console);
    let error = vm.reset(&other, &[], Clock::Keep).unwrap_err();
    assert!(matches!(error, ResetError::Mismatch { what: "bytes of memory", .. }), "{error}");
    // Nothing was changed.
    let mut vm = run_to_pause(vm);
    assert_eq!(console.take(), ["beat 4 ok"]);

    // An error in the middle leaves a guest that does not run.
    let mut broken = decode(&state);
    broken.vcpus_mut()[0].msrs[0].0.index = 0xdead_0001;
    let error = vm.reset(&broken, &[], Clock::Keep).unwrap_err();
    assert!(matches!(error, ResetError::Vcpu { index: 0, .. }), "{error}");
    let stop = vm.breakdown().unwrap();
    assert!(stop.to_string().contains("the guest was not reset: vCPU 0 cannot be reset"), "{stop}");
    let error = vm.reset(&decode(&state), &[], Clock::Keep).unwrap_err();
    assert!(matches!(error, ResetError::Stopped { .. }), "{error}");
    let running = vm.resume().unwrap();
    assert!(matches!(running.wait(None), Some(Stop::Failed { .. })));
    assert!(running.pause().is_err());
    assert!(console.take().is_empty());
}
