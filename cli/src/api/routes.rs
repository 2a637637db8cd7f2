//! The requests of the control socket, and their paths.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::bodies::{
    CreateSnapshot, DeferredPages, LoadSnapshot, LoadType, Pausing, SnapshotType, VmState, Wanted,
};
use super::response::Response;
use crate::bucket;
use crate::http::Request;
use crate::live::{AddError, Answer, Command, Done, Refused, Remote, StoreRequest};

/// Constant facts about the guest, and its figures.
pub(crate) struct Facts {
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: usize,
    pub(crate) restored_from: Option<PathBuf>,
    /// Whether the files that are written of it are sealed.
    pub(crate) sealed: bool,
    /// Whether clients may name files to be written.
    pub(crate) names_files: bool,
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
            "/snapshot/pages" => match request.method.as_str() {
                "PUT" => {
                    return pages(&request.body, |wanted| {
                        self.remote.added(&wanted.id, wanted.page, &|| has_left(stream))
                    });
                }
                "DELETE" => {
                    return pages(&request.body, |wanted| {
                        self.remote.cancel_adding(&wanted.id, &|| has_left(stream))
                    });
                }
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
            "sealed": facts.sealed,
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
        if !self.facts.names_files {
            let message = "the guest's snap runs with --jail strict and has no folder for files: start it with --chroot DIR, \
                           and the file is written in DIR";
            return Response::fault(400, message);
        }
        if !wanted.snapshot_path.is_absolute() {
            let message = "snapshot_path is relative, and the guest's working folder is not yours";
            return Response::fault(400, message);
        }
        if wanted.stop && wanted.pausing == Pausing::Live {
            return Response::fault(400, "stop: a live snapshot is for a guest that runs on");
        }
        if wanted.deferred && !wanted.can_be_deferred() {
            let message = "deferred: for a snapshot with the type \"live\", and without a snapshot_type or checkpoint";
            return Response::fault(400, message);
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
            deferred: wanted.deferred,
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

/// Something about the memory of a file that was deferred.
fn pages(body: &[u8], what: impl Fn(&DeferredPages) -> Result<(), AddError>) -> Response {
    let wanted = match parse(body) {
        Ok(wanted) => wanted,
        Err(refused) => return refused,
    };
    let Err(error) = what(&wanted) else { return Response { status: 204, body: None } };
    let status = match &error {
        AddError::Unknown => 409,
        AddError::Left => 499,
        AddError::Failed(_) => 500,
    };
    Response::fault(status, error.to_string())
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
            sealed: true,
            names_files: true,
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
            assert_eq!((&body["restored_from"], &body["sealed"]), (&Value::Null, &json!(true)));
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
        refused("GET", "/snapshot/pages", "", 405, "PUT");
        refused("PUT", "/snapshot/pages", "{}", 400, "missing field `id`");
        refused("PUT", "/snapshot/pages", "{\"id\":\"a\",\"page\":-1}", 400, "body: invalid value");
        refused("PUT", "/snapshot/pages", "{\"id\":\"a\",\"page\":1}", 409, "with this id");
        refused("PUT", "/snapshot/pages", "{\"id\":\"a\"}", 409, "with this id");
        refused("DELETE", "/snapshot/pages", "{\"id\":\"a\"}", 409, "with this id");
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
        create(
            "{\"snapshot_path\":\"/a\",\"deferred\":true}",
            "deferred: for a snapshot with the type",
        );
        create("{\"snapshot_path\":\"/a\",\"level\":99}", "level: 99 is not in -7 to 22");
        create("{\"snapshot_path\":\"/a\",\"chunk_pages\":0}", "chunk_pages: 0 is not in 1 to 512");
        create("{\"snapshot_path\":\"/a\",\"threads\":0}", "0");
    }
}
