//! Measures a lazy restore until the guest's first instruction, against the bare KVM calls, for guests of different
//! sizes.
//!
//!     cargo bench -p snapvm --bench restore
//!
//! Three variants restore the same demo guest and run it to its first exit, the first byte of its next line. "bare
//! calls" makes the same KVM calls in the same order on one thread, with memory that is present. "PausedVm" is `vmm`
//! alone. "whole" is [`RestoreConfig`]: it opens the file, decodes the state, maps memory, starts the pager and
//! restores. Its pages are loaded on faults. The variants take turns. The output is the best and the median of the
//! rounds; the best is the better figure on a busy machine. `cargo bench -p snapvm-cli --bench restore` measures the
//! program itself.
#![allow(unsafe_code, missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_bindings::{
    CpuId, KVM_PIT_SPEAKER_DUMMY, Msrs, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit};
use snapfmt::{Contents, MemoryRegion, StateBlob, WriteOptions};
use snapvm::RestoreConfig;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm::demo::DemoConfig;
use vmm::state::{STATE_KIND, STATE_VERSION};
use vmm::{ConsoleFlow, PausedVm, Payload, RestoreOptions, VmState, memory_layout};

const ROUNDS: usize = 101;
const WORK_BYTES: u64 = 4 << 20;
const LARGE_PAGE_BYTES: u64 = 2 << 20;

fn main() {
    if let Err(error) = vmm::probe() {
        println!("SKIPPED restore: {error}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    println!(
        "{:>9} {:>12} {:>24} {:>24}",
        "memory", "", "open to first entry", "open to first exit"
    );
    for memory_mib in [64, 1024, 4096, 16384] {
        let guest = saved_guest(memory_mib, folder.path());
        let Guest { memory, state, first, file } = &guest;
        let (mut bare_times, mut vmm_times, mut whole_times) = (vec![], vec![], vec![]);
        for _ in 0..ROUNDS {
            bare_times.push(bare(memory, state, first));
            vmm_times.push(paused_vm(memory, state, first));
            whole_times.push(whole(file));
        }
        print(memory_mib, "bare calls", &bare_times);
        print(memory_mib, "PausedVm", &vmm_times);
        print(memory_mib, "whole", &whole_times);
    }
}

fn print(memory_mib: u64, variant: &str, times: &[(Duration, Duration)]) {
    let best_and_median = |pick: fn(&(Duration, Duration)) -> Duration| {
        let mut picked: Vec<u128> = times.iter().map(|time| pick(time).as_micros()).collect();
        picked.sort_unstable();
        format!("{} / {} us", picked[0], picked[picked.len() / 2])
    };
    let (entry, exit) = (best_and_median(|time| time.0), best_and_median(|time| time.1));
    println!("{memory_mib:>5} MiB {variant:>12} {entry:>24} {exit:>24}");
}

struct Guest {
    memory: Arc<GuestMemoryMmap>,
    state: VmState,
    first: Vec<std::ops::Range<u64>>,
    file: PathBuf,
}

/// A guest that has just become ready. Its memory is mapped here, and is in a file.
fn saved_guest(memory_mib: u64, folder: &Path) -> Guest {
    let layout = memory_layout(memory_mib << 20).unwrap();
    let fd = tempfile::tempfile_in("/dev/shm").unwrap();
    fd.set_len(memory_mib << 20).unwrap();
    let ranges: Vec<_> = layout
        .iter()
        .map(|range| {
            let file = FileOffset::new(fd.try_clone().unwrap(), range.source_offset);
            (GuestAddress(range.gpa), range.len as usize, Some(file))
        })
        .collect();
    let memory = Arc::new(GuestMemoryMmap::from_ranges_with_files(&ranges).unwrap());
    let payload = Payload::Demo(DemoConfig::new(WORK_BYTES));
    let pause = |bytes: &[u8]| {
        if bytes.contains(&b'\n') { ConsoleFlow::Pause } else { ConsoleFlow::Continue }
    };
    let running = PausedVm::boot(Arc::clone(&memory), &payload, pause).unwrap().resume().unwrap();
    assert!(running.wait(None).unwrap().is_resumable());
    let state = running.pause().unwrap().state().unwrap();
    let last = layout.last().unwrap();
    let low = LARGE_PAGE_BYTES + WORK_BYTES / 2;
    let (high, end) = (last.gpa_range().end - WORK_BYTES / 2, memory_mib << 20);
    let file = folder.join(format!("{memory_mib}.snap"));
    store(&file, &fd, &layout, &[0..low, end - WORK_BYTES / 2..end], &state);
    Guest { memory, state, first: vec![0..low, high..last.gpa_range().end], file }
}

fn store(
    file: &Path,
    memory: &File,
    layout: &[vmm::MemoryRange],
    data: &[std::ops::Range<u64>],
    state: &VmState,
) {
    let region = |r: &vmm::MemoryRange| MemoryRegion {
        gpa: r.gpa,
        len: r.len,
        source_offset: r.source_offset,
    };
    let regions: Vec<_> = layout.iter().map(region).collect();
    let bytes = state.encode();
    let states = [StateBlob { tag: STATE_KIND, version: STATE_VERSION, bytes }];
    let contents = Contents::new(&regions, memory, data).states(&states);
    let go_on = |_| ControlFlow::Continue(());
    snapfmt::write_snapshot(file, contents, &WriteOptions::default(), &go_on).unwrap();
}

/// Times from the opening of the file to the first KVM_RUN, and to its return.
fn whole(file: &Path) -> (Duration, Duration) {
    let start = Instant::now();
    let restored = RestoreConfig::open(file).unwrap().restore(|_: &[u8]| ConsoleFlow::Pause);
    let running = restored.unwrap().vm.resume().unwrap();
    assert!(running.wait(None).unwrap().is_resumable());
    (running.first_entry().unwrap() - start, running.first_exit().unwrap() - start)
}

/// Times from the opening of the device to the first KVM_RUN, and to its return.
fn paused_vm(
    memory: &Arc<GuestMemoryMmap>,
    state: &VmState,
    first: &[std::ops::Range<u64>],
) -> (Duration, Duration) {
    let options = RestoreOptions::default().register_first(first.to_vec());
    let start = Instant::now();
    let pause = |_: &[u8]| ConsoleFlow::Pause;
    let vm = PausedVm::restore(Arc::clone(memory), state, pause, &options).unwrap();
    let running = vm.resume().unwrap();
    assert!(running.wait(None).unwrap().is_resumable());
    (running.first_entry().unwrap() - start, running.first_exit().unwrap() - start)
}

fn bare(
    memory: &Arc<GuestMemoryMmap>,
    state: &VmState,
    first: &[std::ops::Range<u64>],
) -> (Duration, Duration) {
    let vcpu_state = &state.vcpus()[0];
    let entries: Vec<_> = vcpu_state.cpuid.iter().map(|entry| entry.0).collect();
    let cpuid = CpuId::from_entries(&entries).unwrap();
    let entries: Vec<_> = vcpu_state.msrs.iter().map(|entry| entry.0).collect();
    let msrs = Msrs::from_entries(&entries).unwrap();
    let mut clock = state.irqchip().clock.0;
    clock.flags = 0;

    let start = Instant::now();
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    for (slot, range) in first.iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: range.start,
            memory_size: range.end - range.start,
            userspace_addr: memory.get_host_address(GuestAddress(range.start)).unwrap() as u64,
        };
        // SAFETY: the ranges lie in `memory`, which outlives the VM, and do not overlap.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
    }
    vm.set_tss_address(0xfffb_d000).unwrap();
    vm.create_irq_chip().unwrap();
    vm.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() }).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid2(&cpuid).unwrap();
    vcpu.set_sregs(&vcpu_state.sregs.0).unwrap();
    vcpu.set_regs(&vcpu_state.regs.0).unwrap();
    vcpu.set_xcrs(&vcpu_state.xcrs.0).unwrap();
    // SAFETY: no feature beyond the 4 KiB of the structure was requested.
    unsafe { vcpu.set_xsave(&vcpu_state.xsave.0) }.unwrap();
    vcpu.set_debug_regs(&vcpu_state.debugregs.0).unwrap();
    vcpu.set_lapic(&vcpu_state.lapic.0).unwrap();
    assert_eq!(vcpu.set_msrs(&msrs).unwrap(), entries.len());
    vcpu.set_mp_state(vcpu_state.mp_state.0).unwrap();
    vcpu.set_vcpu_events(&vcpu_state.events.0).unwrap();
    for chip in [&state.irqchip().pic_master, &state.irqchip().pic_slave, &state.irqchip().ioapic] {
        vm.set_irqchip(&chip.0).unwrap();
    }
    vm.set_pit2(&state.irqchip().pit.0).unwrap();
    vm.set_clock(&clock).unwrap();
    let entry = start.elapsed();
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::IoOut(0x3f8, _)));
    (entry, start.elapsed())
}
