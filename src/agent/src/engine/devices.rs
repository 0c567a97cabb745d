// SPDX-License-Identifier: Apache-2.0
//! Device nodes and links of a container's `/dev`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use protocols::agent::oci::LinuxDevice;
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, Uid, chmodat, chownat, makedev, mknodat, statat, symlinkat,
};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{AgentError, Context as _, Result};
use crate::mount::{self, MountOptions, Target};

/// A device node.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Node {
    /// As seen from the container.
    path: PathBuf,
    kind: Kind,
    major: u32,
    minor: u32,
    mode: u32,
    uid: u32,
    gid: u32,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
enum Kind {
    Character,
    Block,
    Fifo,
}

/// What every container has: name, major and minor number.
pub(crate) const DEFAULT: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
];

impl Node {
    /// # Errors
    ///
    /// A type, number or path that no device has.
    pub(crate) fn new(device: &LinuxDevice) -> Result<Self> {
        let wrong =
            |what: &str| AgentError::invalid(format!("linux.devices: {:?}: {what}", device.Path));
        let path = PathBuf::from(&device.Path);
        if !path.is_absolute() || path.file_name().is_none() {
            return Err(wrong("not an absolute path"));
        }
        let kind = match device.Type.as_str() {
            "c" | "u" => Kind::Character,
            "b" => Kind::Block,
            "p" => Kind::Fifo,
            _ => return Err(wrong("unknown type")),
        };
        let number = |number: i64| {
            u32::try_from(number).map_err(|_| wrong("major or minor number out of range"))
        };
        let (major, minor) = match kind {
            Kind::Fifo => (0, 0),
            _ => (number(device.Major)?, number(device.Minor)?),
        };
        Ok(Self {
            path,
            kind,
            major,
            minor,
            // The wire can't tell "not given" from 0, which nobody means.
            mode: match device.FileMode & 0o7777 {
                0 => 0o666,
                mode => mode,
            },
            uid: device.UID,
            gid: device.GID,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// User and group, as the container numbers them.
    pub(super) fn owner(&self) -> (u32, u32) {
        (self.uid, self.gid)
    }
}

/// The default devices that `nodes` does not have itself, then `nodes`.
pub(super) fn all(nodes: &[Node]) -> impl Iterator<Item = Node> {
    let default = DEFAULT.into_iter().map(|(name, major, minor)| Node {
        path: Path::new("/dev").join(name),
        kind: Kind::Character,
        major,
        minor,
        mode: 0o666,
        uid: 0,
        gid: 0,
    });
    default
        .filter(|default| !nodes.iter().any(|node| node.path == default.path))
        .chain(nodes.iter().cloned())
}

/// Makes the default devices, those of the spec and the links, below `root`. A container in a user
/// namespace can't make any: it gets `prepared` ones.
///
/// # Errors
///
/// The kernel's, with the device's path.
pub(super) fn create(
    root: BorrowedFd<'_>,
    nodes: &[Node],
    prepared: Option<&[(Node, OwnedFd)]>,
) -> Result<()> {
    let dev = mount::create_in_root(root, Path::new("/dev"), Target::Directory)
        .context(|| "mkdir \"/dev\"")?;
    match prepared {
        Some(prepared) => {
            for (node, file) in prepared {
                bind(root, node, file)?;
            }
        }
        None => {
            for node in all(nodes) {
                let (folder, name) = place(root, &node)?;
                make(&folder, &name, &node, node.owner())?;
            }
        }
    }
    for (target, name) in LINKS {
        match symlinkat(target, &dev, name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(AgentError::io(format!("link \"/dev/{name}\""), error)),
        }
    }
    Ok(())
}

/// A /dev that was bound from elsewhere has its own devices; those of the spec must be among them.
///
/// # Errors
///
/// The first that isn't.
pub(super) fn check(root: BorrowedFd<'_>, nodes: &[Node]) -> Result<()> {
    nodes.iter().try_for_each(|node| {
        let (folder, name) = place(root, node)?;
        same(&folder, &name, node)
    })
}

/// The folder that a node is in, and its name there.
fn place(root: BorrowedFd<'_>, node: &Node) -> Result<(OwnedFd, String)> {
    let folder = node.path.parent().unwrap_or_else(|| Path::new("/"));
    let name = node.path.file_name().unwrap_or_default().to_string_lossy();
    let folder = mount::create_in_root(root, folder, Target::Directory)
        .context(|| format!("mkdir for device {:?}", node.path))?;
    Ok((folder, name.into_owned()))
}

fn bind(root: BorrowedFd<'_>, node: &Node, file: &OwnedFd) -> Result<()> {
    let context = || format!("make device {:?}", node.path);
    let target = mount::create_in_root(root, &node.path, Target::File).context(context)?;
    mount::attach(file, target.as_fd(), &MountOptions::default())
        .map_err(|error| AgentError::internal(format!("{}: {}", context(), error.line())))
}

/// Makes a node for `owner`, in the ids of the calling process.
pub(super) fn make(folder: &OwnedFd, name: &str, node: &Node, owner: (u32, u32)) -> Result<()> {
    let context = || format!("make device {:?}", node.path);
    let kind = match node.kind {
        Kind::Character => FileType::CharacterDevice,
        Kind::Block => FileType::BlockDevice,
        Kind::Fifo => FileType::Fifo,
    };
    let mode = Mode::from_raw_mode(node.mode);
    match mknodat(folder, name, kind, mode, makedev(node.major, node.minor)) {
        Ok(()) => {}
        Err(Errno::EXIST) => return same(folder, name, node),
        Err(error) => return Err(AgentError::io(context(), error)),
    }
    // mknod's mode passes through the umask.
    chmodat(folder, name, mode, AtFlags::empty()).context(context)?;
    chownat(
        folder,
        name,
        Some(Uid::from_raw(owner.0)),
        Some(Gid::from_raw(owner.1)),
        AtFlags::SYMLINK_NOFOLLOW,
    )
    .context(context)
}

/// Accepts what is there already only if it is this very device.
fn same(folder: &OwnedFd, name: &str, node: &Node) -> Result<()> {
    let found = statat(folder.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW)
        .context(|| format!("look at {:?}", node.path))?;
    let kind = FileType::from_raw_mode(found.st_mode);
    let number = found.st_rdev == makedev(node.major, node.minor);
    let same = match node.kind {
        Kind::Character => kind == FileType::CharacterDevice && number,
        Kind::Block => kind == FileType::BlockDevice && number,
        Kind::Fifo => kind == FileType::Fifo,
    };
    if same {
        Ok(())
    } else {
        Err(AgentError::precondition(format!(
            "make device {:?}: something else is there",
            node.path
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(path: &str, kind: &str, major: i64) -> LinuxDevice {
        LinuxDevice {
            Path: path.to_owned(),
            Type: kind.to_owned(),
            Major: major,
            Minor: 1,
            ..LinuxDevice::default()
        }
    }

    #[test]
    fn checks_what_a_device_is() {
        let node = Node::new(&device("/dev/fuse", "c", 10)).unwrap();
        assert_eq!((node.major, node.minor, node.mode), (10, 1, 0o666));
        for wrong in [
            device("dev/x", "c", 1),
            device("/", "c", 1),
            device("/dev/x", "x", 1),
            device("/dev/x", "b", -1),
        ] {
            Node::new(&wrong).unwrap_err();
        }
    }
}
