//! `--config FILE.json`: options from a file. They count as if they were on the command line before all others.
//!
//! Each key must be an option of the command, and becomes one, `--key=value`. So the parser of the command line checks
//! it too. A struct with a field for each option would be a second list of them. A map would accept a key that is given
//! twice.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::error::{ContextKind, ContextValue};
use clap::{Arg, ArgAction, Command};
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::input::reading;

/// The length limit of the file.
const FILE_BYTES: u64 = 1 << 20;
const OPTION: &str = "--config";

/// The option as the commands show it.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct ConfigArgs {
    /// Take options from this file too, a JSON object with the options' names as keys: {"memory": "512M", "cpus": 2,
    /// "disk": ["root.img", "data.img,ro"], "rng": true}. Options on the command line override it.
    // `expand` reads this before all other options.
    #[arg(long, value_name = "FILE.json")]
    #[allow(dead_code)]
    config: Option<PathBuf>,
}

/// A command line with the options of its file in it.
pub(crate) struct Expanded {
    pub(crate) args: Vec<OsString>,
    file: PathBuf,
    /// The options that come from the file, and on which of its lines they are.
    lines: Vec<(String, usize)>,
}

/// Whether a command line seems to name a file of options. If it does not, there is none.
pub(crate) fn is_named(args: &[OsString]) -> bool {
    value_of(OPTION, args).is_some()
}

/// The command line with the options of the file that `--config` names; `None` if it names none. `command` is changed
/// so that later options count more than earlier ones.
pub(crate) fn expand(command: &mut Command, args: &[OsString]) -> Result<Option<Expanded>> {
    // Only flags precede the command.
    let is_word = |arg: &&OsString| !arg.as_encoded_bytes().starts_with(b"-");
    let Some((at, name)) = args.iter().enumerate().skip(1).find(|(_, arg)| is_word(arg)) else {
        return Ok(None);
    };
    let rest = args[at + 1..].split(|arg| arg == "--").next().unwrap_or_default();
    let Some(subcommand) = name.to_str().and_then(|name| command.find_subcommand_mut(name)) else {
        return Ok(None);
    };
    if option(subcommand, OPTION.trim_start_matches('-')).is_none() {
        return Ok(None);
    }
    let Some(file) = value_of(OPTION, rest) else { return Ok(None) };
    let file = PathBuf::from(file);
    let text = read(&file)?;
    let entries = entries(&text)
        .with_context(|| format!("{}: not a JSON object of options", file.display()))?;
    let mut words = Vec::new();
    let mut lines = Vec::new();
    for (key, value) in entries {
        let line = line_of(&text, value);
        let place = || format!("{}, line {line}: {key:?}", file.display());
        ensure!(!lines.iter().any(|(known, _)| *known == key), "{}: given twice", place());
        let known = option(subcommand, &key).filter(|_| OPTION.trim_start_matches('-') != key);
        let known = known.with_context(|| {
            format!("{} is no option of snap {}", place(), subcommand.get_name())
        })?;
        let value: Value = serde_json::from_str(value.get()).with_context(place)?;
        let new = words_of(known, &key, &value).with_context(place)?;
        // A list on the command line replaces that of the file.
        let replaced = matches!(known.get_action(), ArgAction::Append)
            && rest.iter().any(|arg| is_option(&format!("--{key}"), arg));
        if !replaced {
            words.extend(new);
        }
        lines.push((key, line));
    }
    let subcommand = name.to_string_lossy().into_owned();
    let changed = std::mem::take(command);
    *command = changed.mut_subcommand(subcommand, |command| command.args_override_self(true));
    let args = [&args[..=at], &words, &args[at + 1..]].concat();
    Ok(Some(Expanded { args, file, lines }))
}

impl Expanded {
    /// The file and line of the option that an error is about, if the file has it.
    pub(crate) fn place_of(&self, error: &clap::Error) -> Option<String> {
        let Some(ContextValue::String(about)) = error.get(ContextKind::InvalidArg) else {
            return None;
        };
        let option = about.strip_prefix("--")?.split([' ', '=', '[']).next()?;
        let (key, line) = self.lines.iter().find(|(key, _)| key == option)?;
        Some(format!("{}, line {line}: {key:?}", self.file.display()))
    }
}

fn option<'a>(command: &'a Command, name: &str) -> Option<&'a Arg> {
    command.get_arguments().find(|arg| arg.get_long() == Some(name))
}

/// `--option value` or `--option=value` among arguments.
fn value_of(option: &str, args: &[OsString]) -> Option<OsString> {
    let at = args.iter().position(|arg| is_option(option, arg))?;
    match args[at].as_os_str() == option {
        true => args.get(at + 1).cloned(),
        false => args[at].to_str()?.split_once('=').map(|(_, value)| value.into()),
    }
}

fn is_option(option: &str, arg: &OsStr) -> bool {
    let rest = arg.as_encoded_bytes().strip_prefix(option.as_bytes());
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"="))
}

fn read(file: &Path) -> Result<String> {
    let named = || format!("cannot read {}", file.display());
    let mut text = String::new();
    let _reading = reading(file);
    let opened = File::open(file).with_context(named)?;
    opened.take(FILE_BYTES + 1).read_to_string(&mut text).with_context(named)?;
    ensure!(text.len() as u64 <= FILE_BYTES, "{}: longer than 1 MiB", file.display());
    Ok(text)
}

/// The words of the command line for an option of the file.
fn words_of(option: &Arg, key: &str, value: &Value) -> Result<Vec<OsString>> {
    let word = |value: &Value| match value {
        Value::String(text) => Ok(format!("--{key}={text}").into()),
        Value::Number(number) => Ok(format!("--{key}={number}").into()),
        other => Err(anyhow!("expected a text or a number, found {}", kind(other))),
    };
    match (option.get_action(), value) {
        (ArgAction::SetTrue, Value::Bool(true)) => Ok(vec![format!("--{key}").into()]),
        (ArgAction::SetTrue, Value::Bool(false)) => Ok(Vec::new()),
        (ArgAction::SetTrue, other) => bail!("expected true or false, found {}", kind(other)),
        (ArgAction::Append, Value::Array(values)) => values.iter().map(word).collect(),
        (_, value) => Ok(vec![word(value)?]),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The line on which a value begins that was parsed out of `text`.
fn line_of(text: &str, value: &RawValue) -> usize {
    let offset = value.get().as_ptr() as usize - text.as_ptr() as usize;
    1 + text.as_bytes()[..offset.min(text.len())].iter().filter(|byte| **byte == b'\n').count()
}

/// The entries of a JSON object, in their order, with duplicates.
fn entries(text: &str) -> serde_json::Result<Vec<(String, &RawValue)>> {
    struct Object;
    impl<'de> Visitor<'de> for Object {
        type Value = Vec<(String, &'de RawValue)>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            std::iter::from_fn(|| map.next_entry().transpose()).collect()
        }
    }
    let mut json = serde_json::Deserializer::from_str(text);
    let entries = json.deserialize_map(Object)?;
    json.end()?;
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use clap::CommandFactory;

    use super::*;
    use crate::Cli;

    fn expanded(json: &str, args: &[&str]) -> Result<Vec<String>> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(json.as_bytes()).unwrap();
        let path = file.path().to_str().unwrap();
        let args: Vec<OsString> = args.iter().map(|arg| arg.replace("FILE", path).into()).collect();
        let expanded = expand(&mut Cli::command(), &args)?.unwrap();
        let text = |arg: OsString| arg.into_string().unwrap().replace(path, "FILE");
        Ok(expanded.args.into_iter().map(text).collect())
    }

    #[test]
    fn keys_become_options_before_the_others() {
        let json = r#"{"memory": "1G", "cpus": 2, "rng": true, "force": false,
            "disk": ["a.img", "b.img,ro"], "cmdline": "--quiet x=1"}"#;
        let found =
            expanded(json, &["snap", "-q", "create", "o.snap", "--config", "FILE"]).unwrap();
        let expected = [
            "snap",
            "-q",
            "create",
            "--memory=1G",
            "--cpus=2",
            "--rng",
            "--disk=a.img",
            "--disk=b.img,ro",
            "--cmdline=--quiet x=1",
            "o.snap",
            "--config",
            "FILE",
        ];
        assert_eq!(found, expected);
        // A list on the command line replaces that of the file.
        let found = expanded(json, &["snap", "run", "--config=FILE", "--disk", "c.img"]);
        assert!(found.is_err(), "force is not an option of run");
        let json = r#"{"disk": "a.img"}"#;
        let found = expanded(json, &["snap", "run", "--config=FILE", "--disk", "c.img"]).unwrap();
        assert_eq!(found, ["snap", "run", "--config=FILE", "--disk", "c.img"]);
    }

    #[test]
    fn errors_name_the_key_and_its_line() {
        let refused = |json: &str, what: &str| {
            let error = expanded(json, &["snap", "run", "--config", "FILE"]).unwrap_err();
            let error = format!("{error:#}");
            assert!(error.contains(what), "{error}");
        };
        refused(
            "{\n  \"memory\": \"1G\",\n  \"memroy\": 1\n}",
            "line 3: \"memroy\" is no option of",
        );
        refused("{\"memory\": \"1G\",\n\"memory\": \"2G\"}", "line 2: \"memory\": given twice");
        refused("{\"memory\": null}", "\"memory\": expected a text or a number, found null");
        refused("{\"memory\": [1]}", "found a list");
        refused("{\n\n\"rng\": 1}", "line 3: \"rng\": expected true or false, found a number");
        refused("{\"disk\": [{}]}", "expected a text or a number, found an object");
        refused("{\"config\": \"x\"}", "\"config\" is no option");
        refused("[1]", "not a JSON object of options");
        refused("{\"memory\": 1,}", "at line 1 column");
        refused(&" ".repeat(FILE_BYTES as usize + 1), "longer than 1 MiB");
    }

    #[test]
    fn commands_without_the_option_are_left_alone() {
        for args in [&["snap"][..], &["snap", "info", "--config", "x"], &["snap", "run", "--", "x"]]
        {
            let args: Vec<_> = args.iter().map(OsString::from).collect();
            assert!(expand(&mut Cli::command(), &args).unwrap().is_none());
        }
    }
}
