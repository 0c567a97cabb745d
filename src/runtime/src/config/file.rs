// SPDX-License-Identifier: Apache-2.0
//! Reads the files: their keys, each with the line that it stands in. A later file's keys go over
//! an earlier one's, table by table, so that a file beside Kata's own may correct it.

use std::collections::BTreeSet;
use std::fmt;

use serde::Deserialize;
use toml::Value;
use toml::de::{DeTable, ValueDeserializer};

use super::keys::{self, Key, settable, tables};
use super::lookup::Source;
use crate::error::{Kind, Result, ShimError};

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Origin {
    /// No file sets it.
    BuiltIn,
    Line {
        file: String,
        line: usize,
    },
    /// The annotation of this name.
    Annotation(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BuiltIn => formatter.write_str("default"),
            Self::Line { file, line } => write!(formatter, "{file}:{line}"),
            Self::Annotation(name) => write!(formatter, "annotation {name}"),
        }
    }
}

/// All that is wrong with a configuration.
#[derive(Debug, Default)]
pub(super) struct Reasons(BTreeSet<(Origin, String)>);

impl Reasons {
    pub(super) fn add(&mut self, origin: Origin, reason: String) {
        self.0.insert((origin, reason));
    }

    /// One line with every reason, if there is any.
    pub(super) fn into_result(self) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let reasons: Vec<_> = self
            .0
            .iter()
            .map(|(origin, reason)| format!("{origin}: {reason}"))
            .collect();
        Err(ShimError::new(
            Kind::InvalidArgument,
            format!("configuration: {}", reasons.join("; ")),
        ))
    }
}

/// What the files say, all together.
#[derive(Debug, Default)]
pub(super) struct Files {
    /// Their names, in the order in which they were read.
    pub(super) names: Vec<String>,
    /// Each key once, with the value that counts.
    pub(super) settings: Vec<(&'static Key, Value, Origin)>,
    pub(super) reasons: Reasons,
}

impl Files {
    pub(super) fn read(sources: &[Source]) -> Self {
        let mut files = Self::default();
        for source in sources {
            files.names.push(source.name.clone());
            let reader = Reader {
                source,
                files: &mut files,
                listed: BTreeSet::new(),
            };
            reader.read();
        }
        files
    }

    fn set(&mut self, key: &'static Key, value: Value, origin: Origin) {
        self.settings
            .retain(|(other, ..)| other.path() != key.path());
        self.settings.push((key, value, origin));
    }
}

/// Reads one file.
struct Reader<'a> {
    source: &'a Source,
    files: &'a mut Files,
    /// Tables whose keys have been listed.
    listed: BTreeSet<String>,
}

impl Reader<'_> {
    fn read(mut self) {
        match DeTable::parse(&self.source.text) {
            Ok(table) => self.walk("", table.into_inner()),
            Err(error) => {
                let origin = self.origin(error.span().map_or(0, |span| span.start));
                // The parser's own words go over several lines.
                let words: Vec<_> = error.message().split_whitespace().collect();
                self.files.reasons.add(origin, words.join(" "));
            }
        }
    }

    fn walk(&mut self, name: &str, table: DeTable<'_>) {
        for (key, value) in table {
            let origin = self.origin(key.span().start);
            let path = match name {
                "" => key.get_ref().to_string(),
                _ => format!("{name}.{}", key.get_ref()),
            };
            let known = keys::all().find(|it| it.table == name && it.name == key.get_ref());
            if let Some(known) = known {
                match Value::deserialize(ValueDeserializer::from(value)) {
                    Ok(value) => self.files.set(known, value, origin),
                    Err(error) => self.files.reasons.add(origin, error.message().to_owned()),
                }
            } else if !value.get_ref().is_table() {
                let reason = self.unknown(name, &path);
                self.files.reasons.add(origin, reason);
            } else if is_table(&path) {
                // Checked just now.
                if let toml::de::DeValue::Table(table) = value.into_inner() {
                    self.walk(&path, table);
                }
            } else {
                let reason = format!("[{path}]: unknown table; there are {}", listed(&tables()));
                self.files.reasons.add(origin, reason);
            }
        }
    }

    fn unknown(&mut self, table: &str, path: &str) -> String {
        let keys = settable(table);
        if keys.is_empty() || !self.listed.insert(table.to_owned()) {
            return format!("{path}: unknown key");
        }
        format!("{path}: unknown key; [{table}] has {}", keys.join(", "))
    }

    fn origin(&self, offset: usize) -> Origin {
        let before = self.source.text.get(..offset).unwrap_or_default();
        Origin::Line {
            file: self.source.name.clone(),
            line: before.matches('\n').count().saturating_add(1),
        }
    }
}

/// Whether a table is one of ours, or holds one.
fn is_table(path: &str) -> bool {
    tables().iter().any(|table| {
        table
            .strip_prefix(path)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    })
}

fn listed(tables: &[&str]) -> String {
    let names: Vec<_> = tables.iter().map(|table| format!("[{table}]")).collect();
    names.join(", ")
}
