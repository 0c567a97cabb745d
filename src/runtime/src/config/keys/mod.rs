// SPDX-License-Identifier: Apache-2.0
//! The keys that a configuration may hold: Kata's names, in Kata's tables.
//!
//! A key sets something; or stands for a choice that this build has made already, and then the
//! one value that agrees with it is accepted; or says how to do what another key has turned off.

mod choices;
mod settings;

use std::fmt;

use toml::Value;

use self::choices::CHOICES;
use self::settings::SETTINGS;
use super::Config;
use super::value::Read;

/// The machine's keys are in the table that Kata's files use for a built-in monitor.
const MACHINE: &str = "hypervisor.dragonball";
/// The key that says how much memory a machine boots with.
pub(super) const MEMORY: (&str, &str) = (MACHINE, "default_memory");
const TEMPLATE: &str = "hypervisor.dragonball.factory";
const AGENT: &str = "agent.kata";
const MEMORY_AGENT: &str = "agent.kata.mem_agent";
const RUNTIME: &str = "runtime";

/// A key.
#[derive(Debug)]
pub(crate) struct Key {
    pub(crate) table: &'static str,
    pub(crate) name: &'static str,
    /// The annotation by which a pod may set it, where the operator lets it.
    pub(super) annotation: Option<Annotation>,
    rule: Rule,
}

/// An annotation's name below `io.katacontainers.config.`: its group and its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Annotation {
    pub(super) group: &'static str,
    pub(super) name: &'static str,
}

/// What becomes of a key's value.
#[derive(Debug)]
enum Rule {
    /// It is set, or the error says what is wanted.
    Set {
        get: fn(&Config) -> Value,
        set: fn(&mut Config, &Value) -> Read<()>,
    },
    /// It must be the one that this build goes by, for this reason.
    Fixed(Choice, &'static str),
    /// It has no effect: what it is about is off.
    Off,
}

/// A value that can stand in a constant.
#[derive(Debug, Clone, Copy)]
enum Choice {
    Text(&'static str),
    Flag(bool),
    Number(i64),
    Nothing,
}

impl From<Choice> for Value {
    fn from(choice: Choice) -> Self {
        match choice {
            Choice::Text(text) => text.into(),
            Choice::Flag(flag) => flag.into(),
            Choice::Number(number) => number.into(),
            Choice::Nothing => Self::Array(Vec::new()),
        }
    }
}

impl Key {
    /// Table and name: what tells keys apart.
    pub(super) fn path(&self) -> (&'static str, &'static str) {
        (self.table, self.name)
    }

    /// What it is set to, where it sets anything.
    pub(super) fn value(&self, config: &Config) -> Option<Value> {
        match self.rule {
            Rule::Set { get, .. } => Some(get(config)),
            Rule::Fixed(..) | Rule::Off => None,
        }
    }

    /// Does what it says, or says what it wants instead.
    pub(super) fn apply(&self, config: &mut Config, value: &Value) -> Read<()> {
        match self.rule {
            Rule::Set { set, .. } => set(config, value),
            Rule::Fixed(choice, reason) => {
                let choice = Value::from(choice);
                if *value == choice {
                    Ok(())
                } else {
                    Err(format!("this build wants {choice}: {reason}"))
                }
            }
            Rule::Off => Ok(()),
        }
    }

    const fn annotated(mut self, group: &'static str, name: &'static str) -> Self {
        self.annotation = Some(Annotation { group, name });
        self
    }
}

impl fmt::Display for Key {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}", self.table, self.name)
    }
}

const fn key(table: &'static str, name: &'static str, rule: Rule) -> Key {
    Key {
        table,
        name,
        annotation: None,
        rule,
    }
}

const fn set(
    table: &'static str,
    name: &'static str,
    get: fn(&Config) -> Value,
    set: fn(&mut Config, &Value) -> Read<()>,
) -> Key {
    key(table, name, Rule::Set { get, set })
}

const fn fixed(
    table: &'static str,
    name: &'static str,
    choice: Choice,
    reason: &'static str,
) -> Key {
    key(table, name, Rule::Fixed(choice, reason))
}

const fn off(table: &'static str, name: &'static str) -> Key {
    key(table, name, Rule::Off)
}

/// All keys.
pub(super) fn all() -> impl Iterator<Item = &'static Key> {
    SETTINGS.iter().chain(CHOICES)
}

/// The tables, in the order of their keys.
pub(super) fn tables() -> Vec<&'static str> {
    let mut tables = Vec::new();
    for key in all() {
        if !tables.contains(&key.table) {
            tables.push(key.table);
        }
    }
    tables
}

/// The keys of a table that set something.
pub(super) fn settable(table: &str) -> Vec<&'static str> {
    SETTINGS
        .iter()
        .filter(|key| key.table == table)
        .map(|key| key.name)
        .collect()
}
