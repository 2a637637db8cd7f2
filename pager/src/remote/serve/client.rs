//! The thread of one client, from its first message to its end.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::error::RefuseError;
use super::event::{Consequence, ServeEvent};
use super::given::Given;
use super::handshake::{self, Answer, Hello, RegionMessage, Request, SnapshotName};
use super::peer::Peer;
use super::refused;
use super::session::{Held, KeptGuest, Session};
use super::state::{ServerState, SharedFile};
use super::wire::{self, SocketReader};
use crate::background::populate::population::Populate;
use crate::causes::with_causes;
use crate::install::records::Records;
use crate::pager::Pager;
use crate::region::{PAGE_BYTES, Region};
use crate::remote::keep::{HandoverState, KeepError, Kept, Record};
use crate::remote::shared::{self, ImageLoader, SharedImage};
use crate::source::page_source::PageSource;
use crate::uffd::ForeignUffd;

/// How a clone differs from other clients.
struct Sharing {
    source: Arc<dyn PageSource>,
    /// The connection on which failures are reported to it.
    failures: UnixStream,
    /// Fills the shared file ahead.
    ahead: Option<Arc<ImageLoader>>,
}

/// The body of the thread of a client.
pub(crate) fn attend(server: &Arc<ServerState>, stream: UnixStream, mut held: Option<Held>) {
    let peer = match server.peer_of(&stream) {
        Ok(peer) => Arc::new(peer),
        Err((_, error @ RefuseError::Shortage(_))) => {
            return server.refuse_without_room(&stream, &error);
        }
        Err((pid, error)) => return server.refuse(pid, &error, Consequence::Closed),
    };
    let mut reader = SocketReader::new(&stream, server.options.handshake_timeout)
        .ended_by(server.ending.as_fd());
    if let Err(error) = attend_peer(server, &stream, &peer, &mut reader, &mut held) {
        let given = reader.into_given();
        // The keeper may have a duplicate.
        let _ = stream.shutdown(Shutdown::Both);
        drop(stream);
        refused::end(server, &peer, given, &error);
    }
}

/// Serves a client until its end. After an error, `reader` has what the client has sent.
fn attend_peer(
    server: &Arc<ServerState>,
    stream: &UnixStream,
    peer: &Arc<Peer>,
    reader: &mut SocketReader<'_>,
    held: &mut Option<Held>,
) -> Result<(), RefuseError> {
    let hello = match held {
        Some(_) => handshake::peek(reader)?,
        None => None,
    };
    let hello = match hello {
        Some(hello) => hello,
        None => {
            // The next server would not find the parts that are read here.
            *held = None;
            handshake::receive(reader)?
        }
    };
    match hello {
        Hello::Fill { regions, descriptor } => {
            // If the client is refused below, its pages are poisoned with this duplicate.
            let second = descriptor.try_clone();
            let (descriptor, second) = match second {
                Ok(second) => (descriptor, second),
                Err(error) => {
                    reader.descriptors.push(descriptor);
                    return Err(RefuseError::Shortage(error));
                }
            };
            reader.descriptors.push(second);
            let uffd = handshake::userfaultfd(descriptor)?;
            let memory = handshake::regions(&regions)?;
            let kept = keep(server, stream, peer, &uffd, &regions, Client::Guest(held.take()));
            let served = served(peer, &memory);
            let session = start(server, Arc::clone(peer), uffd, memory, None, kept)?;
            reader.descriptors.clear();
            attend_until(server, session, served, |peer| until_its_process_ends(stream, peer));
            Ok(())
        }
        Hello::Request(Request::Share(wanted)) => {
            if let Err(error) = share(server, stream, peer, reader, &wanted) {
                // The clone does not touch its memory before it is accepted. It may be gone.
                let _ = Answer::Refused(with_causes(&error)).send(stream, None);
                server.refuse(Some(peer.pid), &error, Consequence::Closed);
            }
            Ok(())
        }
        Hello::Request(Request::Stats {}) => wire::send_line(stream, &server.stats_json(), None)
            .map_err(|error| system("answer", error)),
    }
}

/// Serves a clone: it gets the shared file, sends its userfaultfd, and is served until it hangs up or its process ends.
fn share(
    server: &Arc<ServerState>,
    stream: &UnixStream,
    peer: &Arc<Peer>,
    reader: &mut SocketReader<'_>,
    wanted: &SnapshotName,
) -> Result<(), RefuseError> {
    let file = shared_file(server, wanted)?;
    Answer::Accepted {}.send(stream, Some(file.image.descriptor()))?;
    let Hello::Fill { regions, descriptor } = handshake::receive(reader)? else {
        return Err(RefuseError::NotShared { why: "the client has sent an unexpected message" });
    };
    let uffd = handshake::userfaultfd(descriptor)?;
    let failures = stream.try_clone().map_err(|error| system("duplicate a connection", error))?;
    let memory = handshake::regions(&regions)?;
    let served = served(peer, &memory);
    let kept = keep(server, stream, peer, &uffd, &regions, Client::Clone);
    let sharing = Sharing { source: file.image.as_source(), failures, ahead: file.ahead };
    let session = start(server, Arc::clone(peer), uffd, memory, Some(sharing), kept)?;
    Answer::Accepted {}.send(stream, None)?;
    attend_until(server, session, served, |peer| until_it_hangs_up(stream, peer));
    Ok(())
}

fn shared_file(server: &ServerState, wanted: &SnapshotName) -> Result<SharedFile, RefuseError> {
    let served = server.options.share.as_ref();
    let served = served.ok_or(RefuseError::NotShared { why: "this server does not share" })?;
    if served != wanted {
        let (wanted, served) = (wanted.to_string(), served.to_string());
        return Err(RefuseError::Snapshot { wanted, served });
    }
    let mut file = server.image.lock().unwrap_or_else(PoisonError::into_inner);
    // A file that another process has written to is left to the clones that already have it.
    if let Some(file) = file.as_ref().filter(|file| file.image.whole().is_ok()) {
        return Ok(file.clone());
    }
    let new = Arc::new(SharedImage::new(Arc::clone(&server.source)).map_err(RefuseError::Start)?);
    if let Some(prefetched) = &server.options.prefetch {
        shared::prefill(&new, Box::new(prefetched.list()));
    }
    let ahead = (server.options.populate != Populate::Off).then(|| ImageLoader::of(&new));
    Ok(file.insert(SharedFile { image: new, ahead }).clone())
}

fn served(peer: &Peer, regions: &[Region]) -> ServeEvent<'static> {
    ServeEvent::Served { pid: peer.pid, memory_bytes: all_bytes(regions) }
}

/// The size of all regions in bytes. The client may have sent sizes whose sum overflows: nothing has checked them yet.
fn all_bytes(regions: &[Region]) -> u64 {
    regions.iter().map(Region::len_bytes).fold(0, u64::saturating_add)
}

fn system(what: &'static str, error: io::Error) -> RefuseError {
    RefuseError::System { what, error }
}

/// Starts the pager of a client.
fn start(
    server: &Arc<ServerState>,
    peer: Arc<Peer>,
    uffd: ForeignUffd,
    regions: Vec<Region>,
    sharing: Option<Sharing>,
    kept: Option<(Records, KeptGuest)>,
) -> Result<Arc<Session>, RefuseError> {
    let process = peer.duplicate().map_err(|error| system("duplicate a pidfd", error))?;
    let (source, clone, ahead) = match sharing {
        Some(Sharing { source, failures, ahead }) => (source, Some(failures), ahead),
        None => (Arc::clone(&server.source), None, None),
    };
    let is_clone = clone.is_some();
    let (state, pid) = (Arc::clone(server), peer.pid);
    let mut builder = Pager::builder(source)
        .regions(regions)
        .on_error(server.options.on_error)
        .on_failure(move |failure| {
            if let Some(clone) = &clone {
                let _ = Answer::Failure(with_causes(failure)).send(clone, None);
            }
            (state.on_event)(ServeEvent::Failed { pid, failure });
        })
        .foreign(uffd, process);
    match ahead {
        _ if !is_clone => builder = builder.populate(server.options.populate),
        Some(ahead) => builder = builder.backed().loaded_ahead_by(ahead),
        None => builder = builder.backed(),
    }
    if let (Some(prefetched), false) = (&server.options.prefetch, is_clone) {
        builder = builder.prefetch(prefetched.list());
    }
    if let (Some(overhead), false) = (server.options.fault_overhead, is_clone) {
        builder = builder.fault_overhead(overhead);
    }
    let (records, kept) = kept.unzip();
    if let Some(records) = records {
        builder = builder.recorded(records);
    }
    let pager = builder.start().map_err(RefuseError::Start)?;
    let id = kept.as_ref().map_or_else(|| server.new_id(), |kept| kept.id);
    Ok(Arc::new(Session { id, peer, pager, kept }))
}

/// What the keeper gets.
enum Client {
    /// A guest, whose connection the keeper may hold.
    Guest(Option<Held>),
    /// A clone that shares memory.
    Clone,
}

/// Sends the keeper, if there is one, the handover state for the next server. This happens before the first message of
/// the userfaultfd is read, because only this process knows a message after that. From now on the keeper has the guest,
/// not its connection.
fn keep(
    server: &Arc<ServerState>,
    stream: &UnixStream,
    peer: &Peer,
    uffd: &ForeignUffd,
    regions: &[RegionMessage],
    client: Client,
) -> Option<(Records, KeptGuest)> {
    let link = server.keeper()?;
    let (mut held, shares) = match client {
        Client::Guest(held) => (held, false),
        Client::Clone => (None, true),
    };
    let connection = held.as_ref().and_then(Held::connection);
    let kept = || -> Result<(Records, KeptGuest), KeepError> {
        let record = Record { pid: peer.pid, regions: regions.to_vec() };
        let pages = |region: &RegionMessage| {
            region.size
                / region.page_size.or(region.page_size_kib).unwrap_or(PAGE_BYTES as u64).max(1)
        };
        let pages = regions.iter().map(pages).fold(0, u64::saturating_add);
        let handover = HandoverState::create(record, pages)?;
        let records = handover.records(false);
        let records = records.map_err(|error| KeepError::System { what: "map it", error })?;
        let id = server.new_id();
        let descriptors = [uffd.as_fd(), stream.as_fd(), peer.process(), handover.as_fd()];
        link.keep(id, descriptors, shares, connection)?;
        Ok((records, KeptGuest { keeper: Arc::clone(link), id }))
    }();
    match kept {
        Ok(kept) => {
            held.iter_mut().for_each(Held::replaced);
            Some(kept)
        }
        Err(error) => {
            // Before its memory changes: the next server could not know that.
            drop(held);
            (server.on_event)(ServeEvent::NotKept { pid: peer.pid, error: &error });
            None
        }
    }
}

/// The body of the thread of a client of a dead server.
pub(crate) fn resume(server: &Arc<ServerState>, guest: KeptGuest, kept: Kept) {
    let Kept { uffd, connection, process, handover, shares } = kept;
    let mut given = Given { names_memory: true, ..Given::default() };
    let (pid, handover) = match HandoverState::open(handover) {
        Ok(handover) => (handover.record.pid, Ok(handover)),
        Err(error) => (0, Err(RefuseError::Kept(error))),
    };
    let peer = Arc::new(Peer::kept(pid, process));
    let outcome = handover.and_then(|handover| {
        given.descriptors.push(uffd.try_clone().map_err(RefuseError::Shortage)?);
        let resumed = Resumed { uffd, stream: connection.into(), shares, handover };
        resume_peer(server, guest, &peer, resumed, &mut given)
    });
    match outcome {
        Ok(()) => {}
        // The clone handles the end of its connection itself.
        Err(error) if shares => server.refuse(Some(peer.pid), &error, Consequence::Closed),
        Err(error) => refused::end(server, &peer, given, &error),
    }
}

/// A client of a dead server.
struct Resumed {
    uffd: OwnedFd,
    stream: UnixStream,
    shares: bool,
    handover: HandoverState,
}

fn resume_peer(
    server: &Arc<ServerState>,
    guest: KeptGuest,
    peer: &Arc<Peer>,
    resumed: Resumed,
    given: &mut Given,
) -> Result<(), RefuseError> {
    let Resumed { uffd, stream, shares, handover } = resumed;
    let uffd = handshake::userfaultfd(uffd)?;
    let regions = handshake::regions(&handover.record.regions)?;
    let records =
        handover.records(true).map_err(|error| system("map the handover state", error))?;
    let taken = ServeEvent::TakenOver { pid: peer.pid, memory_bytes: all_bytes(&regions) };
    let kept = Some((records, guest));
    if !shares {
        let session = start(server, Arc::clone(peer), uffd, regions, None, kept)?;
        given.descriptors.clear();
        attend_until(server, session, taken, |peer| until_its_process_ends(&stream, peer));
        return Ok(());
    }
    // No process can write to the file of the dead server. The clone still maps its pages. Missing pages are copied
    // into the private mapping of the clone.
    let failures = stream.try_clone().map_err(|error| system("duplicate a connection", error))?;
    let sharing = Sharing { source: Arc::clone(&server.source), failures, ahead: None };
    let session = start(server, Arc::clone(peer), uffd, regions, Some(sharing), kept)?;
    given.descriptors.clear();
    // The dead server may not have sent this. Sending it twice does no harm.
    Answer::Accepted {}.send(&stream, None)?;
    attend_until(server, session, taken, |peer| until_it_hangs_up(&stream, peer));
    Ok(())
}

fn attend_until(
    server: &Arc<ServerState>,
    session: Arc<Session>,
    begun: ServeEvent<'_>,
    wait: impl FnOnce(&Peer),
) {
    let entry = server.enter(session.id, Arc::clone(&session));
    (server.on_event)(begun);
    wait(&session.peer);
    drop(entry);
    end(server, session);
}

/// Ends the threads of the pager, and closes its descriptors.
fn end(server: &ServerState, session: Arc<Session>) {
    let (pid, stats) = (session.peer.pid, session.pager.stats());
    drop(session);
    (server.on_event)(ServeEvent::Ended { pid, stats: &stats });
}

/// Waits for the end of the process of the client. A closed socket is not enough: while the process lives, its memory
/// needs pages. Further messages are discarded.
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
            // poll(2) fails: keep serving rather than leave the guest without pages.
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(100)),
        }
    }
}

/// Discards received bytes. Returns whether more may come.
fn discard(stream: &UnixStream) -> bool {
    let mut bytes = [0; 4096];
    match rustix::net::recv(stream, &mut bytes, RecvFlags::DONTWAIT) {
        Ok((_, len)) => len > 0,
        Err(Errno::AGAIN | Errno::INTR) => true,
        Err(_) => false,
    }
}
