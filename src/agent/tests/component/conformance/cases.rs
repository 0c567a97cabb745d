// SPDX-License-Identifier: Apache-2.0
//! The tables, as tests.

use std::collections::BTreeSet;

use anyhow::Result;
use serde_json::Value;

use crate::conformance::Bench;
use crate::conformance::message::Protocol;
use crate::conformance::table::{Breakouts, Config, json_file, read};

/// Runs all, and fails with all that failed.
fn all_hold(failures: &[String]) {
    assert!(
        failures.is_empty(),
        "{} failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

#[tokio::test]
async fn every_field_of_config_json_shows() -> Result<()> {
    let table: Config = read("config.toml")?;
    let bench = Bench::new().await?;
    bench.mount_disk()?;
    let mut failures = Vec::new();
    for case in &table.case {
        if let Err(error) = bench.show(case).await {
            failures.push(format!("{}: {}: {error:#}", case.fields[0], case.spec));
        }
    }
    all_hold(&failures);
    Ok(())
}

#[test]
fn no_field_is_without_a_case() -> Result<()> {
    let table: Config = read("config.toml")?;
    let protocol = Protocol::read()?;
    let fields: BTreeSet<String> = protocol.fields().into_iter().collect();
    let cases: BTreeSet<String> = table
        .case
        .iter()
        .flat_map(|case| &case.fields)
        .map(|field| field.to_lowercase())
        .collect();
    let missing: Vec<_> = fields.difference(&cases).collect();
    assert!(
        missing.is_empty(),
        "fields of oci.proto without a case: {missing:?}"
    );
    let unknown: Vec<_> = cases.difference(&fields).collect();
    assert!(
        unknown.is_empty(),
        "fields that oci.proto does not have: {unknown:?}"
    );
    // Each case sets what it names.
    for case in &table.case {
        let spec: Value = serde_json::from_str(&case.spec)?;
        for field in &case.fields {
            assert!(sets(&spec, field), "{field} is not in {}", case.spec);
        }
    }
    for absent in &table.absent {
        assert!(
            !fields.contains(&absent.field.to_lowercase()),
            "{}",
            absent.field
        );
        let spec: Value = serde_json::from_str(&absent.spec)?;
        assert!(
            sets(&spec, &absent.field),
            "{} is not in {}",
            absent.field,
            absent.spec
        );
    }
    Ok(())
}

/// Whether a patch has a field, in any element of the lists on the way.
fn sets(patch: &Value, field: &str) -> bool {
    let Some((key, rest)) = field
        .split_once('.')
        .map(|(key, rest)| (key, Some(rest)))
        .or(Some((field, None)))
    else {
        return false;
    };
    match patch {
        Value::Array(list) => list.iter().any(|element| sets(element, field)),
        Value::Object(object) => object.iter().any(|(name, value)| {
            name.trim_end_matches('+') == key && rest.is_none_or(|rest| sets(value, rest))
        }),
        _ => false,
    }
}

#[tokio::test]
async fn no_attempt_leads_out_and_each_would_without_its_defence() -> Result<()> {
    let table: Breakouts = read("breakouts.toml")?;
    assert!(table.attempt.len() >= 25);
    let seccomp = json_file("seccomp.json")?;
    let bench = Bench::new().await?;
    let mut failures = Vec::new();
    for attempt in &table.attempt {
        if let Err(error) = bench.escape(attempt, &seccomp).await {
            failures.push(format!("{}: {error:#}", attempt.name));
        }
    }
    all_hold(&failures);
    Ok(())
}
