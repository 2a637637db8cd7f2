//! The balloon (virtio 1.2, 5.5): it returns pages that the guest does not use to the host.
//!
//! The driver reports ranges of free pages (VIRTIO_BALLOON_F_REPORTING, Linux 5.7), a few MiB at a time. The host
//! discards them: they read as zeros afterwards, use no memory, and are not stored in a snapshot. The guest can use
//! them again immediately. A driver may also put single pages into the balloon; the host never requests any.

use std::io;

use super::device::Backend;
use super::fault::Fault;
use super::memory::Segment;
use super::rings::{Request, Rings};
use super::state::{BackendState, BalloonState};

/// Memory balloon device.
pub(super) const DEVICE_ID: u32 = 5;
/// Bits of features (virtio 1.2, 5.5.3); `virtio-bindings` does not have them.
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;
/// Pages are counted in 4 KiB, whatever the guest's are.
const VIRTIO_BALLOON_PFN_SHIFT: u32 = 12;
const INFLATE: usize = 0;
const REPORT: usize = 2;
/// A page as the balloon counts it.
const BALLOON_PAGE_BYTES: usize = 1 << VIRTIO_BALLOON_PFN_SHIFT;
/// Most pages that one request puts into the balloon; Linux has 256.
const PAGES_MAX: usize = 1024;
/// Where the driver writes how many pages it has put into the balloon (`struct virtio_balloon_config`).
const ACTUAL_OFFSET: usize = 4;

#[derive(Default)]
pub(super) struct Balloon {
    state: BalloonState,
    /// The number of pages that the host requests, which is none; and of those that the driver has put in.
    config: [u8; 8],
}

impl Balloon {
    pub(super) fn new(state: BalloonState) -> Balloon {
        let [a, b, c, d] = state.actual_pages.to_le_bytes();
        Balloon { state, config: [0, 0, 0, 0, a, b, c, d] }
    }

    fn inflate(&mut self, rings: &Rings<'_>, mut request: Request) -> Result<(), Fault> {
        let mut numbers = vec![0; request.readable.len().min(PAGES_MAX * size_of::<u32>())];
        request.readable.read_front(rings.memory, &mut numbers)?;
        if request.readable.len() != 0 || !numbers.len().is_multiple_of(size_of::<u32>()) {
            return Err(Fault::Driver("a list of pages that is too long or cut short"));
        }
        let (numbers, _) = numbers.as_chunks::<4>();
        let mut pages: Vec<u32> =
            numbers.iter().map(|number| u32::from_le_bytes(*number)).collect();
        pages.sort_unstable();
        // One call for each run of them.
        for run in pages.chunk_by(|page, next| page.checked_add(1) == Some(*next)) {
            let Some(first) = run.first() else { continue };
            let gpa = u64::from(*first) << VIRTIO_BALLOON_PFN_SHIFT;
            let run = Segment { gpa, len: run.len() * BALLOON_PAGE_BYTES };
            if !rings.memory.is_ram(run) {
                return Err(Fault::Driver("pages for the balloon that are not in memory"));
            }
            self.give_back(rings, run);
        }
        Ok(())
    }

    fn report(&mut self, rings: &Rings<'_>, request: &Request) -> Result<(), Fault> {
        if request.readable.len() != 0 {
            return Err(Fault::Driver("a report of free pages with a buffer to read"));
        }
        for segment in request.writable.segments() {
            self.give_back(rings, *segment);
        }
        Ok(())
    }

    fn give_back(&mut self, rings: &Rings<'_>, segment: Segment) {
        let returned = &mut self.state.returned_bytes;
        *returned = returned.saturating_add(rings.memory.discard(segment));
    }
}

impl Backend for Balloon {
    fn features(&self) -> u64 {
        1 << VIRTIO_BALLOON_F_DEFLATE_ON_OOM | 1 << VIRTIO_BALLOON_F_REPORTING
    }

    fn queue_sizes(&self) -> &'static [u16] {
        // There are no statistics and no hints. Their queues would be between these two.
        &[128, 128, 32]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn serve(&mut self, rings: &mut Rings<'_>, queue: usize) -> Result<bool, Fault> {
        let Some(request) = rings.pop(queue)? else { return Ok(false) };
        let head = request.head;
        match queue {
            INFLATE => self.inflate(rings, request)?,
            REPORT => self.report(rings, &request)?,
            // Pages that leave the balloon are allocated again when they are touched.
            _ => {}
        }
        rings.push_used(queue, head, 0)?;
        Ok(true)
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let (ACTUAL_OFFSET, Ok(actual)) = (offset, data.try_into()) {
            self.state.actual_pages = u32::from_le_bytes(actual);
            self.config[ACTUAL_OFFSET..].copy_from_slice(&actual);
        }
    }

    fn put_back(&mut self, saved: &BackendState, _content: Option<&[u8]>) -> io::Result<()> {
        if let BackendState::Balloon(saved) = saved {
            *self = Balloon::new(*saved);
        }
        Ok(())
    }

    fn state(&self) -> BackendState {
        BackendState::Balloon(self.state)
    }
}
