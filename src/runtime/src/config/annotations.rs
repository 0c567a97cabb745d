// SPDX-License-Identifier: Apache-2.0
//! A pod's annotations: each stands for a key, is typed as the key is, and holds only where the
//! configuration lists it.
//!
//! Whoever may create a pod may write annotations, so there are none for what runs on the host or
//! decides what the guest is: programs, kernels, images, paths, free-form arguments.

use std::collections::{BTreeMap, HashMap};

use regex_lite::Regex;
use toml::Value;

use super::Config;
use super::file::{Origin, Reasons};
use super::keys::{self, Annotation, Key};
use super::value::Read;
use crate::error::Result;

/// What the names of all of Kata's annotations begin with.
const KATA: &str = "io.katacontainers.";

/// Those that configure a sandbox: a group and a name follow.
const PREFIX: &str = "io.katacontainers.config.";

/// Those that Kata has and that no configuration may allow here.
const NEVER: [&str; 16] = [
    "hypervisor.path",
    "hypervisor.ctlpath",
    "hypervisor.jailer_path",
    "hypervisor.kernel",
    "hypervisor.image",
    "hypervisor.initrd",
    "hypervisor.firmware",
    "hypervisor.kernel_params",
    "hypervisor.kernel_verity_params",
    "hypervisor.virtio_fs_daemon",
    "hypervisor.virtio_fs_extra_args",
    "hypervisor.guest_hook_path",
    "hypervisor.cc_init_data",
    "runtime.experimental",
    "runtime.sandbox_bind_mounts",
    "agent.kernel_modules",
];

/// The keys that a pod's annotations set, with value and annotation.
pub(super) fn select(
    config: &Config,
    annotations: &HashMap<String, String>,
    reasons: &mut Reasons,
) -> Vec<(&'static Key, Value, String)> {
    let mut selected = Vec::new();
    for (name, text) in annotations {
        if !name.starts_with(KATA) {
            continue;
        }
        let selection = find(name).and_then(|(key, annotation)| {
            permit(config, annotation)?;
            let value = typed(key.value(config).as_ref(), text)?;
            Ok((key, value))
        });
        match selection {
            Ok((key, value)) => selected.push((key, value, name.clone())),
            Err(reason) => reasons.add(Origin::Annotation(name.clone()), reason),
        }
    }
    // The order of a hash map is by chance.
    selected.sort_by(|(.., one), (.., other)| one.cmp(other));
    selected
}

/// Every annotation of Kata's must be one that the sandbox has been made with.
pub(super) fn check_member(
    applied: &BTreeMap<String, String>,
    annotations: &HashMap<String, String>,
) -> Result<()> {
    let mut reasons = Reasons::default();
    for (name, value) in annotations {
        if name.starts_with(KATA) && applied.get(name) != Some(value) {
            reasons.add(
                Origin::Annotation(name.clone()),
                format!("{value:?} is not what the pod was made with"),
            );
        }
    }
    reasons.into_result()
}

fn find(name: &str) -> Read<(&'static Key, Annotation)> {
    let suffix = name.strip_prefix(PREFIX).unwrap_or_default();
    let known = keys::all().find_map(|key| {
        let annotation = key.annotation?;
        let own = suffix.strip_prefix(annotation.group)?.strip_prefix('.')?;
        (own == annotation.name).then_some((key, annotation))
    });
    known.ok_or_else(|| {
        if NEVER.contains(&suffix)
            || suffix.ends_with("_hash")
            || name == "io.katacontainers.config_path"
        {
            return "a pod may not choose this".to_owned();
        }
        let names: Vec<_> = annotations()
            .map(|it| format!("{}.{}", it.group, it.name))
            .collect();
        format!("unknown; {PREFIX} has {}", names.join(", "))
    })
}

/// All annotations.
fn annotations() -> impl Iterator<Item = Annotation> {
    keys::all().filter_map(|key| key.annotation)
}

/// Whether the configuration lets a pod have it.
fn permit(config: &Config, annotation: Annotation) -> Read<()> {
    let patterns = config.allowed.get(annotation.group);
    let permitted = patterns
        .into_iter()
        .flatten()
        .any(|pattern| whole(pattern).is_ok_and(|pattern| pattern.is_match(annotation.name)));
    if permitted {
        return Ok(());
    }
    let table = match annotation.group {
        "hypervisor" => "hypervisor.dragonball",
        group => group,
    };
    Err(format!(
        "not allowed; {table}.enable_annotations must list {:?}",
        annotation.name
    ))
}

/// Checks a list of allowed annotations: each pattern must stand for one that there is.
pub(super) fn check_patterns(group: &str, patterns: &[String]) -> Read<()> {
    for pattern in patterns {
        let regex = whole(pattern).map_err(|error| {
            let error = error.to_string();
            let words: Vec<_> = error.split_whitespace().collect();
            format!("{pattern:?}: {}", words.join(" "))
        })?;
        let names = || {
            annotations()
                .filter(|it| it.group == group)
                .map(|it| it.name)
        };
        if !names().any(|name| regex.is_match(name)) {
            let names: Vec<_> = names().collect();
            return Err(format!(
                "{pattern:?} stands for no annotation; a pod can be allowed {}",
                names.join(", ")
            ));
        }
    }
    Ok(())
}

/// A pattern that stands for whole names, so that a part of a name allows nothing more.
fn whole(pattern: &str) -> std::result::Result<Regex, regex_lite::Error> {
    Regex::new(&format!("^(?:{pattern})$"))
}

/// Reads an annotation's text as a value of the same kind as `like`.
fn typed(like: Option<&Value>, text: &str) -> Read<Value> {
    let number = || {
        let whole = text.parse::<i64>().map(Value::from);
        whole.or_else(|_| text.parse::<f64>().map(Value::from))
    };
    match like {
        Some(Value::Boolean(_)) => text
            .parse::<bool>()
            .map(Value::from)
            .map_err(|_| format!("{text:?}: wants true or false")),
        Some(Value::Integer(_) | Value::Float(_)) => {
            number().map_err(|_| format!("{text:?}: wants a number"))
        }
        _ => Ok(Value::from(text)),
    }
}
