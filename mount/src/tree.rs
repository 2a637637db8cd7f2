//! The folders and files of a mount, by inode number.

use std::sync::atomic::AtomicBool;

use snapvm::interchange::{Export, ExportError, ExportFormat, FileView};
use snapvm::snapfmt::Snapshot;

use crate::pages::LoadedPages;

/// The inode number of the mount's own folder: see `FUSE_ROOT_ID` in linux/fuse.h.
pub(crate) const ROOT: u64 = 1;

/// A node's inode number is its index and [`ROOT`].
pub(crate) struct Tree(Vec<Node>);

pub(crate) struct Node {
    pub(crate) name: &'static str,
    pub(crate) parent: u64,
    /// `None` for a folder.
    pub(crate) file: Option<MountedFile>,
}

pub(crate) struct MountedFile {
    pub(crate) view: FileView,
    /// Which of its pages the kernel has been given.
    pub(crate) loaded: LoadedPages,
    /// Whether it was read since the kernel has known the inode.
    pub(crate) was_read: AtomicBool,
}

/// The formats that have a folder of their own.
const FOLDERS: [(&str, ExportFormat); 3] = [
    ("firecracker", ExportFormat::Firecracker),
    ("cloud-hypervisor", ExportFormat::CloudHypervisor),
    ("qemu", ExportFormat::Qemu),
];

impl Tree {
    /// The files that `snapshot` can be exported as.
    pub(crate) fn new(snapshot: &Snapshot) -> Result<Self, ExportError> {
        let mut tree = Self(vec![Node { name: "", parent: ROOT, file: None }]);
        for format in [ExportFormat::Raw, ExportFormat::Elf] {
            tree.add(ROOT, Export::new(snapshot, format)?.views());
        }
        for (name, format) in FOLDERS {
            match Export::new(snapshot, format) {
                Ok(export) => {
                    let folder = tree.push(Node { name, parent: ROOT, file: None });
                    tree.add(folder, export.views());
                }
                // It was not imported from there.
                Err(ExportError::NoState { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(tree)
    }

    fn add(&mut self, parent: u64, views: Vec<FileView>) {
        for view in views {
            let loaded = LoadedPages::new(view.data());
            let file = Some(MountedFile { view, loaded, was_read: AtomicBool::new(false) });
            let name = file.as_ref().map_or("", |file| file.view.name());
            self.push(Node { name, parent, file });
        }
    }

    fn push(&mut self, node: Node) -> u64 {
        self.0.push(node);
        (self.0.len() - 1) as u64 + ROOT
    }

    pub(crate) fn node(&self, inode: u64) -> Option<&Node> {
        self.0.get(usize::try_from(inode.checked_sub(ROOT)?).ok()?)
    }

    pub(crate) fn file(&self, inode: u64) -> Option<&MountedFile> {
        self.node(inode)?.file.as_ref()
    }

    /// The nodes in a folder, with their inode numbers.
    pub(crate) fn children(&self, folder: u64) -> impl Iterator<Item = (u64, &Node)> {
        let numbered = (ROOT..).zip(&self.0);
        numbered.filter(move |(inode, node)| node.parent == folder && *inode != ROOT)
    }

    /// The path of a file below the mount.
    pub(crate) fn path(&self, inode: u64) -> String {
        let Some(node) = self.node(inode) else { return String::new() };
        match self.node(node.parent) {
            Some(folder) if !folder.name.is_empty() => format!("{}/{}", folder.name, node.name),
            _ => node.name.to_owned(),
        }
    }
}
