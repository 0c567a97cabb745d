// SPDX-License-Identifier: Apache-2.0
//! Which files are read, in Kata's order: the environment, the options of containerd's runtime
//! handler, then a list of places. Beside the file, `config.d` may hold more, read after it in the
//! order of their names, each over the ones before.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::prefix;
use crate::error::{Context, Kind, Result};

/// Names a configuration file before all others.
const ENVIRONMENT: &str = "KATA_CONF_FILE";

/// The operator's file, in the folder of Kata's Rust runtime or beside it.
const OPERATOR: [&str; 2] = [
    "/etc/kata-containers/runtime-rs/configuration.toml",
    "/etc/kata-containers/configuration.toml",
];

/// The installed file, below the folder that the program is installed in, or below `/usr`.
const INSTALLED: &str = "share/defaults/kata-containers/configuration.toml";

/// The folder of further files, beside the file.
const DROP_INS: &str = "config.d";

/// A configuration that the caller names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Named {
    File(PathBuf),
    /// The text itself.
    InPlace(String),
}

/// A text to read, and what it is called in messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Source {
    pub(super) name: String,
    pub(super) text: String,
}

/// The texts that make the configuration, the weightiest last. None of them is fine: the defaults
/// hold then.
pub(super) fn sources(named: Option<Named>) -> Result<Vec<Source>> {
    let program = env::current_exe().ok();
    let installed = [&prefix(program.as_deref()), Path::new("/usr")].map(|it| it.join(INSTALLED));
    let list = OPERATOR.iter().map(PathBuf::from).chain(installed);
    match choose(env::var_os(ENVIRONMENT).as_deref(), named, list) {
        None => Ok(Vec::new()),
        Some(Named::InPlace(text)) => Ok(vec![Source {
            name: "the runtime options of containerd".to_owned(),
            text,
        }]),
        Some(Named::File(path)) => {
            let mut sources = vec![read(&path)?];
            for path in drop_ins(&path)? {
                sources.push(read(&path)?);
            }
            Ok(sources)
        }
    }
}

/// What to read first. A file that was named must exist; the list's need not.
fn choose(
    environment: Option<&OsStr>,
    named: Option<Named>,
    mut list: impl Iterator<Item = PathBuf>,
) -> Option<Named> {
    environment
        .filter(|path| !path.is_empty())
        .map(|path| Named::File(path.into()))
        .or(named)
        .or_else(|| list.find(|path| path.exists()).map(Named::File))
}

/// The files of the folder beside `path`, in the order of their names.
fn drop_ins(path: &Path) -> Result<Vec<PathBuf>> {
    let folder = path.with_file_name(DROP_INS);
    let context = || format!("configuration: read {}", folder.display());
    let entries = match fs::read_dir(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.context(Kind::InvalidArgument, context)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.context(Kind::InvalidArgument, context)?.path();
        // Editors leave copies under other names.
        if path
            .extension()
            .is_some_and(|extension| extension == "toml")
        {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn read(path: &Path) -> Result<Source> {
    let name = path.display().to_string();
    let text = fs::read_to_string(path).context(Kind::InvalidArgument, || {
        format!("configuration: read {name}")
    })?;
    Ok(Source { name, text })
}

#[cfg(test)]
mod tests {
    use std::iter::empty;

    use super::*;

    #[test]
    fn the_named_file_wins() {
        let options = || Some(Named::File("/o.toml".into()));
        let chosen = choose(Some(OsStr::new("/e.toml")), options(), empty());
        assert_eq!(chosen, Some(Named::File("/e.toml".into())));
        let chosen = choose(Some(OsStr::new("")), options(), ["/".into()].into_iter());
        assert_eq!(chosen, options());
    }

    #[test]
    fn the_first_of_the_list_that_exists_is_read() {
        let list = || ["/nowhere/a".into(), "/".into(), "/tmp".into()].into_iter();
        assert_eq!(choose(None, None, list()), Some(Named::File("/".into())));
        assert_eq!(choose(None, None, list().take(1)), None);
    }

    #[test]
    fn drop_ins_are_read_after_the_file_in_the_order_of_their_names() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("configuration.toml");
        let folder = root.path().join(DROP_INS);
        fs::write(&file, "# base\n").unwrap();
        fs::create_dir(&folder).unwrap();
        for name in ["20-b.toml", "10-a.toml", "10-a.toml~", "note.txt"] {
            fs::write(folder.join(name), name).unwrap();
        }
        let sources = sources(Some(Named::File(file))).unwrap();
        let texts: Vec<_> = sources.iter().map(|it| it.text.as_str()).collect();
        assert_eq!(texts, ["# base\n", "10-a.toml", "20-b.toml"]);
        assert!(sources[2].name.ends_with("config.d/20-b.toml"));
    }

    #[test]
    fn a_file_that_is_named_and_missing_is_an_error() {
        let named = Named::File("/nowhere/c.toml".into());
        let error = sources(Some(named)).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument);
        assert!(
            error.chain().contains("/nowhere/c.toml"),
            "{}",
            error.chain()
        );
    }
}
