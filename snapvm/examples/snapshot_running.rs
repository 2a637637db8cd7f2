//! Boots a guest, snapshots it while it runs, and writes its later changes as a layer: `cargo run --example
//! snapshot_running FOLDER`
use std::error::Error;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

use snapvm::vmm::demo::DemoConfig;
use snapvm::vmm::{ConsoleFlow, Payload};
use snapvm::{BootConfig, RestoreConfig, snapfmt::WriteOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = PathBuf::from(std::env::args().nth(1).ok_or("give a folder")?);
    let (base, layer) = (folder.join("base.snap"), folder.join("layer.snap"));
    let (silent, options) = (|_: &[u8]| ConsoleFlow::Continue, WriteOptions::default());
    let go_on = |_| ControlFlow::Continue(());
    let config = BootConfig::new(64 << 20, Payload::Demo(DemoConfig::new(8 << 20)));
    let running = config.boot(silent, Vec::new())?.resume()?;
    running.wait(Some(Duration::from_millis(300)));
    let whole = running.pause()?.snapshot(&base, &options, &go_on)?;
    let running = RestoreConfig::open(&base)?.restore(silent)?.vm.resume()?;
    running.wait(Some(Duration::from_millis(300)));
    let changes = running.pause()?.snapshot_layer(&layer, &options, &go_on)?;
    println!("{} bytes, and a layer of {}", whole.file_bytes, changes.file_bytes);
    Ok(())
}
