//! Every reason why a guest stops is distinguished, and a guest can always be stopped.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::{GIB, LOST_ONCE, Lines, MIB, PATIENCE, guest_memory, kvm_or_skip, stop_of};
use vm_memory::{Bytes, GuestAddress};
use vmm::{Console, ConsoleFlow, PausedVm, Payload, RestoreOptions, RunningVm, SaveError, Stop};

/// `cli; hlt; jmp $-1`
const SLEEP: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfd];
/// `jmp $`
const SPIN: &[u8] = &[0xeb, 0xfe];
/// `ud2`, with no interrupt table
const TRIPLE_FAULT: &[u8] = &[0x0f, 0x0b];
/// `mov al, 0xfe; out 0x64, al; jmp $`
const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe];
/// Reads a device address and a port where nothing is; writes one byte of each to COM1; newline; spins.
const READ_NOTHING: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xbb, 0x00, 0x00, 0x00, 0x20, // mov ebx, 0x20000000
    0x8a, 0x03, // mov al, [rbx]
    0x24, 0x5a, // and al, 'Z'
    0xee, // out dx, al
    0xe4, 0x80, // in al, 0x80
    0x24, 0x59, // and al, 'Y'
    0xee, // out dx, al
    0xb0, 0x0a, // mov al, '\n'
    0xee, // out dx, al
    0xeb, 0xfe, // jmp $
];
/// Writes 8 bytes to memory, 4 on either side of a page's end; prints '1' when it reads them back.
const WRITE_ACROSS_PAGES: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xbb, 0xfc, 0xff, 0xff, 0x1f, // mov ebx, 0x1ffffffc
    0x48, 0xb8, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, // mov rax, 0x1122334455667788
    0x48, 0x89, 0x03, // mov [rbx], rax
    0x48, 0x3b, 0x03, // cmp rax, [rbx]
    0x0f, 0x94, 0xc0, // sete al
    0x04, 0x30, // add al, '0'
    0xee, // out dx, al
    0xb0, 0x0a, // mov al, '\n'
    0xee, // out dx, al
    0xeb, 0xfe, // jmp $
];
/// Echoes the serial port's input in an endless loop, by polling.
const ECHO: &[u8] = &[
    0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd
    0xec, // in al, dx
    0xa8, 0x01, // test al, 1
    0x74, 0xf7, // jz start
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xec, // in al, dx
    0xee, // out dx, al
    0xeb, 0xef, // jmp start
];

fn start(code: &[u8], console: impl Console + 'static) -> RunningVm {
    let payload = Payload::Program { code: code.to_vec() };
    PausedVm::boot(guest_memory(4 * MIB), &payload, console).unwrap().resume().unwrap()
}

#[test]
fn a_sleeping_and_a_spinning_guest_can_be_paused_again_and_again() {
    if !kvm_or_skip("a_sleeping_and_a_spinning_guest_can_be_paused_again_and_again") {
        return;
    }
    for code in [SLEEP, SPIN] {
        let mut running = start(code, Lines::default());
        for round in 0..50 {
            // With and without time to get into KVM_RUN.
            if round % 2 == 0 {
                assert_eq!(running.wait(Some(Duration::from_millis(1))), None);
            }
            running.handle().request_pause();
            assert_eq!(stop_of(&running), Stop::PauseRequested);
            running = running.pause().unwrap().resume().unwrap();
        }
    }
}

#[test]
fn the_ends_of_a_guest_are_distinguished() {
    if !kvm_or_skip("the_ends_of_a_guest_are_distinguished") {
        return;
    }
    for (code, end) in [(TRIPLE_FAULT, Stop::Shutdown), (RESET, Stop::Reset)] {
        let running = start(code, Lines::default());
        assert_eq!(stop_of(&running), end);
        // A guest that has ended cannot be saved by accident.
        let error = running.pause().err().unwrap();
        assert_eq!(error.stop, end);
    }
}

#[test]
fn a_failure_stops_a_guest_permanently() {
    if !kvm_or_skip("a_failure_stops_a_guest_permanently") {
        return;
    }
    let running = start(SLEEP, Lines::default());
    running.handle().fail("page 7 is unreadable");
    let failed = Stop::Failed { reason: "page 7 is unreadable".into() };
    assert_eq!(stop_of(&running), failed);
    assert_eq!(
        running.pause().err().unwrap().to_string(),
        "the guest cannot continue: page 7 is unreadable"
    );

    // The same while it is paused, when no thread is there to be stopped.
    let mut paused = start(SLEEP, Lines::default()).pause().unwrap();
    paused.handle().fail("page 7 is unreadable");
    assert!(matches!(paused.state(), Err(SaveError::Stopped { stop }) if stop == failed));
    assert_eq!(stop_of(&paused.resume().unwrap()), failed);
}

#[test]
fn no_device_answers_at_unused_addresses() {
    if !kvm_or_skip("no_device_answers_at_unused_addresses") {
        return;
    }
    let console = Lines::pausing_after(1);
    let running = start(READ_NOTHING, console.clone());
    assert_eq!(stop_of(&running), Stop::ConsolePause);
    assert_eq!(console.take(), ["ZY"]);
}

/// An access across two pages is two MMIO exits while its memory slot is not registered. The first exit
/// registers it, and so the second was mistaken for a page that cannot be read.
#[test]
fn an_access_across_pages_that_are_registered_late_is_done_in_parts() {
    if !kvm_or_skip("an_access_across_pages_that_are_registered_late_is_done_in_parts") {
        return;
    }
    const ADDRESS: u64 = 0x1fff_fffc;
    const VALUE: u64 = 0x1122_3344_5566_7788;
    // The vCPU races with the thread that registers slots. Repeat until the vCPU was first once.
    let (mut late_accesses, mut rounds) = (0, 0);
    let began = Instant::now();
    while rounds < 20 || (late_accesses == 0 && began.elapsed() < LOST_ONCE) {
        rounds += 1;
        let console = Lines::pausing_after(1);
        let memory = guest_memory(GIB);
        let payload = Payload::Program { code: WRITE_ACROSS_PAGES.to_vec() };
        let vm = PausedVm::boot(memory.clone(), &payload, console.clone()).unwrap();
        let running = vm.resume().unwrap();
        assert_eq!(stop_of(&running), Stop::ConsolePause);
        late_accesses += running.late_accesses();
        assert_eq!(console.take(), ["1"]);
        let written: u64 = memory.read_obj(GuestAddress(ADDRESS)).unwrap();
        assert_eq!(written, VALUE);
    }
    assert!(late_accesses > 0, "in {rounds} rounds no access met memory that was not registered");
}

#[test]
fn input_reaches_the_guest_and_survives_a_restore() {
    if !kvm_or_skip("input_reaches_the_guest_and_survives_a_restore") {
        return;
    }
    let console = Lines::pausing_after(1);
    let payload = Payload::Program { code: ECHO.to_vec() };
    let memory = guest_memory(4 * MIB);
    let running =
        PausedVm::boot(memory.clone(), &payload, console.clone()).unwrap().resume().unwrap();
    // The first line pauses the guest; the second is longer than the UART's FIFO and waits in the
    // queue.
    let second = "x".repeat(200);
    let input = format!("first\n{second}\n");
    assert_eq!(running.handle().send_input(input.as_bytes()), input.len());
    assert_eq!(running.wait(PATIENCE), Some(Stop::ConsolePause));
    assert_eq!(console.take(), ["first"]);
    let state = running.pause().unwrap().state().unwrap();
    assert!(state.serial().queued_input.len() > 100);

    console.pause_after(1);
    let vm = PausedVm::restore(memory, &state, console.clone(), &RestoreOptions::default());
    let running = vm.unwrap().resume().unwrap();
    assert_eq!(stop_of(&running), Stop::ConsolePause);
    assert_eq!(console.take(), [second]);
    // Input is bounded when the guest does not read it.
    assert!(running.handle().send_input(&vec![b'y'; 1 << 20]) < 1 << 20);
}

#[test]
fn a_console_that_panics_stops_the_guest() {
    if !kvm_or_skip("a_console_that_panics_stops_the_guest") {
        return;
    }
    let running =
        start(READ_NOTHING, |_: &[u8]| -> ConsoleFlow { panic!("requested by the test") });
    assert!(matches!(stop_of(&running), Stop::Failed { .. }));
    assert!(running.pause().is_err());
}

/// A guest's exits are counted, also after a pause; one that only computes has none.
#[test]
fn exits_of_a_vcpu_are_counted() {
    if !kvm_or_skip("exits_of_a_vcpu_are_counted") {
        return;
    }
    let mut running = start(ECHO, Lines::default());
    let mut before = 0;
    for _ in 0..2 {
        let handle = running.handle();
        // The thread begins in its own time.
        while handle.vcpus().iter().all(|vcpu| vcpu.exits < before + 10) {
            std::thread::yield_now();
        }
        assert_eq!(handle.vcpus().len(), 1);
        assert_eq!(handle.vcpus()[0].thread_id, handle.vcpu_thread_ids()[0]);
        before = handle.vcpus()[0].exits;
        running = running.pause().unwrap().resume().unwrap();
    }
    let spinning = start(SPIN, Lines::default());
    while spinning.handle().vcpus().is_empty() {
        std::thread::yield_now();
    }
    assert_eq!(spinning.handle().vcpus()[0].exits, 0);
}

#[test]
fn handles_outlive_the_guest_without_effect() {
    if !kvm_or_skip("handles_outlive_the_guest_without_effect") {
        return;
    }
    let running = start(SPIN, Lines::default());
    let handle = running.handle();
    while handle.vcpu_thread_ids().is_empty() {
        std::thread::yield_now();
    }
    drop(running);
    assert!(handle.vcpu_thread_ids().is_empty());
    assert_eq!(handle.send_input(b"anyone?"), 0);
    handle.request_pause();
}
