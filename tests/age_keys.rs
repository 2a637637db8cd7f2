//! Sealed snapshots whose keys are wrapped by age: `--recipient` and `--identity`.

use std::process::Command;

use crate::sealing::Files;
use crate::support::{Ran, SNAP, needs_vm, run, skip, snap};

/// A pair of keys from the tests of the crate age.
const IDENTITY: &str =
    "# for tests\nAGE-SECRET-KEY-1GQ9778VQXMMJVE8SK7J6VT8UJ4HDQAJUVSFCWCM02D8GEWQ72PVQ2Y5J33\n";
const RECIPIENT: &str = "age1t7rxyev2z3rw82stdlrrepyc39nvn86l5078zqkf5uasdy86jp6svpy7pa";
/// Another pair from there: the identity is opened by the passphrase "foobar".
const PROTECTED: &str = "-----BEGIN AGE ENCRYPTED FILE-----
YWdlLWVuY3J5cHRpb24ub3JnL3YxCi0+IHNjcnlwdCBza2I4R0t6L2NLT2s4cGlI
TTRGRjFRIDEwCnVodTdORmZjcCtjRmdnYU54bm8rZEJ5NWlrVHZLY1hyRzZEN2JE
ZVpwWnMKLS0tIEZTcDlSL3oyRC9NQ3JZa3ZvUzNaNlk4bnhBSUdJRTFrMmE4QzMr
UVNETlkK34fdtpwZz+qQaGuirGHEdodVe4JvnSG3ANQpWhkDcsRzoe/+OuHXNdnv
zhBhaKdthstzGXbd2yJbLrTH1A3YbWO+/3zTIZENzKU9XbibLLQ4M/TXwKMzoObY
oiMf5/+8GiQVREtHmm24wsc/479cVwnGVTdH7DL+wANmyf6S9Vc2FYQmXjLDxsJ0
LMF6Cpgcg09C2gg4pcb4TFUWmDuxnZrfggrptOtyzC8O8aRuKPZqCGnzoWNOWl86
fOrxrKTj7xCdNS3+OrCdnBC8Z9cKDxjCGWW3fkjLsYha0Jo=
-----END AGE ENCRYPTED FILE-----
";
const TO_PROTECTED: &str = "age1ysxuaeqlk7xd8uqsh8lsnfwt9jzzjlqf49ruhpjrrj5yatlcuf7qke4pqe";
const SSH: &str = include_str!("keys/ed25519");
const SSH_PROTECTED: &str = include_str!("keys/ed25519-passphrase");
const TO_SSH: &str = include_str!("keys/ed25519.pub");

fn files() -> Files {
    let files = Files::with_golden();
    files.put("id", IDENTITY.as_bytes());
    files.put("protected", PROTECTED.as_bytes());
    files.put("ssh", SSH.as_bytes());
    files.put("ssh-protected", SSH_PROTECTED.as_bytes());
    files
}

/// Seals the golden file for recipients.
fn seal(files: &Files, out: &str, recipients: &[&str]) -> Ran {
    let plain = files.text("plain.snap");
    let mut args = vec!["flatten", &plain, "-o"];
    let out = files.text(out);
    args.extend([out.as_str(), "--from-plain"]);
    args.extend(recipients.iter().flat_map(|recipient| ["--recipient", recipient.trim_end()]));
    snap(args)
}

#[test]
fn each_recipient_opens_the_file_with_its_identity() {
    let files = files();
    seal(&files, "one.snap", &[RECIPIENT]).ok();
    seal(&files, "two.snap", &[RECIPIENT, TO_SSH]).ok();
    files.snap("verify @one.snap --identity @id").ok();
    files.snap("verify @two.snap --identity @id").ok();
    files.snap("verify @two.snap --identity @ssh").ok();
    files.snap("verify @one.snap --identity @ssh --identity @id").ok();
    files.snap("verify @one.snap --identity @ssh").failed(3, &["does not open the snapshot"]);
    files.snap("verify @one.snap").ok();
    let shown = files.snap("info @two.snap").ok().stdout;
    assert!(shown.contains("1: a key of age") && shown.contains("2: a key of age"), "{shown}");
    let export = "export --format raw --decrypt";
    files.snap(&format!("{export} @two.snap -o @a --identity @ssh")).ok();
    files.snap("export --format raw @plain.snap -o @b").ok();
    let raw = |name| std::fs::read(files.path(name)).expect("it is there");
    assert!(raw("a") == raw("b"));
    files.snap("cat @two.snap --gpa 0").failed(3, &["its key is needed", "--identity"]);
    files.snap("verify @sealed.snap --identity @id").failed(3, &["not with an identity of age"]);
    files.snap("verify @two.snap --key-file @key").failed(3, &["keys of other kinds (2, 2)"]);
}

#[test]
fn what_cannot_work_is_refused_with_the_reason() {
    let files = files();
    for (recipient, why) in [
        ("age1xyz", "give a public key"),
        ("AGE-SECRET-KEY-1GQ9778VQXMMJVE8SK7J6VT8UJ4HDQAJUVSFCWCM02D8GEWQ72PVQ2Y5J33", "age1..."),
        (include_str!("keys/rsa.pub"), "ed25519"),
        ("ssh-ed25519 AAAA", "no public key of OpenSSH"),
    ] {
        seal(&files, "no.snap", &[recipient]).failed(2, &[why]);
    }
    let many = vec![RECIPIENT; 17];
    seal(&files, "no.snap", &many).failed(1, &["17 wrapped keys", "1 to 16"]);
    seal(&files, "a.snap", &many[1..]).ok();
    files.snap("verify @a.snap --identity @id").ok();
    files.snap("flatten @a.snap -o @no.snap --identity @id").failed(1, &["--recipient is needed"]);
    files
        .snap(&format!("verify @a.snap --recipient {RECIPIENT}"))
        .failed(1, &["--identity is needed"]);
    assert!(!files.path("no.snap").exists());
    files.put("none", b"# nothing\n");
    files.put("public", TO_SSH.as_bytes());
    files.snap("verify @a.snap --identity @none").failed(1, &["none", "it has no identity"]);
    files.snap("verify @a.snap --identity @public").failed(1, &["it has no identity"]);
    files.snap("verify @a.snap --identity @id --key-file @key").failed(2, &["cannot be used with"]);
    files.snap("verify @a.snap --identity @protected").failed(1, &["protected", "no terminal"]);
    files
        .snap("fork --vm @vm.sock -n 1 --identity @protected")
        .failed(1, &["give an identity without one"]);
    std::process::Command::new("chmod")
        .args(["644", &files.text("id")])
        .status()
        .expect("chmod runs");
    files.snap("verify @a.snap --identity @id").failed(1, &["0644", "chmod 600"]);
}

/// A private key or a key in hex in place of a public key or of a file.
#[test]
fn no_message_repeats_a_key_that_was_given_by_mistake() {
    let files = Files::with_golden();
    let age = IDENTITY.lines().last().expect("a key").to_owned();
    let hex = "5c".repeat(32);
    let (age_part, ssh_part) = (&age[16..40], SSH.lines().nth(2).expect("a line of it"));
    for (key, part) in
        [(&*age, age_part), (&age.to_lowercase(), age_part), (SSH, ssh_part), (&hex, &hex)]
    {
        let sealed = files.text("sealed.snap");
        let out = files.text("no.snap");
        for (args, code) in [
            (vec!["flatten", &*sealed, "-o", &out, "--recipient", key], 2),
            (vec!["rekey", &*sealed, "-o", &out, "--new-recipient", key], 2),
            (vec!["verify", &*sealed, "--identity", key], 1),
            (vec!["verify", &*sealed, "--key-file", key], 1),
            (vec!["fork", "--vm", "vm.sock", "-n", "1", "--key-file", key], 1),
        ] {
            // A value that begins with a dash is taken for an option, and refused as such.
            let code = if key.starts_with('-') { 2 } else { code };
            let ran = snap(args.clone()).failed(code, &[]);
            let printed = format!("{}{}", ran.stdout, ran.stderr).to_uppercase();
            assert!(!printed.contains(&part.to_uppercase()), "{args:?}: {printed}");
        }
        // With "=" the value may begin with a dash.
        for option in ["--recipient", "--identity", "--key-file"] {
            let code = if option == "--recipient" { 2 } else { 1 };
            let ran = snap(["verify", &*sealed, &format!("{option}={key}")]).failed(code, &[]);
            let printed = format!("{}{}", ran.stdout, ran.stderr).to_uppercase();
            assert!(!printed.contains(&part.to_uppercase()), "{option}: {printed}");
        }
        if key != hex {
            for args in [vec!["verify", key], vec![key], vec!["create", "--memory", key]] {
                let ran = snap(args.clone());
                let printed = format!("{}{}", ran.stdout, ran.stderr).to_uppercase();
                assert!(
                    ran.code != Some(0) && !printed.contains(&part.to_uppercase()),
                    "{args:?}: {printed}"
                );
            }
        }
    }
}

/// What is in the file is what `age` reads and writes.
#[test]
fn the_commands_of_age_and_the_options_open_the_same_files() {
    let files = files();
    let age = ["age", "age-keygen"]
        .iter()
        .all(|name| Command::new(name).arg("--version").output().is_ok());
    if !age {
        return skip("the_commands_of_age", "age cannot be run");
    }
    seal(&files, "a.snap", &[RECIPIENT]).ok();
    let decrypt = format!("age -d -i {}", files.text("id"));
    snap(["verify", &files.text("a.snap"), "--key-command", &decrypt]).ok();
    for wrap in [format!("age -r {RECIPIENT}"), format!("age -a -r {RECIPIENT}")] {
        let (plain, out) = (files.text("plain.snap"), files.text("b.snap"));
        let args = ["flatten", &plain, "-o", &out, "--from-plain", "-f", "--wrap-command", &wrap];
        snap(args).ok();
        files.snap("verify @b.snap --identity @id").ok();
    }
}

/// Types a passphrase at a terminal.
const TYPES: &str = r#"
import os, pty, sys
child, terminal = pty.fork()
if child == 0:
    os.execv(sys.argv[2], sys.argv[2:])
shown = b''
while b'passphrase of' not in shown:
    shown += os.read(terminal, 1024)
os.write(terminal, sys.argv[1].encode() + b'\n')
try:
    while True:
        more = os.read(terminal, 1024)
        if not more:
            break
        shown += more
except OSError:
    pass
_, status = os.waitpid(child, 0)
sys.stdout.buffer.write(shown)
sys.exit(os.waitstatus_to_exitcode(status))
"#;

#[test]
fn a_passphrase_is_asked_for_on_the_terminal_and_not_shown() {
    let files = files();
    if Command::new("python3").arg("--version").output().is_err() {
        return skip("a_passphrase_is_asked_for", "python3 cannot be run");
    }
    seal(&files, "a.snap", &[TO_PROTECTED, TO_SSH]).ok();
    let verify = |identity: &str, passphrase: &str| {
        let mut command = Command::new("python3");
        command.args(["-c", TYPES, passphrase, SNAP, "verify", &files.text("a.snap")]);
        command.args(["--identity", &files.text(identity)]);
        run(command)
    };
    for (identity, passphrase) in [("protected", "foobar"), ("ssh-protected", "tree")] {
        let ran = verify(identity, passphrase).ok();
        assert!(!ran.stdout.contains(passphrase), "{}", ran.stdout);
        let wrong = verify(identity, "wrongone");
        assert_eq!(wrong.code, Some(1), "{}", wrong.stdout);
        assert!(wrong.stdout.contains("the passphrase does not open it"), "{}", wrong.stdout);
        assert!(!wrong.stdout.contains("wrongone"), "{}", wrong.stdout);
    }
}

#[test]
fn a_copy_is_opened_by_other_recipients() {
    let files = files();
    let to = |recipient: &str, out: &str, rest: &str| {
        let mut args: Vec<String> =
            ["rekey", &files.text("sealed.snap"), "-o", &files.text(out), "--key-file"]
                .map(str::to_owned)
                .to_vec();
        args.extend([files.text("key"), "--new-recipient".into(), recipient.trim_end().into()]);
        args.extend(rest.split_whitespace().map(str::to_owned));
        snap(args).ok()
    };
    to(RECIPIENT, "a.snap", "");
    files.snap("verify @a.snap --identity @id").ok();
    files.snap("verify @a.snap --key-file @key").failed(3, &["keys of other kinds (2)"]);
    to(TO_SSH, "b.snap", "--keep all");
    files.snap("verify @b.snap --identity @ssh").ok();
    files.snap("verify @b.snap --key-file @key").ok();
    files.snap("rekey @b.snap -o @c.snap --identity @ssh --keep 2").ok();
    files.snap("verify @c.snap --identity @ssh").ok();
    files
        .snap(&format!("rekey @b.snap -o @d.snap --identity @ssh --recipient {RECIPIENT}"))
        .failed(2, &["begin with --new-"]);
}

/// The keys of what a jailed guest's process writes are wrapped in the jail.
#[test]
fn a_guest_is_created_restored_and_saved_with_recipients() {
    needs_vm!();
    let files = files();
    files.snap(&format!("create @a.snap --memory 64M --work 4M --recipient {RECIPIENT}")).ok();
    for options in ["", "--lazy"] {
        files.snap(&format!("restore @a.snap --identity @id --beats 2 {options}")).ok();
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (file, id) = (files.text("a.snap"), files.text("id"));
    let guest = ["restore", &file, "--lazy", "--identity", &id, "--recipient", RECIPIENT];
    let mut vm = crate::control::Vm::start(folder.path(), &guest);
    let socket = vm.socket.to_str().expect("a plain name").to_owned();
    files.snap(&format!("create @b.snap --vm {socket} --live")).ok();
    files.snap("restore @b.snap --identity @id --beats 1").ok();
    let forked = format!("fork --vm {socket} -n 1 --identity @id --recipient {RECIPIENT}");
    files.snap(&format!("{forked} -- --beats 2")).ok();
    vm.beats(1);
    vm.interrupt();
}
