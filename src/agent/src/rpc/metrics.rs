// SPDX-License-Identifier: Apache-2.0
//! GetMetrics: what the guest and the agent use, as text for Prometheus, under Kata's names.

use std::fmt::Write as _;
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

/// How often metrics were asked for.
static SCRAPES: AtomicU64 = AtomicU64::new(0);

/// The kernel counts processor time in hundredths of a second (USER_HZ).
const TICKS: f64 = 100.0;

/// All metrics. What can't be read is left out.
pub(super) fn text() -> String {
    let mut text = String::new();
    let scrapes = SCRAPES.fetch_add(1, Ordering::Relaxed).saturating_add(1);
    agent(&mut text, scrapes);
    guest(&mut text, &read);
    text
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
}

fn agent(text: &mut String, scrapes: u64) {
    head(text, "kata_agent_scrape_count", "counter", "Metrics calls.");
    let _ = writeln!(text, "kata_agent_scrape_count {scrapes}");
    let status = read("/proc/self/status");
    let kib = |key: &str| field(&status, key)?.parse::<u64>().ok()?.checked_mul(1024);
    let values = [
        (
            "kata_agent_total_rss",
            "Resident memory in bytes.",
            kib("VmRSS"),
        ),
        (
            "kata_agent_total_vm",
            "Virtual memory in bytes.",
            kib("VmSize"),
        ),
        (
            "kata_agent_threads",
            "Threads.",
            field(&status, "Threads").and_then(|value| value.parse().ok()),
        ),
        (
            "kata_agent_process_open_fds",
            "Open descriptors.",
            fs::read_dir("/proc/self/fd")
                .ok()
                .and_then(|folder| u64::try_from(folder.count()).ok()),
        ),
    ];
    for (name, help, value) in values {
        if let Some(value) = value {
            head(text, name, "gauge", help);
            let _ = writeln!(text, "{name} {value}");
        }
    }
}

fn guest(text: &mut String, read: &dyn Fn(&str) -> String) {
    let load = read("/proc/loadavg");
    head(text, "kata_guest_load", "gauge", "Load of the guest.");
    for (item, value) in ["load1", "load5", "load15"]
        .iter()
        .zip(load.split_whitespace())
    {
        let _ = writeln!(text, "kata_guest_load{{item=\"{item}\"}} {value}");
    }
    if let Some((running, all)) = load
        .split_whitespace()
        .nth(3)
        .and_then(|word| word.split_once('/'))
    {
        head(text, "kata_guest_tasks", "gauge", "Tasks of the guest.");
        let _ = writeln!(text, "kata_guest_tasks{{item=\"cur\"}} {running}");
        let _ = writeln!(text, "kata_guest_tasks{{item=\"max\"}} {all}");
    }
    head(
        text,
        "kata_guest_meminfo",
        "gauge",
        "Memory of the guest in bytes.",
    );
    for line in read("/proc/meminfo").lines() {
        // The others are counts of pages.
        let Some((item, kib)) = line
            .strip_suffix(" kB")
            .and_then(|line| line.split_once(':'))
        else {
            continue;
        };
        let kib = kib.trim().parse::<u64>().ok();
        if let Some(bytes) = kib.and_then(|kib| kib.checked_mul(1024)) {
            let _ = writeln!(text, "kata_guest_meminfo{{item=\"{item}\"}} {bytes}");
        }
    }
    cpu_times(text, &read("/proc/stat"));
    head(
        text,
        "kata_guest_vm_stat",
        "gauge",
        "Virtual memory of the guest.",
    );
    for line in read("/proc/vmstat").lines() {
        if let Some((item, value)) = line.split_once(' ') {
            let _ = writeln!(text, "kata_guest_vm_stat{{item=\"{item}\"}} {value}");
        }
    }
    interfaces(text, &read("/proc/self/net/dev"));
}

fn cpu_times(text: &mut String, stat: &str) {
    const ITEMS: [&str; 8] = [
        "user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal",
    ];
    head(
        text,
        "kata_guest_cpu_time",
        "gauge",
        "Processor time of the guest in seconds.",
    );
    for line in stat.lines().filter(|line| line.starts_with("cpu")) {
        let mut words = line.split_whitespace();
        let cpu = match words.next() {
            Some("cpu") | None => "total",
            Some(name) => name.trim_start_matches("cpu"),
        };
        for (item, ticks) in ITEMS.iter().zip(words) {
            if let Ok(ticks) = ticks.parse::<f64>() {
                let seconds = ticks / TICKS;
                let _ = writeln!(
                    text,
                    "kata_guest_cpu_time{{cpu=\"{cpu}\",item=\"{item}\"}} {seconds}"
                );
            }
        }
    }
}

fn interfaces(text: &mut String, devices: &str) {
    const ITEMS: [(usize, &str); 8] = [
        (0, "recv_bytes"),
        (1, "recv_packets"),
        (2, "recv_errs"),
        (3, "recv_drop"),
        (8, "sent_bytes"),
        (9, "sent_packets"),
        (10, "sent_errs"),
        (11, "sent_drop"),
    ];
    head(
        text,
        "kata_guest_netdev_stat",
        "gauge",
        "Traffic of the guest's interfaces.",
    );
    for (name, counters) in devices.lines().filter_map(|line| line.split_once(':')) {
        let counters: Vec<&str> = counters.split_whitespace().collect();
        for (index, item) in ITEMS {
            if let Some(value) = counters.get(index) {
                let name = name.trim();
                let _ = writeln!(
                    text,
                    "kata_guest_netdev_stat{{interface=\"{name}\",item=\"{item}\"}} {value}"
                );
            }
        }
    }
}

fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    pairs(text)
        .find(|(found, _)| *found == key)
        .map(|(_, value)| value)
}

/// Lines such as `MemTotal:  2000 kB`: name and first word.
fn pairs(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| {
        let (name, rest) = line.split_once(':')?;
        Some((name, rest.split_whitespace().next()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_kernel_become_metrics() {
        let mut text = String::new();
        guest(&mut text, &|path| {
            match path {
                "/proc/loadavg" => "0.10 0.20 0.30 2/77 123",
                "/proc/meminfo" => "MemTotal:  2 kB\nHugePages_Total:  0\n",
                "/proc/stat" => "cpu  100 0 250 3\ncpu0 100 0 250 3\nctxt 5\n",
                "/proc/vmstat" => "pgfault 9\n",
                "/proc/self/net/dev" => "x|y\n eth0: 10 1 2 3 0 0 0 0 20 2 4 5 0 0 0 0\n",
                _ => "",
            }
            .to_owned()
        });
        for line in [
            "kata_guest_load{item=\"load5\"} 0.20",
            "kata_guest_tasks{item=\"max\"} 77",
            "kata_guest_meminfo{item=\"MemTotal\"} 2048",
            "kata_guest_cpu_time{cpu=\"0\",item=\"system\"} 2.5",
            "kata_guest_cpu_time{cpu=\"total\",item=\"user\"} 1",
            "kata_guest_vm_stat{item=\"pgfault\"} 9",
            "kata_guest_netdev_stat{interface=\"eth0\",item=\"sent_drop\"} 5",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
    }

    #[test]
    fn the_agent_counts_itself() {
        let text = super::text();
        for name in [
            "kata_agent_total_rss ",
            "kata_agent_threads ",
            "kata_agent_scrape_count ",
        ] {
            assert!(text.lines().any(|line| line.starts_with(name)), "{text}");
        }
    }
}
