//! Many clones of a guest on one host, started at the same moment: what the server sends.

use std::time::Instant;

use crate::fake::{Fake, whole_times_sent};
use crate::{Amount, Bound, LATENCY, LINK, line, snap};

const KEY: &str = "/bucket/guest.snap";

pub(crate) fn measure(amount: Amount) {
    let folder = tempfile::tempdir().unwrap();
    let file = snap::create(folder.path(), "guest", &["--memory", "64M"]);
    let file = std::fs::read(file).unwrap();
    let fake = Fake::with_link(LATENCY, LINK);
    fake.put(KEY, file.clone());
    let url = fake.url(KEY);
    let cache = tempfile::tempdir().unwrap();
    let started = Instant::now();
    let clones: Vec<_> =
        (0..amount.clones).map(|_| snap::start_restore(cache.path(), &url, &[])).collect();
    for clone in clones {
        let output = clone.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let took = started.elapsed();
    let received = fake.take_received();
    let times = whole_times_sent(&received, KEY, file.len() as u64);
    let again = times.values().filter(|times| **times > 1).count();
    let gets = received.iter().filter(|one| one.method == "GET");
    let bytes: u64 = gets.map(|one| one.range.end - one.range.start).sum();
    let name = format!("{} clones on a host", amount.clones);
    line(&format!("{name}: until all have done their work"), took.as_secs_f64(), "s", None);
    line(
        "  blocks that the server sent more than once",
        again as f64,
        "",
        Some(Bound::AtMost(0.0)),
    );
    line(
        "  bytes sent, of the length of the object",
        bytes as f64 / file.len() as f64 * 100.0,
        "%",
        None,
    );
    line("  requests for each clone", received.len() as f64 / amount.clones as f64, "", None);
}
