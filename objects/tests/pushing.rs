//! Push and pull: a pulled file has the pushed bytes, and an interrupted push leaves no name.

mod support;

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use objects::{Cache, ObjectError, ObjectUrl, Options, Retry};
use snapfmt::{
    Contents, Existing, MemoryRegion, Parent, Progress, Snapshot, WriteError, WriteOptions,
    write_layer,
};
use support::{chain, impatient, memory, write};
use tempfile::TempDir;

const GO_ON: &(dyn Fn(Progress) -> ControlFlow<()> + Sync) = &|_| ControlFlow::Continue(());

/// A folder with a base of 24 MiB and a layer on it, and a folder as a bucket.
struct Setup {
    folder: TempDir,
    base: PathBuf,
    layer: PathBuf,
}

impl Setup {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut pages = memory(6000, 3);
        let base = write(folder.path(), "base.snap", &pages);
        pages[5 * 4096..9 * 4096].fill(9);
        let layer = folder.path().join("layer.snap");
        let len = pages.len() as u64;
        let regions = [MemoryRegion { gpa: 0, len, source_offset: 0 }];
        let onto = Snapshot::open(&base).expect("it opens");
        let parent = Parent::new(&onto, "base.snap");
        let changed = [0..16 * 4096];
        let contents = Contents::new(&regions, &pages, &changed);
        write_layer(&layer, contents, &parent, &WriteOptions::default(), GO_ON).expect("written");
        Self { folder, base, layer }
    }

    fn bucket(&self) -> PathBuf {
        self.folder.path().join("bucket")
    }

    fn name(&self, name: &str) -> ObjectUrl {
        format!("file://{}/{name}", self.bucket().display()).parse().expect("an address")
    }

    fn options(&self) -> Options {
        let cache = Cache::open(self.folder.path().join("cache"), 1 << 30).expect("a cache");
        Options::new(cache).retry(impatient())
    }

    fn objects(&self) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(self.bucket().join("objects"))
            .expect("it is there")
            .map(|entry| entry.expect("it can be read").file_name().into_string().expect("UTF-8"))
            .collect();
        names.sort();
        names
    }
}

fn open(path: &Path) -> Snapshot {
    Snapshot::open(path).expect("it opens")
}

fn push(snapshot: &Snapshot, name: &ObjectUrl) -> Result<objects::Pushed, ObjectError> {
    objects::push(snapshot, name, false, Retry::default(), GO_ON)
}

#[test]
fn what_is_pulled_is_what_was_pushed() {
    let setup = Setup::new();
    let name = setup.name("guest");
    let pushed = push(&open(&setup.layer), &name).unwrap();
    assert_eq!(pushed.layers.len(), 2);
    assert!(pushed.layers.iter().all(|layer| !layer.was_there));
    let away = tempfile::tempdir().unwrap();
    let out = away.path().join("guest.snap");
    let pulled = objects::pull(&name, &out, Existing::Keep, &setup.options(), GO_ON).unwrap();
    assert_eq!(std::fs::read(&out).unwrap(), std::fs::read(&setup.layer).unwrap());
    // The parent has the name that the layer knows.
    assert_eq!(pulled[1].path, away.path().join("base.snap"));
    assert_eq!(std::fs::read(&pulled[1].path).unwrap(), std::fs::read(&setup.base).unwrap());
    open(&out).verify_chain(NonZeroUsize::MIN, GO_ON).unwrap();

    // The pull by the object's address needs no name, and keeps the parent that exists.
    let object = name.beside(&format!("objects/{}.snap", open(&setup.layer).header().id)).unwrap();
    let again = away.path().join("again.snap");
    let pulled = objects::pull(&object, &again, Existing::Keep, &setup.options(), GO_ON).unwrap();
    assert!(pulled[1].was_there && !pulled[0].was_there);

    // It can also be opened in the bucket.
    let opened = objects::open(&name, &setup.options()).unwrap();
    assert_eq!(opened.snapshot.headers().len(), 2);
    opened.snapshot.verify_chain(NonZeroUsize::MIN, GO_ON).unwrap();
}

#[test]
fn what_is_there_is_not_sent_again() {
    let setup = Setup::new();
    push(&open(&setup.base), &setup.name("base")).unwrap();
    let pushed = push(&open(&setup.layer), &setup.name("guest")).unwrap();
    let there: Vec<_> = pushed.layers.iter().map(|layer| layer.was_there).collect();
    assert_eq!(there, [false, true]);
    // The same name is accepted for the same snapshot, and refused for another one.
    push(&open(&setup.layer), &setup.name("guest")).unwrap();
    let error = push(&open(&setup.base), &setup.name("guest")).unwrap_err();
    assert!(matches!(error, ObjectError::NameTaken { .. }), "{}", chain(&error));
    let name = setup.name("guest");
    objects::push(&open(&setup.base), &name, true, Retry::default(), GO_ON).unwrap();
    let opened = objects::open(&name, &setup.options()).unwrap();
    assert_eq!(opened.snapshot.headers().len(), 1);
    // The list of the layer's parents is beside it.
    let lists = setup.objects().iter().filter(|name| name.ends_with(".layers")).count();
    assert_eq!((setup.objects().len(), lists), (3, 1));
}

#[test]
fn an_object_with_the_id_and_other_content_is_not_taken_for_it() {
    let setup = Setup::new();
    push(&open(&setup.base), &setup.name("base")).unwrap();
    let object = setup.bucket().join("objects").join(&setup.objects()[0]);
    let mut bytes = std::fs::read(&object).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&object, bytes).unwrap();
    let error = push(&open(&setup.layer), &setup.name("guest")).unwrap_err();
    assert!(matches!(error, ObjectError::Differs { .. }), "{}", chain(&error));
    assert!(!setup.bucket().join("guest").exists());
}

#[test]
fn an_interrupted_push_leaves_no_name_and_no_object() {
    let setup = Setup::new();
    for stop_at in 1..4 {
        let calls = AtomicUsize::new(0);
        let interrupted = |_| match calls.fetch_add(1, Ordering::SeqCst) + 1 == stop_at {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        };
        let name = setup.name("guest");
        let push = objects::push(&open(&setup.layer), &name, false, Retry::default(), &interrupted);
        assert!(matches!(push, Err(ObjectError::Cancelled)), "{push:?}");
        assert!(!setup.bucket().join("guest").exists());
        assert_eq!(setup.objects(), [""; 0], "stopped at {stop_at}");
    }
    push(&open(&setup.layer), &setup.name("guest")).unwrap();
}

#[test]
fn an_interrupted_or_damaged_pull_leaves_no_file() {
    let setup = Setup::new();
    let name = setup.name("guest");
    push(&open(&setup.base), &name).unwrap();
    let away = tempfile::tempdir().unwrap();
    let out = away.path().join("guest.snap");
    let pull =
        |progress| objects::pull(&name, &out, Existing::Keep, &setup.options(), progress).map(drop);
    let error = pull(&|_| ControlFlow::Break(())).unwrap_err();
    assert!(matches!(error, ObjectError::Cancelled));
    // This interrupts the verification.
    let late = |p: Progress| match p.done_bytes > p.total_bytes * 3 / 4 {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    };
    assert!(matches!(pull(&late).unwrap_err(), ObjectError::Cancelled));
    let object = setup.bucket().join("objects").join(&setup.objects()[0]);
    let mut bytes = std::fs::read(&object).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&object, bytes).unwrap();
    let error = pull(GO_ON).unwrap_err();
    assert!(matches!(error, ObjectError::Snapshot { .. }), "{}", chain(&error));
    assert_eq!(std::fs::read_dir(away.path()).unwrap().count(), 0);
    std::fs::write(&out, b"mine").unwrap();
    let error = pull(GO_ON).unwrap_err();
    assert!(matches!(error, ObjectError::Write(WriteError::Exists { .. })), "{}", chain(&error));
}

#[test]
fn a_folder_that_a_push_makes_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let setup = Setup::new();
    push(&open(&setup.base), &setup.name("guest")).unwrap();
    let mode = std::fs::metadata(setup.bucket().join("objects")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[test]
fn a_parent_that_is_missing_in_the_bucket_is_named() {
    let setup = Setup::new();
    let name = setup.name("guest");
    push(&open(&setup.layer), &name).unwrap();
    let base = format!("{}.snap", open(&setup.base).header().id);
    std::fs::remove_file(setup.bucket().join("objects").join(&base)).unwrap();
    let error = objects::open(&name, &setup.options()).err().expect("it fails");
    let ObjectError::NotFound { url } = &error else { panic!("{}", chain(&error)) };
    assert!(url.ends_with(&base), "{url}");
}

#[test]
fn http_servers_are_only_read_from() {
    let setup = Setup::new();
    let error = push(&open(&setup.base), &"http://host/guest".parse().unwrap()).unwrap_err();
    assert!(matches!(error, ObjectError::Unsupported { .. }), "{}", chain(&error));
}
