//! Push, pull and restore with a server that speaks S3: moto, from PyPI (`pip install 'moto[server]'`).
//!
//! The program `moto_server` is taken from `$SNAP_MOTO`, otherwise from `$PATH`. Without it the tests are skipped; with
//! `SNAP_REQUIRE_MOTO` set, a skip is a failure.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::fake_objects::Fake;
use crate::secrets;
use crate::support::{Ran, SNAP, Sample, end_of, needs_vm, run, signal, skip, snap, start};

const SECRET: &str = "hunter2hunter2hunter2";

struct Moto {
    server: Child,
    address: SocketAddr,
}

impl Drop for Moto {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

impl Moto {
    /// `None`: it is not installed.
    fn start() -> Option<Self> {
        let program = std::env::var_os("SNAP_MOTO").unwrap_or("moto_server".into());
        let free = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = free.local_addr().expect("it has an address");
        drop(free);
        let server = Command::new(&program)
            .args(["-H", "127.0.0.1", "-p", &address.port().to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let server = match server {
            Ok(server) => server,
            Err(error) => {
                assert!(std::env::var_os("SNAP_REQUIRE_MOTO").is_none(), "{program:?}: {error}");
                skip("object_store_s3", &format!("{program:?}: {error}"));
                return None;
            }
        };
        let moto = Self { server, address };
        let started = Instant::now();
        while TcpStream::connect(address).is_err() {
            assert!(started.elapsed() < Duration::from_secs(60), "moto does not listen");
            std::thread::sleep(Duration::from_millis(50));
        }
        moto.request("PUT", "/bucket");
        Some(moto)
    }

    /// The status of the answer.
    fn request(&self, method: &str, path: &str) -> u16 {
        self.request_with(method, path, b"")
    }

    fn request_with(&self, method: &str, path: &str, body: &[u8]) -> u16 {
        let mut stream = TcpStream::connect(self.address).expect("moto listens");
        let head = format!("{method} {path} HTTP/1.1\r\nhost: {}\r\n", self.address);
        let rest = format!("connection: close\r\ncontent-length: {}\r\n\r\n", body.len());
        stream.write_all((head + &rest).as_bytes()).expect("it is sent");
        stream.write_all(body).expect("it is sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("it answers");
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
        status.expect("a status")
    }

    #[track_caller]
    fn snap(&self, cache: &Path, args: &[&str]) -> Ran {
        let ran = run(self.command(cache, args));
        assert!(!ran.stderr.contains(SECRET) && !ran.stdout.contains(SECRET), "{}", ran.stderr);
        ran
    }

    fn command(&self, cache: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(SNAP);
        command
            .args(args)
            .env("SNAP_CACHE", cache)
            .env("AWS_ENDPOINT_URL", format!("http://{}", self.address))
            .env("AWS_ALLOW_HTTP", "true")
            .env("AWS_REGION", "us-east-1")
            .env("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
            .env("AWS_SECRET_ACCESS_KEY", SECRET);
        command
    }
}

#[test]
fn a_guest_goes_into_an_s3_bucket_and_comes_back() {
    needs_vm!();
    let Some(moto) = Moto::start() else { return };
    // More than one part of an upload.
    let sample = Sample::create(&["--memory", "128M", "--work", "32M", "--codec", "raw"]);
    let folder = sample.folder.path();
    let cache = folder.join("cache");
    let snap_s3 = |args: &[&str]| moto.snap(&cache, args);
    let file = sample.file.to_str().unwrap();
    assert!(std::fs::metadata(file).unwrap().len() > 20 << 20);
    let url = "s3://bucket/team/guest";

    snap_s3(&["restore", "--lazy", url]).failed(1, &["there is no such object", url]);
    let pushed = snap_s3(&["push", file, url, "--json"]).ok().json();
    let object = pushed["layers"][0]["url"].as_str().expect("an address");
    assert!(object.starts_with("s3://bucket/team/objects/"), "{object}");
    snap_s3(&["push", file, url]).ok();
    let other = Sample::small();
    let other = other.file.to_str().unwrap();
    snap_s3(&["push", other, url]).failed(1, &["the name is taken", url]);
    snap_s3(&["push", other, url, "--force"]).ok();
    snap_s3(&["push", file, url, "--force"]).ok();

    let end = ["--beats", "4", "--report", "none"];
    let of_file = snap([&["restore", file], &end[..]].concat()).ok().stdout;
    for address in [url, object] {
        let args = [&["restore", "--lazy", address], &end[..]].concat();
        assert_eq!(snap_s3(&args).ok().stdout, of_file);
    }
    let out = folder.join("pulled.snap");
    snap_s3(&["pull", url, out.to_str().unwrap()]).ok();
    assert!(std::fs::read(&out).unwrap() == std::fs::read(file).unwrap());

    // A layer has the address of its parent, and no credentials.
    let layer = folder.join("layer.snap");
    let from = ["create", layer.to_str().unwrap(), "--from", url, "--when", "output:beat 7"];
    snap_s3(&from).ok();
    snap_s3(&["push", layer.to_str().unwrap(), "s3://bucket/team/layer"]).ok();
    secrets::not_in_folder(folder, &[SECRET]);

    for args in
        [&["info", "s3://none/a"][..], &["push", file, "s3://none/a"], &["create", "s3://none/a"]]
    {
        snap_s3(args).failed(1, &["s3://none/a: there is no such bucket"]);
    }

    // A cached block of an object that is gone: the name of the object is told.
    let path = object.strip_prefix("s3:/").expect("its scheme");
    assert_eq!(moto.request("DELETE", path), 204);
    snap_s3(&["verify", object]).failed(1, &["there is no such object", object]);
}

#[test]
fn a_guest_survives_that_its_object_is_replaced_or_deleted_in_a_bucket_with_versions() {
    needs_vm!();
    let Some(moto) = Moto::start() else { return };
    let rule = "<VersioningConfiguration xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">\
                <Status>Enabled</Status></VersioningConfiguration>";
    moto.request("PUT", "/versions");
    assert_eq!(moto.request_with("PUT", "/versions?versioning", rule.as_bytes()), 200);
    // It touches little in each beat, so that most of it is fetched later, for the hash.
    let how = ["--memory", "128M", "--work", "32M", "--walk", "1", "--codec", "raw"];
    let sample = Sample::create(&how);
    let folder = sample.folder.path();
    let file = sample.file.to_str().unwrap();
    let of_file = snap(["restore", file, "--beats", "6", "--hash", "--report", "none"]).ok().stdout;
    let snap_s3 = |args: &[&str]| moto.snap(&folder.join("cache"), args);
    for (bucket, method) in [("bucket", "PUT"), ("versions", "PUT"), ("versions", "DELETE")] {
        let url = format!("s3://{bucket}/{method}/guest");
        let pushed = snap_s3(&["push", file, &url, "--json"]).ok().json();
        let object = pushed["layers"][0]["url"].as_str().expect("an address");
        let args = ["restore", "--lazy", "--populate", "off", object, "--beats", "6", "--hash"];
        let args = [&args[..], &["--report", "none"]].concat();
        let mut guest = start(moto.command(&folder.join("cache"), &args));
        let mut stdout = BufReader::new(guest.stdout.take().expect("a pipe"));
        let mut said = String::new();
        stdout.read_line(&mut said).expect("it says something");
        signal(guest.id(), "STOP");
        secrets::not_in_proc(guest.id(), &[SECRET]);
        let path = object.strip_prefix("s3:/").expect("its scheme");
        assert!((200..300).contains(&moto.request_with(method, path, b"another object")));
        signal(guest.id(), "CONT");
        stdout.read_to_string(&mut said).expect("text");
        let ran = Ran::from(end_of(guest));
        if bucket == "bucket" {
            // So it needed pages after that.
            ran.failed(5, &["the object was replaced while it was read", object]);
            continue;
        }
        ran.ok();
        assert_eq!(said, of_file);
        // A restore uses what is cached of an object with an id in its key. A verification asks for the present one.
        let code = if method == "DELETE" { 1 } else { 3 };
        snap_s3(&["verify", object]).failed(code, &[object]);
    }
}

#[test]
fn a_host_without_credentials_is_told_from_a_missing_object() {
    let folder = tempfile::tempdir().expect("a folder");
    let info = |metadata: &str| {
        let mut command = Command::new(SNAP);
        command
            .args(["info", "s3://bucket/guest"])
            .env("SNAP_CACHE", folder.path())
            .env("AWS_METADATA_ENDPOINT", metadata)
            .env("AWS_REGION", "us-east-1")
            .env_remove("AWS_ACCESS_KEY_ID")
            .env_remove("AWS_SECRET_ACCESS_KEY");
        run(command).failed(1, &["s3://bucket/guest: the environment has no credentials"])
    };
    let started = Instant::now();
    // Nothing listens there.
    let refused = info("http://127.0.0.1:9");
    assert!(refused.stderr.contains("cannot connect to the metadata service"));
    let fake = Fake::start(Duration::ZERO);
    let none = info(&fake.url(""));
    assert!(none.stderr.contains("HTTP 404"), "{}", none.stderr);
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[test]
fn what_the_environment_lacks_is_said() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = Command::new(SNAP);
    command
        .args(["info", "s3://bucket/guest"])
        .env("SNAP_CACHE", folder.path())
        // Nothing listens there.
        .env("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        .env("AWS_SECRET_ACCESS_KEY", SECRET)
        .env("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
        .env_remove("AWS_ALLOW_HTTP");
    let ran = run(command).failed(1, &["s3://bucket/guest", "AWS_ALLOW_HTTP=true"]);
    assert!(!ran.stderr.contains(SECRET), "{}", ran.stderr);
}

/// The same for a store whose endpoint is in a file. The request is not repeated until the patience ends.
#[test]
fn plain_http_of_google_cloud_storage_is_refused_unless_it_is_allowed() {
    let folder = tempfile::tempdir().expect("a folder");
    let fake = Fake::start(Duration::ZERO);
    let account = folder.path().join("account.json");
    let text = serde_json::json!({
        "gcs_base_url": fake.url(""), "disable_oauth": true,
        "client_email": "", "private_key": "", "private_key_id": "",
    });
    std::fs::write(&account, text.to_string()).expect("it is written");
    let info = |allow: &str| {
        let mut command = Command::new(SNAP);
        command
            .args(["info", "gs://bucket/guest"])
            .env("SNAP_CACHE", folder.path())
            .env("GOOGLE_SERVICE_ACCOUNT", &account)
            .env("GOOGLE_ALLOW_HTTP", allow);
        run(command)
    };
    let started = Instant::now();
    info("false").failed(1, &["gs://bucket/guest", "GOOGLE_ALLOW_HTTP=true"]);
    assert!(started.elapsed() < Duration::from_secs(10));
    assert!(fake.take_received().is_empty());
    info("true").failed(1, &["gs://bucket/guest", "there is no such object"]);
    assert!(!fake.take_received().is_empty());
}
