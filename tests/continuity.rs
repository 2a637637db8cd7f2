//! A restored guest continues exactly where the snapshotted one stopped.

use crate::support::{Sample, needs_vm};

/// The numbers of the beats in a guest's output; every beat must be ok.
fn beats(output: &str) -> Vec<u64> {
    let beats = output.lines().filter_map(|line| line.strip_prefix("beat "));
    beats.map(|beat| beat.strip_suffix(" ok").expect(beat).parse().expect(beat)).collect()
}

fn continues_equally_in_both_modes(memory: &str) {
    // Snapshotted in the middle of its work, not at its start.
    let sample =
        Sample::create(&["--memory", memory, "--work", "16M", "--when", "output:beat 7 ok\n"]);
    let eager = sample.restore(&["--beats", "6", "--hash", "--memory", memory]).ok();
    let lazy = sample.restore(&["--lazy", "--beats", "6", "--hash"]).ok();
    for ran in [&eager, &lazy] {
        assert_eq!(beats(&ran.stdout), [8, 9, 10, 11, 12, 13]);
        assert_eq!(ran.report()["bad_beats"], 0);
    }
    assert_eq!(eager.stdout, lazy.stdout);
    let (eager, lazy) = (eager.report(), lazy.report());
    assert_eq!(eager["memory_sha256"].as_str().map(str::len), Some(64));
    assert_eq!(eager["memory_sha256"], lazy["memory_sha256"]);
    // One more beat gives other memory: the hash shows what the guest does.
    let more = sample.restore(&["--beats", "7", "--hash"]).ok().report();
    assert_ne!(more["memory_sha256"], eager["memory_sha256"]);
    // It was really lazy: most pages were never loaded, and the others were loaded by faults.
    let pages = &lazy["pager"]["pages"];
    assert!(pages["missing"].as_u64() > pages["total"].as_u64().map(|total| total / 2), "{pages}");
    assert!(lazy["pager"]["faults"].as_u64() > Some(10));
    assert!(eager["pager"].is_null());
}

/// Memory that is loaded in the background is right, and complete in the end.
#[test]
fn a_guest_continues_equally_while_its_memory_is_populated() {
    needs_vm!();
    let sample = Sample::create(&["--memory", "64M", "--work", "16M"]);
    let eager = sample.restore(&["--beats", "6", "--hash"]).ok().report();
    for populate in ["full", "idle", "full,1G"] {
        let options = ["--lazy", "--populate", populate, "--beats", "6", "--hash"];
        let lazy = sample.restore(&options).ok();
        assert_eq!(beats(&lazy.stdout), [1, 2, 3, 4, 5, 6], "{populate}");
        let report = lazy.report();
        assert_eq!(report["memory_sha256"], eager["memory_sha256"], "{populate}");
        assert_ne!(report["pager"]["population"], "off");
    }
    for placement in ["spin", "none"] {
        let options = ["--lazy", "--placement", placement, "--beats", "6", "--hash"];
        let lazy = sample.restore(&options).ok().report();
        assert_eq!(lazy["memory_sha256"], eager["memory_sha256"], "{placement}");
    }
}

#[test]
fn a_64_mib_guest_continues_equally_in_both_modes() {
    needs_vm!();
    continues_equally_in_both_modes("64M");
}

#[test]
fn a_4_gib_guest_continues_equally_in_both_modes() {
    needs_vm!();
    continues_equally_in_both_modes("4G");
}

#[test]
fn every_codec_and_chunk_size_restores_the_same() {
    needs_vm!();
    let mut hashes = std::collections::BTreeSet::new();
    for codec in ["raw", "lz4", "zstd"] {
        for pages in ["1", "16", "512"] {
            let options =
                ["--memory", "32M", "--work", "8M", "--codec", codec, "--chunk-pages", pages];
            let sample = Sample::create(&options);
            for mode in [&["--beats", "2", "--hash"][..], &["--beats", "2", "--hash", "--lazy"]] {
                let ran = sample.restore(mode).ok();
                assert_eq!(beats(&ran.stdout), [1, 2], "{codec} {pages}");
                hashes.insert(ran.report()["memory_sha256"].as_str().map(str::to_owned));
            }
        }
    }
    assert_eq!(hashes.len(), 1, "{hashes:?}");
}

#[test]
fn a_hundred_lazy_restores_in_a_row_are_all_right() {
    needs_vm!();
    let sample = Sample::small();
    for number in 0..100 {
        let ran = sample.restore(&["--lazy", "--beats", "2"]).ok();
        assert_eq!(beats(&ran.stdout), [1, 2], "restore {number}");
    }
    assert_eq!(sample.names(), ["guest.snap"]);
}

#[test]
fn a_run_ends_as_its_options_say() {
    needs_vm!();
    let sample = Sample::small();
    let until = sample.restore(&["--lazy", "--until", "beat 3"]).ok();
    assert!(until.stdout.ends_with("beat 3"), "{}", until.stdout);
    assert_eq!(until.report()["stop"], "done");
    let timed = sample.restore(&["--lazy", "--for", "2s"]).ok();
    assert_eq!(timed.report()["stop"], "time is up");
    // Time does not wait for the end of a line: the last one may be cut.
    let whole_lines = timed.stdout.rsplit_once('\n').expect("a line in two seconds").0;
    assert!(!beats(whole_lines).is_empty());
}
