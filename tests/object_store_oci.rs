//! Push, pull and restore with a real registry: Debian's `docker-registry`.
//!
//! The program is taken from `$SNAP_REGISTRY`, otherwise from `$PATH`. Without it the tests are skipped; with
//! `SNAP_REQUIRE_REGISTRY` set, a skip is a failure.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::secrets;
use crate::support::{Ran, SNAP, Sample, end_of, needs_vm, run, signal, skip, snap, start};

const PASSWORD: &str = "hunter2hunter2";
/// `snap:hunter2hunter2` in base 64, as docker's file has it, and with the password's bcrypt hash.
const AUTH: &str = "c25hcDpodW50ZXIyaHVudGVyMg==";
const HTPASSWD: &str = "snap:$2b$04$ZEPNnF/wJq/lmQLEY/01oeJb34ZvpS/e07G/50qE0e75VgL/NIyIi\n";

/// A registry that only one user may read and write.
struct Registry {
    server: Child,
    address: SocketAddr,
    folder: TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

impl Registry {
    /// `None`: it is not installed.
    fn start() -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        let free = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = free.local_addr().expect("it has an address");
        drop(free);
        let config = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {address}\nauth:\n  htpasswd:\n    realm: registry\n    path: {}\n",
            path("data").display(),
            path("htpasswd").display()
        );
        fs::write(path("config.yml"), config).expect("it is written");
        fs::write(path("htpasswd"), HTPASSWD).expect("it is written");
        fs::create_dir(path("docker")).expect("it is made");
        let login = format!(r#"{{"auths":{{"{address}":{{"auth":"{AUTH}"}}}}}}"#);
        fs::write(path("docker/config.json"), login).expect("it is written");
        let program = std::env::var_os("SNAP_REGISTRY").unwrap_or("docker-registry".into());
        let server = Command::new(&program)
            .arg("serve")
            .arg(path("config.yml"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let server = match server {
            Ok(server) => server,
            Err(error) => {
                let required = std::env::var_os("SNAP_REQUIRE_REGISTRY").is_some();
                assert!(!required, "{program:?}: {error}");
                skip("object_store_oci", &format!("{program:?}: {error}"));
                return None;
            }
        };
        let registry = Self { server, address, folder };
        let started = Instant::now();
        while TcpStream::connect(address).is_err() {
            assert!(started.elapsed() < Duration::from_secs(60), "the registry does not listen");
            std::thread::sleep(Duration::from_millis(50));
        }
        Some(registry)
    }

    fn url(&self, reference: &str) -> String {
        format!("oci://{}/{reference}", self.address)
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(SNAP);
        command
            .args(args)
            .env("SNAP_CACHE", self.cache())
            .env("DOCKER_CONFIG", self.folder.path().join("docker"));
        command
    }

    #[track_caller]
    fn snap(&self, args: &[&str]) -> Ran {
        let ran = run(self.command(args));
        for secret in [PASSWORD, AUTH] {
            assert!(!ran.stderr.contains(secret) && !ran.stdout.contains(secret), "{}", ran.stderr);
        }
        ran
    }
}

#[test]
fn a_guest_goes_into_a_registry_and_comes_back() {
    needs_vm!();
    let Some(registry) = Registry::start() else { return };
    let sample = Sample::create(&["--memory", "128M", "--work", "32M", "--codec", "raw"]);
    let folder = sample.folder.path();
    let file = sample.file.to_str().unwrap();
    let layer = folder.join("layer.snap");
    let layer = layer.to_str().unwrap();
    snap(["create", layer, "--from", file, "--when", "output:beat 7"]).ok();
    let url = registry.url("team/guest:v1");

    registry.snap(&["restore", "--lazy", &url]).failed(1, &["there is no such object", &url]);
    let pushed = registry.snap(&["push", layer, &url, "--json"]).ok().json();
    assert_eq!(pushed["layers"].as_array().map(Vec::len), Some(2));
    let blob = pushed["layers"][1]["url"].as_str().expect("an address").to_owned();
    assert!(blob.contains("/team/guest@sha256:"), "{blob}");
    let again = registry.snap(&["push", layer, &url, "--json"]).ok().json();
    assert_eq!(again["layers"][0]["was_there"], true);
    registry.snap(&["push", file, &url]).failed(1, &["the name is taken", &url]);

    let end = ["--beats", "9", "--report", "none"];
    let of_file = snap([&["restore", layer], &end[..]].concat()).ok().stdout;
    for how in [&["--lazy"][..], &[]] {
        let args = [&["restore", &url], &end[..], how].concat();
        assert_eq!(registry.snap(&args).ok().stdout, of_file);
    }
    registry.snap(&["verify", &url]).ok();
    let info = registry.snap(&["info", &blob, "--json"]).ok().stdout;
    assert_eq!(info.replace(&blob, file), snap(["info", file, "--json"]).ok().stdout);
    // A layer on what is only in the registry, and another that is created there.
    let (third, fourth) = (folder.join("third.snap"), registry.url("team/guest:v4"));
    let third = third.to_str().unwrap();
    registry.snap(&["create", third, "--from", &url, "--when", "output:beat 9"]).ok();
    let pushed = registry.snap(&["push", third, &registry.url("team/guest:v3"), "--json"]);
    let pushed = pushed.ok().json();
    let was_there = |number: usize| pushed["layers"][number]["was_there"].as_bool();
    assert_eq!([0, 1, 2].map(was_there), [Some(false), Some(true), Some(true)], "{pushed}");
    let other = registry.url("other/guest:v1");
    registry.snap(&["push", third, &other]).failed(1, &["pull it with snap pull"]);
    registry.snap(&["create", &fourth, "--from", &url, "--when", "output:beat 11"]).ok();
    registry.snap(&["verify", &fourth]).ok();

    let out = folder.join("pulled/layer.snap");
    fs::create_dir(folder.join("pulled")).unwrap();
    registry.snap(&["pull", &url, out.to_str().unwrap()]).ok();
    assert!(fs::read(&out).unwrap() == fs::read(layer).unwrap());
    assert!(fs::read(folder.join("pulled/guest.snap")).unwrap() == fs::read(file).unwrap());
    secrets::not_in_folder(&registry.cache(), &[PASSWORD, AUTH]);
    secrets::not_in_folder(folder, &[PASSWORD, AUTH]);
    secrets::not_in_folder(&registry.folder.path().join("data"), &[PASSWORD, AUTH]);
}

#[test]
fn a_tag_that_changes_under_a_running_guest_leaves_it_its_blobs() {
    needs_vm!();
    let Some(registry) = Registry::start() else { return };
    // It touches little in each beat, so that most of it is fetched later, for the hash.
    let how = ["--memory", "128M", "--work", "32M", "--walk", "1", "--codec", "raw"];
    let sample = Sample::create(&how);
    let url = registry.url("guest:latest");
    let file = sample.file.to_str().unwrap();
    registry.snap(&["push", file, &url]).ok();
    let args = [
        "restore",
        "--lazy",
        "--populate",
        "off",
        &url,
        "--beats",
        "6",
        "--hash",
        "--report",
        "none",
    ];
    let mut guest = start(registry.command(&args));
    let mut stdout = BufReader::new(guest.stdout.take().expect("a pipe"));
    let mut said = String::new();
    stdout.read_line(&mut said).expect("it says something");
    signal(guest.id(), "STOP");
    secrets::not_in_proc(guest.id(), &[PASSWORD, AUTH]);
    let other = Sample::small();
    registry.snap(&["push", other.file.to_str().unwrap(), &url, "--force"]).ok();
    signal(guest.id(), "CONT");
    std::io::Read::read_to_string(&mut stdout, &mut said).expect("text");
    Ran::from(end_of(guest)).ok();
    let of_file = snap(["restore", file, "--beats", "6", "--hash", "--report", "none"]).ok().stdout;
    assert_eq!(said, of_file);
}

#[test]
fn wrong_credentials_are_reported_without_them() {
    needs_vm!();
    let Some(registry) = Registry::start() else { return };
    let url = registry.url("guest:latest");
    let config = registry.folder.path().join("docker/config.json");
    let with = |content: &str, says: &[&str]| {
        fs::write(&config, content).expect("it is written");
        registry.snap(&["info", &url]).failed(1, &[&[url.as_str()], says].concat());
    };
    with("{}", &["access is denied (HTTP 401)"]);
    let address = registry.address;
    // `snap:wrong`
    let wrong = format!(r#"{{"auths":{{"{address}":{{"auth":"c25hcDp3cm9uZw=="}}}}}}"#);
    with(&wrong, &["access is denied (HTTP 401)"]);
    with(
        &format!(r#"{{"auths":{{"{address}":{{"auth":"{PASSWORD}!"}}}}}}"#),
        &["no valid credentials"],
    );
    let token = format!(r#"{{"auths":{{"{address}":{{"identitytoken":"{PASSWORD}"}}}}}}"#);
    with(&token, &["identity token", "not supported"]);
    let helper = format!(r#"{{"credHelpers":{{"{address}":"snap-test-missing"}}}}"#);
    with(&helper, &["the credential helper", "cannot be run"]);
}
