//! How long it takes to pause all vCPUs of a running guest, and to resume them.
//!
//!     cargo bench -p snapvm-vmm --bench pause
//!
//! Guests of two vCPUs, each of which runs in its own loop: computing, writing to its serial port, or asleep in HLT;
//! and the demo guest, which works in user mode and has one. The guest runs for two milliseconds between pauses.
//! A pause ends when all vCPUs have stopped with a consistent state, and all devices are paused. A resume ends when
//! the vCPUs' threads are started.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../tests/common/kernel.rs"]
mod kernel;

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm::boot::LinuxConfig;
use vmm::demo::DemoConfig;
use vmm::{BootOptions, ConsoleFlow, PausedVm, Payload, memory_layout};

const ROUNDS: usize = 500;
const RUN: Duration = Duration::from_millis(2);
const MEMORY_BYTES: u64 = 64 << 20;

/// The endless loop of a vCPU, as machine code.
type Loop = &'static [u8];

/// `jmp .` and `hlt; jmp` back to it.
const COMPUTE: Loop = &[0xeb, 0xfe];
const SLEEP: Loop = &[0xf4, 0xeb, 0xfd];

fn main() {
    if let Err(error) = vmm::probe() {
        println!("SKIPPED pause: {error}");
        return;
    }
    println!("{:<44} {:>26} {:>26}", "", "pause p50 / p99 / max us", "resume p50 / p99 / max us");
    let guests: [(&str, Loop, Option<Loop>); 4] = [
        ("two vCPUs: both compute", COMPUTE, Some(COMPUTE)),
        ("two vCPUs: one computes, one sleeps", COMPUTE, Some(SLEEP)),
        ("two vCPUs: both sleep", SLEEP, Some(SLEEP)),
        ("two vCPUs: one computes, one writes", COMPUTE, None),
    ];
    for (name, first, second) in guests {
        let mut kernel = tempfile::NamedTempFile::new().unwrap();
        kernel.write_all(&kernel::elf(&two_cpus(first, second), true, 0)).unwrap();
        let payload = Payload::Linux(LinuxConfig::new(kernel.path().to_owned()));
        measure(name, &payload, 2);
    }
    measure("the demo guest", &Payload::Demo(DemoConfig::new(8 << 20)), 1);
}

/// A kernel with these loops on its vCPUs. Without a second loop, the second vCPU writes in an endless loop.
fn two_cpus(first: Loop, second: Option<Loop>) -> Vec<u8> {
    let mut code = kernel::START_SECOND_CPU.to_vec();
    if let Some(second) = second {
        // Its program is the operand of the first `mov` to memory.
        code[6..6 + second.len()].copy_from_slice(second);
    }
    code.truncate(code.len() - 2);
    code.extend(first);
    code
}

fn measure(name: &str, payload: &Payload, cpus: u8) {
    let layout = memory_layout(MEMORY_BYTES).unwrap();
    let ranges: Vec<_> = layout.iter().map(|r| (GuestAddress(r.gpa), r.len as usize)).collect();
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
    let console = |_: &[u8]| ConsoleFlow::Continue;
    let options = BootOptions::default().cpus(cpus);
    let mut vm = PausedVm::boot_with(memory, payload, console, &options, vec![]).unwrap();
    let (mut pauses, mut resumes) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let start = Instant::now();
        let running = vm.resume().unwrap();
        resumes.push(start.elapsed());
        // The first time until the guest has set itself up.
        std::thread::sleep(if round == 0 { Duration::from_millis(500) } else { RUN });
        let start = Instant::now();
        vm = running.pause().unwrap();
        pauses.push(start.elapsed());
    }
    println!("{name:<44} {:>26} {:>26}", figures(pauses), figures(resumes));
}

fn figures(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let us = |at: usize| times[at].as_micros();
    let last = times.len() - 1;
    format!("{} / {} / {}", us(last / 2), us(last * 99 / 100), us(last))
}
