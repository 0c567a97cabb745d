// SPDX-License-Identifier: Apache-2.0
//! The agent's parameters: `agent.*` words of the kernel command line, and the environment.

use std::time::Duration;

use tracing::level_filters::LevelFilter;

/// Where the ttrpc server listens when nothing else is asked: vsock port 1024, any CID.
const DEFAULT_SERVER: &str = "vsock://-1:1024";

/// Parameters of this boot.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Parameters {
    /// `agent.log`: the least severe level that is logged.
    pub(crate) log: LevelFilter,
    /// `agent.server_addr`: `vsock://CID:PORT` or `unix:///PATH`.
    pub(crate) server: String,
    /// `agent.ready_vport`: the host's vsock port that is told once the server listens.
    pub(crate) ready_port: Option<u32>,
    /// `agent.forward_vport`: the vsock port where streams are connected to TCP ports of the guest.
    pub(crate) forward_port: Option<u32>,
    /// `agent.boot_progress`: the VMM wants to see the moment that init runs.
    pub(crate) boot_progress: bool,
    /// `agent.launch_process_timeout` (seconds): how long a new process may take to be set up.
    pub(crate) launch_timeout: Duration,
    /// `agent.hotplug_timeout` (seconds): how long a plugged device may take to appear.
    pub(crate) hotplug_timeout: Duration,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            log: LevelFilter::WARN,
            server: DEFAULT_SERVER.to_owned(),
            ready_port: None,
            forward_port: None,
            boot_progress: false,
            launch_timeout: Duration::from_secs(30),
            hotplug_timeout: Duration::from_secs(10),
        }
    }
}

impl Parameters {
    /// Reads a kernel command line. Words that are not ours, or whose value does not parse, leave
    /// the default in place: another runtime may pass parameters of a newer agent.
    pub(crate) fn from_cmdline(cmdline: &str) -> Self {
        let mut parameters = Self::default();
        for word in cmdline.split_ascii_whitespace() {
            let Some(word) = word.strip_prefix("agent.") else {
                continue;
            };
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            match key {
                "log" => parameters.log = level(value).unwrap_or(parameters.log),
                "server_addr" => value.clone_into(&mut parameters.server),
                "ready_vport" => parameters.ready_port = value.parse().ok(),
                "forward_vport" => parameters.forward_port = value.parse().ok(),
                "boot_progress" => parameters.boot_progress = !matches!(value, "0" | "false"),
                "launch_process_timeout" => set_seconds(&mut parameters.launch_timeout, value),
                "hotplug_timeout" => set_seconds(&mut parameters.hotplug_timeout, value),
                _ => {}
            }
        }
        parameters
    }

    /// Kata's environment variables win over the command line.
    pub(crate) fn with_environment(mut self, get: impl Fn(&str) -> Option<String>) -> Self {
        if let Some(server) = get("KATA_AGENT_SERVER_ADDR") {
            self.server = server;
        }
        if let Some(log) = get("KATA_AGENT_LOG_LEVEL").as_deref().and_then(level) {
            self.log = log;
        }
        self
    }
}

fn set_seconds(time: &mut Duration, value: &str) {
    if let Ok(seconds) = value.parse() {
        *time = Duration::from_secs(seconds);
    }
}

fn level(name: &str) -> Option<LevelFilter> {
    match name {
        "trace" => Some(LevelFilter::TRACE),
        "debug" => Some(LevelFilter::DEBUG),
        "info" => Some(LevelFilter::INFO),
        "warn" | "warning" => Some(LevelFilter::WARN),
        "error" | "critical" => Some(LevelFilter::ERROR),
        "off" => Some(LevelFilter::OFF),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_its_words_among_the_kernels() {
        let parameters = Parameters::from_cmdline(
            "root=/dev/vda ro quiet agent.log=debug agent.ready_vport=1024 agent.boot_progress \
             agent.forward_vport=9 agent.hotplug_timeout=7 agent.server_addr=unix:///run/a.sock init=/sbin/init\n",
        );
        assert_eq!(
            parameters,
            Parameters {
                log: LevelFilter::DEBUG,
                server: "unix:///run/a.sock".to_owned(),
                ready_port: Some(1024),
                forward_port: Some(9),
                boot_progress: true,
                hotplug_timeout: Duration::from_secs(7),
                ..Parameters::default()
            }
        );
    }

    #[test]
    fn nonsense_leaves_the_defaults() {
        let parameters = Parameters::from_cmdline(
            "agent.log=loud agent.ready_vport=many agent.new_key=1 agent. agent.boot_progress=0",
        );
        assert_eq!(parameters, Parameters::default());
    }

    #[test]
    fn environment_wins() {
        let parameters = Parameters::from_cmdline("agent.log=debug")
            .with_environment(|key| (key == "KATA_AGENT_LOG_LEVEL").then(|| "error".to_owned()));
        assert_eq!(parameters.log, LevelFilter::ERROR);
    }
}
