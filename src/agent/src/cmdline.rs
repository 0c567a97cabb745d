// SPDX-License-Identifier: Apache-2.0
//! The agent's parameters: `agent.*` words of the kernel command line, and the environment.

use std::time::Duration;

use tracing::level_filters::LevelFilter;

/// Where the ttrpc server listens when nothing else is asked: vsock port 1024, any CID.
const DEFAULT_SERVER: &str = "vsock://-1:1024";

/// Kata's vsock ports of the debug console and of streams.
const DEBUG_CONSOLE: u32 = 1026;
const PASSFD: u32 = 1027;

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
    /// `agent.log_vport`: the vsock port where the host reads the log. Without it the log goes to
    /// the kernel's.
    pub(crate) log_port: Option<u32>,
    /// `agent.debug_console`: whoever reaches the host's end of vsock gets a shell.
    pub(crate) debug_console: bool,
    /// `agent.debug_console_vport`: the vsock port of that shell.
    pub(crate) debug_console_port: u32,
    /// `agent.passfd_listener_port`: the vsock port where the host connects streams of processes
    /// (0: nowhere).
    pub(crate) passfd_port: Option<u32>,
    /// `agent.container_pipe_size`: bytes that a process's pipes hold, where not the kernel's usual.
    pub(crate) pipe_size: Option<usize>,
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
            log_port: None,
            debug_console: false,
            debug_console_port: DEBUG_CONSOLE,
            passfd_port: Some(PASSFD),
            pipe_size: None,
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
        parameters.read(cmdline);
        parameters
    }

    /// The vsock port of the debug console, where there is one.
    pub(crate) fn console_port(&self) -> Option<u32> {
        self.debug_console.then_some(self.debug_console_port)
    }

    fn read(&mut self, words: &str) {
        for word in words.split_ascii_whitespace() {
            let Some(word) = word.strip_prefix("agent.") else {
                continue;
            };
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            match key {
                "log" => self.log = level(value).unwrap_or(self.log),
                "server_addr" => value.clone_into(&mut self.server),
                "ready_vport" => self.ready_port = value.parse().ok(),
                "forward_vport" => self.forward_port = value.parse().ok(),
                "log_vport" => self.log_port = port(value),
                "debug_console" => self.debug_console = is_on(value),
                "debug_console_vport" => {
                    self.debug_console_port = port(value).unwrap_or(DEBUG_CONSOLE);
                }
                "passfd_listener_port" => self.passfd_port = port(value),
                "container_pipe_size" => {
                    self.pipe_size = value.parse().ok().filter(|size| *size > 0);
                }
                "boot_progress" => self.boot_progress = is_on(value),
                "launch_process_timeout" => set_seconds(&mut self.launch_timeout, value),
                "hotplug_timeout" => set_seconds(&mut self.hotplug_timeout, value),
                _ => {}
            }
        }
    }

    /// Kata's environment variables win over the command line. Where that isn't the agent's to
    /// choose, `KATA_AGENT_PARAMETERS` holds more of its words.
    pub(crate) fn with_environment(mut self, get: impl Fn(&str) -> Option<String>) -> Self {
        self.read(&get("KATA_AGENT_PARAMETERS").unwrap_or_default());
        if let Some(server) = get("KATA_AGENT_SERVER_ADDR") {
            self.server = server;
        }
        if let Some(log) = get("KATA_AGENT_LOG_LEVEL").as_deref().and_then(level) {
            self.log = log;
        }
        self
    }
}

fn is_on(value: &str) -> bool {
    !matches!(value, "0" | "false")
}

/// 0 is none, in Kata's words.
fn port(value: &str) -> Option<u32> {
    value.parse().ok().filter(|port| *port > 0)
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
    fn ports_of_the_side_protocols_are_katas() {
        let usual = Parameters::from_cmdline("agent.debug_console");
        assert_eq!((usual.console_port(), usual.log_port), (Some(1026), None));
        assert_eq!(usual.passfd_port, Some(1027));
        let other = Parameters::from_cmdline(
            "agent.debug_console_vport=7 agent.log_vport=1025 agent.passfd_listener_port=0 \
             agent.container_pipe_size=65536",
        );
        // A port alone turns no shell on.
        assert_eq!((other.console_port(), other.passfd_port), (None, None));
        assert_eq!((other.log_port, other.pipe_size), (Some(1025), Some(65536)));
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
        let words =
            |key: &str| (key == "KATA_AGENT_PARAMETERS").then(|| "agent.log=off".to_owned());
        assert_eq!(
            Parameters::default().with_environment(words).log,
            LevelFilter::OFF
        );
    }
}
