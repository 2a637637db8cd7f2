//! Snapshots in an OCI registry: pushed, read by ranges, pulled; and each failure that a registry adds.

mod support;

use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;

use objects::{ObjectError, ObjectUrl, Opened, Pushed, Retry, pull, push};
use snapfmt::{Existing, Progress, Snapshot};
use support::registry::{FakeRegistry, digest_of};
use support::{Bench, chain, impatient, memory, write};

fn proceed(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A registry, and a snapshot that is pushed to it.
struct Pushing {
    bench: Bench,
    registry: FakeRegistry,
}

impl Pushing {
    fn start(pages: usize) -> Self {
        let bench = Bench::start(pages, Default::default());
        Self { bench, registry: FakeRegistry::start() }
    }

    fn url(&self, reference: &str) -> ObjectUrl {
        self.registry.url(reference).parse().expect("an address")
    }

    fn push_as(&self, reference: &str, replace: bool) -> Result<Pushed, ObjectError> {
        let snapshot = Snapshot::open(&self.bench.file).expect("it opens");
        push(&snapshot, &self.url(reference), replace, impatient(), &proceed)
    }

    fn push(&self) -> Pushed {
        self.push_as("team/guest:v1", false).expect("it is pushed")
    }

    fn open(&self, reference: &str) -> Result<Opened, ObjectError> {
        objects::open(&self.url(reference), &self.bench.options())
    }

    fn pulled(&self, reference: &str) -> Result<PathBuf, ObjectError> {
        let path = self.bench.folder.path().join("pulled.snap");
        let options = self.bench.options_in("pull");
        pull(&self.url(reference), &path, Existing::Replace, &options, &proceed)?;
        Ok(path)
    }

    /// The digest of the one file.
    fn digest(&self) -> String {
        digest_of(&fs::read(&self.bench.file).expect("it is there"))
    }
}

#[test]
fn a_push_writes_a_blob_and_then_a_tag_and_is_read_and_pulled_bit_by_bit() {
    let test = Pushing::start(2000);
    let pushed = test.push();
    let digest = test.digest();
    assert!(pushed.layers[0].url.to_string().ends_with(&format!("/team/guest@{digest}")));
    let received = test.registry.take_received();
    let last = received.last().expect("requests");
    assert_eq!((&*last.method, &*last.path), ("PUT", "/v2/team/guest/manifests/v1"));

    let opened = test.open("team/guest:v1").expect("it opens");
    for page in [0, 1, 700, 1999] {
        test.bench.check_page(&opened.snapshot, page);
    }
    let path = test.pulled("team/guest:v1").expect("it is pulled");
    assert!(fs::read(path).unwrap() == fs::read(&test.bench.file).unwrap());
    // By the digest of the manifest, and by that of the blob.
    let manifest = digest_of(&test.registry.state().manifests["v1"]);
    for digest in [manifest, digest] {
        let opened = test.open(&format!("team/guest@{digest}")).expect("it opens");
        test.bench.check_page(&opened.snapshot, 3);
    }
}

#[test]
fn a_second_push_sends_nothing_and_a_taken_tag_is_kept() {
    let test = Pushing::start(100);
    test.push();
    test.registry.take_received();
    let again = test.push();
    assert!(again.layers[0].was_there);
    assert!(test.registry.take_received().iter().all(|one| one.method != "POST"));

    let other = write(test.bench.folder.path(), "other.snap", &memory(50, 7));
    let snapshot = Snapshot::open(&other).unwrap();
    let url = test.url("team/guest:v1");
    let error = push(&snapshot, &url, false, impatient(), &proceed).unwrap_err();
    assert!(matches!(error, ObjectError::NameTaken { .. }), "{error:?}");
    // It was found before the upload.
    assert_eq!(test.registry.state().blobs.len(), 2);
    push(&snapshot, &url, true, impatient(), &proceed).expect("it replaces the tag");
    let digest = test.digest();
    let error = test.push_as(&format!("team/guest@{digest}"), false).unwrap_err();
    assert!(matches!(error, ObjectError::Unsupported { .. }), "{error:?}");
}

#[test]
fn an_interrupted_or_failed_push_leaves_no_tag() {
    let test = Pushing::start(2000);
    let snapshot = Snapshot::open(&test.bench.file).unwrap();
    let url = test.url("team/guest:v1");
    let cancel = |progress: Progress| match progress.done_bytes > snapshot.header().file_bytes {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    };
    let error = push(&snapshot, &url, false, impatient(), &cancel).unwrap_err();
    assert!(matches!(error, ObjectError::Cancelled), "{error:?}");
    assert!(test.registry.state().manifests.is_empty());

    test.registry.state().failing_uploads = vec![413; 9];
    let error = test.push_as("team/guest:v1", false).unwrap_err();
    assert!(matches!(error, ObjectError::Refused { status: Some(413), .. }), "{error:?}");
    assert!(!chain(&error).contains("hunter2"));
    assert!(test.registry.state().manifests.is_empty());
    // A busy registry is tried again, with the whole blob.
    test.registry.state().failing_uploads = vec![503, 503];
    test.push();
    assert_eq!(test.registry.state().manifests.len(), 2);
}

#[test]
fn an_expired_redirect_is_resolved_again_and_a_valid_one_is_used_again() {
    let test = Pushing::start(4000);
    test.push();
    test.registry.state().redirects = true;
    let opened = test.open("team/guest:v1").expect("it opens");
    test.registry.take_received();
    for page in [1000, 1500, 2000] {
        test.bench.check_page(&opened.snapshot, page);
    }
    // One request each, without a redirect.
    let received = test.registry.take_received();
    assert!(received.iter().all(|one| one.path.starts_with("/signed/")), "{received:?}");
    test.registry.expire_redirects();
    test.bench.check_page(&opened.snapshot, 2500);
    let statuses: Vec<_> =
        test.registry.take_received().iter().map(|one| one.status).take(3).collect();
    assert_eq!(statuses, [403, 307, 206]);
    // Each new address has expired as soon as it is given.
    test.registry.state().expired = usize::MAX;
    let error = test.bench.fail_page(&opened.snapshot, 3500);
    assert!(chain(&error).contains("access is denied (HTTP 403)"), "{}", chain(&error));
    assert!(!chain(&error).contains("hunter2"), "{}", chain(&error));
}

#[test]
fn a_token_is_asked_for_once_and_again_when_it_is_refused() {
    let test = Pushing::start(4000);
    test.registry.expire_tokens();
    test.push();
    test.registry.take_received();
    let opened = test.open("team/guest:v1").expect("it opens");
    test.bench.check_page(&opened.snapshot, 1000);
    let tokens = |registry: &FakeRegistry| {
        let received = registry.take_received();
        received.iter().filter(|one| one.path.starts_with("/token")).count()
    };
    assert_eq!(tokens(&test.registry), 1);
    test.registry.expire_tokens();
    test.bench.check_page(&opened.snapshot, 2000);
    assert_eq!(tokens(&test.registry), 1);
    // This user gets none.
    test.registry.state().basic = Some("aHVudGVyMjpodW50ZXIy".into());
    test.registry.expire_tokens();
    let error = test.bench.fail_page(&opened.snapshot, 3500);
    assert!(chain(&error).contains("access is denied (HTTP 401)"), "{}", chain(&error));
    assert!(!chain(&error).contains("hunter2"), "{}", chain(&error));
}

#[test]
fn a_guest_keeps_its_blobs_when_its_tag_is_given_to_another() {
    let test = Pushing::start(2000);
    test.push();
    let opened = test.open("team/guest:v1").expect("it opens");
    let other = write(test.bench.folder.path(), "other.snap", &memory(2000, 7));
    let other = Snapshot::open(&other).unwrap();
    push(&other, &test.url("team/guest:v1"), true, impatient(), &proceed).expect("it is pushed");
    test.bench.check_page(&opened.snapshot, 1500);
    let now = test.open("team/guest:v1").expect("it opens");
    assert_eq!(now.snapshot.header().id, other.header().id);
}

#[test]
fn what_is_not_there_is_permanent_and_a_short_answer_is_continued() {
    let test = Pushing::start(4000);
    let error = test.open("team/guest:v1").err().expect("it is not there");
    assert!(matches!(error, ObjectError::NotFound { .. }), "{error:?}");
    test.push();
    let opened = test.open("team/guest:v1").expect("it opens");
    test.registry.state().truncated = (1000, 3);
    test.bench.check_page(&opened.snapshot, 1000);
    assert_eq!(test.registry.state().truncated.1, 0);
    test.registry.state().blobs.clear();
    let error = test.bench.fail_page(&opened.snapshot, 3500);
    assert!(chain(&error).contains("there is no such object"), "{}", chain(&error));
}

#[test]
fn an_answer_with_a_shorter_range_than_the_requested_one_is_refused() {
    let test = Pushing::start(4000);
    test.push();
    let opened = test.open("team/guest:v1").expect("it opens");
    test.registry.state().most_range_bytes = Some(1000);
    test.registry.take_received();
    let error = test.bench.fail_page(&opened.snapshot, 1040);
    assert!(chain(&error).contains("an answer has another range"), "{}", chain(&error));
    assert_eq!(test.registry.take_received().len(), 1);
}

#[test]
fn bytes_with_another_digest_are_not_pulled() {
    let test = Pushing::start(100);
    test.push();
    let digest = test.digest();
    // A valid snapshot of the same length, so that only the digest shows it.
    let mut state = test.registry.state();
    let blob = state.blobs.get_mut(&digest).expect("it was pushed");
    let other = write(test.bench.folder.path(), "other.snap", &memory(100, 7));
    *blob = fs::read(other).unwrap();
    drop(state);
    let error = test.pulled("team/guest:v1").unwrap_err();
    assert!(matches!(error, ObjectError::WrongDigest { .. }), "{error:?}");
    assert!(!test.bench.folder.path().join("pulled.snap").exists());

    let mut state = test.registry.state();
    let manifest = state.manifests["v1"].clone();
    let wrong = digest_of(b"another");
    state.manifests.insert(wrong.clone(), manifest);
    drop(state);
    let error = test.open(&format!("team/guest@{wrong}")).err().expect("another digest");
    assert!(chain(&error).contains("the manifest has another digest"), "{}", chain(&error));
}

#[test]
fn a_layer_is_pushed_with_its_parents() {
    let test = Pushing::start(500);
    let folder = test.bench.folder.path();
    let layer = folder.join("layer.snap");
    let mut changed = test.bench.memory.clone();
    changed[..4096].fill(9);
    support::write_on(&test.bench.file, &layer, &changed, 0);
    let snapshot = Snapshot::open(&layer).unwrap();
    let retry = Retry { ..impatient() };
    let pushed = push(&snapshot, &test.url("guest:top"), false, retry, &proceed).unwrap();
    assert_eq!(pushed.layers.len(), 2);
    let opened = test.open("guest:top").expect("it opens");
    assert_eq!(opened.objects.len(), 2);
    test.bench.check_page(&opened.snapshot, 400);
    let path = test.pulled("guest:top").expect("it is pulled");
    assert!(fs::read(path).unwrap() == fs::read(&layer).unwrap());
}
