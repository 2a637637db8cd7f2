//! A mounted snapshot.

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::SystemTime;

use fuser::{Config, Session, SessionACL};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use snapvm::snapfmt::Snapshot;

use crate::activity::Activity;
use crate::error::{MountError, MountEvent};
use crate::filesystem::{OnEvent, SnapshotFiles, read_ahead_bytes};
use crate::loader::Loader;
use crate::mount_point::MountPoint;
use crate::tree::Tree;

/// How a snapshot is mounted.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct MountOptions {
    /// Whether users other than this one may read the files. A user without privileges may set it only if
    /// /etc/fuse.conf has `user_allow_other`.
    pub allow_other: bool,
    /// When pages that readers have not touched are loaded in the background.
    pub populate: Populate,
    /// Guest memory to load into a file when it is read first: source offsets in bytes, in this order.
    pub prefetch: Vec<Range<u64>>,
    /// Called by each thread that answers readers or loads pages, before it begins. A program jails these threads with it.
    /// They do not mount or unmount. If it cannot do its work it must end the process.
    pub on_thread_start: Option<fn()>,
}

/// When pages that readers have not touched are loaded in the background.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Populate {
    /// Never.
    Off,
    /// While readers wait for pages a good part of their time: from the page that was read last to the end of the file,
    /// then from its start.
    #[default]
    Auto,
}

/// A snapshot that is mounted, and not yet served. Dropping it unmounts it.
pub struct Mount {
    session: Session<SnapshotFiles>,
    point: MountPoint,
    activity: Arc<Activity>,
    tree: Arc<Tree>,
    span_bytes: u64,
    on_event: Arc<OnEvent>,
    on_thread_start: Option<fn()>,
}

impl Mount {
    /// Mounts a snapshot on an empty folder. Readers wait until [`Mount::run`].
    ///
    /// `on_event` is called by the threads that serve; readers wait for it.
    ///
    /// # Errors
    /// [`MountError`]: all but `Start`, `Serve` and `Unmount`.
    pub fn new(
        snapshot: &Arc<Snapshot>,
        folder: &Path,
        options: &MountOptions,
        on_event: impl Fn(MountEvent<'_>) + Send + Sync + 'static,
    ) -> Result<Self, MountError> {
        let tree = Arc::new(Tree::new(snapshot)?);
        let activity = Arc::new(Activity::new(options.populate == Populate::Auto));
        let on_event: Arc<OnEvent> = Arc::new(Box::new(on_event));
        let files = SnapshotFiles {
            snapshot: Arc::clone(snapshot),
            tree: Arc::clone(&tree),
            activity: Arc::clone(&activity),
            prefetch: options.prefetch.clone(),
            allow_other: options.allow_other,
            mounted_at: SystemTime::now(),
            on_event: Arc::clone(&on_event),
            idle: Mutex::new(Vec::new()),
            failed: Mutex::new(HashSet::new()),
        };
        let span_bytes = read_ahead_bytes(snapshot);
        let (point, connection) = MountPoint::attach(folder, options.allow_other)?;
        let mut config = Config::default();
        config.n_threads = Some(threads());
        // The kernel lets only those users in that the mount is for.
        let session = Session::from_fd(files, connection, SessionACL::All, config);
        let session = session.map_err(MountError::Serve)?;
        let (span_bytes, on_thread_start) = (span_bytes.into(), options.on_thread_start);
        Ok(Self { session, point, activity, tree, span_bytes, on_event, on_thread_start })
    }

    /// Answers readers until the other end of the pipe `stop` is closed, or the folder is unmounted. In both cases files
    /// that are open or mapped are served until the last one is closed.
    ///
    /// # Errors
    /// [`MountError::Start`], [`MountError::Serve`], [`MountError::Unmount`].
    pub fn run(self, stop: BorrowedFd<'_>) -> Result<(), MountError> {
        let Self { session, mut point, activity, tree, span_bytes, on_event, on_thread_start } =
            self;
        let folder = point.folder().to_owned();
        let loader = Loader { folder, span_bytes, tree, activity: Arc::clone(&activity) };
        let (ended, end) = io::pipe().map_err(MountError::Start)?;
        let begin = move || on_thread_start.map_or((), |hook| hook());
        let serve = move || {
            let _end = end;
            begin();
            session.run()
        };
        let server = start("mount", serve)?;
        loader.prepare();
        on_event(MountEvent::Ready);
        let load = move || {
            begin();
            loader.run()
        };
        let loader = start("mount-loader", load)?;
        if wait_for_either(stop, ended.as_fd())? {
            // Its files would keep the mount from ending.
            activity.end();
            point.detach()?;
            on_event(MountEvent::Detached);
        } else {
            point.forget();
        }
        let served = join(server);
        activity.end();
        join(loader);
        served.map_err(MountError::Serve)
    }
}

/// Requests wait for the storage, which may be far away, so there are more threads than CPUs.
fn threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from).saturating_mul(2).clamp(4, 16)
}

fn start<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, MountError> {
    thread::Builder::new().name(name.into()).spawn(body).map_err(MountError::Start)
}

fn join<T>(thread: JoinHandle<T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Whether it was the first that ended.
fn wait_for_either(first: BorrowedFd<'_>, second: BorrowedFd<'_>) -> Result<bool, MountError> {
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(first, PollFlags::IN),
            PollFd::from_borrowed_fd(second, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Err(Errno::INTR) => {}
            Err(errno) => return Err(MountError::Start(errno.into())),
            Ok(_) if !fds[1].revents().is_empty() => return Ok(false),
            Ok(_) if !fds[0].revents().is_empty() => return Ok(true),
            Ok(_) => {}
        }
    }
}
