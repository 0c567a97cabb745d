// SPDX-License-Identifier: Apache-2.0
//! Rules of the architecture that the compiler can't see (ARCHITECTURE.md, "Invariants"), read from the
//! source tree.

use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Longest production part of a file, in lines that are not blank: what comes before its tests.
const MAX_LINES: usize = 500;

/// Files and folders below which `unsafe` may be written; everything else goes through them.
const UNSAFE_MODULES: &[&str] = &[
    "src/agent/src/sys/",
    "src/fuse-server/src/syscall.rs",
    "src/runtime/src/raw.rs",
    "src/runtime/src/raw/",
    "src/vmm/src/sys/",
    "tests/src/sys.rs",
    "xtask/src/probe/guest.rs",
];

/// Text that must not appear in files below a folder, and why.
const WALLS: &[(&str, &[&str], &str)] = &[
    (
        "src/vmm/",
        &["runtime::", "protocols::"],
        "the VMM knows nothing of containerd, OCI or the agent",
    ),
    (
        "src/vmm/src/devices/",
        &["crate::arch"],
        "devices do not depend on the architecture",
    ),
    (
        "src/fuse-server/",
        &["vmm::"],
        "the file server runs without a VM",
    ),
];

/// Dependencies on our own crates that each crate may have.
const DEPENDENCIES: &[(&str, &[&str])] = &[
    ("src/agent", &["oci-hooks", "protocols"]),
    ("src/fuse-server", &[]),
    ("src/oci-hooks", &[]),
    ("src/protocols", &[]),
    (
        "src/runtime",
        &["fuse-server", "oci-hooks", "protocols", "vmm"],
    ),
    ("src/vmm", &["fuse-server"]),
];

const OURS: &[&str] = &[
    "fuse-server",
    "kata-agent",
    "oci-hooks",
    "protocols",
    "rootfs-builder",
    "runtime",
    "vmm",
    "xtask",
];

/// Every broken rule of the tree at `root`, as one line each.
pub(crate) fn violations(root: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for path in sources(root)? {
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let name = path
            .strip_prefix(root)
            .unwrap_or(&path)
            .to_string_lossy()
            .into_owned();
        check_source(&name, &text, &mut found);
    }
    for module in UNSAFE_MODULES {
        if !root.join(module).exists() {
            found.push(format!("{module}: listed for unsafe, and gone"));
        }
    }
    for (crate_folder, allowed) in DEPENDENCIES {
        let manifest = root.join(crate_folder).join("Cargo.toml");
        let text = fs::read_to_string(&manifest)
            .with_context(|| format!("reading {}", manifest.display()))?;
        check_manifest(crate_folder, &text, allowed, &mut found);
    }
    Ok(found)
}

fn check_source(name: &str, text: &str, found: &mut Vec<String>) {
    let production = text
        .lines()
        .take_while(|line| !line.starts_with("#[cfg(test)]"))
        .filter(|line| !line.trim().is_empty())
        .count();
    let is_test = name.contains("/tests/") || name.contains("test");
    if production > MAX_LINES && !is_test {
        found.push(format!(
            "{name}: {production} lines; at most {MAX_LINES} before its tests"
        ));
    }
    for (folder, words, reason) in WALLS {
        if !name.starts_with(folder) {
            continue;
        }
        for (number, line) in numbered(text) {
            if words.iter().any(|word| names(line, word)) {
                found.push(format!("{name}:{number}: {reason}"));
            }
        }
    }
    let may_be_unsafe = UNSAFE_MODULES.iter().any(|module| name.starts_with(module));
    let mut explained = false;
    for (number, line) in numbered(text) {
        let line = line.trim();
        if is_unsafe(line) {
            if !may_be_unsafe {
                found.push(format!(
                    "{name}:{number}: unsafe outside of the modules for it"
                ));
            }
            if line.contains("unsafe {") && !explained {
                found.push(format!(
                    "{name}:{number}: unsafe block without a SAFETY reason above it"
                ));
            }
        }
        // A reason holds through the lines of its statement.
        explained = line.starts_with("// SAFETY:")
            || (explained && !line.is_empty() && !line.ends_with(';'));
    }
}

fn check_manifest(name: &str, text: &str, allowed: &[&str], found: &mut Vec<String>) {
    let dependencies = text
        .lines()
        .skip_while(|line| line.trim() != "[dependencies]")
        .skip(1)
        .take_while(|line| !line.starts_with('['));
    for line in dependencies {
        let dependency = line.split(['.', ' ', '=']).next().unwrap_or_default();
        if OURS.contains(&dependency) && !allowed.contains(&dependency) {
            found.push(format!(
                "{name}/Cargo.toml: must not depend on {dependency}"
            ));
        }
    }
}

/// Whether a line of code has the keyword; comments and strings about it don't count.
fn is_unsafe(line: &str) -> bool {
    ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"]
        .iter()
        .any(|form| names(line, form))
}

/// Whether a line of code has the words, beginning at a word's start and outside of a string.
fn names(line: &str, words: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    code.match_indices(words).any(|(at, _)| {
        let before = code.get(..at).unwrap_or_default();
        let joined = before.ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':');
        !joined && !before.contains('"')
    })
}

fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().zip(1..).map(|(line, number)| (number, line))
}

/// All Rust files of our crates.
fn sources(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> = ["src", "rootfs-builder", "tests", "xtask"]
        .map(|name| root.join(name))
        .into();
    while let Some(folder) = folders.pop() {
        for entry in
            fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?
        {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace;

    fn check(name: &str, text: &str) -> Vec<String> {
        let mut found = Vec::new();
        check_source(name, text, &mut found);
        found
    }

    #[test]
    fn the_tree_keeps_the_rules() {
        let found = violations(&workspace::root()).unwrap();
        assert!(found.is_empty(), "{found:#?}");
    }

    #[test]
    fn walls_stand() {
        assert_eq!(check("src/vmm/src/a.rs", "use protocols::agent;").len(), 1);
        assert_eq!(
            check(
                "src/vmm/src/a.rs",
                "use crate::my_protocols::x; // protocols::"
            )
            .len(),
            0
        );
        assert_eq!(
            check("src/vmm/src/devices/a.rs", "use crate::arch::x;").len(),
            1
        );
        assert_eq!(
            check("src/vmm/src/machine.rs", "use crate::arch::x;").len(),
            0
        );
    }

    #[test]
    fn unsafe_needs_its_module_and_its_reason() {
        let block = "fn f() {\n    // SAFETY: fine.\n    unsafe { g() };\n}\n";
        assert_eq!(check("src/vmm/src/sys/kvm.rs", block).len(), 0);
        assert_eq!(check("src/vmm/src/machine.rs", block).len(), 1);
        assert_eq!(
            check(
                "src/vmm/src/sys/kvm.rs",
                "fn f() {\n    unsafe { g() };\n}\n"
            )
            .len(),
            1
        );
        assert_eq!(
            check(
                "src/vmm/src/machine.rs",
                "// unsafe { }\nlet s = \"unsafe { }\";"
            )
            .len(),
            0
        );
    }

    #[test]
    fn long_files_are_named() {
        let long = "let x = 1;\n".repeat(MAX_LINES + 1);
        assert_eq!(check("src/vmm/src/a.rs", &long).len(), 1);
        let tested = format!("fn f() {{}}\n#[cfg(test)]\n{long}");
        assert_eq!(check("src/vmm/src/a.rs", &tested).len(), 0);
    }

    #[test]
    fn manifests_keep_the_walls() {
        let mut found = Vec::new();
        check_manifest(
            "src/agent",
            "[dependencies]\nvmm.workspace = true\nprotocols.workspace = true\n",
            &["protocols"],
            &mut found,
        );
        assert_eq!(found, ["src/agent/Cargo.toml: must not depend on vmm"]);
    }
}
