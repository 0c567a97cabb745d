// SPDX-License-Identifier: Apache-2.0
//! `env`: versions, files and the host, for a report of what runs where.

use std::env;
use std::fs;
use std::path::Path;

use rustix::system::uname;
use toml::{Table, Value};
use vmm::control::PROTOCOL_VERSION;

use crate::cli::PROGRAM;
use crate::config::{LEAST_MEMORY, MOST_VCPUS, Sourced, host};
use crate::error::{Context, Result};

/// The description as TOML, or as JSON.
pub(super) fn describe(sourced: &Sourced, json: bool) -> Result<String> {
    let table = table(sourced);
    if json {
        let text = serde_json::to_string_pretty(&table).internal(|| "write JSON".to_owned())?;
        Ok(format!("{text}\n"))
    } else {
        Ok(table.to_string())
    }
}

fn table(sourced: &Sourced) -> Table {
    let program = env::current_exe().unwrap_or_default();
    let system = uname();
    let section = |entries: Vec<(&str, Value)>| -> Value {
        let entries = entries
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value));
        entries.collect::<Table>().into()
    };
    let sections = [
        (
            "runtime",
            section(vec![
                ("version", env!("CARGO_PKG_VERSION").into()),
                ("path", shown(&program.with_file_name(PROGRAM))),
                ("configuration", sourced.files.clone().into()),
            ]),
        ),
        (
            "monitor",
            section(vec![
                ("protocol", i64::from(PROTOCOL_VERSION).into()),
                ("most_vcpus", i64::from(MOST_VCPUS).into()),
                ("least_memory_mib", i64::from(LEAST_MEMORY).into()),
            ]),
        ),
        ("kernel", file(&sourced.config.kernel)),
        ("image", file(&sourced.config.image)),
        (
            "host",
            section(vec![
                ("kernel", system.release().to_string_lossy().as_ref().into()),
                (
                    "architecture",
                    system.machine().to_string_lossy().as_ref().into(),
                ),
                ("cpus", i64::from(host::cpus()).into()),
                ("memory_mib", i64::from(host::memory_mib()).into()),
                ("kvm", Path::new("/dev/kvm").exists().into()),
                ("vhost_net", Path::new("/dev/vhost-net").exists().into()),
                ("tun", Path::new("/dev/net/tun").exists().into()),
                (
                    "cgroup2",
                    Path::new("/sys/fs/cgroup/cgroup.controllers")
                        .exists()
                        .into(),
                ),
            ]),
        ),
    ];
    sections
        .into_iter()
        .map(|(name, section)| (name.to_owned(), section))
        .collect()
}

/// A file's path, and its size where it exists.
fn file(path: &Path) -> Value {
    let mut table = Table::new();
    table.insert("path".to_owned(), shown(path));
    if let Ok(metadata) = fs::metadata(path) {
        let size = i64::try_from(metadata.len()).unwrap_or(i64::MAX);
        table.insert("bytes".to_owned(), size.into());
    }
    table.into()
}

fn shown(path: &Path) -> Value {
    path.display().to_string().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Named;

    #[test]
    fn both_forms_say_the_same() {
        let sourced = Sourced::read(Some(Named::InPlace(String::new()))).unwrap();
        let toml: Table = describe(&sourced, false).unwrap().parse().unwrap();
        let json: Table = serde_json::from_str(&describe(&sourced, true).unwrap()).unwrap();
        assert_eq!(toml, json);
        for section in ["runtime", "monitor", "kernel", "image", "host"] {
            assert!(toml.contains_key(section), "{section} in {toml}");
        }
        let cpus = toml
            .get("host")
            .and_then(|host| host.get("cpus")?.as_integer());
        assert_eq!(cpus, Some(host::cpus().into()));
    }
}
