//! `snap rekey`: a copy of a sealed snapshot that other keys open, with the same chunks.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::json;
use snapfmt::{
    Existing, Outline, ReadAt, Rekey, Snapshot, Storage, WriteError, open_file, rekey_snapshot,
};
use snapvm::{path_of_parent, refuse_same};

use super::summary::Written;
use crate::exit::WrongOptions;
use crate::input::{Input, refuse_as_output, refuse_existing};
use crate::keys::NewKeyArgs;
use crate::progress::Bar;
use crate::session::Session;
use crate::size;
use crate::stdout::{print_json, print_line};

/// Write a copy of a sealed snapshot that other keys open.
///
/// The chunks are not decrypted and not read: the kernel copies them, and on Btrfs and XFS both files share them. FILE is
/// not changed: its keys still open it. The copy has the same data key: see docs/sealing.md for what that means.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap rekey guest.snap -o new.snap --key-file old --new-key-file new          only the new key
  snap rekey guest.snap -o new.snap --key-file key --keep all --new-key-file more   one key more
  snap rekey guest.snap -o new.snap --key-file key --keep 2              only the second key
  snap rekey layer.snap -o l2.snap --onto new.snap --key-file old --new-key-file new")]
pub(crate) struct Args {
    #[command(flatten)]
    input: Input,

    /// The file to write. It appears when it is complete.
    #[arg(short, long, value_name = "OUT.snap")]
    out: PathBuf,

    #[command(flatten)]
    new_keys: NewKeyArgs,

    /// Which of the present keys open the copy too: `all`, or their numbers, as `snap info` shows them without a key. None
    /// by default.
    #[arg(long, value_name = "all|N[,N...]")]
    keep: Option<Keep>,

    /// For a layer: a copy of its parent, made by `snap rekey`, which becomes the parent of the new file.
    #[arg(long, value_name = "PARENT.snap")]
    onto: Option<PathBuf>,

    /// Replace the output if it exists.
    #[arg(long, short)]
    force: bool,

    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
}

/// Which slots of the original the copy has.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Keep {
    All,
    Numbers(Vec<usize>),
}

impl FromStr for Keep {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Self::All);
        }
        let number = |text: &str| match text.parse() {
            Ok(number) if number > 0 => Ok(number),
            _ => Err(format!("{text:?}: give `all`, or numbers from 1 with commas between them")),
        };
        let mut numbers = text.split(',').map(number).collect::<Result<Vec<_>, _>>()?;
        numbers.sort_unstable();
        numbers.dedup();
        Ok(Self::Numbers(numbers))
    }
}

#[derive(Serialize)]
struct Summary<'a> {
    #[serde(flatten)]
    written: Written<'a>,
    /// How many keys open the file.
    keys: usize,
}

pub(crate) fn run(args: &Args, session: &Session) -> Result<()> {
    let keys = &args.input.parents.keys;
    let wrong = |message: &str| Err(WrongOptions(message.into()).into());
    if keys.is_given_to_write() {
        return wrong("the keys of the new file are given by options that begin with --new-");
    }
    let add = args.new_keys.providers()?;
    if add.is_empty() && args.keep.is_none() {
        return wrong(
            "no key would open the new file: give one by an option that begins with --new-, or --keep",
        );
    }
    refuse_existing(&args.out, args.force)?;
    let snapshot = args.input.open()?;
    refuse_as_output(&args.out, [&snapshot])?;
    let named = || args.input.file.display().to_string();
    let Some(present) = key_count(&snapshot).with_context(named)? else {
        bail!("{} is not sealed: snap flatten --from-plain seals a copy", named());
    };
    let keep = match &args.keep {
        None => Vec::new(),
        Some(Keep::All) => (1..=present).collect(),
        Some(Keep::Numbers(numbers)) => numbers.clone(),
    };
    let keeps_all = keep.len() == present;
    let is_layer = snapshot.paths().len() > 1;
    let same_keys = keeps_all && add.is_empty();
    if is_layer && args.onto.is_none() && !same_keys {
        return wrong(
            "the file is a layer, whose parent only the old keys open: rekey the parent first, and give its copy as --onto",
        );
    }
    if !is_layer && args.onto.is_some() {
        return wrong("--onto is for a layer, and the file is none");
    }
    let onto = match &args.onto {
        Some(path) => {
            let named = || path.display().to_string();
            let file = open_file(path).with_context(named)?;
            refuse_same(&args.out, &file.metadata().with_context(named)?)?;
            let onto = Outline::open(&file).with_context(named)?.header().id;
            if !same_keys && snapshot.headers().nth(1).is_some_and(|parent| parent.id == onto) {
                return wrong(
                    "--onto is the layer's present parent, which only the old keys open: rekey it first",
                );
            }
            Some((Storage::from(file), path.as_path()))
        }
        None => None,
    };
    // Without --onto it is the present parent, which counts as a copy of itself.
    let present_parent = snapshot.storages().zip(snapshot.paths()).nth(1);
    let present_parent = present_parent.and_then(|(storage, path)| Some((storage, path?)));
    let parent = onto.as_ref().map(|(storage, path)| (storage, *path)).or(present_parent);
    let parent = match parent {
        Some((storage, path)) => {
            Some((storage as &dyn ReadAt, path_of_parent(storage, path, &args.out)?))
        }
        None => None,
    };
    let mut metadata = snapshot.metadata().with_context(named)?;
    metadata.other.insert("rewritten_from".into(), json!([snapshot.header().id.to_string()]));
    let existing = if args.force { Existing::Replace } else { Existing::Keep };
    let rekey = Rekey::new(add, metadata).keep(keep).parent(parent).existing(existing);
    let bar = Bar::new("copying", session.quiet, &session.interrupt);
    let written = rekey_snapshot(&args.out, &snapshot, &rekey, &|p| bar.update(p));
    let header = written.map_err(|error| match (&error, &args.onto) {
        (WriteError::Parent(_) | WriteError::OtherParent { .. }, Some(onto)) => {
            anyhow::Error::new(error).context(onto.display().to_string())
        }
        (WriteError::Original(_), _) => anyhow::Error::new(error).context(named()),
        _ => error.into(),
    })?;
    drop(bar);
    let outline = Outline::open(open_file(&args.out)?)?;
    let keys = outline.keys().map_or(0, |keys| keys.slots.len());
    let written = Written::new(&args.out, &header, session.started);
    if args.json {
        return print_json(&Summary { written, keys });
    }
    if !session.quiet {
        print_line(format_args!(
            "{}: opened by {keys} {}; {}",
            args.out.display(),
            if keys == 1 { "key" } else { "keys" },
            size::human(written.file_bytes),
        ))?;
    }
    Ok(())
}

/// How many keys open the file of a snapshot, if it is sealed.
fn key_count(snapshot: &Snapshot) -> Result<Option<usize>> {
    let outline = Outline::open(snapshot.storage())?;
    Ok(outline.keys().map(|keys| keys.slots.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_keys_are_kept() {
        let parsed = |text: &str| text.parse::<Keep>();
        assert_eq!(parsed("all"), Ok(Keep::All));
        assert_eq!(parsed("3,1,3"), Ok(Keep::Numbers(vec![1, 3])));
        for wrong in ["", "0", "1,", "-1", "1 2", "ALL", "99999999999999999999999"] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
    }
}
