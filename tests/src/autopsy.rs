// SPDX-License-Identifier: Apache-2.0
//! What the machine has to say when a scenario failed.

use std::fs;
use std::process::Command;

use crate::node::Node;

/// How many lines of each source are shown.
const LINES: usize = 12;

/// The node's and the kernel's last words, and how much memory is left.
#[must_use]
pub fn report(node: &Node) -> String {
    let log = node.containerd().log();
    let words = log.lines().filter(|line| tells(line));
    let kernel = Command::new("dmesg").output().map(|output| output.stdout);
    let kernel = String::from_utf8_lossy(&kernel.unwrap_or_default()).into_owned();
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory = memory.lines().filter(|line| {
        ["MemAvailable", "AnonHugePages", "Shmem:"]
            .iter()
            .any(|it| line.starts_with(it))
    });
    let mut all: Vec<&str> = last(words);
    // The guest's attempts at registers of the processor that KVM does not know.
    all.extend(last(
        kernel.lines().filter(|line| !line.contains("Unhandled")),
    ));
    all.extend(memory);
    all.join("\n")
}

/// Whether a line of the node's log is about what went wrong.
fn tells(line: &str) -> bool {
    ["level=warn", "level=error", "virtual machine"]
        .iter()
        .any(|word| line.contains(word))
}

fn last<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let lines: Vec<_> = lines.collect();
    let begin = lines.len().saturating_sub(LINES);
    lines.get(begin..).unwrap_or_default().to_vec()
}
