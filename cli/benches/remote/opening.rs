//! Requests and time until the guest's first instruction. A name is never answered from the cache, because it may be
//! given to another snapshot at any time. It has the ends of its object, so it takes no further round trip.

use std::path::Path;

use crate::fake::{Fake, Received, depth};
use crate::{Amount, Bound, LATENCY, LINK, line, quantile, snap};

pub(crate) fn measure(amount: Amount) {
    let folder = tempfile::tempdir().unwrap();
    let fake = Fake::with_link(LATENCY, LINK);
    let small = snap::create(folder.path(), "small", &["--memory", "64M"]);
    let large = snap::create(folder.path(), "large", &["--memory", amount.large_guest]);
    let top = snap::layers(folder.path(), &small, 8);
    let id = snapfmt::Snapshot::open(&top).unwrap().header().id;
    let id_of_small = snapfmt::Snapshot::open(&small).unwrap().header().id;
    for (file, name) in [(&small, "small"), (&large, "large"), (&top, "layers")] {
        push(&fake, folder.path(), file, name);
    }
    let address = |path: String| fake.url(&format!("/bucket/{path}"));
    let by_id = |id: &dyn std::fmt::Display| address(format!("objects/{id}.snap"));
    for (what, url, wanted) in [
        ("1 file, by its address", by_id(&id_of_small), 2.0),
        ("1 file, by a name", address("small".into()), 2.0),
        ("8 layers, by a name", address("layers".into()), 3.0),
        ("8 layers, by the address of the top one", by_id(&id), 3.0),
    ] {
        let received = until_first_page(&fake, &url);
        let (count, depth) = (received.len() as f64, depth(&received) as f64);
        line(&format!("requests until the first page: {what}"), count, "", None);
        line(
            &format!("  depth of their dependencies: {what}"),
            depth,
            "",
            Some(Bound::AtMost(wanted)),
        );
    }
    for (size, file, path) in [("64M", &small, "small"), (amount.large_guest, &large, "large")] {
        let id = snapfmt::Snapshot::open(file).unwrap().header().id;
        first_instruction(
            amount,
            folder.path(),
            size,
            file,
            &[("address", by_id(&id)), ("name", address(path.into()))],
        );
    }
    println!();
}

/// Pushes a snapshot into a folder, whose objects the server then has in `/bucket`.
fn push(fake: &Fake, folder: &Path, file: &Path, name: &str) {
    let bucket = folder.join("bucket");
    let url = format!("file://{}/{name}", bucket.display());
    snap::run(folder, &["push", "--quiet", file.to_str().unwrap(), &url]);
    let put = |path: &Path, key: String| fake.put(&key, std::fs::read(path).unwrap());
    put(&bucket.join(name), format!("/bucket/{name}"));
    for entry in std::fs::read_dir(bucket.join("objects")).unwrap().flatten() {
        put(&entry.path(), format!("/bucket/objects/{}", entry.file_name().to_str().unwrap()));
    }
}

/// The requests of opening a snapshot and reading a page that opening does not fetch.
fn until_first_page(fake: &Fake, url: &str) -> Vec<Received> {
    let cache = tempfile::tempdir().unwrap();
    let cache = objects::Cache::open(cache.path(), 1 << 30).unwrap();
    fake.take_received();
    let opened = objects::open(&url.parse().unwrap(), &objects::Options::new(cache)).unwrap();
    let snapshot = &opened.snapshot;
    let pages = snapshot.header().pages() as u32;
    let mut bytes = [0; snapfmt::layout::PAGE_BYTES];
    let mut received = fake.take_received();
    for page in (0..pages).step_by(97) {
        snapshot.read_page(snapfmt::PageIndex(page), &mut Default::default(), &mut bytes).unwrap();
        let more = fake.take_received();
        if !more.is_empty() {
            received.extend(more);
            break;
        }
    }
    received
}

/// Medians of `snap restore --lazy`, by its own report.
fn first_instruction(
    amount: Amount,
    folder: &Path,
    size: &str,
    file: &Path,
    urls: &[(&str, String)],
) {
    let options = ["--populate", "off"];
    let median = |once: &dyn Fn() -> f64| {
        let mut times: Vec<_> = (0..amount.rounds).map(|_| once()).collect();
        quantile(&mut times, 0.5)
    };
    let time = |cache: &Path, what: &str| {
        snap::restore(cache, what, &options)["first_instruction_ms"].as_f64().unwrap()
    };
    let of_file = median(&|| time(folder, file.to_str().unwrap()));
    line(&format!("first instruction, guest of {size}: file"), of_file, "ms", None);
    let latency = LATENCY.as_secs_f64() * 1e3;
    for (what, url) in urls {
        let cold = median(&|| time(tempfile::tempdir().unwrap().path(), url));
        let bound = Bound::AtMost(2.0 * latency + 10.0);
        line(&format!("  by its {what}, empty cache"), cold, "ms", Some(bound));
        let cache = tempfile::tempdir().unwrap();
        time(cache.path(), url);
        let warm = median(&|| time(cache.path(), url));
        // A name is asked for at each start, because it may have changed.
        let bound = match *what {
            "name" => Bound::AtMost(latency + 10.0),
            _ => Bound::AtMost(1.3 * of_file),
        };
        line(&format!("  by its {what}, all in the cache"), warm, "ms", Some(bound));
    }
}
