//! Snapshots in object storage: read and restored by their address, pushed, pulled, and cached.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::fake_objects::{Fake, Fate, times_sent, whole_times_sent};
use crate::support::{
    Ran, SNAP, Sample, end_of, needs_vm, run, signal, snap, start, wait_for_handlers,
};

const KEY: &str = "/bucket/guest.snap";

/// `snap` with a cache of its own.
fn with_cache(cache: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(SNAP);
    command.args(args).env("SNAP_CACHE", cache);
    command
}

struct Served {
    sample: Sample,
    fake: Fake,
    url: String,
    cache: TempDir,
}

impl Served {
    fn start(latency: Duration) -> Self {
        let sample = Sample::small();
        let fake = Fake::start(latency);
        fake.put(KEY, std::fs::read(&sample.file).expect("the snapshot is there"));
        let url = fake.url(KEY);
        Self { sample, fake, url, cache: tempfile::tempdir().expect("a folder") }
    }

    fn file(&self) -> &str {
        self.sample.file.to_str().expect("UTF-8")
    }

    #[track_caller]
    fn snap(&self, args: &[&str]) -> Ran {
        run(with_cache(self.cache.path(), args))
    }
}

#[test]
fn a_guest_is_restored_from_a_server_as_from_a_file() {
    needs_vm!();
    let served = Served::start(Duration::from_millis(5));
    for how in [&["--lazy"][..], &[], &["--lazy", "--prefetch", "all"]] {
        let restore = |what: &str| {
            let args = [&["restore", what, "--beats", "5", "--report", "json"], how].concat();
            served.snap(&args).ok()
        };
        let (of_file, of_url) = (restore(served.file()), restore(&served.url));
        assert_eq!(of_url.stdout, of_file.stdout);
        assert!(of_url.stdout.contains("beat"), "{}", of_url.stdout);
    }
    let received = served.fake.take_received();
    assert!(times_sent(&received, KEY).values().all(|times| *times <= 2), "{received:?}");
}

#[test]
fn what_looks_into_a_file_looks_into_an_object() {
    needs_vm!();
    let served = Served::start(Duration::ZERO);
    let same = |args: &[&str]| {
        let with = |what: &str| {
            let args: Vec<_> =
                args.iter().map(|arg| if *arg == "WHAT" { what } else { arg }).collect();
            served.snap(&args).ok().stdout.replace(what, "WHAT")
        };
        assert_eq!(with(&served.url), with(served.file()), "{args:?}");
    };
    same(&["info", "WHAT", "--json"]);
    same(&["verify", "WHAT", "--json"]);
    same(&["cat", "WHAT", "--gpa", "0x100000", "--len", "4096"]);
    same(&["pages", "WHAT"]);
    same(&["diff", "WHAT", served.file(), "--json"]);
    let listed = served.snap(&["cache", "ls", "--json"]).ok().json();
    assert_eq!(listed["objects"][0]["url"], served.url.as_str());
    assert_eq!(listed["objects"][0]["in_use"], false);
    let listed = served.snap(&["cache", "ls"]).ok().stdout;
    assert!(listed.contains(&served.url), "{listed}");
    served.snap(&["cache", "prune"]).ok();
    // The file of locks stays.
    assert_eq!(crate::support::names(served.cache.path()), ["turns"]);
}

#[test]
fn two_processes_with_one_cache_fetch_each_block_once_also_if_one_is_killed() {
    needs_vm!();
    let served = Served::start(Duration::from_millis(10));
    let verify = || start(with_cache(served.cache.path(), &["verify", &served.url]));
    let both = [verify(), verify()];
    for child in both {
        Ran::from(crate::support::end_of(child)).ok();
    }
    let received = served.fake.take_received();
    let len = std::fs::metadata(served.file()).expect("it is there").len();
    let times = whole_times_sent(&received, KEY, len);
    // Without a length from a name, both of the first two answers may contain all of a short object.
    let most = if len < 9 << 18 { 2 } else { 1 };
    assert!(times.values().all(|times| *times <= most), "{len} bytes: {received:?}");

    served.snap(&["cache", "prune"]).ok();
    let fake = served.fake.clone();
    fake.decide(|_, received| match received.range.start {
        0 => Fate::Answer,
        _ => Fate::Late(Duration::from_millis(300)),
    });
    let killed = verify();
    std::thread::sleep(Duration::from_millis(500));
    signal(killed.id(), "KILL");
    crate::support::end_of(killed);
    fake.decide(|_, _| Fate::Answer);
    served.snap(&["verify", &served.url]).ok();
}

#[test]
fn a_page_server_serves_an_object() {
    needs_vm!();
    let served = Served::start(Duration::ZERO);
    let socket = served.sample.folder.path().join("pages.sock");
    let socket = socket.to_str().expect("UTF-8");
    let serve = ["serve", &served.url, "--listen", socket];
    let mut server = start(with_cache(served.cache.path(), &serve));
    let mut stderr = BufReader::new(server.stderr.take().expect("a pipe")).lines();
    let first = stderr.next().expect("it says something").expect("text");
    assert!(first.starts_with("serving ") && first.contains(&served.url), "{first}");
    let args = ["restore", "--lazy", &served.url, "--share", socket, "--beats", "3"];
    let ran = served.snap(&[&args[..], &["--report", "none"]].concat()).ok();
    signal(server.id(), "INT");
    let of_file = snap(["restore", served.file(), "--beats", "3", "--report", "none"]).ok();
    assert_eq!(ran.stdout, of_file.stdout);
    // What it says is read to the end, so that it can end.
    stderr.by_ref().for_each(drop);
    crate::support::end_of(server);
}

#[test]
fn an_object_that_is_deleted_or_replaced_stops_its_guest_with_its_name() {
    needs_vm!();
    for replaced in [false, true] {
        let served = Served::start(Duration::ZERO);
        let fake = served.fake.clone();
        // After what opening reads, when the guest runs.
        let after_opening = AtomicUsize::new(0);
        let bytes = std::fs::read(served.file()).expect("it is there");
        served.fake.decide(move |number, _| {
            if number >= 2 && after_opening.fetch_add(1, Ordering::SeqCst) == 0 {
                match replaced {
                    true => fake.put(KEY, bytes.clone()),
                    false => fake.remove(KEY),
                }
                // The client asks again.
                return Fate::Reset;
            }
            Fate::Answer
        });
        let args = ["restore", "--lazy", &served.url, "--beats", "200", "--hash"];
        let said = match replaced {
            true => "the object was replaced while it was read: ETag \"etag-0\" then",
            false => "there is no such object",
        };
        served.snap(&args).failed(5, &[said, &served.url]);
    }
}

#[test]
fn a_guest_waits_out_a_short_outage() {
    needs_vm!();
    let served = Served::start(Duration::ZERO);
    served.fake.decide(|number, _| match number {
        2..8 => Fate::Status(503, "SlowDown"),
        _ => Fate::Answer,
    });
    let args = ["restore", "--lazy", &served.url, "--beats", "3", "--hash", "--report", "none"];
    let ran = served.snap(&args).ok();
    let of_file = snap(["restore", served.file(), "--beats", "3", "--report", "none"]).ok();
    assert_eq!(ran.stdout, of_file.stdout);
}

#[test]
fn a_pushed_guest_is_restored_by_its_name_and_pulled_bit_by_bit() {
    needs_vm!();
    let sample = Sample::small();
    let folder = sample.folder.path();
    let cache = folder.join("cache");
    let url = format!("file://{}/bucket/team/guest", folder.display());
    let layer = folder.join("layer.snap");
    let (file, layer) = (sample.file.to_str().unwrap(), layer.to_str().unwrap());
    snap(["create", layer, "--from", file, "--when", "output:beat 7"]).ok();
    let pushed = run(with_cache(&cache, &["push", layer, &url, "--json"])).ok().json();
    assert_eq!(pushed["layers"].as_array().map(Vec::len), Some(2), "{pushed}");
    let again = run(with_cache(&cache, &["push", layer, &url])).ok();
    assert!(again.stdout.contains("0 of 2 files sent"), "{}", again.stdout);
    run(with_cache(&cache, &["push", file, &url])).failed(1, &["the name is taken", &url]);

    let restore = |what: &str| {
        let args = ["restore", "--lazy", what, "--beats", "4", "--report", "none"];
        run(with_cache(&cache, &args)).ok().stdout
    };
    assert_eq!(restore(&url), restore(layer));

    // The same layer onto the object, by its name.
    let rebased = folder.join("rebased.snap");
    let rebased = rebased.to_str().unwrap();
    let base = format!("{url}-base");
    run(with_cache(&cache, &["push", file, &base])).ok();
    run(with_cache(&cache, &["rebase", layer, "--onto", &base, "-o", rebased])).ok();
    run(with_cache(&cache, &["push", rebased, &format!("{url}-rebased")])).ok();
    assert_eq!(restore(&format!("{url}-rebased")), restore(layer));

    // A layer on what is only in the bucket.
    let (second, third) = (folder.join("second.snap"), format!("{url}-3"));
    let second = second.to_str().unwrap();
    let from = ["create", second, "--from", &url, "--when", "output:beat 9"];
    run(with_cache(&cache, &from)).ok();
    run(with_cache(&cache, &["info", second])).failed(3, &["parent", "is missing"]);
    let pushed = run(with_cache(&cache, &["push", second, &third])).ok();
    assert!(pushed.stdout.contains("1 of 3 files sent"), "{}", pushed.stdout);
    assert!(restore(&third).contains("beat 10 "), "{}", restore(&third));

    // By its id, it is restored from the cache also when it was deleted; `verify` looks into the bucket.
    let id = snap(["info", layer, "--json"]).ok().json()["id"].as_str().unwrap().to_owned();
    let key = folder.join(format!("bucket/team/objects/{id}.snap"));
    let by_id = format!("file://{}", key.display());
    let (hidden, of_layer) = (folder.join("hidden"), restore(layer));
    assert_eq!(restore(&by_id), of_layer);
    run(with_cache(&cache, &["verify", &by_id])).ok();
    std::fs::rename(&key, &hidden).unwrap();
    assert_eq!(restore(&by_id), of_layer);
    let gone = ["no such object", &*by_id];
    run(with_cache(&cache, &["verify", &by_id])).failed(1, &gone);
    std::fs::rename(&hidden, &key).unwrap();

    let out = folder.join("pulled/top.snap");
    std::fs::create_dir(folder.join("pulled")).unwrap();
    let args = ["pull", &url, out.to_str().unwrap()];
    run(with_cache(&cache, &args)).ok();
    let same = |a: &Path, b: &str| assert!(std::fs::read(a).unwrap() == std::fs::read(b).unwrap());
    same(&out, layer);
    same(&folder.join("pulled/guest.snap"), file);
    run(with_cache(&cache, &args)).failed(1, &["exists"]);
}

#[test]
fn wrong_addresses_are_refused_without_repeating_their_secrets() {
    let folder = tempfile::tempdir().expect("a folder");
    for (url, says) in [
        ("https://user:hunter2@host/a.snap", "credentials are not given in an address"),
        ("https://host/a.snap?X-Amz-Signature=hunter2", "signed URLs are not supported"),
        ("s3://bucket", "no bucket or host"),
        ("s3://bucket/", "no key"),
    ] {
        let ran = run(with_cache(folder.path(), &["info", url])).failed(1, &[says]);
        assert!(!ran.stderr.contains("hunter2"), "{}", ran.stderr);
    }
    // An output with a secret is not repeated, either.
    let address = "s3://bucket/hunter2";
    for args in [
        ["flatten", "a.snap", "-o", address],
        ["rebase", "a.snap", "--onto=b.snap", &format!("--out={address}")],
        ["import", "a.mem", "-o", address],
        ["pull", "s3://bucket/a", address, "--force"],
    ] {
        let ran = run(with_cache(folder.path(), &args));
        let ran = ran.failed(1, &["only snap create and snap push write"]);
        assert!(!ran.stderr.contains("hunter2"), "{}", ran.stderr);
    }
    run(with_cache(folder.path(), &["info", "S3://bucket/hunter2"]))
        .failed(1, &["an address begins with s3://"]);
    let with_parent = ["info", "s3://bucket/a", "--parent", "b.snap"];
    run(with_cache(folder.path(), &with_parent)).failed(1, &["in the same bucket"]);
}

#[test]
fn a_guest_is_snapshotted_straight_into_a_bucket_also_while_it_runs_and_as_a_layer() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a folder");
    let cache = folder.path().join("cache");
    let snap_in = |args: &[&str]| run(with_cache(&cache, args));
    let bucket = format!("file://{}/bucket", folder.path().display());
    let (base, layer) = (format!("{bucket}/base"), format!("{bucket}/layer"));
    let how = ["--memory", "16M", "--work", "4M", "--json"];
    let created = snap_in(&[&["create", &base], &how[..]].concat()).ok().json();
    assert_eq!(created["file"], base.as_str());
    let beats = |what: &str, number: &str| {
        snap_in(&["restore", "--lazy", what, "--beats", number, "--report", "none"]).ok().stdout
    };
    assert!(beats(&base, "3").contains("beat 3 "));
    snap_in(&[&["create", &base], &how[..]].concat()).failed(1, &["the name is taken", &base]);
    snap_in(&["create", "http://127.0.0.1:9/a"]).failed(1, &["not pushed to an HTTP server"]);

    let from = ["create", &layer, "--from", &base, "--when", "output:beat 5", "--json"];
    let elsewhere = from.map(|arg| if arg == layer { "file:///none/other/layer" } else { arg });
    snap_in(&elsewhere).failed(1, &["a parent is in another bucket", "pull it first"]);
    // The cache has all that is read to open the base, but its layer could not be restored elsewhere.
    let objects = folder.path().join("bucket/objects");
    let hidden = folder.path().join("hidden");
    std::fs::rename(&objects, &hidden).expect("it is there");
    snap_in(&from).failed(1, &["there is no such object", "/objects/"]);
    std::fs::rename(&hidden, &objects).expect("it is there");
    let created = snap_in(&from).ok().json();
    assert!(created["parent_id"].is_string(), "{created}");
    assert!(beats(&layer, "3").contains("beat 8 "));

    let socket = folder.path().join("vm.sock");
    let socket = socket.to_str().expect("UTF-8");
    let args = ["restore", "--lazy", &base, "--api", socket, "--report", "none"];
    let guest = start(with_cache(&cache, &args));
    let waiting = Instant::now();
    while !Path::new(socket).exists() {
        assert!(waiting.elapsed() < Duration::from_secs(30), "there is no socket");
        std::thread::sleep(Duration::from_millis(20));
    }
    for (name, more) in [("whole", &["--stop"][..]), ("changes", &["--diff"][..])].iter().rev() {
        let url = format!("{bucket}/{name}");
        snap_in(&[&["create", &url, "--vm", socket], *more].concat()).ok();
        assert!(beats(&url, "2").contains("beat "));
    }
    end_of(guest);
    // Nothing is left of the files that were pushed.
    let left: Vec<_> = std::fs::read_dir(&cache).expect("it is there").flatten().collect();
    assert!(left.iter().all(|entry| entry.path().is_file()), "{left:?}");
}

#[test]
fn an_interrupted_snapshot_into_a_bucket_leaves_no_name_and_no_file() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a folder");
    let cache = folder.path().join("cache");
    // This guest is never ready.
    let url = format!("file://{}/bucket/guest", folder.path().display());
    let args = ["create", &url, "--memory", "16M", "--work", "4M", "--when", "output:no such text"];
    let child = start(with_cache(&cache, &args));
    wait_for_handlers(child.id());
    std::thread::sleep(Duration::from_millis(1500));
    signal(child.id(), "INT");
    Ran::from(end_of(child)).failed(130, &["interrupted"]);
    assert!(!folder.path().join("bucket").exists());
    assert_eq!(std::fs::read_dir(&cache).expect("it is there").count(), 0);
}

#[test]
fn the_snapshot_of_an_ended_guest_is_kept_if_its_push_fails() {
    needs_vm!();
    let sample = Sample::small();
    let folder = sample.folder.path();
    let (cache, socket) = (folder.join("cache"), folder.join("vm.sock"));
    let socket = socket.to_str().expect("UTF-8");
    let file = sample.file.to_str().expect("UTF-8");
    let guest = start(with_cache(&cache, &["restore", file, "--api", socket, "--report", "none"]));
    let waiting = Instant::now();
    while !Path::new(socket).exists() {
        assert!(waiting.elapsed() < Duration::from_secs(30), "there is no socket");
        std::thread::sleep(Duration::from_millis(20));
    }
    let fake = Fake::start(Duration::ZERO);
    fake.decide(|_, request| match request.method.as_str() {
        "GET" | "HEAD" => Fate::Answer,
        _ => Fate::Status(403, "AccessDenied"),
    });
    for (more, is_kept) in [(&[][..], false), (&["--stop"], true)] {
        let args = [&["create", "s3://bucket/name", "--vm", socket], more].concat();
        let mut command = with_cache(&cache, &args);
        command.envs([
            ("AWS_ENDPOINT_URL", &*fake.url("")),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_ACCESS_KEY_ID", "hunter2key"),
            ("AWS_SECRET_ACCESS_KEY", "hunter2secret"),
            ("AWS_REGION", "us-east-1"),
        ]);
        let ran = run(command).failed(1, &["access is denied (HTTP 403)"]);
        let kept = ran.stderr.split_once("the guest's snapshot is in ");
        assert_eq!(kept.is_some(), is_kept, "{}", ran.stderr);
        if let Some((_, kept)) = kept {
            let (kept, _) = kept.split_once(',').expect("more text");
            snap(["verify", kept]).ok();
        }
        let folders = std::fs::read_dir(&cache).expect("it is there").flatten();
        let folders = folders.filter(|entry| entry.path().is_dir()).count();
        assert_eq!(folders, usize::from(is_kept));
    }
    end_of(guest);
}

/// An untrusted layer, with an address for its parent.
#[test]
fn the_address_of_a_parent_is_followed_only_with_the_option() {
    needs_vm!();
    let served = Served::start(Duration::ZERO);
    let folder = served.sample.folder.path().join("layers");
    std::fs::create_dir(&folder).expect("it is made");
    let layer = folder.join("layer.snap");
    let layer = layer.to_str().expect("UTF-8");
    served.snap(&["create", layer, "--from", &served.url, "--when", "output:beat 5"]).ok();
    served.fake.take_received();
    let option = "--allow-parents-from";
    served.snap(&["info", layer]).failed(3, &[option, &served.url]);
    served.snap(&["info", layer, option, "https://other.example"]).failed(1, &[option]);
    assert!(served.fake.take_received().is_empty());
    let args = ["restore", layer, option, &served.url, "--beats", "2", "--report", "none"];
    assert!(served.snap(&args).ok().stdout.contains("beat 7 "));

    let other = Fake::start(Duration::ZERO);
    other.put("/layers/top.snap", std::fs::read(layer).expect("it is there"));
    let url = other.url("/layers/top.snap");
    served.snap(&["verify", &url]).failed(1, &[option, &served.url]);
    served.snap(&["verify", &url, option, &served.url]).ok();
    let out = folder.join("pulled/top.snap");
    std::fs::create_dir(folder.join("pulled")).expect("it is made");
    let out = out.to_str().expect("UTF-8");
    served.snap(&["pull", &url, out]).failed(1, &[option]);
    served.snap(&["pull", &url, out, option, &served.url]).ok();
    // The parent is beside it now.
    served.snap(&["verify", out]).ok();
}

/// A server that takes connections and sends nothing.
#[test]
fn a_push_and_a_pull_from_a_silent_server_are_reported_and_interrupted() {
    needs_vm!();
    let sample = Sample::small();
    let server = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let endpoint = format!("http://{}", server.local_addr().expect("it has an address"));
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("out.snap");
    let (file, out_text) = (sample.file.to_string_lossy(), out.to_string_lossy());
    for args in [["push", &file, "s3://bucket/name"], ["pull", "s3://bucket/name", &out_text]] {
        let mut command = with_cache(&folder.path().join("cache"), &args);
        command.envs([
            ("AWS_ENDPOINT_URL", &*endpoint),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_ACCESS_KEY_ID", "hunter2key"),
            ("AWS_SECRET_ACCESS_KEY", "hunter2secret"),
            ("AWS_REGION", "us-east-1"),
        ]);
        let child = start(command);
        wait_for_handlers(child.id());
        std::thread::sleep(Duration::from_millis(1500));
        let interrupted = Instant::now();
        signal(child.id(), "INT");
        let ran = Ran::from(end_of(child));
        // Less than the five seconds after which the process would be ended from outside.
        assert!(interrupted.elapsed() < Duration::from_secs(4), "{args:?}: {}", ran.stderr);
        assert!(!ran.stderr.contains("hunter2"), "{}", ran.stderr);
        ran.failed(130, &["waiting for the server", "interrupted"]);
        assert!(!out.exists());
    }
}
