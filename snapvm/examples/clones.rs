//! Runs three clones as processes that share the pages that none writes: `cargo run --example clones FILE SOCKET`
use std::{error::Error, os::fd::AsFd, path::Path, process::Command, sync::Arc, time::Duration};

use snapvm::pager::{SnapshotSource, serve::ServeOptions, serve::Server};
use snapvm::{MemoryFrom, RestoreConfig, snapfmt::Snapshot, snapshot_name, vmm::ConsoleFlow};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<_> = std::env::args().collect();
    let [program, file, socket, clone @ ..] = &args[..] else { Err("give a file and a socket")? };
    let (socket, snapshot) = (Path::new(socket).to_owned(), Arc::new(Snapshot::open(file)?));
    if !clone.is_empty() {
        let from = MemoryFrom::Shared { socket, timeout: Duration::from_secs(5) };
        let config = RestoreConfig::new(snapshot, Path::new(file)).memory(from);
        let running = config.restore(|_: &[u8]| ConsoleFlow::Continue)?.vm.resume()?;
        println!("clone {clone:?} has ended: {:?}", running.wait(Some(Duration::from_millis(500))));
        return Ok(());
    }
    let mut options = ServeOptions::default();
    options.share = Some(snapshot_name(&snapshot));
    let server = Server::bind(&socket, Arc::new(SnapshotSource::new(snapshot)), options, |_| ())?;
    let (stopped, stop) = std::io::pipe()?;
    let serving = std::thread::spawn(move || server.run(stopped.as_fd()));
    let start = |name| Command::new(program).args(&args[1..]).arg(name).spawn();
    for mut clone in [start("1")?, start("2")?, start("3")?] {
        clone.wait()?;
    }
    drop(stop);
    Ok(serving.join().map_err(|_| "the server has panicked")??)
}
