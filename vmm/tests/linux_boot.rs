//! Booting as Linux is booted: the protocols, several vCPUs, power off, reset, the snapshot trigger.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::PathBuf;
use std::sync::Arc;

use common::{Lines, MIB, guest_memory, kernel, kvm_or_skip, run_to_pause, stop_of};
use vmm::boot::LinuxConfig;
use vmm::state::{STATE_KIND, STATE_VERSION};
use vmm::{BootError, BootOptions, PausedVm, Payload, RestoreOptions, Stop, VmState};

/// A file that is deleted when this is dropped.
struct TempFile(PathBuf);

impl TempFile {
    fn new(name: &str, bytes: &[u8]) -> TempFile {
        let path = std::env::temp_dir().join(format!("vmm-{}-{name}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        TempFile(path)
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn linux(kernel: &TempFile, cmdline: &str) -> Payload {
    Payload::Linux(LinuxConfig::new(kernel.0.clone()).cmdline(cmdline.to_owned()))
}

fn boot(
    name: &str,
    file: &[u8],
    cmdline: &str,
    console: Lines,
    options: &BootOptions,
) -> Result<PausedVm, BootError> {
    let kernel = TempFile::new(name, file);
    PausedVm::boot_with(guest_memory(8 * MIB), &linux(&kernel, cmdline), console, options, vec![])
}

#[test]
fn both_protocols_pass_the_command_line() {
    if !kvm_or_skip("both_protocols_pass_the_command_line") {
        return;
    }
    for (name, print, pvh) in
        [("pvh", kernel::PRINT_CMDLINE_PVH, true), ("long", kernel::PRINT_CMDLINE_64, false)]
    {
        let file = kernel::elf(&[print, &kernel::power_off()].concat(), pvh, 0);
        let console = Lines::default();
        let vm =
            boot(name, &file, "console=x quiet", console.clone(), &BootOptions::default()).unwrap();
        assert_eq!(stop_of(&vm.resume().unwrap()), Stop::PowerOff, "{name}");
        assert_eq!(console.take(), ["console=x quiet"], "{name}");
    }
}

#[test]
fn a_second_cpu_starts_and_continues_after_a_restore() {
    if !kvm_or_skip("a_second_cpu_starts_and_continues_after_a_restore") {
        return;
    }
    let file = kernel::elf(kernel::START_SECOND_CPU, true, 0);
    let kernel = TempFile::new("smp", &file);
    let memory = guest_memory(8 * MIB);
    let console = Lines::pausing_after(3);
    let options = BootOptions::default().cpus(2);
    let payload = linux(&kernel, "");
    let vm = PausedVm::boot_with(Arc::clone(&memory), &payload, console.clone(), &options, vec![]);
    let state = run_to_pause(vm.unwrap()).state().unwrap();
    assert_eq!(console.take(), ["A", "A", "A"]);
    assert_eq!(state.vcpus().len(), 2);
    // The first one is still at its `jmp .`, the second one is in its loop.
    assert_eq!(state.vcpus()[0].regs.0.rip, u64::from(kernel::LOAD_GPA) + 70);
    assert!(
        (0x8000..0x8010)
            .contains(&(state.vcpus()[1].sregs.0.cs.base + state.vcpus()[1].regs.0.rip))
    );

    let console = Lines::pausing_after(2);
    let vm = PausedVm::restore(memory, &state, console.clone(), &RestoreOptions::default());
    run_to_pause(vm.unwrap());
    assert_eq!(console.take(), ["A", "A"]);
}

#[test]
fn the_generation_id_is_new_in_every_restored_guest() {
    use vm_memory::{Bytes, GuestAddress};
    if !kvm_or_skip("the_generation_id_is_new_in_every_restored_guest") {
        return;
    }
    let file = kernel::elf(&[kernel::PRINT_CMDLINE_PVH, &[0xeb, 0xfe]].concat(), true, 0);
    let kernel = TempFile::new("generation", &file);
    let memory = guest_memory(8 * MIB);
    let console = Lines::pausing_after(1);
    let vm = PausedVm::boot(Arc::clone(&memory), &linux(&kernel, "x"), console).unwrap();
    let state = run_to_pause(vm).state().unwrap();
    let gpa = GuestAddress(state.generation_id_gpa().unwrap());
    let id = || memory.read_obj::<u128>(gpa).unwrap();
    let mut ids = vec![0, id()];
    for _ in 0..2 {
        let options = RestoreOptions::default();
        PausedVm::restore(Arc::clone(&memory), &state, Lines::default(), &options).unwrap();
        ids.push(id());
    }
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 4, "{ids:x?}");
}

/// The state with another I/O APIC.
fn with_ioapic(state: &VmState, ioapic: kvm_bindings::kvm_ioapic_state) -> VmState {
    let mut chip = state.irqchip().ioapic;
    let old = bincode::serialize(&chip).unwrap();
    chip.0.chip.ioapic = ioapic;
    let new = bincode::serialize(&chip).unwrap();
    let mut bytes = state.encode();
    let at = bytes.windows(old.len()).position(|window| window == old).unwrap();
    bytes[at..at + new.len()].copy_from_slice(&new);
    VmState::decode(STATE_KIND, STATE_VERSION, &bytes).unwrap()
}

#[test]
fn the_guest_is_notified_of_its_new_generation_id() {
    /// Offsets of the spurious vector and interrupt request registers in the LAPIC's page.
    const SPURIOUS: usize = 0xf0;
    const REQUESTS: usize = 0x200;
    const VECTOR: usize = 0x51;
    if !kvm_or_skip("the_guest_is_notified_of_its_new_generation_id") {
        return;
    }
    let file = kernel::elf(&[kernel::PRINT_CMDLINE_PVH, &[0xeb, 0xfe]].concat(), true, 0);
    let kernel = TempFile::new("paused", &file);
    let memory = guest_memory(8 * MIB);
    let console = Lines::pausing_after(1);
    let vm = PausedVm::boot(Arc::clone(&memory), &linux(&kernel, "x"), console).unwrap();
    let mut state = run_to_pause(vm).state().unwrap();
    // As a kernel sets it up: the LAPIC is on, and the event device's interrupt (16) is a vector of CPU 0.
    state.vcpus_mut()[0].lapic.0.regs[SPURIOUS + 1] |= 1;
    let mut ioapic =
        kvm_bindings::kvm_ioapic_state { base_address: 0xfec0_0000, ..Default::default() };
    ioapic.redirtbl[16].bits = VECTOR as u64;
    let state = with_ioapic(&state, ioapic);
    let requested = |state: &vmm::state::VmState| {
        let lapic = &state.vcpus()[0].lapic.0.regs;
        lapic[REQUESTS + VECTOR / 32 * 16 + VECTOR % 32 / 8] as u8 >> (VECTOR % 8) & 1
    };
    assert_eq!(requested(&state), 0);
    let options = RestoreOptions::default();
    let mut vm = PausedVm::restore(memory, &state, Lines::default(), &options).unwrap();
    assert_eq!(requested(&vm.state().unwrap()), 1);
}

/// Programs in the guest compare it with the value that they have seen: before the first instruction it is another one.
#[test]
fn the_vm_clock_is_new_in_every_restored_or_reset_guest() {
    use vm_memory::{Bytes, GuestAddress};
    if !kvm_or_skip("the_vm_clock_is_new_in_every_restored_or_reset_guest") {
        return;
    }
    let file = kernel::elf(&[kernel::PRINT_CMDLINE_PVH, &[0xeb, 0xfe]].concat(), true, 0);
    let kernel = TempFile::new("clock", &file);
    let memory = guest_memory(8 * MIB);
    let field = |at: u64, bytes: usize| {
        let mut field = vec![0; bytes];
        memory.read_slice(&mut field, GuestAddress(0xf_1000 + at)).unwrap();
        field
    };
    // The sequence number, the disruption marker, the generation counter.
    let fields = || (field(0x0c, 4), field(0x10, 8), field(0x68, 8));
    let console = Lines::pausing_after(1);
    let vm = PausedVm::boot(Arc::clone(&memory), &linux(&kernel, "x"), console).unwrap();
    assert_eq!(field(0, 0x0c), *b"VCLK\0\x10\0\0\x01\0\xff\0");
    let mut seen = vec![fields()];
    let mut vm = run_to_pause(vm);
    assert_eq!(fields(), seen[0], "it changed while the guest ran");
    let state = vm.state().unwrap();
    let mut check = |sequence: u32| {
        let now = fields();
        assert_eq!(now.0, sequence.to_le_bytes());
        assert!(seen.iter().all(|(_, marker, count)| *marker != now.1 && *count != now.2));
        seen.push(now);
    };
    drop(vm);
    let options = RestoreOptions::default();
    let restored = || PausedVm::restore(Arc::clone(&memory), &state, Lines::default(), &options);
    let mut vm = restored().unwrap();
    check(2);
    vm.reset(&state, &[], vmm::Clock::Advance).unwrap();
    check(4);
    drop(vm);
    // A number that is odd is that of a change in progress. The guest may have written it.
    memory.write_obj(u32::MAX, GuestAddress(0xf_100c)).unwrap();
    drop(restored().unwrap());
    check(0);
    // A guest of a version without this page has zeros there.
    memory.write_slice(&[0; 0x70], GuestAddress(0xf_1000)).unwrap();
    drop(restored().unwrap());
    assert_eq!(field(0, 0x70), [0; 0x70]);
}

/// Otherwise the guest's watchdog reports the pause as a lockup of its CPU.
#[test]
fn the_guest_is_notified_that_it_was_paused() {
    use vm_memory::{Bytes, GuestAddress};
    /// `pvclock_vcpu_time_info`: where its flags are, and the flag PVCLOCK_GUEST_STOPPED.
    const FLAGS: GuestAddress = GuestAddress(0x20_0000 + 29);
    const GUEST_STOPPED: u8 = 1 << 1;
    if !kvm_or_skip("the_guest_is_notified_that_it_was_paused") {
        return;
    }
    let clock_at_2_mib = [
        0xb9, 0x01, 0x4d, 0x56, 0x4b, // mov ecx, MSR_KVM_SYSTEM_TIME_NEW
        0xb8, 0x01, 0x00, 0x20, 0x00, 0x31, 0xd2, // mov eax, 0x200001; xor edx, edx
        0x0f, 0x30, // wrmsr
    ];
    let print_for_ever = [
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xb0, b'A', 0xee, 0xb0, b'\n', 0xee, 0xeb, 0xf8, // out dx, al; again
    ];
    let file = kernel::elf(&[&clock_at_2_mib[..], &print_for_ever].concat(), true, 0);
    let kernel = TempFile::new("stood", &file);
    let memory = guest_memory(8 * MIB);
    let flag_is_set = || memory.read_obj::<u8>(FLAGS).unwrap() & GUEST_STOPPED != 0;
    let console = Lines::pausing_after(1);
    let vm = PausedVm::boot(Arc::clone(&memory), &linux(&kernel, ""), console.clone()).unwrap();
    let mut vm = run_to_pause(vm);
    assert!(!flag_is_set());
    let state = vm.state().unwrap();
    console.pause_after(1);
    run_to_pause(vm);
    assert!(flag_is_set());

    memory.write_obj(0u8, FLAGS).unwrap();
    let (console, options) = (Lines::pausing_after(1), RestoreOptions::default());
    run_to_pause(PausedVm::restore(Arc::clone(&memory), &state, console, &options).unwrap());
    assert!(flag_is_set());
}

#[test]
fn resets_and_requests_stop_the_guest() {
    if !kvm_or_skip("resets_and_requests_stop_the_guest") {
        return;
    }
    let trigger = BootOptions::default().guest_snapshot_trigger(true);
    for (name, port, value, stop) in [
        ("reset", 0x602, 1, Stop::Reset),
        ("i8042", 0x64, 0xfe, Stop::Reset),
        ("request", vmm::SNAPSHOT_TRIGGER_PORT, b'x', Stop::SnapshotTrigger),
    ] {
        let file = kernel::elf(&kernel::out(port, value), true, 0);
        let vm = boot(name, &file, "", Lines::default(), &trigger).unwrap();
        assert_eq!(stop_of(&vm.resume().unwrap()), stop, "{name}");
    }
    // Without the option the write does nothing, and the guest runs to its end.
    let code = [&kernel::out(vmm::SNAPSHOT_TRIGGER_PORT, 1)[..7], &kernel::power_off()].concat();
    let vm = boot(
        "no-trigger",
        &kernel::elf(&code, true, 0),
        "",
        Lines::default(),
        &BootOptions::default(),
    );
    assert_eq!(stop_of(&vm.unwrap().resume().unwrap()), Stop::PowerOff);
}
