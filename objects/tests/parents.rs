//! Layers that have an address for their parent: it is read in the same bucket or repository, or where the caller allows.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use objects::{ObjectError, ObjectUrl, Options, UrlPrefix, open, open_over};
use snapfmt::{Contents, MemoryRegion, Parent, Snapshot, WriteOptions, write_layer};
use support::fake::{Fake, Fate};
use support::{Bench, chain};

/// A layer on the snapshot of the bench, with this address for its parent.
fn layer(bench: &Bench, address: &str) -> PathBuf {
    let file = bench.folder.path().join("layer.snap");
    let onto = Snapshot::open(&bench.file).expect("it opens");
    let regions = [MemoryRegion { gpa: 0, len: bench.memory.len() as u64, source_offset: 0 }];
    let data = [0..4096];
    let contents = Contents::new(&regions, &bench.memory, &data);
    let options = WriteOptions::default().existing(snapfmt::Existing::Replace);
    let proceed = |_| std::ops::ControlFlow::Continue(());
    write_layer(&file, contents, &Parent::new(&onto, address), &options, &proceed)
        .expect("written");
    file
}

/// Puts a layer with this address for its parent on the server, and opens it.
fn open_with(bench: &Bench, address: &str, allowed: &[&str]) -> Result<Snapshot, ObjectError> {
    let file = layer(bench, address);
    bench.fake.put("/bucket/layers/top.snap", fs::read(file).expect("it is there"));
    let url = bench.fake.url("/bucket/layers/top.snap").parse().expect("an address");
    open(&url, &with(bench.options(), allowed)).map(|opened| opened.snapshot)
}

fn with(options: Options, allowed: &[&str]) -> Options {
    let prefixes: Vec<UrlPrefix> =
        allowed.iter().map(|text| text.parse().expect("a prefix")).collect();
    options.parents_from(prefixes)
}

#[track_caller]
fn refused(opened: Result<Snapshot, ObjectError>, address: &str) {
    let error = opened.err().expect("it is refused");
    assert!(matches!(error, ObjectError::ParentElsewhere { .. }), "{}", chain(&error));
    assert!(error.to_string().contains(address), "{error}");
}

#[test]
fn a_parent_on_the_same_server_is_read() {
    let bench = Bench::start(100, Duration::ZERO);
    let address = bench.url().to_string();
    let opened = open_with(&bench, &address, &[]).expect("it opens");
    bench.check_page(&opened, 50);
}

#[test]
fn a_parent_is_read_at_its_address_if_its_id_is_refused_in_the_folder_of_the_layer() {
    let bench = Bench::start(100, Duration::ZERO);
    let address = bench.url().to_string();
    bench.fake.decide(|_, received| {
        let is_by_id = received.path.starts_with("/bucket/layers/")
            && received.path != "/bucket/layers/top.snap";
        if is_by_id { Fate::Status(403, "AccessDenied") } else { Fate::Answer }
    });
    bench.check_page(&open_with(&bench, &address, &[]).expect("it opens"), 50);
    // The same of a layer in a file that is pushed beside its parent.
    let name = bench.fake.url("/bucket/name").parse().expect("an address");
    bench.fake.decide(|_, received| match received.path.starts_with("/bucket/objects/") {
        true => Fate::Status(403, "AccessDenied"),
        false => Fate::Answer,
    });
    let file = layer(&bench, &address);
    let opened = open_over(&file, Some(&name), &with(bench.options(), &[]));
    bench.check_page(&opened.expect("it opens"), 50);
}

#[test]
fn a_parent_elsewhere_is_refused_without_a_request_and_read_if_it_is_allowed() {
    let bench = Bench::start(100, Duration::ZERO);
    let other = Fake::start(Duration::ZERO);
    other.put("/bucket/guest.snap", fs::read(&bench.file).expect("it is there"));
    let address = other.url("/bucket/guest.snap");
    refused(open_with(&bench, &address, &[]), &address);
    let prefixes = [other.url(""), other.url("/buck"), "https://host/".to_owned()];
    refused(open_with(&bench, &address, &[&prefixes[1], &prefixes[2]]), &address);
    assert!(other.take_received().is_empty());
    let opened = open_with(&bench, &address, &[&prefixes[0]]).expect("it opens");
    bench.check_page(&opened, 50);
}

#[test]
fn neither_the_host_s_own_services_nor_its_files_are_read() {
    let bench = Bench::start(100, Duration::ZERO);
    let file = format!("file://{}", bench.file.display());
    for address in
        ["http://169.254.169.254/latest/meta-data/iam", &file, "s3://bucket/guest", "oci://h/a:b"]
    {
        refused(open_with(&bench, address, &[]), address);
    }
    // Of a folder as a bucket, only the folder of the layer.
    let folder = bench.folder.path().join("bucket");
    fs::create_dir(&folder).expect("it is made");
    fs::copy(layer(&bench, &file), folder.join("top.snap")).expect("it is copied");
    let url: ObjectUrl = format!("file://{}", folder.join("top.snap").display()).parse().unwrap();
    let options = with(bench.options(), &[]);
    refused(open(&url, &options).map(|opened| opened.snapshot), &file);
    let options = with(options, &[&format!("file://{}", bench.folder.path().display())]);
    bench.check_page(&open(&url, &options).expect("it opens").snapshot, 50);
}

#[test]
fn a_layer_in_a_file_follows_an_address_only_if_it_is_allowed() {
    let bench = Bench::start(100, Duration::ZERO);
    let address = bench.url().to_string();
    let file = layer(&bench, &address);
    // Beside it, the parent would be found by its name.
    let alone = bench.folder.path().join("alone");
    fs::create_dir(&alone).expect("it is made");
    let file = {
        let to = alone.join("layer.snap");
        fs::rename(file, &to).expect("it is moved");
        to
    };
    bench.fake.take_received();
    assert!(Snapshot::open(&file).is_err());
    let over = |file: &Path, name: Option<&ObjectUrl>, allowed: &[&str]| {
        open_over(file, name, &with(bench.options(), allowed))
    };
    refused(over(&file, None, &[]), &address);
    assert!(bench.fake.take_received().is_empty());
    bench.check_page(&over(&file, None, &[&address]).expect("it opens"), 50);
    // It is pushed to where its parent is.
    let name = bench.fake.url("/bucket/name").parse().expect("an address");
    bench.check_page(&over(&file, Some(&name), &[]).expect("it opens"), 50);
    let elsewhere = "http://127.0.0.1:9/bucket/name".parse().expect("an address");
    let error = over(&file, Some(&elsewhere), &[]).err().expect("nothing listens there");
    assert!(matches!(error, ObjectError::Unavailable { .. }), "{error:?}");
}
