//! Boots a Linux kernel and prints its console until the guest stops.
//!
//!     cargo run -p snapvm-vmm --example boot_linux -- vmlinux "console=ttyS0 reboot=k panic=-1"

use std::{error::Error, io::Write, sync::Arc};

use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm::{ConsoleFlow, PausedVm, Payload, boot::LinuxConfig, memory_layout};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let kernel = args.next().ok_or("usage: boot_linux KERNEL [COMMAND LINE]")?;
    let config = LinuxConfig::new(kernel).cmdline(args.next().unwrap_or_default());

    let layout = memory_layout(256 << 20)?;
    let ranges: Vec<_> = layout.iter().map(|r| (GuestAddress(r.gpa), r.len as usize)).collect();
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges)?);
    let console = |bytes: &[u8]| match std::io::stdout().write_all(bytes) {
        Ok(()) => ConsoleFlow::Continue,
        Err(_) => ConsoleFlow::Pause,
    };
    let running = PausedVm::boot(memory, &Payload::Linux(config), console)?.resume()?;
    if let Some(stop) = running.wait(None) {
        println!("{stop}");
    }
    Ok(())
}
