//! How a guest becomes a file: its memory, wherever that is, its state, and what the file says of itself.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use pager::Pager;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use snapfmt::layout::PAGE_BYTES;
use snapfmt::{
    Contents, Header, MemoryRegion, Metadata, OnProgress, Parent, ReadAt, Snapshot, SnapshotMemory,
    StateBlob, WriteOptions, write_layer, write_snapshot,
};
use vm_memory::GuestMemoryMmap;
use vmm::{HostCpu, PausedVm};

use crate::commands::{path_of_parent, refuse_as_output};
use crate::guest_memory::{ArrivingBytes, FileMemory, GuestBytes};
use crate::pagemap;
use crate::report::ms;
use crate::restored::damaged;
use crate::{room, size};

/// What was made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) file: PathBuf,
    pub(crate) id: String,
    pub(crate) parent_id: Option<String>,
    pub(crate) memory_bytes: u64,
    pub(crate) nonzero_bytes: u64,
    pub(crate) file_bytes: u64,
    /// Bytes of non-zero memory for each byte of the file.
    pub(crate) ratio: f64,
    /// The whole command.
    pub(crate) total_ms: f64,
    /// Until the guest was ready to be stored, or brought back.
    pub(crate) ready_ms: f64,
    /// How long the guest stood still: reading its state and writing the file.
    pub(crate) pause_ms: f64,
}

impl Summary {
    /// Of a file that is complete now.
    pub(crate) fn new(
        file: &Path,
        header: &Header,
        started: Instant,
        ready: Instant,
        paused: Instant,
    ) -> Self {
        let now = Instant::now();
        Self {
            file: file.to_owned(),
            id: header.id.to_string(),
            parent_id: header.parent_id.map(|id| id.to_string()),
            memory_bytes: header.memory_bytes,
            nonzero_bytes: header.data_pages * PAGE_BYTES as u64,
            file_bytes: header.file_bytes,
            ratio: (header.data_pages * PAGE_BYTES as u64) as f64 / header.file_bytes as f64,
            total_ms: ms(now - started),
            ready_ms: ms(ready - started),
            pause_ms: ms(now - paused),
        }
    }
}

/// A guest's memory, and what tells where it differs from what it was.
pub(crate) enum Kept<'a> {
    /// A guest that was booted here, in a memfd: what was never touched is a hole.
    Booted {
        memory: &'a FileMemory,
        regions: &'a [MemoryRegion],
        /// What the metadata says of the guest.
        guest: Value,
    },
    /// A guest that was brought back.
    Restored(Origins<'a>),
}

/// What a guest was brought back from.
pub(crate) struct Origins<'a> {
    pub(crate) file: &'a Path,
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) memory: &'a GuestMemoryMmap,
    pub(crate) from: Filled<'a>,
}

/// How the memory of a guest that was brought back got its content.
pub(crate) enum Filled<'a> {
    /// All at once, before it ran.
    AtOnce,
    /// Page by page; what was never touched is only in the snapshot.
    By(&'a Pager),
    /// Page by page out of memory that clones share; what it has written is its own.
    Shared,
}

impl Kept<'_> {
    /// Stores all of the guest.
    pub(crate) fn store_whole(
        &self,
        vm: &mut PausedVm,
        out: &Path,
        options: &WriteOptions,
        progress: OnProgress<'_>,
    ) -> Result<Header> {
        let states = stored_states(vm)?;
        let write = |regions, memory: &dyn ReadAt, data: &[Range<u64>], guest| {
            check_room(data, options)?;
            let metadata = metadata(guest);
            let contents = Contents::new(regions, memory, data).states(&states).metadata(metadata);
            Ok(write_snapshot(out, contents, options, progress)?.0)
        };
        match self {
            Kept::Booted { memory, regions, guest } => {
                let mapped = GuestBytes { memory: &memory.mapped, regions };
                write(regions, &mapped, &memory.touched()?, guest.clone())
            }
            Kept::Restored(origins) => {
                origins.check(out)?;
                let Origins { snapshot, memory, .. } = origins;
                let regions = snapshot.regions();
                let mapped = GuestBytes { memory, regions };
                let own = origins.own_pages()?;
                let populated = || snapshot.populated();
                let guest = origins.guest()?;
                match origins.from {
                    Filled::AtOnce => write(regions, &mapped, &own, guest),
                    Filled::By(_) => {
                        let data: Vec<_> = own.iter().cloned().chain(populated()).collect();
                        let overlay = Overlay { mapped, own: &own, rest: snapshot.memory() };
                        write(regions, &overlay, &data, guest)
                    }
                    // Through the mapping: it brings what is missing, and nothing is lost with it.
                    Filled::Shared => {
                        let data: Vec<_> = own.into_iter().chain(populated()).collect();
                        write(regions, &ArrivingBytes { memory, regions }, &data, guest)
                    }
                }
            }
        }
    }

    /// Stores what has changed since the snapshot that the guest was brought back from.
    pub(crate) fn store_changes(
        &self,
        vm: &mut PausedVm,
        out: &Path,
        options: &WriteOptions,
        progress: OnProgress<'_>,
    ) -> Result<Header> {
        let Kept::Restored(origins) = self else {
            bail!("the guest was not brought back from a snapshot that a layer could build on");
        };
        origins.check(out)?;
        let Origins { snapshot, memory, .. } = origins;
        let mut data = origins.own_pages()?;
        if matches!(origins.from, Filled::AtOnce) {
            // What the guest gave back has no pages any more, and was something in the snapshot.
            data.extend(snapshot.populated());
        }
        check_room(&data, options)?;
        let states = stored_states(vm)?;
        let memory = GuestBytes { memory, regions: snapshot.regions() };
        let contents = Contents::new(snapshot.regions(), &memory, &data)
            .states(&states)
            .metadata(metadata(origins.guest()?));
        let parent = Parent::new(snapshot, path_of_parent(origins.file, out)?);
        Ok(write_layer(out, contents, &parent, options, progress)?.0)
    }
}

impl Origins<'_> {
    /// Refuses to read memory with pages that could not be had, and to replace what the guest lives on.
    fn check(&self, out: &Path) -> Result<()> {
        if let Filled::By(pager) = self.from
            && let Some(failure) = pager.failure()
        {
            return Err(damaged(self.file, failure));
        }
        refuse_as_output(out, [self.snapshot])
    }

    fn own_pages(&self) -> Result<Vec<Range<u64>>> {
        match self.from {
            Filled::By(pager) => Ok(pager.touched()),
            Filled::AtOnce | Filled::Shared => {
                pagemap::own_pages(self.memory, self.snapshot.regions())
            }
        }
    }

    /// What the metadata says of the guest.
    fn guest(&self) -> Result<Value> {
        Ok(self.snapshot.metadata()?.other.remove("guest").unwrap_or_default())
    }
}

/// Refuses to begin what would end the guest for want of memory.
fn check_room(data: &[Range<u64>], options: &WriteOptions) -> Result<()> {
    let needed = room::of_writer(options, data.iter().map(|range| range.end - range.start).sum());
    room::check(needed).with_context(|| {
        let needed = size::human(needed as u64);
        format!("no memory to store the guest ({needed}; --threads 1 takes less)")
    })
}

/// Memory of which some is here, and the rest still in the snapshot that it comes from.
struct Overlay<'a> {
    mapped: GuestBytes<'a>,
    /// What is here: ranges of the source space, ascending.
    own: &'a [Range<u64>],
    rest: SnapshotMemory<'a, std::fs::File>,
}

impl ReadAt for Overlay<'_> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let (mut rest, mut at) = (buf, offset);
        while !rest.is_empty() {
            let next = self.own.partition_point(|own| own.end <= at);
            let here = self.own.get(next).filter(|own| own.start <= at);
            let end = match (here, self.own.get(next)) {
                (Some(own), _) => own.end,
                (None, Some(later)) => later.start,
                (None, None) => u64::MAX,
            };
            let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            match here {
                Some(_) => self.mapped.read_exact_at(now, at)?,
                None => self.rest.read_exact_at(now, at)?,
            }
            rest = later;
            at += len as u64;
        }
        Ok(())
    }

    fn len_bytes(&self) -> io::Result<u64> {
        self.mapped.len_bytes()
    }
}

/// The machine's state, and what its devices have besides.
fn stored_states(vm: &mut PausedVm) -> Result<Vec<StateBlob>> {
    let bytes = vm.state()?.encode();
    let machine =
        StateBlob { tag: vmm::state::STATE_KIND, version: vmm::state::STATE_VERSION, bytes };
    let mut states = vec![machine];
    let contents = vm.device_contents().context("a device of the guest cannot be stored")?;
    for (place, content) in contents.into_iter().enumerate() {
        if let (Some(bytes), Some(tag)) = (content, vmm::state::device_content_kind(place)) {
            states.push(StateBlob { tag, version: vmm::state::DEVICE_CONTENT_VERSION, bytes });
        }
    }
    Ok(states)
}

fn metadata(guest: Value) -> Metadata {
    let other = json!({
        "host_cpu": HostCpu::current(),
        "guest": guest,
        "devices": ["serial 8250 at port 0x3f8, irq 4"],
    });
    Metadata::default()
        .tool(env!("CARGO_PKG_NAME"))
        .tool_version(env!("CARGO_PKG_VERSION"))
        .other(other.as_object().cloned().unwrap_or_default())
}
