// SPDX-License-Identifier: Apache-2.0
//! The command line of a guest's kernel.

use std::fmt::Write;

use tracing::Level;

use super::CONSOLE_PORT;
use crate::config::Config;

/// The console is polled and says nothing while all is well, and still holds the reason when it
/// isn't; no serial port is probed for. `quiet` comes first: from `earlycon` on, all that was
/// logged before goes out a byte an exit.
const QUIET: &str = "quiet earlycon=uart8250,io,0x3f8 keep_bootcon 8250.nr_uarts=0";

/// A console that shows the whole boot.
const VERBOSE: &str = "console=ttyS0 8250.nr_uarts=1";

/// No interface but the machine's own; the image's disk, the agent, and what the agent has to tell.
const COMMON: &str = "dummy.numdummies=0 root=/dev/vda ro rootfstype=erofs init=/sbin/init panic=-1 \
    agent.ready_vport=1024 agent.log_vport=1025 agent.forward_vport=1028 agent.boot_progress";

/// Memory that comes later is for what can be moved, as far as the guest's kernel can spare it for
/// itself, so that it can go again: twice as much as the rest. What is freed is reported to the
/// host zone by zone, a part of each at a time; with less of a difference that is done sooner.
const GROWING: &str = "memory_hotplug.online_policy=auto-movable \
    memory_hotplug.auto_movable_ratio=201";

/// What the agent logs where nothing is said.
const AGENT_LEVEL: Level = Level::WARN;

/// The whole command line; what the operator adds comes last, and so counts most. `grows` is
/// whether the guest may have more memory later.
pub(super) fn cmdline(config: &Config, grows: bool) -> String {
    let console = if config.monitor.debug { VERBOSE } else { QUIET };
    let mut cmdline = format!("{console} {COMMON}");
    if grows {
        cmdline.push(' ');
        cmdline.push_str(GROWING);
    }
    let level = config.agent.level();
    if level != AGENT_LEVEL {
        cmdline.push_str(" agent.log=");
        cmdline.push_str(&level.as_str().to_ascii_lowercase());
    }
    if config.debug_console {
        // Writing to a string can't fail.
        let _ = write!(
            cmdline,
            " agent.debug_console agent.debug_console_vport={CONSOLE_PORT}"
        );
    }
    if let Some(port) = config.stream_port() {
        let _ = write!(cmdline, " agent.passfd_listener_port={port}");
    }
    if !config.kernel_params.is_empty() {
        cmdline.push(' ');
        cmdline.push_str(&config.kernel_params);
    }
    cmdline
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> String {
        cmdline(&Config::of_text(text), false)
    }

    #[test]
    fn a_guest_is_quiet_unless_told_otherwise() {
        assert_eq!(words(""), format!("{QUIET} {COMMON}"));
        let grows = cmdline(&Config::built_in(), true);
        assert_eq!(grows, format!("{QUIET} {COMMON} {GROWING}"));
        let loud = words("[hypervisor.dragonball]\nenable_debug = true");
        assert_eq!(loud, format!("{VERBOSE} {COMMON}"));
    }

    #[test]
    fn the_agent_and_the_operator_come_last() {
        let both = words(
            "[hypervisor.dragonball]\nkernel_params = \"a=b c\"\n[agent.kata]\nlog_level = \"info\"",
        );
        assert!(both.ends_with(" agent.log=info a=b c"), "{both}");
        let debug = words("[agent.kata]\nenable_debug = true");
        assert!(debug.ends_with(" agent.log=debug"), "{debug}");
        let console = words("[agent.kata]\ndebug_console_enabled = true");
        let ends = " agent.debug_console agent.debug_console_vport=1026";
        assert!(console.ends_with(ends), "{console}");
        let streams = words("[runtime]\nuse_passfd_io = true\npassfd_listener_port = 7");
        let ends = " agent.passfd_listener_port=7";
        assert!(streams.ends_with(ends), "{streams}");
    }
}
