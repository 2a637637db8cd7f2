//! The messages for wrong arguments, and the help texts.

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
fn a_restored_guest_takes_no_options_of_a_fresh_one() {
    for option in [["--memory", "64M"], ["--work", "8M"], ["--kernel", "vmlinux"]] {
        let args = ["create", "out.snap", "--from", "base.snap", "--when", "after:1s"];
        snap(args.into_iter().chain(option)).failed(2, &["cannot be used with", option[0]]);
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
fn a_missing_snapshot_is_named() {
    for command in ["info", "verify", "restore"] {
        let stderr = snap([command, "/nonexistent/a.snap"]).failed(1, &["No such file"]).stderr;
        assert!(stderr.starts_with("snap: cannot open /nonexistent/a.snap: "), "{stderr}");
    }
}

#[test]
fn a_missing_folder_is_named() {
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

/// The commands that `snap --help` lists.
fn commands() -> Vec<String> {
    let help = snap(["--help"]).ok().stdout;
    let list = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let list = list.take_while(|line| !line.is_empty());
    // Further lines of a description are indented far to the right.
    let names = list.filter(|line| !line.starts_with("   "));
    let names = names.filter_map(|line| line.split_whitespace().next());
    names.filter(|name| *name != "help").map(str::to_owned).collect()
}

#[test]
fn every_command_has_help_with_an_example() {
    let commands = commands();
    for one in ["create", "restore", "info", "flatten", "import", "man"] {
        assert!(commands.iter().any(|name| name == one), "{one} is not in {commands:?}");
    }
    for command in &commands {
        let help = snap([command, "--help"]).ok().stdout;
        assert!(help.contains("Usage: snap"), "{help}");
        let examples = help.split_once("Examples:").map_or("", |(_, examples)| examples);
        assert!(examples.contains(&format!("snap {command}")), "{help}");
    }
    let help = snap(["--help"]).ok().stdout;
    for what in ["Exit codes", "130"] {
        assert!(help.contains(what), "{what} not in {help}");
    }
}

#[test]
fn shells_complete_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let script = snap(["completions", shell]).ok().stdout;
        for command in commands().iter().map(String::as_str).chain(["chunk-pages"]) {
            assert!(script.contains(command), "{command} is not in the script for {shell}");
        }
    }
    // An installed shell accepts the script.
    let script = snap(["completions", "bash"]).ok().stdout;
    let mut bash = std::process::Command::new("bash");
    bash.arg("-c").arg(format!("{script}\ncomplete -p snap"));
    crate::support::run(bash).ok();
    snap(["completions", "tcsh"]).failed(2, &["tcsh", "bash"]);
}

#[test]
fn every_command_has_a_manual_page() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let pages = folder.path().join("share/man1");
    for _ in 0..2 {
        snap(["man".as_ref(), pages.as_os_str()]).ok();
    }
    let page = |name: &str| {
        std::fs::read_to_string(pages.join(format!("{name}.1"))).expect("there is such a page")
    };
    assert!(page("snap").contains("Exit codes"));
    for command in commands() {
        assert!(page(&format!("snap-{command}")).contains("Examples:"), "{command}");
    }
    snap(["man", "/dev/null/folder"]).failed(1, &["/dev/null/folder"]);
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

/// The options in a command's short help, each with its letter, if it has one, and how it takes a value: `-o, --out
/// <OUT>`.
fn options(command: &str) -> Vec<(String, Option<String>, &'static str)> {
    let help = snap([command, "-h"]).ok().stdout;
    let option = |line: &str| {
        // Further lines of a text are indented further.
        let option = line.strip_prefix("      ").or_else(|| line.strip_prefix("  "))?;
        let (letter, option) = match option.split_once(", --") {
            Some((letter, rest)) if letter.len() == 2 => (Some(letter.to_owned()), rest),
            _ => (None, option.strip_prefix("--")?),
        };
        let end =
            option.find(|c: char| c != '-' && !c.is_ascii_lowercase()).unwrap_or(option.len());
        let value = match &option[end..] {
            rest if rest.starts_with(" <") => "a value",
            rest if rest.starts_with('[') => "a value behind =, or none",
            _ => "no value",
        };
        Some((option[..end].to_owned(), letter, value))
    };
    help.lines().filter_map(option).collect()
}

#[test]
fn an_option_is_the_same_in_every_command() {
    let mut known = std::collections::BTreeMap::new();
    for command in commands() {
        for (name, letter, value) in options(&command) {
            let this = (letter, value);
            let (first, before) =
                known.entry(name.clone()).or_insert((command.clone(), this.clone()));
            assert_eq!(*before, this, "--{name} of {first} and of {command}");
        }
    }
    // Options that are in most commands, and their meaning.
    for (name, means) in [("force", "Replace "), ("json", "JSON"), ("force-cpu", "lacks features")]
    {
        let of = commands()
            .into_iter()
            .filter(|command| options(command).iter().any(|(option, _, _)| option == name));
        let of: Vec<_> = of.collect();
        assert!(of.len() > 1, "--{name}: {of:?}");
        for command in of {
            let help = snap([&*command, "--help"]).ok().stdout;
            let help = help.split("Examples:").next().unwrap_or_default();
            let heads = ["\n", " "].map(|end| help.split_once(&format!("--{name}{end}")));
            let about = heads.into_iter().flatten().next().expect("it is there").1;
            let about = about.split("\n\n").next().unwrap_or_default();
            assert!(about.contains(means), "--{name} of {command}: {about}");
        }
    }
    // Every output has a name that -o gives. (`bench` prints; its page is an extra output.)
    for command in [
        "create", "restore", "info", "flatten", "rebase", "rekey", "train", "optimize", "import",
        "export", "man",
    ] {
        let out = ("out".to_owned(), Some("-o".to_owned()), "a value");
        assert!(options(command).contains(&out), "{command} has no -o");
    }
}

#[test]
fn an_output_has_one_name() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("out");
    let out = out.to_string_lossy();
    snap(["man", "-o", &out]).ok();
    assert!(std::fs::read_dir(&*out).is_ok_and(|pages| pages.count() > 10));
    snap(["man", "-o", &out, &out]).failed(2, &["cannot be used with"]);
    snap(["man"]).failed(2, &["FOLDER"]);
    snap(["create", "-o", &out, &out]).failed(2, &["cannot be used with"]);
    snap(["create"]).failed(2, &["OUT.snap"]);
    snap(["info", "a.snap", "-o", "b.png"]).failed(2, &["--map"]);
    snap(["restore", "a.snap", "--force"]).failed(2, &["--record"]);
    crate::support::needs_vm!();
    let file = folder.path().join("a.snap");
    let file = file.to_string_lossy();
    snap(["create", "--memory", "16M", "--work", "4M", "-o", &file]).ok();
    let picture = format!("{out}.png");
    snap(["info", &file, "--map", "-o", &picture]).ok();
    assert!(std::fs::read(&picture).is_ok_and(|bytes| bytes.starts_with(b"\x89PNG")));
    snap(["info", &file, &format!("--map={picture}"), "-o", "b.png"]).failed(2, &["one of them"]);
    // The output of a record: once, and again by force.
    let record = ["restore", "--lazy", "--record", "--beats", "1", "-o", &picture, &file];
    snap(record).failed(1, &["exists; give --force"]);
    snap(record.into_iter().chain(["-f", "--json"])).ok().report();
    snap(["verify", &picture]).ok();
    let ran = snap(["run", "--memory", "16M", "--work", "4M", "--beats", "2"]).ok();
    assert_eq!(ran.stdout.matches("beat ").count(), 2, "{}", ran.stdout);
}
