//! `snap bench`: its table, its JSON, its refusals, and that it leaves no files.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::support::{
    Ran, SNAP, Sample, end_of, names, needs_vm, run, signal, snap, start, wait_for_handlers,
};

/// `snap bench` of a small demo guest, with a folder of its own for temporary files.
fn bench(folder: &Path, options: &[&str]) -> Command {
    let mut command = Command::new(SNAP);
    command.args(["bench", "demo", "--memory", "16M", "--touch", "5", "--dir"]).arg(folder);
    command.args(options);
    command
}

#[test]
fn the_table_has_a_column_for_each_mode() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let ran = run(bench(folder.path(), &["--runs", "1", "--modes", "lazy,mmap,eager"])).ok();
    let header: Vec<_> =
        ran.stdout.lines().nth(2).expect("a table").split_ascii_whitespace().collect();
    assert_eq!(header, ["lazy", "mmap", "eager"]);
    for what in
        ["page cache warm", "workload done", "fault p99", "done, x of mmap", "the same in all"]
    {
        assert!(ran.stdout.contains(what), "{what}: {}", ran.stdout);
    }
    assert_eq!(ran.stderr, "", "progress is for terminals");
    assert!(names(folder.path()).is_empty(), "{:?}", names(folder.path()));
}

#[test]
fn json_has_every_run_and_the_modes_agree() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let options = ["--runs", "3", "--modes", "eager,mmap,lazy,shared", "--json"];
    let all = run(bench(folder.path(), &options)).ok().json();
    assert_eq!(all["memory_sha256"].as_str().map(str::len), Some(64));
    assert_eq!((&all["runs"], &all["page_cache"]), (&3.into(), &"warm".into()));
    assert_eq!(all["snapshot"]["memory_bytes"], 16 << 20);
    let modes = all["modes"].as_array().expect("modes");
    let named: Vec<_> = modes.iter().map(|mode| mode["mode"].as_str().expect("a name")).collect();
    assert_eq!(named, ["eager", "mmap", "lazy", "shared"]);
    let number = |value: &Value| value.as_f64().expect("a number");
    for mode in modes {
        let runs = mode["runs"].as_array().expect("runs");
        assert_eq!(runs.len(), 3);
        for run in runs.iter().chain([&mode["median"]]) {
            assert!(number(&run["first_instruction_ms"]) <= number(&run["done_ms"]));
        }
        // A median is one of three.
        assert!(runs.iter().any(|run| run["done_ms"] == mode["median"]["done_ms"]));
        assert!(mode["timeline"].as_array().is_some_and(|samples| samples.len() >= 2));
    }
    let median = |mode: usize, figure: &str| &modes[mode]["median"][figure];
    // Each has only the figures of its mode.
    assert!(median(0, "served_faults").is_null() && median(1, "served_faults").is_null());
    assert!(number(median(2, "served_faults")) > 0.0 && number(median(2, "fault_p50_us")) > 0.0);
    assert_eq!(median(0, "unloaded_bytes"), 0);
    for lazily in [1, 2, 3] {
        assert!(number(median(lazily, "unloaded_bytes")) > 0.0);
    }
    assert!(number(&all["ratios"]["done_ms"]["lazy"]["mmap"]) > 0.0);
    assert!(names(folder.path()).is_empty());
}

#[test]
fn the_working_set_is_loaded_ahead_of_the_guest() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let options = ["--runs", "1", "--modes", "lazy,lazy+hot,lazy+other", "--json"];
    let all = run(bench(folder.path(), &options)).ok().json();
    let mode = |number: usize| &all["modes"][number]["median"];
    let set = all["hot"]["working_set_bytes"].as_u64().expect("a working set");
    // Five percent of 16 MiB, and a little.
    assert!((600 << 10..2 << 20).contains(&set), "{set}");
    // How much it loads before the guest has done its work depends on timing.
    assert!(mode(1)["prefetched_bytes"].as_u64() <= Some(2 * set), "{}", mode(1));
    assert!(mode(1)["prefetched_bytes"].is_u64(), "{}", mode(1));
    assert!(mode(0)["prefetched_bytes"].is_null(), "plain lazy prefetches nothing");
    // The other set is as large, and does not help.
    assert!(all["other"]["working_set_bytes"].as_u64() > Some(set / 2));
    assert!(mode(2)["served_faults"].as_u64() > Some(0));
    assert_eq!(all["memory_sha256"].as_str().map(str::len), Some(64), "the pages are right anyway");
    assert!(names(folder.path()).is_empty());
}

#[test]
fn cold_runs_read_from_storage_or_are_refused() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let ran = run(bench(folder.path(), &["--runs", "1", "--cold", "--json"]));
    if ran.code == Some(1) {
        // A temporary folder in memory.
        ran.failed(1, &["cannot be dropped", "--dir"]);
        return;
    }
    let all = ran.ok().json();
    assert!(all["page_cache"].as_str().is_some_and(|way| way.starts_with("cold, by ")));
    for mode in all["modes"].as_array().expect("modes") {
        assert!(mode["median"]["storage_bytes_read"].as_u64() > Some(0), "{mode}");
    }
    let in_memory = Path::new("/dev/shm");
    if in_memory.is_dir() {
        run(bench(in_memory, &["--runs", "1", "--cold"])).failed(1, &["in memory", "--dir"]);
    }
}

#[test]
fn a_snapshot_is_measured_until_its_work_is_done() {
    needs_vm!();
    let sample = Sample::small();
    let bench = |options: &[&str]| {
        let mut command = Command::new(SNAP);
        command.arg("bench").arg(&sample.file).args(["--runs", "1", "--modes", "lazy"]);
        run({
            command.args(options);
            command
        })
    };
    let until = bench(&["--until", "beat 2 ok", "--json"]).ok().json();
    assert_eq!(until["work"]["until"], "beat 2 ok");
    let forever = ["--until", "no guest prints this", "--timeout", "200ms"];
    bench(&forever).failed(1, &["mode lazy", "was not done after 200ms", "--timeout"]);
    bench(&["--for", "50ms"]).ok();
    bench(&["--memory", "64M"]).failed(1, &["--memory and --touch are only for `snap bench demo`"]);
    assert_eq!(sample.names(), ["guest.snap"]);
}

#[test]
fn bad_input_is_refused() {
    for (options, code, messages) in [
        (&["--modes", "eager,fast"][..], 2, &["fast", "possible values", "mmap"][..]),
        (&["--runs", "0"], 2, &["--runs", "0"]),
        (&["--touch", "0"], 2, &["--touch"]),
        (&["--until", "x", "--for", "1s"], 2, &["cannot be used with"]),
        (&["--modes", "lazy,lazy"], 1, &["lazy is given twice"]),
        (&["--touch", "40"], 1, &["a beat of the demo guest reads at most 21 %"]),
        (&["--memory", "3M"], 1, &["--memory"]),
        (&["--dir", "/no/such"], 1, &["/no/such"]),
    ] {
        snap(["bench", "demo"].iter().chain(options)).failed(code, messages);
    }
    snap(["bench", "/no/such.snap"]).failed(1, &["/no/such.snap"]);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("a.snap");
    std::fs::write(&file, [7; 8192]).expect("it can be written");
    snap(["bench".as_ref(), file.as_os_str()]).failed(3, &["a.snap"]);
}

#[test]
fn a_guest_that_cannot_be_restored_has_its_own_error() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("memory"), vec![1; 1 << 20]).expect("it can be written");
    snap(["import", &*path("memory"), "-o", &*path("a.snap")]).ok();
    snap(["bench", &*path("a.snap")]).failed(1, &["give the end of the guest's work"]);
    let ran = snap(["bench", &*path("a.snap"), "--for", "1s", "--modes", "lazy"]);
    ran.failed(1, &["mode lazy", "no state of a KVM guest"]);
}

#[test]
fn an_interrupt_ends_it_and_leaves_no_files() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a temporary folder");
    for moment_ms in [0, 300, 1500] {
        // It would run for minutes.
        let mut command = bench(folder.path(), &["--runs", "1000"]);
        command.args(["--beats", "20", "--modes", "lazy,shared,mmap"]);
        let child = start(command);
        wait_for_handlers(child.id());
        // Somewhere while it creates, exports, or runs: each must end cleanly.
        std::thread::sleep(std::time::Duration::from_millis(moment_ms));
        signal(child.id(), "INT");
        Ran::from(end_of(child)).failed(130, &["interrupted"]);
        assert!(names(folder.path()).is_empty(), "{:?}", names(folder.path()));
    }
}

#[test]
fn the_page_is_complete_and_loads_nothing() {
    needs_vm!();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("figures.html");
    let options = ["--runs", "2", "--modes", "eager,mmap,lazy", "--html"];
    let bench = |more: &[&str]| {
        let mut command = bench(folder.path(), &options);
        command.arg(&out).args(more);
        run(command)
    };
    let ran = bench(&[]).ok();
    assert!(ran.stdout.contains("workload done"), "the table is still printed");
    let page = std::fs::read_to_string(&out).expect("it is there");
    assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
    // Nothing is fetched, nothing is run.
    for foreign in ["<script", "<link", "<img", "<iframe", "src=", "@import", "url(", "href="] {
        assert!(!page.contains(foreign), "{foreign}");
    }
    assert_eq!(
        page.matches("http").count(),
        page.matches("http://www.w3.org/2000/svg").count() + 1
    );
    assert!(page.contains("default-src 'none'") && page.contains("prefers-color-scheme: dark"));
    for title in [
        "Time until the work is done",
        "Memory loaded over time",
        "Faults over time",
        "How long a fault took",
    ] {
        assert!(page.contains(title), "{title}");
    }
    // A curve of each mode, with a dot at its end, in both plots over time, and no NaN.
    for colour in ["#5B7FB5", "#D9822B", "#C2485B"] {
        let curves = |tag: &str| tag.starts_with("polyline") && tag.contains(colour);
        assert_eq!(page.split('<').filter(|tag| curves(tag)).count(), 2, "{colour}");
    }
    assert_eq!(page.matches("<circle").count(), 2 * 3);
    assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
    assert_closed(&page);

    bench(&[]).failed(1, &["figures.html exists", "--force"]);
    bench(&["--force"]).ok();
    assert_eq!(names(folder.path()), ["figures.html"]);
}

/// Every element that is opened is closed, in order.
fn assert_closed(page: &str) {
    let body = page.split_once("<html").expect("a page").1;
    let mut open = vec!["html"];
    for tag in body.split('<').skip(1) {
        let tag = tag.split('>').next().unwrap_or_default();
        let name = tag.split([' ', '/']).next().unwrap_or_default();
        match tag.strip_prefix('/') {
            Some(closed) => assert_eq!(open.pop(), Some(closed)),
            None if tag.ends_with('/') || name == "meta" => {}
            None => open.push(name),
        }
    }
    assert!(open.is_empty(), "{open:?}");
}
