//! The files that a thread may still name, as rules of Landlock. Files that are open stay usable without a rule.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, Erratum, PathBeneath, Ruleset as Builder,
    RulesetAttr, RulesetCreatedAttr, Scope,
};
use rustix::fs::{CWD, Mode, OFlags};

use crate::install;
use crate::role::Role;

/// What may be done with a file, or in a folder and below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Files are opened for reading, and folders are listed.
    Read,
    /// Files and empty folders lose their names.
    Remove,
    /// All of that, and new files and folders. Nothing is executed, and no devices are made.
    Write,
}

/// A file or a folder, and what may be done with it.
#[derive(Debug)]
pub(crate) struct Named {
    pub(crate) at: OwnedFd,
    /// Where it is in an empty root: nowhere, if this is empty.
    pub(crate) path: PathBuf,
    access: Access,
}

/// The files that a thread may still name.
#[derive(Debug, Default)]
pub struct Files {
    any: bool,
    root_changes: bool,
    named: Vec<Named>,
}

impl Files {
    /// None.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// All that the user may use.
    #[must_use]
    pub fn any() -> Self {
        Self { any: true, ..Self::default() }
    }

    /// The root folder will change while the rules are in use. Then they keep no folder open, from whose descriptor the
    /// folders of the old root could be named.
    pub fn change_root(&mut self) {
        self.root_changes = true;
    }

    /// Adds a file or a folder. Links in its path are followed now. What does not exist is not added.
    ///
    /// # Errors
    /// As open(2) with O_PATH.
    pub fn allow(&mut self, path: &Path, access: Access) -> io::Result<()> {
        // The folder of a name without a folder.
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        match rustix::fs::openat(CWD, path, flags, Mode::empty()) {
            Ok(at) => {
                let mut path = std::path::absolute(path)?;
                // In a new root each file is at one path only. Otherwise, below a folder that is mounted by a path with `..`,
                // a place for another file would be made in the host's folder.
                if path.components().any(|part| part == Component::ParentDir) {
                    path = std::fs::read_link(link_to(&at))?;
                }
                self.add(at, path, access)
            }
            Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Adds a file that is open, which is then opened a second time: by `/proc/self/fd`, or by its name if it still has one.
    ///
    /// # Errors
    /// As fstat(2) or open(2).
    pub fn allow_again(&mut self, file: &File, access: Access) -> io::Result<()> {
        let same = |named: &OwnedFd| -> io::Result<bool> {
            let (open, named) = (rustix::fs::fstat(file)?, rustix::fs::fstat(named)?);
            Ok((open.st_dev, open.st_ino) == (named.st_dev, named.st_ino))
        };
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // Without /proc, no name is known.
        let link = std::fs::read_link(link_to(file));
        // A memfd has no rules, and needs none (EBADFD of landlock_add_rule(2)).
        if link.as_ref().is_ok_and(|path| path.starts_with("/memfd:")) {
            return Ok(());
        }
        if let Ok(path) = link
            && let Ok(named) = rustix::fs::openat(CWD, &path, flags, Mode::empty())
            && same(&named)?
        {
            return self.add(named, path, access);
        }
        self.add(file.as_fd().try_clone_to_owned()?, PathBuf::new(), access)
    }

    fn add(&mut self, at: OwnedFd, path: PathBuf, access: Access) -> io::Result<()> {
        self.named.push(Named { at, path, access });
        Ok(())
    }

    /// All that are named.
    pub(crate) fn named(&self) -> &[Named] {
        &self.named
    }

    /// The rules for threads of a role. Besides the files they take away: TCP connections and, where the role needs none,
    /// signals to other processes and abstract sockets. A kernel that lacks a part of this has no rules for it:
    /// [`crate::support`].
    ///
    /// # Errors
    /// The kernel refuses the rules.
    pub fn rules(&self, role: Role) -> io::Result<Rules> {
        let refused = |error: landlock::RulesetError| io::Error::other(error);
        let network = AccessNet::BindTcp | AccessNet::ConnectTcp;
        let mut builder = Builder::default().handle_access(network).map_err(refused)?;
        if !self.any {
            builder = builder.handle_access(AccessFs::from_all(ABI::V5)).map_err(refused)?;
        }
        let scopes = scopes(role);
        if !scopes.is_empty() {
            builder = builder.scope(scopes).map_err(refused)?;
        }
        let mut rules = builder.create().map_err(refused)?;
        // Beside files of any name there is nothing to allow.
        for named in self.named.iter().filter(|_| !self.any) {
            let rule = PathBeneath::new(&named.at, rights(named)?);
            rules = rules.add_rule(rule).map_err(refused)?;
        }
        let ruleset: Option<OwnedFd> = rules.into();
        let keep = !self.root_changes && ruleset.is_some();
        let of_proc = self.named.iter().filter(|named| keep && named.path.starts_with("/proc"));
        let kept = of_proc.map(|named| named.at.try_clone()).collect::<io::Result<_>>()?;
        Ok(Rules { ruleset, _kept: kept })
    }
}

/// What a role is cut off from.
fn scopes(role: Role) -> BitFlags<Scope> {
    match role {
        // A server kills guests.
        Role::Server | Role::Fork => Scope::AbstractUnixSocket.into(),
        // Before this erratum was fixed, the rule also refused signals to threads of the same process.
        _ if Erratum::current().contains(Erratum::ScopedSignalHandling) => {
            Scope::AbstractUnixSocket | Scope::Signal
        }
        _ => Scope::AbstractUnixSocket.into(),
    }
}

fn rights(named: &Named) -> io::Result<BitFlags<AccessFs>> {
    let all = match named.access {
        Access::Read => AccessFs::ReadFile | AccessFs::ReadDir,
        Access::Remove => AccessFs::RemoveFile | AccessFs::RemoveDir | AccessFs::ReadDir,
        Access::Write => {
            AccessFs::from_all(ABI::V5)
                & !(AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock)
        }
    };
    let is_folder = rustix::fs::fstat(&named.at)?.st_mode & libc::S_IFMT == libc::S_IFDIR;
    Ok(if is_folder { all } else { all & AccessFs::from_file(ABI::V5) })
}

/// The name by which an open file can be opened again.
pub(crate) fn link_to(file: &impl AsFd) -> PathBuf {
    use std::os::fd::AsRawFd;
    format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()).into()
}

/// Rules of Landlock that are ready for any number of threads.
#[derive(Debug)]
pub struct Rules {
    /// None, if the kernel has no Landlock.
    ruleset: Option<OwnedFd>,
    /// Folders of `/proc`: while they are open, the kernel keeps the entries to which the rules belong.
    _kept: Vec<OwnedFd>,
}

impl Rules {
    /// Applies them to the calling thread, and to the threads that it starts later. This cannot be undone.
    ///
    /// # Errors
    /// As landlock_restrict_self(2).
    pub fn apply(&self) -> io::Result<()> {
        rustix::thread::set_no_new_privs(true)?;
        self.ruleset.as_ref().map_or(Ok(()), |ruleset| install::restrict(ruleset.as_fd()))
    }
}
