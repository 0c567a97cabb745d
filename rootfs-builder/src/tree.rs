// SPDX-License-Identifier: Apache-2.0
//! What the image holds.

use std::collections::BTreeMap;

use thiserror::Error;

/// A file of the image; its owner is root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A directory; names are unique and in byte order, as EROFS wants them.
    Directory {
        /// Permission bits.
        mode: u16,
        /// What it holds.
        entries: BTreeMap<String, Node>,
    },
    /// A regular file.
    File {
        /// Permission bits.
        mode: u16,
        /// Its content.
        content: Vec<u8>,
    },
    /// A symbolic link.
    Symlink {
        /// Where it points.
        target: String,
    },
}

/// Why an entry could not be added.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum TreeError {
    /// A component of the path exists and is no directory.
    #[error("{0}: a part of the path is not a directory")]
    NotADirectory(String),
    /// The path is taken.
    #[error("{0}: exists already")]
    Exists(String),
    /// The path is empty, relative, or has an empty, `.` or `..` part.
    #[error("{0:?}: not a plain absolute path")]
    BadPath(String),
}

impl Node {
    /// An empty directory.
    #[must_use]
    pub fn directory(mode: u16) -> Self {
        Self::Directory {
            mode,
            entries: BTreeMap::new(),
        }
    }

    /// Adds `node` at the absolute path `path`; missing parents are made with mode 0755.
    ///
    /// # Errors
    /// The path is taken, malformed, or leads through something that is no directory.
    pub fn insert(&mut self, path: &str, node: Self) -> Result<(), TreeError> {
        let bad = || TreeError::BadPath(path.to_owned());
        let parts: Vec<&str> = path.strip_prefix('/').ok_or_else(bad)?.split('/').collect();
        if parts.iter().any(|part| matches!(*part, "" | "." | "..")) {
            return Err(bad());
        }
        let (name, parents) = parts.split_last().ok_or_else(bad)?;
        let mut place = self;
        for parent in parents {
            let Self::Directory { entries, .. } = place else {
                return Err(TreeError::NotADirectory(path.to_owned()));
            };
            place = entries
                .entry((*parent).to_owned())
                .or_insert_with(|| Self::directory(0o755));
        }
        let Self::Directory { entries, .. } = place else {
            return Err(TreeError::NotADirectory(path.to_owned()));
        };
        if entries.contains_key(*name) {
            return Err(TreeError::Exists(path.to_owned()));
        }
        entries.insert((*name).to_owned(), node);
        Ok(())
    }
}

/// The guest image's tree around `agent`, a static executable.
///
/// # Errors
/// None of the fixed paths collide, so only a change of this list can make it fail.
pub fn guest_image(agent: Vec<u8>) -> Result<Node, TreeError> {
    let mut root = Node::directory(0o755);
    // Where the agent mounts: devtmpfs, proc, sysfs, and tmpfs on what must be writable.
    for path in ["/dev", "/etc", "/mnt", "/proc", "/run", "/sys", "/var"] {
        root.insert(path, Node::directory(0o755))?;
    }
    root.insert("/tmp", Node::directory(0o1777))?;
    root.insert(
        "/usr/bin/kata-agent",
        Node::File {
            mode: 0o755,
            content: agent,
        },
    )?;
    root.insert(
        "/sbin/init",
        Node::Symlink {
            target: "../usr/bin/kata-agent".to_owned(),
        },
    )?;
    Ok(root)
}

/// Gives an image a shell, for the debug console.
///
/// # Errors
/// The image has one.
pub fn add_shell(image: &mut Node, shell: Vec<u8>) -> Result<(), TreeError> {
    image.insert(
        "/bin/sh",
        Node::File {
            mode: 0o755,
            content: shell,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_it_cannot_place() {
        let mut root = Node::directory(0o755);
        root.insert(
            "/a/b",
            Node::File {
                mode: 0o644,
                content: vec![],
            },
        )
        .unwrap();
        let file = || Node::File {
            mode: 0o644,
            content: vec![],
        };
        assert_eq!(
            root.insert("/a/b", file()),
            Err(TreeError::Exists("/a/b".into()))
        );
        assert_eq!(
            root.insert("/a/b/c", file()),
            Err(TreeError::NotADirectory("/a/b/c".into()))
        );
        for path in ["", "a", "/", "/a/", "/a/../c", "/./c"] {
            assert_eq!(
                root.insert(path, file()),
                Err(TreeError::BadPath(path.into()))
            );
        }
    }
}
