// SPDX-License-Identifier: Apache-2.0
//! Files and folders of the host that the operator shares with every guest (`sandbox_bind_mounts`). The
//! guest finds each by its last name, whether a container binds it or not.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

/// A file or folder of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostPath {
    path: PathBuf,
    name: String,
    pub(super) writable: bool,
}

impl HostPath {
    /// Reads Kata's form: an absolute path, which `:rw` lets the guest write to, and `:ro` or nothing not.
    fn parse(text: &str) -> Result<Self, String> {
        let (path, writable) = match text.rsplit_once(':') {
            Some((path, "rw")) => (path, true),
            Some((path, "ro")) => (path, false),
            _ => (text, false),
        };
        let path = PathBuf::from(path);
        // Neither `/` nor what ends in `..` has one.
        let name = path.file_name().and_then(|name| name.to_str());
        match name {
            Some(name) if path.is_absolute() => Ok(Self {
                name: name.to_owned(),
                path,
                writable,
            }),
            _ => Err(format!(
                "{text:?} is no absolute path of a file or folder, with :ro or :rw behind it or without"
            )),
        }
    }

    /// Reads several; the guest tells them apart by their last names.
    pub(crate) fn parse_all(texts: &[String]) -> Result<Vec<Self>, String> {
        let paths: Vec<_> = texts
            .iter()
            .map(|text| Self::parse(text))
            .collect::<Result<_, _>>()?;
        let mut names = BTreeSet::new();
        match paths.iter().find(|path| !names.insert(path.name())) {
            Some(twice) => Err(format!("holds two paths that end in {:?}", twice.name())),
            None => Ok(paths),
        }
    }

    /// Where it is on the host.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What the guest calls it.
    pub(super) fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for HostPath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = if self.writable { "rw" } else { "ro" };
        write!(formatter, "{}:{access}", self.path.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_says_who_may_write() {
        for (text, shown, name) in [
            ("/etc/pki", "/etc/pki:ro", "pki"),
            ("/etc/pki/:ro", "/etc/pki/:ro", "pki"),
            ("/srv/a:b:rw", "/srv/a:b:rw", "a:b"),
        ] {
            let path = HostPath::parse(text).unwrap();
            assert_eq!((path.to_string().as_str(), path.name()), (shown, name));
        }
        for text in ["", "/", "relative", "/srv/..", ":rw", "/:rw"] {
            let error = HostPath::parse(text).unwrap_err();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
