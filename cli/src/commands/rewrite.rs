//! `snap flatten` and `snap rebase`: the same guest in another file, with other parents.

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;
use snapfmt::{
    Contents, Metadata, Parent, SectionKind, Snapshot, StateBlob, WriteError, WriteOptions,
    write_layer, write_snapshot,
};
use snapvm::path_of_parent;

use super::summary::Written;
use crate::exit::WrongOptions;
use crate::input::{Input, ParentArgs, refuse_as_output, refuse_existing};
use crate::keys::KeyArgs;
use crate::progress::Bar;
use crate::session::Session;
use crate::size;
use crate::stdout::{print_json, print_line};
use crate::storage::Storage;

/// Join a layer and all of its parents into one complete file.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap flatten layer.snap -o whole.snap
  snap flatten layer.snap -o small.snap --level 19 --chunk-pages 64
  snap flatten plain.snap -o sealed.snap --key-file key --from-plain")]
pub(crate) struct FlattenArgs {
    #[command(flatten)]
    input: Input,

    /// The file to write. It appears when it is complete.
    #[arg(short, long, value_name = "OUT.snap")]
    out: PathBuf,

    #[command(flatten)]
    storage: Storage,

    #[command(flatten)]
    sealing: SealingArgs,

    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
}

/// How a copy differs from a sealed original.
#[derive(clap::Args)]
struct SealingArgs {
    /// With a key: FILE is not sealed, and the copy is to be.
    #[arg(long)]
    from_plain: bool,

    /// With a key: write a copy that is not sealed.
    #[arg(long, conflicts_with = "from_plain")]
    decrypt: bool,
}

impl SealingArgs {
    /// How the input is opened, and how the output is written.
    fn of(&self, input: &Input, storage: &Storage) -> Result<(Input, WriteOptions)> {
        let keys = &input.parents.keys;
        for (given, option) in [(self.from_plain, "--from-plain"), (self.decrypt, "--decrypt")] {
            if given && !keys.is_given() {
                let wrong = format!("{option} goes with a key, as --key-file has it");
                return Err(WrongOptions(wrong).into());
            }
        }
        let none = KeyArgs::default();
        let options = storage.options(if self.decrypt { &none } else { keys })?;
        let keys = if self.from_plain { none } else { keys.clone() };
        let parents = ParentArgs { keys, ..input.parents.clone() };
        Ok((Input { file: input.file.clone(), parents }, options))
    }
}

/// Write a snapshot as a layer of another one, which holds only what differs.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  snap rebase guest.snap --onto base.snap -o layer.snap
  snap rebase layer.snap --onto new-base.snap -o new-layer.snap")]
pub(crate) struct RebaseArgs {
    #[command(flatten)]
    input: Input,

    /// The snapshot to be the parent.
    #[arg(long, value_name = "PARENT.snap")]
    onto: PathBuf,

    /// The file to write. It appears when it is complete.
    #[arg(short, long, value_name = "OUT.snap")]
    out: PathBuf,

    #[command(flatten)]
    storage: Storage,

    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn flatten(args: &FlattenArgs, session: &Session) -> Result<()> {
    let (input, options) = args.sealing.of(&args.input, &args.storage)?;
    refuse_existing(&args.out, args.storage.force)?;
    let snapshot = input.open()?;
    refuse_as_output(&args.out, [&snapshot])?;
    let bar = Bar::new("flattening", session.quiet, &session.interrupt);
    let data: Vec<_> = snapshot.populated().collect();
    let memory = snapshot.memory();
    let parts = Parts::of(&snapshot).with_context(|| args.input.file.display().to_string())?;
    let contents = parts.contents(&snapshot, &memory, &data);
    let written = write_snapshot(&args.out, contents, &options, &|p| bar.update(p));
    let (header, _) = written.map_err(|error| named(error, &args.input.file, &args.input.file))?;
    drop(bar);
    print(&Written::new(&args.out, &header, session.started), args.json, session)
}

pub(crate) fn rebase(args: &RebaseArgs, session: &Session) -> Result<()> {
    let options = args.storage.options(&args.input.parents.keys)?;
    refuse_existing(&args.out, args.storage.force)?;
    let snapshot = args.input.open()?;
    let onto = args.input.beside(&args.onto)?;
    refuse_as_output(&args.out, [&snapshot, &onto])?;
    let bar = Bar::new("rebasing", session.quiet, &session.interrupt);
    // Parts that are zero in both need no comparison.
    let data: Vec<_> = snapshot.populated().chain(onto.populated()).collect();
    let memory = snapshot.memory();
    let parts = Parts::of(&snapshot).with_context(|| args.input.file.display().to_string())?;
    let contents = parts.contents(&snapshot, &memory, &data);
    // In a bucket, it is the object that the name has now.
    let onto_path = onto.paths().next().flatten().unwrap_or(&args.onto);
    let parent = Parent::new(&onto, path_of_parent(onto.storage(), onto_path, &args.out)?);
    let written = write_layer(&args.out, contents, &parent, &options, &|p| bar.update(p));
    let (header, _) = written.map_err(|error| named(error, &args.input.file, &args.onto))?;
    drop(bar);
    print(&Written::new(&args.out, &header, session.started), args.json, session)
}

/// An error that names the file, one of the two inputs.
fn named(error: WriteError, input: &Path, onto: &Path) -> anyhow::Error {
    let file = match error {
        WriteError::Snapshot { .. } => input,
        WriteError::Parent(_) => onto,
        _ => return error.into(),
    };
    anyhow::Error::new(error).context(file.display().to_string())
}

/// The content that is copied from the old file besides memory.
pub(crate) struct Parts {
    states: Vec<StateBlob>,
    metadata: Metadata,
}

impl Parts {
    pub(crate) fn of(snapshot: &Snapshot) -> Result<Self> {
        let tags = snapshot.sections().iter().filter(|section| section.kind == SectionKind::STATE);
        let states = tags.map(|section| {
            let state = snapshot.state(section.tag)?;
            state.context("a state section has disappeared")
        });
        let mut metadata = snapshot.metadata()?;
        let ids = snapshot.headers().map(|header| header.id.to_string());
        metadata.other.insert("rewritten_from".into(), json!(ids.collect::<Vec<_>>()));
        Ok(Self { states: states.collect::<Result<_>>()?, metadata })
    }

    pub(crate) fn contents<'a>(
        &'a self,
        snapshot: &'a Snapshot,
        memory: &'a dyn snapfmt::ReadAt,
        data: &'a [Range<u64>],
    ) -> Contents<'a> {
        let metadata = self.metadata.clone();
        Contents::new(snapshot.regions(), memory, data).states(&self.states).metadata(metadata)
    }
}

fn print(written: &Written<'_>, json: bool, session: &Session) -> Result<()> {
    if json {
        print_json(written)?;
    } else if !session.quiet {
        print_line(format_args!(
            "{}: {} data pages in {}, {} unchanged from the parent",
            written.file.display(),
            written.pages.data,
            size::human(written.file_bytes),
            written.pages.parent
        ))?;
    }
    Ok(())
}
