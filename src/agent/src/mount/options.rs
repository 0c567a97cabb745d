// SPDX-License-Identifier: Apache-2.0
//! The words of an OCI mount's `options` (and of fstab(5)), sorted by what the kernel wants them
//! to be: attributes of the mount, propagation, or parameters of the file system.

use serde::{Deserialize, Serialize};

use crate::error::{AgentError, Result};
use crate::sys::mount::Attributes;

/// A mount's options.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct MountOptions {
    /// `bind` or `rbind` was among them.
    pub(crate) bind: bool,
    /// Binds, and `rro` and its kin, reach the mounts below as well.
    pub(crate) recursive_bind: bool,
    /// A tmpfs starts with what is at its mount point.
    pub(crate) copy_up: bool,
    /// The mount that is at the destination is changed, and nothing is mounted.
    pub(crate) remount: bool,
    /// Owners are shown as mapped by the container's user namespace.
    pub(crate) id_map: Option<IdMap>,
    set: u64,
    clear: u64,
    recursive_set: u64,
    recursive_clear: u64,
    /// In the order given.
    pub(crate) propagation: Vec<Propagation>,
    /// Parameters of the file system: `key=value`, or a flag.
    pub(crate) parameters: Vec<(String, Option<String>)>,
}

/// `idmap` or `ridmap`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) enum IdMap {
    /// Of the mount itself.
    Single,
    /// Of the mounts below it, too.
    Recursive,
}

/// `shared`, `rslave`, ...
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Propagation {
    kind: u64,
    recursive: bool,
}

impl MountOptions {
    /// Sorts the words.
    ///
    /// # Errors
    ///
    /// Words that this agent does not honour, by name.
    pub(crate) fn parse<S: AsRef<str>>(words: &[S]) -> Result<Self> {
        let mut options = Self::default();
        for word in words {
            options.add(word.as_ref())?;
        }
        Ok(options)
    }

    fn add(&mut self, word: &str) -> Result<()> {
        match word {
            // What every mount is without being told.
            "" | "defaults" | "loud" | "nomand" | "noiversion" => {}
            "bind" => self.bind = true,
            "rbind" => {
                self.bind = true;
                self.recursive_bind = true;
            }
            "remount" => self.remount = true,
            "tmpcopyup" => self.copy_up = true,
            "idmap" => self.id_map = Some(IdMap::Single),
            "ridmap" => self.id_map = Some(IdMap::Recursive),
            "mand" | "silent" | "iversion" => {
                return Err(AgentError::unsupported(format!(
                    "mount option {word:?} is no longer the kernel's"
                )));
            }
            _ => {
                if let Some(propagation) = Propagation::parse(word) {
                    self.propagation.push(propagation);
                } else if let Some((set, clear)) = attribute(word) {
                    merge(&mut self.set, &mut self.clear, set, clear);
                } else if let Some((set, clear)) = word.strip_prefix('r').and_then(attribute) {
                    merge(
                        &mut self.recursive_set,
                        &mut self.recursive_clear,
                        set,
                        clear,
                    );
                } else if let Some((key, value)) = word.split_once('=') {
                    self.parameters
                        .push((key.to_owned(), Some(value.to_owned())));
                } else {
                    self.parameters.push((word.to_owned(), None));
                }
            }
        }
        Ok(())
    }

    /// Whether a new mount is to be read-only.
    pub(crate) fn read_only(&self) -> bool {
        (self.set | self.recursive_set) & libc::MOUNT_ATTR_RDONLY != 0
    }

    /// The same, but that the mount can be written to.
    #[must_use]
    pub(crate) fn writable(mut self) -> Self {
        self.set &= !libc::MOUNT_ATTR_RDONLY;
        self.recursive_set &= !libc::MOUNT_ATTR_RDONLY;
        self
    }

    /// Whether a parameter of the file system was given.
    pub(crate) fn has_parameter(&self, name: &str) -> bool {
        self.parameters.iter().any(|(key, _)| key == name)
    }

    /// Attributes of the mount itself.
    pub(crate) fn attributes(&self) -> Attributes {
        Attributes {
            set: self.set,
            clear: self.clear,
            propagation: 0,
        }
    }

    /// Attributes of the mount and of all mounts below it.
    pub(crate) fn recursive_attributes(&self) -> Attributes {
        Attributes {
            set: self.recursive_set,
            clear: self.recursive_clear,
            propagation: 0,
        }
    }
}

impl Propagation {
    /// The word of a mount option or of `linux.rootfsPropagation`.
    pub(crate) fn parse(word: &str) -> Option<Self> {
        let kind = |word| match word {
            "private" => Some(libc::MS_PRIVATE),
            "shared" => Some(libc::MS_SHARED),
            "slave" => Some(libc::MS_SLAVE),
            "unbindable" => Some(libc::MS_UNBINDABLE),
            _ => None,
        };
        kind(word)
            .map(|kind| (kind, false))
            .or_else(|| kind(word.strip_prefix('r')?).map(|kind| (kind, true)))
            .map(|(kind, recursive)| Self { kind, recursive })
    }

    /// The change to make, and whether on the mounts below too.
    pub(crate) fn attributes(self) -> (Attributes, bool) {
        let attributes = Attributes {
            propagation: self.kind,
            ..Attributes::default()
        };
        (attributes, self.recursive)
    }
}

/// A later word wins over an earlier one about the same attribute.
fn merge(all_set: &mut u64, all_clear: &mut u64, set: u64, clear: u64) {
    *all_set = (*all_set & !clear) | set;
    *all_clear = (*all_clear & !set) | clear;
    // The three access-time modes are one field: all its bits are cleared, then one may be set.
    if clear & libc::MOUNT_ATTR__ATIME != 0 {
        *all_clear |= libc::MOUNT_ATTR__ATIME;
    }
}

/// What a word sets and clears.
fn attribute(word: &str) -> Option<(u64, u64)> {
    let found = match word {
        "ro" => (libc::MOUNT_ATTR_RDONLY, 0),
        "rw" => (0, libc::MOUNT_ATTR_RDONLY),
        "nosuid" => (libc::MOUNT_ATTR_NOSUID, 0),
        "suid" => (0, libc::MOUNT_ATTR_NOSUID),
        "nodev" => (libc::MOUNT_ATTR_NODEV, 0),
        "dev" => (0, libc::MOUNT_ATTR_NODEV),
        "noexec" => (libc::MOUNT_ATTR_NOEXEC, 0),
        "exec" => (0, libc::MOUNT_ATTR_NOEXEC),
        "nodiratime" => (libc::MOUNT_ATTR_NODIRATIME, 0),
        "diratime" => (0, libc::MOUNT_ATTR_NODIRATIME),
        "nosymfollow" => (libc::MOUNT_ATTR_NOSYMFOLLOW, 0),
        "symfollow" => (0, libc::MOUNT_ATTR_NOSYMFOLLOW),
        "noatime" => (libc::MOUNT_ATTR_NOATIME, libc::MOUNT_ATTR__ATIME),
        "strictatime" => (libc::MOUNT_ATTR_STRICTATIME, libc::MOUNT_ATTR__ATIME),
        "relatime" | "atime" | "nostrictatime" | "norelatime" => (0, libc::MOUNT_ATTR__ATIME),
        _ => return None,
    };
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorts_containerds_default_mounts() {
        let tmpfs =
            MountOptions::parse(&["nosuid", "strictatime", "mode=755", "size=65536k"]).unwrap();
        assert_eq!(
            tmpfs.attributes().set,
            libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_STRICTATIME
        );
        assert_eq!(tmpfs.attributes().clear, libc::MOUNT_ATTR__ATIME);
        assert_eq!(
            tmpfs.parameters,
            [
                ("mode".to_owned(), Some("755".to_owned())),
                ("size".to_owned(), Some("65536k".to_owned()))
            ]
        );
        let bind = MountOptions::parse(&["rbind", "rprivate", "ro"]).unwrap();
        assert!(bind.bind && bind.recursive_bind);
        assert_eq!(bind.propagation, [Propagation::parse("rprivate").unwrap()]);
        assert_eq!(bind.attributes().set, libc::MOUNT_ATTR_RDONLY);
        assert_eq!(bind.recursive_attributes(), Attributes::default());
    }

    #[test]
    fn the_last_word_wins() {
        let options = MountOptions::parse(&["ro", "noatime", "rw", "relatime"]).unwrap();
        assert_eq!(options.attributes().set, 0);
        assert_eq!(
            options.attributes().clear,
            libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR__ATIME
        );
    }

    #[test]
    fn recursive_attributes_are_kept_apart() {
        let options = MountOptions::parse(&["rbind", "rro", "rnosuid"]).unwrap();
        assert_eq!(options.attributes(), Attributes::default());
        assert_eq!(
            options.recursive_attributes().set,
            libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID
        );
    }

    #[test]
    fn what_is_not_honoured_is_refused_by_name() {
        let error = MountOptions::parse(&["ro", "mand"]).unwrap_err();
        assert!(error.line().contains("mand"));
    }
}
