// SPDX-License-Identifier: Apache-2.0
//! How a machine ended, in words.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use vmm::control::ExitReason;

/// How much of the guest's last output an error message shows.
const CONSOLE_LINES: usize = 6;

/// How a machine ended.
#[derive(Debug, Clone)]
pub(crate) struct Ended {
    pub(super) reason: String,
    pub(super) console: String,
}

impl Ended {
    #[cfg(test)]
    pub(crate) fn for_test(reason: &str) -> Self {
        Self {
            reason: reason.to_owned(),
            console: String::new(),
        }
    }

    /// Reason and last console lines in one line.
    pub(crate) fn describe(&self) -> String {
        format!("{}{}", self.reason, last_lines(&self.console))
    }
}

pub(super) fn describe(reason: &ExitReason) -> String {
    match reason {
        ExitReason::Stopped => "it was stopped".to_owned(),
        ExitReason::Shutdown => "the guest powered off".to_owned(),
        ExitReason::Reboot => "the guest asked for a reboot".to_owned(),
        ExitReason::TripleFault => "a triple fault of the guest's kernel".to_owned(),
        ExitReason::Panic => "a panic of the guest's kernel".to_owned(),
        ExitReason::Failure(reason) => reason.clone(),
    }
}

pub(super) fn died(status: ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("the virtual machine monitor was killed by signal {signal}"),
        None => format!("the virtual machine monitor died: {status}"),
    }
}

/// The last lines of the guest's console, for the end of a one-line message. After a panic the
/// lines that say why come before a long trace.
pub(super) fn last_lines(console: &str) -> String {
    let lines: Vec<_> = console
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let panic = lines.iter().position(|line| line.contains("Kernel panic"));
    let end = panic.map_or(lines.len(), |line| line.saturating_add(1));
    let last = lines
        .get(end.saturating_sub(CONSOLE_LINES)..end)
        .unwrap_or_default();
    if last.is_empty() {
        return String::new();
    }
    // What a guest writes must not steer the terminal of whoever reads the message.
    let text: String = last
        .join(" | ")
        .chars()
        .map(|character| {
            if character.is_control() {
                '?'
            } else {
                character
            }
        })
        .collect();
    format!("; the guest's last lines on its console: {text}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_s_last_lines_fit_into_a_message() {
        assert_eq!(last_lines(" \n"), "");
        let console: String = (0..10).map(|line| format!("[{line}] text\r\n")).collect();
        let text = last_lines(&console);
        assert!(
            text.starts_with("; the guest's last lines on its console: [4] text | "),
            "{text}"
        );
        assert!(text.ends_with("[9] text"));
        let panic = format!(
            "why\nKernel panic - not syncing: VFS\n{}",
            "trace\n".repeat(20)
        );
        assert!(last_lines(&panic).ends_with("why | Kernel panic - not syncing: VFS"));
        assert!(!last_lines("\u{1b}[2Jhello").contains('\u{1b}'));
    }
}
