//! One client, from its first word to its end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::error::{RefuseError, chain};
use super::handshake::{self, Answer, Hello, RegionMessage, Request, SnapshotName};
use super::metrics::Guest;
use super::peer::Peer;
use super::refused::{self, Consequence, Given};
use super::wire::{self, Inlet};
use super::{Hall, ServeEvent, SharedFile};
use crate::keep::{KeepError, Kept, Ledger, Record};
use crate::pager::Pager;
use crate::populate::Populate;
use crate::records::Records;
use crate::region::Region;
use crate::shared::{self, ImageLoader, SharedImage};
use crate::source::PageSource;
use crate::uffd::ForeignUffd;

/// A client that is served.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) id: u64,
    pub(crate) peer: Arc<Peer>,
    pub(crate) pager: Pager,
    /// A keeper has what the next server needs. Dropped after the pager.
    pub(crate) kept: Option<KeptGuest>,
}

impl Session {
    pub(super) fn figures(&self) -> Guest {
        let Session { peer, pager, .. } = self;
        Guest { pid: peer.pid, stats: pager.stats(), regions: pager.region_stats() }
    }
}

/// A guest that the keeper has. It is forgotten there when this is dropped: a server that dies drops nothing.
#[derive(Debug)]
pub(crate) struct KeptGuest {
    pub(super) hall: Arc<Hall>,
    pub(super) id: u64,
}

impl Drop for KeptGuest {
    fn drop(&mut self) {
        if let Some(link) = self.hall.keep() {
            link.forget(self.id);
        }
    }
}

/// How a clone differs from other clients.
struct Sharing {
    source: Arc<dyn PageSource>,
    /// It is told of failures.
    told: UnixStream,
    /// What fills the shared file before clones ask.
    ahead: Option<Arc<ImageLoader>>,
}

/// The body of a client's thread.
pub(crate) fn attend(hall: &Arc<Hall>, stream: UnixStream) {
    let peer = match hall.peer_of(&stream) {
        Ok(peer) => Arc::new(peer),
        Err((_, error @ RefuseError::Shortage(_))) => {
            return hall.refuse_without_room(&stream, &error);
        }
        Err((pid, error)) => return hall.refuse(pid, &error, Consequence::Closed),
    };
    let mut inlet = Inlet::new(&stream, hall.options.handshake_timeout);
    if let Err(error) = attend_peer(hall, &stream, &peer, &mut inlet) {
        let given = inlet.into_given();
        drop(stream);
        refused::end(hall, &peer, given, &error);
    }
}

/// Serves a client until its end. One that is refused has what it gave in `inlet`.
fn attend_peer(
    hall: &Arc<Hall>,
    stream: &UnixStream,
    peer: &Arc<Peer>,
    inlet: &mut Inlet<'_>,
) -> Result<(), RefuseError> {
    match handshake::receive(inlet)? {
        Hello::Fill { regions, descriptor } => {
            // Until it is served: if it is not, its pages are poisoned by this one.
            let second = descriptor.try_clone();
            let (descriptor, second) = match second {
                Ok(second) => (descriptor, second),
                Err(error) => {
                    inlet.descriptors.push(descriptor);
                    return Err(RefuseError::Shortage(error));
                }
            };
            inlet.descriptors.push(second);
            let uffd = handshake::userfaultfd(descriptor)?;
            let memory = handshake::regions(&regions)?;
            let kept = keep(hall, stream, peer, &uffd, &regions, false);
            let served = served(peer, &memory);
            let session = start(hall, Arc::clone(peer), uffd, memory, None, kept)?;
            inlet.descriptors.clear();
            attend_until(hall, session, served, |peer| until_its_process_ends(stream, peer));
            Ok(())
        }
        Hello::Request(Request::Share(wanted)) => {
            if let Err(error) = share(hall, stream, peer, inlet, &wanted) {
                // It does not touch its memory before it was accepted. It may be gone.
                let _ = Answer::Refused(chain(&error)).send(stream, None);
                hall.refuse(Some(peer.pid), &error, Consequence::Closed);
            }
            Ok(())
        }
        Hello::Request(Request::Stats {}) => wire::send_line(stream, &hall.stats_json(), None)
            .map_err(|error| system("answer", error)),
    }
}

/// A clone: gets the shared file, sends its userfaultfd, and is served until it hangs up, which says that its guest
/// has ended, or is no more.
fn share(
    hall: &Arc<Hall>,
    stream: &UnixStream,
    peer: &Arc<Peer>,
    inlet: &mut Inlet<'_>,
    wanted: &SnapshotName,
) -> Result<(), RefuseError> {
    let file = shared_file(hall, wanted)?;
    Answer::Accepted {}.send(stream, Some(file.image.descriptor()))?;
    let Hello::Fill { regions, descriptor } = handshake::receive(inlet)? else {
        return Err(RefuseError::NotShared { why: "the client says something else than expected" });
    };
    let uffd = handshake::userfaultfd(descriptor)?;
    let told = stream.try_clone().map_err(|error| system("duplicate a connection", error))?;
    let memory = handshake::regions(&regions)?;
    let served = served(peer, &memory);
    let kept = keep(hall, stream, peer, &uffd, &regions, true);
    let sharing = Sharing { source: file.image.as_source(), told, ahead: file.ahead };
    let session = start(hall, Arc::clone(peer), uffd, memory, Some(sharing), kept)?;
    Answer::Accepted {}.send(stream, None)?;
    attend_until(hall, session, served, |peer| until_it_hangs_up(stream, peer));
    Ok(())
}

fn shared_file(hall: &Hall, wanted: &SnapshotName) -> Result<SharedFile, RefuseError> {
    let served = hall.options.share.as_ref();
    let served = served.ok_or(RefuseError::NotShared { why: "this server does not share" })?;
    if served != wanted {
        let (wanted, served) = (wanted.to_string(), served.to_string());
        return Err(RefuseError::Snapshot { wanted, served });
    }
    let mut file = hall.image.lock().unwrap_or_else(PoisonError::into_inner);
    // One that somebody has written to is left to the clones that have it.
    if let Some(file) = file.as_ref().filter(|file| file.image.whole().is_ok()) {
        return Ok(file.clone());
    }
    let new = Arc::new(SharedImage::new(Arc::clone(&hall.source)).map_err(RefuseError::Start)?);
    if let Some(prefetched) = &hall.options.prefetch {
        shared::prefill(&new, Box::new(prefetched.list()));
    }
    let ahead = (hall.options.populate != Populate::Off).then(|| ImageLoader::of(&new));
    Ok(file.insert(SharedFile { image: new, ahead }).clone())
}

fn served(peer: &Peer, regions: &[Region]) -> ServeEvent<'static> {
    ServeEvent::Served { pid: peer.pid, memory_bytes: all_bytes(regions) }
}

/// Nobody has looked yet whether the regions overlap: a client may say more than there can be.
fn all_bytes(regions: &[Region]) -> u64 {
    regions.iter().map(Region::len_bytes).fold(0, u64::saturating_add)
}

fn system(what: &'static str, error: io::Error) -> RefuseError {
    RefuseError::System { what, error }
}

/// Starts the pager of a client.
fn start(
    hall: &Arc<Hall>,
    peer: Arc<Peer>,
    uffd: ForeignUffd,
    regions: Vec<Region>,
    sharing: Option<Sharing>,
    kept: Option<(Records, KeptGuest)>,
) -> Result<Arc<Session>, RefuseError> {
    let process = peer.duplicate().map_err(|error| system("duplicate a pidfd", error))?;
    let (source, clone, ahead) = match sharing {
        Some(Sharing { source, told, ahead }) => (source, Some(told), ahead),
        None => (Arc::clone(&hall.source), None, None),
    };
    let is_clone = clone.is_some();
    let (told, pid) = (Arc::clone(hall), peer.pid);
    let mut builder = Pager::builder(source)
        .regions(regions)
        .on_error(hall.options.on_error)
        .on_failure(move |failure| {
            if let Some(clone) = &clone {
                let _ = Answer::Failure(failure.chain()).send(clone, None);
            }
            (told.on_event)(ServeEvent::Failed { pid, failure });
        })
        .foreign(uffd, process);
    match ahead {
        _ if !is_clone => builder = builder.populate(hall.options.populate),
        Some(ahead) => builder = builder.backed().loaded_ahead_by(ahead),
        None => builder = builder.backed(),
    }
    if let (Some(prefetched), false) = (&hall.options.prefetch, is_clone) {
        builder = builder.prefetch(prefetched.list());
    }
    if let (Some(overhead), false) = (hall.options.fault_overhead, is_clone) {
        builder = builder.fault_overhead(overhead);
    }
    let (records, kept) = kept.unzip();
    if let Some(records) = records {
        builder = builder.recorded(records);
    }
    let pager = builder.start().map_err(RefuseError::Start)?;
    let id = kept.as_ref().map_or_else(|| hall.new_id(), |kept| kept.id);
    Ok(Arc::new(Session { id, peer, pager, kept }))
}

/// Gives the keeper, if there is one, what the next server needs. From before the first message is read: what this
/// process has read is known to nobody else.
fn keep(
    hall: &Arc<Hall>,
    stream: &UnixStream,
    peer: &Peer,
    uffd: &ForeignUffd,
    regions: &[RegionMessage],
    shares: bool,
) -> Option<(Records, KeptGuest)> {
    let link = hall.keep()?;
    let kept = || -> Result<(Records, KeptGuest), KeepError> {
        let record = Record { pid: peer.pid, regions: regions.to_vec() };
        let pages = |region: &RegionMessage| {
            region.size / region.page_size.or(region.page_size_kib).unwrap_or(4096).max(1)
        };
        let pages = regions.iter().map(pages).fold(0, u64::saturating_add);
        let ledger = Ledger::create(record, pages)?;
        let records = ledger.records(false);
        let records = records.map_err(|error| KeepError::System { what: "map it", error })?;
        let id = hall.new_id();
        let descriptors = [uffd.as_fd(), stream.as_fd(), peer.process(), ledger.as_fd()];
        link.keep(id, descriptors, shares)?;
        Ok((records, KeptGuest { hall: Arc::clone(hall), id }))
    }();
    match kept {
        Ok(kept) => Some(kept),
        Err(error) => {
            (hall.on_event)(ServeEvent::NotKept { pid: peer.pid, error: &error });
            None
        }
    }
}

/// The body of the thread of a client whose server has died.
pub(crate) fn resume(hall: &Arc<Hall>, guest: KeptGuest, kept: Kept) {
    let Kept { uffd, connection, process, ledger, shares } = kept;
    let mut given = Given { names_memory: true, ..Given::default() };
    let (pid, ledger) = match Ledger::open(ledger) {
        Ok(ledger) => (ledger.record.pid, Ok(ledger)),
        Err(error) => (0, Err(RefuseError::Kept(error))),
    };
    let peer = Arc::new(Peer::kept(pid, process));
    let outcome = ledger.and_then(|ledger| {
        given.descriptors.push(uffd.try_clone().map_err(RefuseError::Shortage)?);
        let resumed = Resumed { uffd, stream: connection.into(), shares, ledger };
        resume_peer(hall, guest, &peer, resumed, &mut given)
    });
    match outcome {
        Ok(()) => {}
        // It sees its connection close, and knows what to do.
        Err(error) if shares => hall.refuse(Some(peer.pid), &error, Consequence::Closed),
        Err(error) => refused::end(hall, &peer, given, &error),
    }
}

/// What is known of a client whose server has died.
struct Resumed {
    uffd: OwnedFd,
    stream: UnixStream,
    shares: bool,
    ledger: Ledger,
}

fn resume_peer(
    hall: &Arc<Hall>,
    guest: KeptGuest,
    peer: &Arc<Peer>,
    resumed: Resumed,
    given: &mut Given,
) -> Result<(), RefuseError> {
    let Resumed { uffd, stream, shares, ledger } = resumed;
    let uffd = handshake::userfaultfd(uffd)?;
    let regions = handshake::regions(&ledger.record.regions)?;
    let records = ledger.records(true).map_err(|error| system("map the ledger", error))?;
    let taken = ServeEvent::TakenOver { pid: peer.pid, memory_bytes: all_bytes(&regions) };
    let kept = Some((records, guest));
    if !shares {
        let session = start(hall, Arc::clone(peer), uffd, regions, None, kept)?;
        given.descriptors.clear();
        attend_until(hall, session, taken, |peer| until_its_process_ends(&stream, peer));
        return Ok(());
    }
    // Nobody can write to the dead server's file any more. What it has the clone still maps; what it lacks is copied
    // into the clone's own mapping, and hides the file there.
    let told = stream.try_clone().map_err(|error| system("duplicate a connection", error))?;
    let sharing = Sharing { source: Arc::clone(&hall.source), told, ahead: None };
    let session = start(hall, Arc::clone(peer), uffd, regions, Some(sharing), kept)?;
    given.descriptors.clear();
    // The dead server may not have come to that. Twice does no harm.
    Answer::Accepted {}.send(&stream, None)?;
    attend_until(hall, session, taken, |peer| until_it_hangs_up(&stream, peer));
    Ok(())
}

fn attend_until(
    hall: &Arc<Hall>,
    session: Arc<Session>,
    begun: ServeEvent<'_>,
    wait: impl FnOnce(&Peer),
) {
    let entry = hall.enter(session.id, Arc::clone(&session));
    (hall.on_event)(begun);
    wait(&session.peer);
    drop(entry);
    end(hall, session);
}

/// The pager's threads end here, and its descriptors are closed.
fn end(hall: &Hall, session: Arc<Session>) {
    let (pid, stats) = (session.peer.pid, session.pager.stats());
    drop(session);
    (hall.on_event)(ServeEvent::Ended { pid, stats: &stats });
}

/// Waits for the end of the client's process. That it has closed the socket is not enough: while it lives, its
/// memory wants pages. What it goes on saying is not listened to.
fn until_its_process_ends(stream: &UnixStream, peer: &Peer) {
    wait(stream, peer, false);
}

fn until_it_hangs_up(stream: &UnixStream, peer: &Peer) {
    wait(stream, peer, true);
}

fn wait(stream: &UnixStream, peer: &Peer, or_for_hang_up: bool) {
    let mut talks = true;
    while talks || !or_for_hang_up {
        let process = peer.process();
        let mut fds = vec![PollFd::from_borrowed_fd(process, PollFlags::IN)];
        if talks {
            fds.push(PollFd::new(stream, PollFlags::IN));
        }
        match rustix::event::poll(&mut fds, None) {
            Ok(_) if !fds[0].revents().is_empty() => return,
            Ok(_) if fds.len() > 1 => talks = discard(stream),
            Ok(_) | Err(Errno::INTR) => {}
            // Not to be had: serve on without an end rather than leave a guest alone.
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(100)),
        }
    }
}

/// Answers whether more may come.
fn discard(stream: &UnixStream) -> bool {
    let mut bytes = [0; 4096];
    match rustix::net::recv(stream, &mut bytes, RecvFlags::DONTWAIT) {
        Ok((_, len)) => len > 0,
        Err(Errno::AGAIN | Errno::INTR) => true,
        Err(_) => false,
    }
}
