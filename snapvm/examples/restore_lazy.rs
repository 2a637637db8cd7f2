//! Restores a guest lazily and lets it run for a second: `cargo run --example restore_lazy guest.snap`
use std::error::Error;
use std::io::Write;
use std::time::Duration;

use snapvm::RestoreConfig;
use snapvm::vmm::ConsoleFlow;

fn main() -> Result<(), Box<dyn Error>> {
    let file = std::env::args().nth(1).ok_or("give a snapshot")?;
    let console = |output: &[u8]| match std::io::stdout().write_all(output) {
        Ok(()) => ConsoleFlow::Continue,
        Err(_) => ConsoleFlow::Pause,
    };
    let running = RestoreConfig::open(file)?.restore(console)?.vm.resume()?;
    running.wait(Some(Duration::from_secs(1)));
    let vm = running.pause()?;
    let stats = vm.memory().pager().ok_or("there is no pager")?.stats();
    println!("{} faults, {} of {} pages", stats.faults, stats.pages.present, stats.pages.total);
    Ok(())
}
