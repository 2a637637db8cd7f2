//! A mount of this process: what the library itself does. The program's tests have the rest.

use std::fs::File;
use std::io::{ErrorKind, PipeWriter, Write};
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use mount::{Mount, MountError, MountEvent, MountOptions, Populate};
use snapvm::interchange::{Import, MemoryImage};
use snapvm::snapfmt::layout::PAGE_BYTES;
use snapvm::snapfmt::{Snapshot, WriteOptions};
use tempfile::TempDir;

const PAGES: usize = 1024;

/// 4 MiB of memory; every page differs.
fn memory() -> Vec<u8> {
    let mut bytes = vec![0; PAGES * PAGE_BYTES];
    for (number, page) in bytes.chunks_mut(PAGE_BYTES).enumerate() {
        page.fill(number as u8 | 1);
        page[..8].copy_from_slice(&number.to_le_bytes());
    }
    bytes
}

struct Place {
    folder: TempDir,
    snapshot: Arc<Snapshot>,
}

fn place() -> Place {
    let folder = tempfile::tempdir().unwrap();
    let (raw, snap) = (folder.path().join("raw"), folder.path().join("snap"));
    std::fs::write(&raw, memory()).unwrap();
    std::fs::create_dir(folder.path().join("mounted")).unwrap();
    let import = Import::raw(MemoryImage::open(&raw).unwrap(), None).unwrap();
    let go = |_| ControlFlow::Continue(());
    import.write(&snap, &WriteOptions::default(), &go).unwrap();
    Place { snapshot: Arc::new(Snapshot::open(&snap).unwrap()), folder }
}

/// What was reported.
#[derive(Debug, PartialEq)]
enum Event {
    Failed(String),
    Detached,
}

fn noted(sender: Sender<Event>) -> impl Fn(MountEvent<'_>) + Send + Sync {
    move |event| {
        let event = match event {
            MountEvent::Failed(failure) => Event::Failed(failure.to_string()),
            MountEvent::Detached => Event::Detached,
            _ => return,
        };
        let _ = sender.send(event);
    }
}

struct Running {
    server: JoinHandle<Result<(), MountError>>,
    stop: PipeWriter,
    events: Receiver<Event>,
}

/// `None`, and a message, where this user cannot mount.
fn started(place: &Place, options: &MountOptions) -> Option<Running> {
    let (sender, events) = channel();
    let folder = place.folder.path().join("mounted");
    let mount = match Mount::new(&place.snapshot, &folder, options, noted(sender)) {
        Ok(mount) => mount,
        Err(error @ (MountError::NoFuse(_) | MountError::Mount { .. })) => {
            let thread = std::thread::current();
            let line = format!("SKIPPED {}: {error}\n", thread.name().unwrap_or_default());
            std::io::stderr().write_all(line.as_bytes()).unwrap();
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    let (stopped, stop) = std::io::pipe().unwrap();
    let server = std::thread::spawn(move || mount.run(stopped.as_fd()));
    Some(Running { server, stop, events })
}

fn is_empty(folder: &Path) -> bool {
    folder.read_dir().unwrap().next().is_none()
}

#[test]
fn open_files_are_served_after_the_stop() {
    let place = place();
    let folder = place.folder.path().join("mounted");
    let mut options = MountOptions::default();
    options.populate = Populate::Off;
    let Some(running) = started(&place, &options) else { return };
    let file = File::open(folder.join("memory.raw")).unwrap();
    drop(running.stop);
    assert_eq!(running.events.recv().unwrap(), Event::Detached);
    assert!(is_empty(&folder));
    let mut bytes = vec![0; PAGES * PAGE_BYTES];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == memory());
    assert!(!running.server.is_finished());
    drop(file);
    running.server.join().unwrap().unwrap();
    assert!(running.events.recv().is_err(), "nothing else is reported");
}

#[test]
fn a_mount_that_is_dropped_is_unmounted() {
    let place = place();
    let folder = place.folder.path().join("mounted");
    let options = MountOptions::default();
    match Mount::new(&place.snapshot, &folder, &options, |_| {}) {
        Ok(mount) => drop(mount),
        Err(MountError::NoFuse(_) | MountError::Mount { .. }) => return,
        Err(error) => panic!("{error}"),
    }
    assert!(is_empty(&folder));
}

#[test]
fn what_was_opened_is_loaded_in_the_given_order() {
    let place = place();
    let folder = place.folder.path().join("mounted");
    let mut options = MountOptions::default();
    options.prefetch = vec![3 << 20..(3 << 20) + 8192, 0..4 << 20];
    let Some(running) = started(&place, &options) else { return };
    let file = File::open(folder.join("memory.raw")).unwrap();
    // It is stored while it is read.
    for number in (0..PAGES).rev() {
        let mut bytes = [0; PAGE_BYTES];
        file.read_exact_at(&mut bytes, (number * PAGE_BYTES) as u64).unwrap();
        assert!(bytes == memory()[number * PAGE_BYTES..][..PAGE_BYTES], "page {number}");
    }
    drop((file, running.stop));
    running.server.join().unwrap().unwrap();
}

#[test]
fn a_folder_that_is_in_use_is_refused() {
    let place = place();
    let folder = place.folder.path();
    let options = MountOptions::default();
    match Mount::new(&place.snapshot, folder, &options, |_| {}).err().unwrap() {
        MountError::Folder { error, .. } => assert_eq!(error.kind(), ErrorKind::DirectoryNotEmpty),
        error => panic!("{error}"),
    }
}
