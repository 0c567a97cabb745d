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
use crate::mount::{self, Target};

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
}

/// Makes the default devices, those of the spec and the links, below `root`.
///
/// # Errors
///
/// The kernel's, with the device's path.
pub(crate) fn create(root: BorrowedFd<'_>, nodes: &[Node]) -> Result<()> {
    let dev = mount::create_in_root(root, Path::new("/dev"), Target::Directory)
        .context(|| "mkdir \"/dev\"")?;
    for (name, major, minor) in DEFAULT {
        let path = Path::new("/dev").join(name);
        if nodes.iter().any(|node| node.path == path) {
            continue;
        }
        let node = Node {
            path,
            kind: Kind::Character,
            major,
            minor,
            mode: 0o666,
            uid: 0,
            gid: 0,
        };
        make(&dev, name, &node)?;
    }
    for node in nodes {
        let folder = node.path.parent().unwrap_or_else(|| Path::new("/"));
        let name = node.path.file_name().unwrap_or_default().to_string_lossy();
        let folder = mount::create_in_root(root, folder, Target::Directory)
            .context(|| format!("mkdir for device {:?}", node.path))?;
        make(&folder, &name, node)?;
    }
    for (target, name) in LINKS {
        match symlinkat(target, &dev, name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(AgentError::io(format!("link \"/dev/{name}\""), error)),
        }
    }
    Ok(())
}

fn make(folder: &OwnedFd, name: &str, node: &Node) -> Result<()> {
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
        Some(Uid::from_raw(node.uid)),
        Some(Gid::from_raw(node.gid)),
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
