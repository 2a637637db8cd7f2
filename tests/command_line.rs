//! What is said to those who give the wrong arguments, and to those who ask.

use crate::support::snap;

#[test]
fn impossible_sizes_are_refused_before_anything_is_done() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("a.snap");
    let out = out.to_string_lossy();
    snap(["create", &out, "--memory", "0"]).failed(1, &["--memory", "minimum"]);
    snap(["create", &out, "--memory", "5000"]).failed(1, &["--memory"]);
    snap(["create", &out, "--memory", "2T"]).failed(1, &["maximum"]);
    for (option, value) in [
        ("--memory", "lots"),
        ("--codec", "gzip"),
        ("--level", "99"),
        ("--chunk-pages", "0"),
        ("--chunk-pages", "513"),
        ("--threads", "0"),
        ("--when", "sometime"),
        ("--when", "output:"),
        ("--timeout", "soon"),
    ] {
        snap(["create", &out, option, value]).failed(2, &[option, value]);
    }
    assert_eq!(std::fs::read_dir(folder.path()).expect("the folder is there").count(), 0);
}

#[test]
fn a_guest_that_is_brought_back_takes_no_words_of_a_fresh_one() {
    for word in [["--memory", "64M"], ["--work", "8M"], ["--kernel", "vmlinux"]] {
        let args = ["create", "out.snap", "--from", "base.snap", "--when", "after:1s"];
        snap(args.into_iter().chain(word)).failed(2, &["cannot be used with", word[0]]);
    }
}

#[test]
fn a_level_without_zstd_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("a.snap");
    let out = out.to_string_lossy();
    for codec in ["raw", "lz4"] {
        snap(["create", &out, "--codec", codec, "--level", "3"]).failed(1, &["--level", codec]);
        snap(["import", "x", "-o", &out, "--codec", codec, "--level", "3"]).failed(1, &["--level"]);
    }
}

#[test]
fn a_snapshot_that_is_not_there_is_named() {
    for command in ["info", "verify", "restore"] {
        let stderr = snap([command, "/nonexistent/a.snap"]).failed(1, &["No such file"]).stderr;
        assert!(stderr.starts_with("snap: cannot open /nonexistent/a.snap: "), "{stderr}");
    }
}

#[test]
fn a_folder_that_is_not_there_is_named() {
    crate::support::needs_vm!();
    let out = "/nonexistent/a.snap";
    snap(["create", out, "--memory", "32M", "--work", "4M"])
        .failed(1, &["/nonexistent/a.snap", "No such file"]);
}

#[test]
fn a_working_area_that_does_not_fit_is_refused() {
    crate::support::needs_vm!();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("a.snap");
    let out = out.to_string_lossy();
    snap(["create", &out, "--memory", "64M", "--work", "64M"]).failed(1, &["does not fit"]);
    snap(["create", &out, "--work", "1M"]).failed(1, &["multiple"]);
}

#[test]
fn every_command_has_help_with_examples_or_a_description() {
    let commands = [
        "create", "restore", "info", "verify", "diff", "flatten", "rebase", "import", "export",
        "cat", "pages", "demo",
    ];
    for command in commands {
        let help = snap([command, "--help"]).ok().stdout;
        assert!(help.contains("Usage: snap"), "{help}");
    }
    let help = snap(["--help"]).ok().stdout;
    for what in commands.iter().chain(&["Exit codes", "130"]) {
        assert!(help.contains(what), "{what} not in {help}");
    }
}

#[test]
fn unknown_commands_and_missing_arguments_end_with_code_2() {
    snap(["frobnicate"]).failed(2, &["frobnicate"]);
    snap(["info"]).failed(2, &["FILE"]);
    snap(["restore", "a", "--beats", "0"]).failed(2, &["--beats"]);
    snap(["restore", "a", "--on-error", "kill"]).failed(2, &["--lazy"]);
    snap(["restore", "a", "--populate", "full"]).failed(2, &["--lazy"]);
    for bad in ["fast", "off,1M", "full,0", "idle,much"] {
        snap(["restore", "--lazy", "a", "--populate", bad]).failed(2, &["--populate", bad]);
    }
}
