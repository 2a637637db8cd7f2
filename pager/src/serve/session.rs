//! One client, from its first word to its end.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::error::RefuseError;
use super::handshake::{self, Hello, RegionMessage, Request};
use super::peer::Peer;
use super::wire::{self, Inlet};
use super::{Hall, ServeEvent};
use crate::pager::Pager;
use crate::uffd::ForeignUffd;

/// A client that is served.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) peer: Arc<Peer>,
    pub(crate) pager: Pager,
}

/// The body of a client's thread.
pub(crate) fn attend(hall: &Arc<Hall>, stream: &UnixStream) {
    match Peer::of(stream) {
        Err(error) => hall.refuse(None, &error),
        Ok(peer) => {
            let pid = peer.pid;
            if let Err(error) = attend_peer(hall, stream, peer) {
                hall.refuse(Some(pid), &error);
            }
        }
    }
}

fn attend_peer(hall: &Arc<Hall>, stream: &UnixStream, peer: Peer) -> Result<(), RefuseError> {
    let mut inlet = Inlet::new(stream, hall.options.handshake_timeout);
    match handshake::receive(&mut inlet)? {
        Hello::Fill { regions, descriptor } => {
            let uffd = handshake::userfaultfd(descriptor)?;
            let session = start(hall, peer, uffd, &regions)?;
            let entry = hall.enter(Arc::clone(&session));
            let memory_bytes = regions.iter().map(|region| region.size).sum();
            (hall.on_event)(ServeEvent::Served { pid: session.peer.pid, memory_bytes });
            until_its_process_ends(stream, &session.peer);
            drop(entry);
            end(hall, session);
            Ok(())
        }
        Hello::Request(Request::Share(_)) => {
            Err(RefuseError::NotShared { why: "this server fills private memory only" })
        }
        Hello::Request(Request::Stats {}) => {
            let system = |error| RefuseError::System { what: "answer", error };
            wire::send_line(stream, &hall.stats_json(), None).map_err(system)
        }
    }
}

fn start(
    hall: &Arc<Hall>,
    peer: Peer,
    uffd: ForeignUffd,
    regions: &[RegionMessage],
) -> Result<Arc<Session>, RefuseError> {
    let regions = handshake::regions(regions)?;
    let peer = Arc::new(peer);
    let process = peer
        .duplicate()
        .map_err(|error| RefuseError::System { what: "duplicate a process descriptor", error })?;
    let (told, pid) = (Arc::clone(hall), peer.pid);
    let pager = Pager::builder(Arc::clone(&hall.source))
        .regions(regions)
        .on_error(hall.options.on_error)
        .on_failure(move |failure| (told.on_event)(ServeEvent::Failed { pid, failure }))
        .foreign(uffd, process)
        .start()
        .map_err(RefuseError::Start)?;
    Ok(Arc::new(Session { peer, pager }))
}

/// The pager's threads end here, and its descriptors are closed.
fn end(hall: &Hall, session: Arc<Session>) {
    let pid = session.peer.pid;
    let stats = session.pager.stats();
    drop(session);
    (hall.on_event)(ServeEvent::Ended { pid, stats: &stats });
}

/// Waits for the end of the client's process. That it has closed the socket is not enough: while it lives, its
/// memory wants pages. What it goes on saying is not listened to.
fn until_its_process_ends(stream: &UnixStream, peer: &Peer) {
    let mut talks = true;
    loop {
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
