//! `snap doctor`: what this host offers, and what to do about what is missing.

mod check;
mod isolation;
mod machine;

use anyhow::Result;
use serde::Serialize;

use self::check::{Check, Status};
use crate::exit::HostLacks;
use crate::stdout::{print_json, print_text};

/// Check what this host offers: KVM, page faults, isolation, devices; and what to do about what is missing.
///
/// It changes nothing. Exit code 4: guests cannot run here, or not lazily.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap doctor
  snap doctor --json | jq -r '.checks[] | select(.status == \"missing\") | .advice'")]
pub(crate) struct Args {
    /// Print it as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    kernel: String,
    /// Whether nothing is missing that `snap` needs.
    usable: bool,
    checks: Vec<Check>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let checks: Vec<_> = machine::checks().into_iter().chain(isolation::checks()).collect();
    let lacks = |check: &&Check| check.required && check.status == Status::Missing;
    let lacking: Vec<_> = checks.iter().filter(lacks).map(|check| check.name).collect();
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let version = env!("CARGO_PKG_VERSION");
    let report = Report { version, kernel: release, usable: lacking.is_empty(), checks };
    match args.json {
        true => print_json(&report)?,
        false => print_text(as_text(&report))?,
    }
    match lacking[..] {
        [] => Ok(()),
        _ => Err(HostLacks(lacking.join(", ")).into()),
    }
}

fn as_text(report: &Report) -> String {
    let mut text = format!("snap {} on Linux {}\n", report.version, report.kernel);
    for check in &report.checks {
        text += &format!("{:<8} {:<18} {}\n", check.status.word(), check.name, check.found);
        if check.status == Status::Missing {
            let rest = [("for", Some(check.needed_for)), ("do", check.advice.as_deref())];
            for (what, line) in rest.iter().filter_map(|(what, line)| Some((what, (*line)?))) {
                text += &format!("{:<27} {what}: {line}\n", "");
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_is_missing_has_advice() {
        let there = Check::new("fuse", "snap mount").ok("there", json!({}));
        let missing = Check::new("tap", "--net").missing("no device", "modprobe tun");
        let checks = vec![there, missing];
        let report = Report { version: "1", kernel: "6.18".into(), usable: true, checks };
        let expected = "\
snap 1 on Linux 6.18
ok       fuse               there
missing  tap                no device
                            for: --net
                            do: modprobe tun
";
        assert_eq!(as_text(&report), expected);
    }
}
