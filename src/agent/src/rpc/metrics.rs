// SPDX-License-Identifier: Apache-2.0
//! GetMetrics: what the guest and the agent use, as text for Prometheus, in Kata's families, with its items
//! and its units (Kata's `docs/design/kata-2-0-metrics.md`; times of processors are in milliseconds there).

use std::fmt::Write as _;
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

/// How often metrics were asked for.
static SCRAPES: AtomicU64 = AtomicU64::new(0);

/// The kernel counts processor time in hundredths of a second (`USER_HZ`).
const TICKS: u64 = 100;
const MILLISECONDS: u64 = 10;

/// Columns of `/proc/stat`.
const CPU: [&str; 10] = [
    "user",
    "nice",
    "system",
    "idle",
    "iowait",
    "irq",
    "softirq",
    "steal",
    "guest",
    "guest_nice",
];
/// Columns of `/proc/diskstats`, after a disk's name.
const DISK: [&str; 17] = [
    "reads",
    "merged",
    "sectors_read",
    "time_reading",
    "writes",
    "writes_merged",
    "sectors_written",
    "time_writing",
    "in_progress",
    "time_in_progress",
    "weighted_time_in_progress",
    "discards",
    "discards_merged",
    "sectors_discarded",
    "time_discarding",
    "flushes",
    "time_flushing",
];
/// Columns of `/proc/net/dev`.
const INTERFACE: [&str; 16] = [
    "recv_bytes",
    "recv_packets",
    "recv_errs",
    "recv_drop",
    "recv_fifo",
    "recv_frame",
    "recv_compressed",
    "recv_multicast",
    "sent_bytes",
    "sent_packets",
    "sent_errs",
    "sent_drop",
    "sent_fifo",
    "sent_colls",
    "sent_carrier",
    "sent_compressed",
];
/// Lines of `/proc/meminfo`, and what they are called.
const MEMORY: [(&str, &str); 49] = [
    ("MemTotal", "mem_total"),
    ("MemFree", "mem_free"),
    ("MemAvailable", "mem_available"),
    ("Buffers", "buffers"),
    ("Cached", "cached"),
    ("SwapCached", "swap_cached"),
    ("Active", "active"),
    ("Inactive", "inactive"),
    ("Active(anon)", "active_anon"),
    ("Inactive(anon)", "inactive_anon"),
    ("Active(file)", "active_file"),
    ("Inactive(file)", "inactive_file"),
    ("Unevictable", "unevictable"),
    ("Mlocked", "mlocked"),
    ("SwapTotal", "swap_total"),
    ("SwapFree", "swap_free"),
    ("Dirty", "dirty"),
    ("Writeback", "writeback"),
    ("AnonPages", "anon_pages"),
    ("Mapped", "mapped"),
    ("Shmem", "shmem"),
    ("KReclaimable", "k_reclaimable"),
    ("Slab", "slab"),
    ("SReclaimable", "s_reclaimable"),
    ("SUnreclaim", "s_unreclaim"),
    ("KernelStack", "kernel_stack"),
    ("PageTables", "page_tables"),
    ("NFS_Unstable", "nfs_unstable"),
    ("Bounce", "bounce"),
    ("WritebackTmp", "writeback_tmp"),
    ("CommitLimit", "commit_limit"),
    ("Committed_AS", "committed_as"),
    ("VmallocTotal", "vmalloc_total"),
    ("VmallocUsed", "vmalloc_used"),
    ("VmallocChunk", "vmalloc_chunk"),
    ("Percpu", "per_cpu"),
    ("HardwareCorrupted", "hardware_corrupted"),
    ("AnonHugePages", "anon_hugepages"),
    ("ShmemHugePages", "shmem_hugepages"),
    ("ShmemPmdMapped", "shmem_pmd_mapped"),
    ("HugePages_Total", "hugepages_total"),
    ("HugePages_Free", "hugepages_free"),
    ("HugePages_Rsvd", "hugepages_rsvd"),
    ("HugePages_Surp", "hugepages_surp"),
    ("Hugepagesize", "hugepagesize"),
    ("Hugetlb", "hugetlb"),
    ("DirectMap4k", "direct_map_4k"),
    ("DirectMap2M", "direct_map_2M"),
    ("DirectMap1G", "direct_map_1G"),
];
/// Lines of `/proc/PID/status` that are called the same in small letters.
const STATUS: [&str; 18] = [
    "VmPeak",
    "VmSize",
    "VmLck",
    "VmPin",
    "VmHWM",
    "VmRSS",
    "RssAnon",
    "RssFile",
    "RssShmem",
    "VmData",
    "VmStk",
    "VmExe",
    "VmLib",
    "VmPTE",
    "VmSwap",
    "HugetlbPages",
    "voluntary_ctxt_switches",
    "nonvoluntary_ctxt_switches",
];
/// Fields 14 to 17 of `/proc/PID/stat`: the first is the twelfth after the process's name.
const TIMES: (usize, [&str; 4]) = (11, ["utime", "stime", "cutime", "cstime"]);

/// All metrics. What can't be read is left out.
pub(super) fn text() -> String {
    let mut text = Text::default();
    let scrapes = SCRAPES.fetch_add(1, Ordering::Relaxed).saturating_add(1);
    agent(&mut text, scrapes, &read);
    guest(&mut text, &read);
    text.0
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// The exposition format of Prometheus, version 0.0.4.
#[derive(Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &'static str, kind: &str, help: &str) -> Family<'_> {
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        Family { text: self, name }
    }

    fn gauge(&mut self, name: &'static str, help: &str) -> Family<'_> {
        self.family(name, "gauge", help)
    }

    /// A family of one value, if there is one.
    fn value(&mut self, name: &'static str, help: &str, value: Option<u64>) {
        if let Some(value) = value {
            let _ = writeln!(self.gauge(name, help).text.0, "{name} {value}");
        }
    }
}

/// A family's values.
struct Family<'a> {
    text: &'a mut Text,
    name: &'static str,
}

impl Family<'_> {
    fn item(&mut self, item: &str, value: impl std::fmt::Display) {
        let _ = writeln!(self.text.0, "{}{{item=\"{item}\"}} {value}", self.name);
    }

    /// One of several things that have the same items: `kind` says what `which` is.
    fn item_of(&mut self, (kind, which): (&str, &str), item: &str, value: u64) {
        let _ = writeln!(
            self.text.0,
            "{}{{{kind}=\"{which}\",item=\"{item}\"}} {value}",
            self.name
        );
    }
}

fn agent(text: &mut Text, scrapes: u64, read: &dyn Fn(&str) -> String) {
    let name = "kata_agent_scrape_count";
    let family = text.family(name, "counter", "Metrics calls.");
    let _ = writeln!(family.text.0, "{name} {scrapes}");

    let status = read("/proc/self/status");
    let field = |key: &str| number(pairs(&status).find(|(name, _)| *name == key)?.1);
    let bytes = |key: &str| field(key)?.checked_mul(1024);
    let stat = read("/proc/self/stat");
    // The name may have spaces and brackets in it.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let times = after_name.split_whitespace().skip(TIMES.0).map(number);
    let times: Vec<_> = TIMES.1.into_iter().zip(times).collect();
    let spent = times
        .iter()
        .take(2)
        .try_fold(0_u64, |sum, (_, ticks)| sum.checked_add((*ticks)?));

    text.value("kata_agent_threads", "Threads.", field("Threads"));
    text.value(
        "kata_agent_total_time",
        "Processor time in seconds.",
        spent.map(|ticks| ticks / TICKS),
    );
    text.value(
        "kata_agent_total_vm",
        "Virtual memory in bytes.",
        bytes("VmSize"),
    );
    text.value(
        "kata_agent_total_rss",
        "Resident memory in bytes.",
        bytes("VmRSS"),
    );
    let mut family = text.gauge("kata_agent_proc_status", "The agent's status, in KiB.");
    for name in STATUS {
        if let Some(value) = field(name) {
            family.item(&name.to_ascii_lowercase(), value);
        }
    }
    let mut family = text.gauge("kata_agent_io_stat", "What the agent reads and writes.");
    for (name, value) in pairs(&read("/proc/self/io")) {
        family.item(name, value);
    }
    let mut family = text.gauge("kata_agent_proc_stat", "The agent's time, in ticks.");
    for (name, ticks) in times {
        if let Some(ticks) = ticks {
            family.item(name, ticks);
        }
    }
}

fn guest(text: &mut Text, read: &dyn Fn(&str) -> String) {
    load(text, &read("/proc/loadavg"));
    memory(text, &read("/proc/meminfo"));
    cpu_times(text, &read("/proc/stat"));
    let mut family = text.gauge("kata_guest_vm_stat", "Virtual memory of the guest.");
    for (item, value) in read("/proc/vmstat")
        .lines()
        .filter_map(|line| line.split_once(' '))
    {
        family.item(item, value);
    }
    let mut family = text.gauge("kata_guest_diskstat", "The guest's disks.");
    for line in read("/proc/diskstats").lines() {
        let mut words = line.split_whitespace().skip(2);
        if let Some(name) = words.next() {
            columns(&mut family, ("disk", name), &DISK, words, 1);
        }
    }
    let mut family = text.gauge("kata_guest_netdev_stat", "The guest's interfaces.");
    for (name, counters) in read("/proc/self/net/dev")
        .lines()
        .filter_map(|line| line.split_once(':'))
    {
        let which = ("interface", name.trim());
        columns(
            &mut family,
            which,
            &INTERFACE,
            counters.split_whitespace(),
            1,
        );
    }
}

fn load(text: &mut Text, load: &str) {
    let words: Vec<&str> = load.split_whitespace().collect();
    let mut family = text.gauge("kata_guest_load", "Load of the guest.");
    for (item, value) in ["load1", "load5", "load15"].iter().zip(&words) {
        family.item(item, value);
    }
    if let Some((running, all)) = words.get(3).and_then(|word| word.split_once('/')) {
        let mut family = text.gauge("kata_guest_tasks", "Tasks of the guest.");
        family.item("cur", running);
        family.item("max", all);
    }
}

fn memory(text: &mut Text, memory: &str) {
    let mut family = text.gauge("kata_guest_meminfo", "Memory of the guest, in bytes.");
    for line in memory.lines() {
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        let known = MEMORY.iter().find(|(of_kernel, _)| *of_kernel == name);
        // Those without a unit are counts of pages.
        let value = match value.trim().strip_suffix(" kB") {
            Some(kib) => number(kib).and_then(|kib| kib.checked_mul(1024)),
            None => number(value.trim()),
        };
        if let (Some((_, item)), Some(value)) = (known, value) {
            family.item(item, value);
        }
    }
}

fn cpu_times(text: &mut Text, stat: &str) {
    let mut family = text.gauge(
        "kata_guest_cpu_time",
        "Processor time of the guest, in milliseconds.",
    );
    for line in stat.lines().filter(|line| line.starts_with("cpu")) {
        let mut words = line.split_whitespace();
        let cpu = match words.next() {
            Some("cpu") | None => "total",
            Some(name) => name.trim_start_matches("cpu"),
        };
        columns(&mut family, ("cpu", cpu), &CPU, words, MILLISECONDS);
    }
}

/// The columns of a line, each of them so many times its number.
fn columns<'a>(
    family: &mut Family<'_>,
    which: (&str, &str),
    items: &[&str],
    words: impl Iterator<Item = &'a str>,
    times: u64,
) {
    for (item, word) in items.iter().zip(words) {
        if let Some(value) = number(word).and_then(|value| value.checked_mul(times)) {
            family.item_of(which, item, value);
        }
    }
}

fn number(word: &str) -> Option<u64> {
    word.parse().ok()
}

/// Lines such as `VmRSS:  2000 kB`: name and first word.
fn pairs(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| {
        let (name, rest) = line.split_once(':')?;
        Some((name, rest.split_whitespace().next()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_has(text: &str, lines: &[&str]) {
        for line in lines {
            assert!(text.lines().any(|found| found == *line), "{line}: {text}");
        }
    }

    #[test]
    fn files_of_the_kernel_become_metrics() {
        let mut text = Text::default();
        guest(&mut text, &|path| {
            match path {
                "/proc/loadavg" => "0.10 0.20 0.30 2/77 123",
                "/proc/meminfo" => {
                    "MemTotal:  2 kB\nActive(anon): 1 kB\nHugePages_Total:  3\nNew: 4 kB\n"
                }
                "/proc/stat" => "cpu  100 0 250 3\ncpu0 100 0 250 3 0 0 0 0 7 0\nctxt 5\n",
                "/proc/vmstat" => "pgfault 9\n",
                "/proc/diskstats" => " 254 0 vda 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18\n",
                "/proc/self/net/dev" => "x|y\n eth0: 10 1 2 3 0 0 0 4 20 2 4 5 0 0 0 6\n",
                _ => "",
            }
            .to_owned()
        });
        assert_has(
            &text.0,
            &[
                "kata_guest_load{item=\"load5\"} 0.20",
                "kata_guest_tasks{item=\"max\"} 77",
                "kata_guest_meminfo{item=\"mem_total\"} 2048",
                "kata_guest_meminfo{item=\"active_anon\"} 1024",
                "kata_guest_meminfo{item=\"hugepages_total\"} 3",
                "kata_guest_cpu_time{cpu=\"0\",item=\"system\"} 2500",
                "kata_guest_cpu_time{cpu=\"0\",item=\"guest\"} 70",
                "kata_guest_cpu_time{cpu=\"total\",item=\"user\"} 1000",
                "kata_guest_vm_stat{item=\"pgfault\"} 9",
                "kata_guest_diskstat{disk=\"vda\",item=\"reads\"} 1",
                "kata_guest_diskstat{disk=\"vda\",item=\"time_flushing\"} 17",
                "kata_guest_netdev_stat{interface=\"eth0\",item=\"recv_multicast\"} 4",
                "kata_guest_netdev_stat{interface=\"eth0\",item=\"sent_compressed\"} 6",
            ],
        );
        assert!(!text.0.contains("New"), "{}", text.0);
    }

    #[test]
    fn the_agent_counts_itself() {
        let mut text = Text::default();
        agent(&mut text, 7, &|path| {
            match path {
                "/proc/self/status" => "Name:\tinit\nVmRSS:\t 3 kB\nVmSize:\t 9 kB\nThreads:\t2\n",
                "/proc/self/stat" => "1 (a ) b) S 0 1 1 0 -1 4 5 6 7 8 150 160 3 4 20 0 2",
                "/proc/self/io" => "rchar: 12\ncancelled_write_bytes: 0\n",
                _ => "",
            }
            .to_owned()
        });
        assert_has(
            &text.0,
            &[
                "kata_agent_scrape_count 7",
                "kata_agent_threads 2",
                "kata_agent_total_time 3",
                "kata_agent_total_vm 9216",
                "kata_agent_total_rss 3072",
                "kata_agent_proc_status{item=\"vmrss\"} 3",
                "kata_agent_io_stat{item=\"cancelled_write_bytes\"} 0",
                "kata_agent_proc_stat{item=\"utime\"} 150",
                "kata_agent_proc_stat{item=\"cstime\"} 4",
            ],
        );
        let real = super::text();
        assert!(real.contains("\nkata_agent_total_rss "), "{real}");
        assert!(real.contains("\nkata_agent_proc_stat{"), "{real}");
    }
}
