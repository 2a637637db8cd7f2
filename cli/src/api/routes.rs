//! The requests of the control socket, and their paths and fields.

use std::num::NonZeroUsize;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::json;
use snapfmt::{Codec, Existing, WriteOptions};

use super::response::Response;
use crate::bucket;
use crate::http::Request;
use crate::live::{Answer, Checkpoint, Command, Done, Refused, Remote, StoreRequest};

/// Constant facts about the guest, and its figures.
pub(crate) struct Facts {
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: usize,
    pub(crate) restored_from: Option<PathBuf>,
    pub(crate) started: Instant,
    /// The pager's figures, if there is a pager.
    pub(crate) pager: Box<dyn Fn() -> Option<PagerFigures> + Send + Sync>,
}

/// A pager's figures, and those of each of its regions.
#[derive(Serialize)]
pub(crate) struct PagerFigures {
    #[serde(flatten)]
    stats: pager::Stats,
    regions: Vec<pager::RegionStats>,
}

impl PagerFigures {
    pub(crate) fn of(pager: &pager::Pager) -> PagerFigures {
        PagerFigures { stats: pager.stats(), regions: pager.region_stats() }
    }
}

pub(super) struct Routes {
    pub(super) remote: Remote,
    pub(super) facts: Facts,
}

/// The body of `PATCH /vm`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VmState {
    state: Wanted,
}

#[derive(Deserialize)]
enum Wanted {
    Paused,
    Resumed,
}

/// The body of `PUT /snapshot/create`.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CreateSnapshot {
    pub(super) snapshot_path: PathBuf,
    #[serde(default)]
    pub(super) snapshot_type: SnapshotType,
    #[serde(default, rename = "type")]
    pub(super) pausing: Pausing,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) checkpoint: Option<CheckpointFields>,
    #[serde(default)]
    pub(super) stop: bool,
    #[serde(default)]
    pub(super) force: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) codec: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) level: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) chunk_pages: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) dedupe: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) threads: Option<NonZeroUsize>,
}

/// How a live snapshot continues a chain.
#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CheckpointFields {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) parent: Option<PathBuf>,
    #[serde(default)]
    pub(crate) if_changed: bool,
    pub(crate) track_ms: u64,
}

/// The longest time between two checkpoints.
const MOST_TRACK_MS: u64 = 24 * 60 * 60 * 1000;

impl CheckpointFields {
    fn checked(self, wanted: &CreateSnapshot) -> Result<Checkpoint, &'static str> {
        if wanted.pausing != Pausing::Live || matches!(wanted.snapshot_type, SnapshotType::Diff) {
            return Err(
                "checkpoint: for a snapshot with the type \"live\", and without a snapshot_type",
            );
        }
        if self.parent.as_ref().is_some_and(|parent| !parent.is_absolute()) {
            return Err(
                "checkpoint: the parent is relative, and the guest's working folder is not yours",
            );
        }
        if !(1..=MOST_TRACK_MS).contains(&self.track_ms) {
            return Err("checkpoint: track_ms is not in 1 to a day");
        }
        let CheckpointFields { parent, if_changed, track_ms } = self;
        Ok(Checkpoint { parent, if_changed, track_for: Duration::from_millis(track_ms) })
    }
}

impl CreateSnapshot {
    /// How the file is to be written, or the error in the request.
    fn options(&self) -> Result<WriteOptions, String> {
        let mut options = WriteOptions::default();
        if let Some(codec) = &self.codec {
            options.codec = codec.parse().map_err(|error| format!("codec: {error}"))?;
        }
        if let Some(level) = self.level {
            if options.codec != Codec::Zstd {
                return Err(format!("level: {} has no levels", options.codec));
            }
            if !(-7..=22).contains(&level) {
                return Err(format!("level: {level} is not in -7 to 22"));
            }
            options.level = level;
        }
        if let Some(pages) = self.chunk_pages {
            if !(1..=512).contains(&pages) {
                return Err(format!("chunk_pages: {pages} is not in 1 to 512"));
            }
            options.chunk_pages = pages.into();
        }
        options.dedupe = self.dedupe.unwrap_or(options.dedupe);
        options.threads = self.threads.unwrap_or(options.threads);
        options.existing = if self.force { Existing::Replace } else { Existing::Keep };
        Ok(options)
    }
}

#[derive(Clone, Copy, Default, Deserialize, Serialize)]
pub(super) enum SnapshotType {
    #[default]
    Full,
    Diff,
}

/// The body of `PUT /snapshot/load`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LoadSnapshot {
    #[serde(rename = "type")]
    kind: LoadType,
}

#[derive(Deserialize)]
enum LoadType {
    /// The snapshot that the guest was restored from.
    #[serde(rename = "reset")]
    Reset,
}

/// Whether the guest is paused until the file is complete, or runs meanwhile.
#[derive(Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
pub(super) enum Pausing {
    #[default]
    #[serde(rename = "paused")]
    Paused,
    #[serde(rename = "live")]
    Live,
}

/// The interval of checks whether a client still waits.
const LOOK: Duration = Duration::from_millis(100);

impl Routes {
    /// Answers a request. `stream` shows whether the client still waits for the answer.
    pub(super) fn answer(&self, request: &Request, stream: &UnixStream) -> Response {
        let allowed = match request.path.as_str() {
            "/" | "/vm" | "/stats" => match (request.path.as_str(), request.method.as_str()) {
                ("/stats", "GET") => return self.stats(),
                (_, "GET") => return self.state(),
                ("/vm", "PATCH") => return self.patch(&request.body),
                ("/vm", _) => "GET or PATCH",
                _ => "GET",
            },
            "/snapshot/create" => match request.method.as_str() {
                "PUT" => return self.create(&request.body, stream),
                "DELETE" => return self.cancel(),
                _ => "PUT or DELETE",
            },
            "/snapshot/load" => match request.method.as_str() {
                "PUT" => return self.load(&request.body, stream),
                _ => "PUT",
            },
            path => {
                let message = format!("{path:?} is not here; see docs/api.md");
                return Response::fault(404, message);
            }
        };
        let (method, path) = (&request.method, &request.path);
        Response::fault(405, format!("{method} is not for {path}: {allowed}"))
    }

    fn state(&self) -> Response {
        let facts = &self.facts;
        let body = json!({
            "id": format!("snap-{}", std::process::id()),
            "app_name": "snap",
            "vmm_version": env!("CARGO_PKG_VERSION"),
            "state": self.remote.state(),
            "storing": self.remote.storing(),
            "resetting": self.remote.resetting(),
            "saving": self.remote.saving(),
            "memory_bytes": facts.memory_bytes,
            "vcpus": facts.vcpus,
            "restored_from": facts.restored_from,
        });
        Response { status: 200, body: Some(body) }
    }

    fn stats(&self) -> Response {
        let body = json!({
            "state": self.remote.state(),
            "uptime_ms": crate::millis::ms(self.facts.started.elapsed()),
            "pager": (self.facts.pager)(),
        });
        Response { status: 200, body: Some(body) }
    }

    fn patch(&self, body: &[u8]) -> Response {
        let command = match parse(body) {
            Ok(VmState { state: Wanted::Paused }) => Command::Pause,
            Ok(VmState { state: Wanted::Resumed }) => Command::Resume,
            Err(refused) => return refused,
        };
        answered(self.remote.ask(command).and_then(|answer| answer.recv().unwrap_or(ENDED)))
    }

    fn cancel(&self) -> Response {
        match self.remote.cancel() {
            true => Response { status: 204, body: None },
            false => Response::fault(409, "the guest is not being snapshotted"),
        }
    }

    fn create(&self, body: &[u8], stream: &UnixStream) -> Response {
        let wanted: CreateSnapshot = match parse(body) {
            Ok(wanted) => wanted,
            Err(refused) => return refused,
        };
        if bucket::is_meant(&wanted.snapshot_path) {
            let message = "snapshot_path is an address: snap create URL --vm SOCKET writes to one";
            return Response::fault(400, message);
        }
        if !wanted.snapshot_path.is_absolute() {
            let message = "snapshot_path is relative, and the guest's working folder is not yours";
            return Response::fault(400, message);
        }
        if wanted.stop && wanted.pausing == Pausing::Live {
            return Response::fault(400, "stop: a live snapshot is for a guest that runs on");
        }
        let options = match wanted.options() {
            Ok(options) => options,
            Err(error) => return Response::fault(400, error),
        };
        let checkpoint =
            wanted.checkpoint.clone().map(|fields| fields.checked(&wanted)).transpose();
        let checkpoint = match checkpoint {
            Ok(checkpoint) => checkpoint,
            Err(error) => return Response::fault(400, error),
        };
        // The client may have left while this process was stopped.
        if has_left(stream) {
            return Response::fault(499, "the client has left");
        }
        let cancelled = Arc::new(AtomicBool::new(false));
        let request = StoreRequest {
            out: wanted.snapshot_path,
            changes_only: matches!(wanted.snapshot_type, SnapshotType::Diff),
            live: wanted.pausing == Pausing::Live,
            checkpoint,
            stop: wanted.stop,
            options,
            cancelled: Arc::clone(&cancelled),
        };
        let answer = match self.remote.ask(Command::Store(request)) {
            Ok(answer) => answer,
            Err(error) => return failed(&error),
        };
        let answer = loop {
            match answer.recv_timeout(LOOK) {
                Ok(answer) => break answer,
                Err(RecvTimeoutError::Disconnected) => break ENDED,
                Err(RecvTimeoutError::Timeout) if has_left(stream) => {
                    cancelled.store(true, Ordering::SeqCst);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        };
        answered(answer)
    }

    /// A reset that has begun is not cancelled: the guest would be in neither state.
    fn load(&self, body: &[u8], stream: &UnixStream) -> Response {
        match parse(body) {
            Ok(LoadSnapshot { kind: LoadType::Reset }) => {}
            Err(refused) => return refused,
        }
        if has_left(stream) {
            return Response::fault(499, "the client has left");
        }
        let answer = self.remote.ask(Command::Reset);
        answered(answer.and_then(|answer| answer.recv().unwrap_or(ENDED)))
    }
}

fn answered(answer: Answer) -> Response {
    match answer {
        Ok(Done::Stored(summary)) => Response { status: 200, body: Some(json!(summary)) },
        Ok(Done::Reset(summary)) => Response { status: 200, body: Some(json!(summary)) },
        Ok(Done::Plain) => Response { status: 204, body: None },
        Err(error) => failed(&error),
    }
}

/// The result of a command that got no answer.
const ENDED: Answer = Err(Refused::Ended);

fn failed(error: &Refused) -> Response {
    let status = match error {
        Refused::Busy | Refused::Ended => 409,
        Refused::Unfit(_) => 400,
        Refused::Failed(_) => 500,
    };
    Response::fault(status, error.to_string())
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Response> {
    serde_json::from_slice(body).map_err(|error| Response::fault(400, format!("body: {error}")))
}

/// Whether the client has closed its end. A client that has only finished sending has not.
fn has_left(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&now)).is_ok()
        && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::live::remote;

    fn answer(method: &str, path: &str, body: &str) -> (u16, Value) {
        let (remote, events) = remote();
        // The guest has ended.
        drop(events);
        let facts = Facts {
            memory_bytes: 1 << 20,
            vcpus: 2,
            restored_from: None,
            started: Instant::now(),
            pager: Box::new(|| None),
        };
        let request = Request {
            method: method.into(),
            host: None,
            path: path.into(),
            body: body.into(),
            keep_alive: false,
        };
        let (_client, server) = UnixStream::pair().unwrap();
        let response = Routes { remote, facts }.answer(&request, &server);
        (response.status, response.body.unwrap_or_default())
    }

    #[track_caller]
    fn refused(method: &str, path: &str, body: &str, status: u16, reason: &str) {
        let (found, body) = answer(method, path, body);
        let message = body["fault_message"].as_str().unwrap_or_default().to_owned();
        assert_eq!(found, status, "{body}");
        assert!(message.contains(reason), "{message}");
    }

    #[test]
    fn the_state_is_reported() {
        for path in ["/", "/vm"] {
            let (status, body) = answer("GET", path, "");
            assert_eq!(status, 200);
            assert_eq!((&body["state"], &body["vcpus"]), (&json!("Not started"), &json!(2)));
        }
        assert_eq!(answer("GET", "/stats", "").1["pager"], Value::Null);
    }

    #[test]
    fn a_wrong_request_gets_a_reason() {
        refused("GET", "/nowhere", "", 404, "\"/nowhere\" is not here");
        refused("POST", "/vm", "", 405, "POST is not for /vm: GET or PATCH");
        refused("GET", "/snapshot/create", "", 405, "PUT");
        refused("GET", "/snapshot/load", "", 405, "PUT");
        refused("PUT", "/snapshot/load", "{\"type\":\"fork\"}", 400, "unknown variant `fork`");
        refused("PUT", "/snapshot/load", "{\"type\":\"reset\"}", 409, "the guest has ended");
        refused("PATCH", "/vm", "", 400, "body: EOF");
        refused("PATCH", "/vm", "{\"state\":\"Off\"}", 400, "unknown variant `Off`");
        refused("PATCH", "/vm", "{\"state\":\"Paused\",\"a\":1}", 400, "unknown field `a`");
        refused("PATCH", "/vm", "{\"state\":\"Paused\"}", 409, "the guest has ended");
        let create =
            |body: &str, reason: &str| refused("PUT", "/snapshot/create", body, 400, reason);
        create("{}", "missing field `snapshot_path`");
        create("{\"snapshot_path\":\"a.snap\"}", "snapshot_path is relative");
        create("{\"snapshot_path\":\"/a\",\"mem_file_path\":\"/b\"}", "mem_file_path");
        create("{\"snapshot_path\":\"/a\",\"codec\":\"gzip\"}", "gzip");
        create(
            "{\"snapshot_path\":\"/a\",\"codec\":\"lz4\",\"level\":3}",
            "level: lz4 has no levels",
        );
        create("{\"snapshot_path\":\"/a\",\"level\":99}", "level: 99 is not in -7 to 22");
        create("{\"snapshot_path\":\"/a\",\"chunk_pages\":0}", "chunk_pages: 0 is not in 1 to 512");
        create("{\"snapshot_path\":\"/a\",\"threads\":0}", "0");
    }
}
