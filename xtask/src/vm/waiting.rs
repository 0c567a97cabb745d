// SPDX-License-Identifier: Apache-2.0
//! What the processes of the dev VM wait for: said where a command does not end.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// How many of a thread's innermost functions are named.
const DEPTH: usize = 6;
/// How much of a command line is shown, in characters.
const COMMAND: usize = 120;

/// Every process with its command, and the kernel's functions that its threads are in; threads of one
/// process that wait alike are counted. The kernel's own threads only where they can't be interrupted.
pub(crate) fn report() -> String {
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory: Vec<&str> = memory.lines().take(3).collect();
    let mut text = format!(
        "dev VM: {}; what its processes wait for\n",
        memory.join(", ")
    );
    for (id, process) in numbered(Path::new("/proc")) {
        let command = command(&process);
        let mut alike: BTreeMap<String, usize> = BTreeMap::new();
        for (_, thread) in numbered(&process.join("task")) {
            let (state, parent) = state(&thread);
            if !command.is_empty() || state == 'D' {
                let line = format!("{state} (of {parent}) {}", stack(&thread));
                let count = alike.entry(line).or_default();
                *count = count.saturating_add(1);
            }
        }
        if alike.is_empty() {
            continue;
        }
        let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
        // Writing to a string can't fail.
        let _ = writeln!(text, "{id} {}: {command}", name.trim());
        for (line, count) in alike {
            let _ = writeln!(text, "    {count} x {line}");
        }
    }
    text
}

/// Entries of a folder that are numbers, in their order.
fn numbered(folder: &Path) -> BTreeMap<u32, PathBuf> {
    // A process may go while it is looked at, here and below.
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
        .collect()
}

fn command(process: &Path) -> String {
    let bytes = fs::read(process.join("cmdline")).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes).replace('\0', " ");
    text.trim().chars().take(COMMAND).collect()
}

/// State letter and parent, of proc(5)'s `stat`: the name before them may hold anything, and ends in the
/// last parenthesis.
fn state(thread: &Path) -> (char, String) {
    let stat = fs::read_to_string(thread.join("stat")).unwrap_or_default();
    let mut words = stat
        .rsplit_once(')')
        .map_or("", |(_, rest)| rest)
        .split_whitespace();
    let state = words.next().and_then(|word| word.chars().next());
    (state.unwrap_or('?'), words.next().unwrap_or("?").to_owned())
}

fn stack(thread: &Path) -> String {
    let text = fs::read_to_string(thread.join("stack")).unwrap_or_default();
    let functions = text.lines().take(DEPTH).map(|line| {
        let function = line.rsplit(' ').next().unwrap_or_default();
        function.split('+').next().unwrap_or_default()
    });
    functions.collect::<Vec<_>>().join(" < ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_reported() {
        let text = report();
        let line = format!("{} ", std::process::id());
        assert!(text.lines().any(|found| found.starts_with(&line)), "{text}");
        assert!(text.contains(" x "), "{text}");
    }
}
