// SPDX-License-Identifier: Apache-2.0
//! The tables of `tests/conformance`, and how a case changes the default config.json.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

/// `config.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub case: Vec<Case>,
    pub absent: Vec<Absent>,
}

/// What a field shows.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    pub fields: Vec<String>,
    pub spec: String,
    pub script: Option<String>,
    #[serde(default)]
    pub prints: String,
    /// On standard error.
    #[serde(default)]
    pub says: String,
    /// Create or start is refused, with these words.
    pub refused: Option<String>,
    /// What is in the log when the container is gone.
    pub leaves: Option<String>,
    pub not_runc: Option<String>,
}

/// A field that the protocol lacks.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Absent {
    pub field: String,
    pub spec: String,
    /// Read by the shim's own test of this table.
    #[allow(dead_code, reason = "the shim's part of the table")]
    pub shim: Option<String>,
}

/// `breakouts.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Breakouts {
    pub attempt: Vec<Attempt>,
}

/// A way out.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attempt {
    pub name: String,
    pub script: String,
    /// Changes of both runs.
    pub default: Option<String>,
    /// The defences, taken away.
    pub without: String,
    /// Capabilities whose lack is a defence.
    #[serde(default)]
    pub capabilities: Vec<String>,
}

pub fn read<T: DeserializeOwned>(name: &str) -> Result<T> {
    let text = text(name)?;
    toml::from_str(&text).with_context(|| name.to_owned())
}

pub fn json_file(name: &str) -> Result<Value> {
    serde_json::from_str(&text(name)?).with_context(|| name.to_owned())
}

fn text(name: &str) -> Result<String> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/conformance");
    let path = folder.join(name);
    fs::read_to_string(&path).with_context(|| format!("{}", path.display()))
}

/// Lays `patch` over `config` as a JSON merge patch (RFC 7386), with two words more: `NAME+`
/// appends to a list, and an object over a list changes the elements that it names by their
/// destination or type.
pub fn merge(config: &mut Value, patch: &Value) -> Result<()> {
    let Value::Object(changes) = patch else {
        *config = patch.clone();
        return Ok(());
    };
    if let Value::Array(list) = config {
        return changes
            .iter()
            .try_for_each(|(name, change)| change_element(list, name, change));
    }
    if !config.is_object() {
        *config = Value::Object(Map::new());
    }
    let object = config.as_object_mut().context("no object")?;
    for (key, change) in changes {
        if let Some(key) = key.strip_suffix('+') {
            let list = object.entry(key).or_insert_with(|| json!([]));
            let list = list
                .as_array_mut()
                .with_context(|| format!("{key}: no list"))?;
            list.extend(change.as_array().context("no list")?.iter().cloned());
        } else if change.is_null() {
            object.remove(key);
        } else {
            merge(object.entry(key).or_insert(Value::Null), change)?;
        }
    }
    Ok(())
}

fn change_element(list: &mut Vec<Value>, name: &str, change: &Value) -> Result<()> {
    let named = |element: &Value| {
        ["destination", "type"]
            .iter()
            .any(|key| element[*key] == *name)
    };
    let Some(index) = list.iter().position(named) else {
        bail!("no element {name}");
    };
    if change.is_null() {
        list.remove(index);
        return Ok(());
    }
    merge(&mut list[index], change)
}

/// Laid over by JSON in a table's text.
pub fn merge_text(config: &mut Value, patch: &str) -> Result<()> {
    merge(
        config,
        &serde_json::from_str(patch).with_context(|| patch.to_owned())?,
    )
}
