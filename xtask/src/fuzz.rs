// SPDX-License-Identifier: Apache-2.0
//! Fuzzing what a guest can write: the targets of the workspace `fuzz`, each for some time.
//!
//! The coverage instrumentation and the address sanitizer that libFuzzer wants are unstable options
//! of the compiler, so it is told to accept them; no further toolchain is needed.

use crate::packages::{self, any};
use crate::progress::{self, Reminder};
use crate::{build, workspace};
use anyhow::{Context, Result, bail};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What cargo-fuzz has the compiler do.
const FLAGS: &[&str] = &[
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Zsanitizer=address",
    "-Ccodegen-units=1",
];

/// Runs the named target, or each, for `seconds`; stops at the first finding.
pub(crate) fn run(target: Option<&str>, seconds: u64) -> Result<()> {
    let folder = workspace::root().join("fuzz");
    let targets = targets(&folder)?;
    let chosen: Vec<&String> = targets
        .iter()
        .filter(|name| target.is_none_or(|target| target == *name))
        .collect();
    if let (Some(target), []) = (target, chosen.as_slice()) {
        bail!(
            "no fuzz target is named {target}; there are: {}",
            targets.join(", ")
        );
    }
    let programs = compile(&folder)?;
    for name in chosen {
        progress::note(&format!("fuzzing {name} for {seconds} s"));
        fuzz(&folder, name, &programs.join(name), seconds)?;
    }
    Ok(())
}

/// The names of the targets, which are those of their files.
fn targets(folder: &Path) -> Result<Vec<String>> {
    let folder = folder.join("fuzz_targets");
    let entries = fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let path = entry?.path();
        names.extend(
            path.file_stem()
                .map(|name| name.to_string_lossy().into_owned()),
        );
    }
    names.sort();
    Ok(names)
}

/// Builds all targets; the folder of their programs.
fn compile(folder: &Path) -> Result<PathBuf> {
    packages::ensure("fuzzing", &[any("g++"), any("libc6-dev")])?;
    let output = workspace::target_dir()?.join("fuzz");
    let _reminder = Reminder::of("compiling the fuzz targets");
    progress::run(
        Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            // With a target named, build scripts and procedural macros stay as they are.
            .args([
                "build",
                "--quiet",
                "--release",
                "--target",
                build::STATIC_TARGET,
            ])
            .current_dir(folder)
            .env("CARGO_TARGET_DIR", &output)
            .env("RUSTC_BOOTSTRAP", "1")
            .env("RUSTFLAGS", FLAGS.join(" ")),
    )?;
    Ok(output.join(build::STATIC_TARGET).join("release"))
}

/// What it finds new stays in the corpus for the next run; what fails, among the artifacts.
fn fuzz(folder: &Path, name: &str, program: &Path, seconds: u64) -> Result<()> {
    let corpus = folder.join("corpus").join(name);
    let artifacts = folder.join("artifacts").join(name);
    // Where a search that has not begun yet starts; in the tree, and not written to.
    let seeds = folder.join("seeds").join(name);
    for folder in [&corpus, &artifacts, &seeds] {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    }
    progress::run(
        Command::new(program)
            .env(
                "LSAN_OPTIONS",
                format!("suppressions={}", folder.join("leaks.txt").display()),
            )
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            // The bytes are a guest's choices: a short input is a guest that does little.
            .args(["-len_control=0", "-max_len=4096", "-print_final_stats=1"])
            .args([&corpus, &seeds]),
    )
    .with_context(|| format!("fuzzing {name}; the input is in {}", artifacts.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_built() {
        let folder = workspace::root().join("fuzz");
        let manifest = fs::read_to_string(folder.join("Cargo.toml")).unwrap();
        let targets = targets(&folder).unwrap();
        assert!(targets.iter().any(|name| name == "net_buffers"));
        for name in &targets {
            assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
        }
        let error = run(Some("nothing"), 1).unwrap_err().to_string();
        assert!(
            error.contains("nothing") && error.contains("net_buffers"),
            "{error}"
        );
    }
}
