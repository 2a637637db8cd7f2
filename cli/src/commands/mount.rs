//! `snap mount`: a snapshot as a folder of read-only files.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use clap::ValueEnum;
use mount::{Mount, MountEvent, MountOptions, Populate};
use snapfmt::Snapshot;
use snapvm::interchange::has_async_page_faults;
use snapvm::{with_causes, working_set_pages};

use crate::descriptors::allow_many_descriptors;
use crate::exit::Interrupted;
use crate::input::{Input, reading};
use crate::jailed::{self, PartialJailArgs};
use crate::pager_args::PrefetchArg;
use crate::session::Session;
use crate::stderr::{self, say};
use crate::waits::{Wait, Waiting};

/// Mount a snapshot as a folder of read-only files, which any virtual machine monitor can map.
///
/// Files are decoded when they are read, and stay in the page cache of the kernel, which all readers share: memory.raw;
/// memory.core for gdb; and, if it was imported from there, firecracker/memory and vmstate, cloud-hypervisor with its
/// three files, or qemu/migration and migration-lazy. A damaged page is an error (EIO; SIGBUS where it is mapped), never zeros. Runs until Ctrl-C, or until
/// `fusermount3 -u FOLDER`. Files that are still open then are served until they are closed; Ctrl-C again: their readers
/// get errors.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap import mem --vmstate state -o fc.snap && mkdir fc && snap mount fc.snap fc")]
pub(crate) struct Args {
    #[command(flatten)]
    input: Input,

    /// The folder: an empty one.
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,

    /// Let other users read the files, too. Without it only this user can, and not even root. Users other than root need
    /// `user_allow_other` in /etc/fuse.conf for it.
    #[arg(long)]
    allow_other: bool,

    /// Load pages into a file when it is read first. `hot`: those of the snapshot's working set (`snap train` records
    /// one); `all`: then all other pages.
    #[arg(long, value_name = "off|hot|all", default_value = "hot", hide_possible_values = true)]
    prefetch: PrefetchArg,

    /// Load pages that were not read in the background. `auto`: while readers wait for pages a good part of their time;
    /// for a guest with KVM's asynchronous page faults everything, from when a file is read first.
    #[arg(long, value_name = "off|auto", default_value = "auto", hide_possible_values = true)]
    populate: PopulateArg,

    #[command(flatten)]
    jail: PartialJailArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum PopulateArg {
    Off,
    Auto,
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    let snapshot = Arc::new(args.input.open()?);
    let mut options = options(args, &snapshot)?;
    if !jailed::uses_network(&snapshot) {
        options.on_thread_start =
            args.jail.begin_mount(&snapshot, &args.folder, &session.interrupt)?;
    }
    let (file, folder) = (args.input.file.clone(), args.folder.clone());
    let draining = Mutex::new(None::<Waiting>);
    let quiet = session.quiet;
    let on_event = move |event: MountEvent<'_>| match event {
        MountEvent::Ready if !quiet => {
            stderr::print(&format!("{} is mounted at {}\n", file.display(), folder.display()));
        }
        // If the reader of stderr does not read, the files are served anyway.
        MountEvent::Failed(failure) => {
            say(&format!("snap: {}, {}\n", file.display(), with_causes(failure)));
        }
        MountEvent::Detached => {
            let folder = folder.clone();
            let closed = move || {
                let folder = folder.display();
                format!(
                    "files of {folder} to be closed; Ctrl-C ends it, and their readers get errors"
                )
            };
            let waiting = Wait::new(closed).outlasts().begin();
            *draining.lock().unwrap_or_else(PoisonError::into_inner) = Some(waiting);
        }
        _ => {}
    };
    let mount = Mount::new(&snapshot, &args.folder, &options, on_event)?;
    allow_many_descriptors();
    let (stopped, stop) = std::io::pipe().context("cannot create a pipe")?;
    session.interrupt.stops(None, stop);
    mount.run(stopped.as_fd())?;
    match session.interrupt.requested() {
        true => Err(Interrupted.into()),
        false => Ok(()),
    }
}

/// Reads what is to be loaded ahead.
fn options(args: &Args, snapshot: &Snapshot) -> Result<MountOptions> {
    let _reading = reading(&args.input.file);
    let mut options = MountOptions::default();
    options.allow_other = args.allow_other;
    options.populate = match args.populate {
        PopulateArg::Off => Populate::Off,
        PopulateArg::Auto => Populate::Auto,
    };
    if !matches!(args.prefetch, PrefetchArg::Off) {
        // A damaged working set is reported, and not used.
        options.prefetch = working_set_pages(snapshot).unwrap_or_else(|error| {
            stderr::print(&format!("snap: the working set is not used: {}\n", with_causes(&error)));
            Vec::new()
        });
    }
    // A guest of Firecracker halts for each page that it waits for, if it has KVM's asynchronous page faults.
    let halts = options.populate == Populate::Auto && has_async_page_faults(snapshot)?;
    if halts || matches!(args.prefetch, PrefetchArg::All) {
        options.prefetch.push(0..snapshot.header().memory_bytes);
    }
    Ok(options)
}
