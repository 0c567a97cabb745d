// SPDX-License-Identifier: Apache-2.0
//! The keys that set something.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use toml::Value;
use tracing::Level;
use vmm::control::{FsCache, MAX_BLOCK_QUEUES, MAX_QUEUE_PAIRS, RateLimits};

use super::{AGENT, Key, MACHINE, RUNTIME, set};
use crate::config::annotations::check_patterns;
use crate::config::value::{Read, flag, fraction, name, number, path, text, texts, word};
use crate::config::{Config, LEAST_MEMORY, MOST_VCPUS, host, whole_cpus};
use crate::network::Model;
use crate::sandbox::HostPath;

/// Agents may need longer than Kata's files say; Kata's own floor.
const SHORTEST_BOOT_TIMEOUT: Duration = Duration::from_secs(10);

/// The largest number that a file can hold.
const MOST_RATE: u64 = i64::MAX.cast_unsigned();

/// Kata counts bandwidth in bits.
const BITS: u64 = 8;

/// Kata's names of how a disk's requests are served: beside each other or not.
const AIO: &[(&str, bool)] = &[("io_uring", true), ("threads", false)];

/// Kata's names of the levels of a log; the first name of a level is the one shown.
const LEVELS: &[(&str, Level)] = &[
    ("trace", Level::TRACE),
    ("debug", Level::DEBUG),
    ("info", Level::INFO),
    ("warn", Level::WARN),
    ("error", Level::ERROR),
    ("critical", Level::ERROR),
];

/// Kata's names of how long a guest may trust what it has read.
const CACHES: &[(&str, FsCache)] = &[
    ("never", FsCache::Never),
    ("auto", FsCache::Auto),
    ("always", FsCache::Always),
];

/// Kata's names of how an interface is joined to the guest's.
const MODELS: &[(&str, Model)] = &[
    ("none", Model::None),
    ("tcfilter", Model::TcFilter),
    ("macvtap", Model::Macvtap),
];

/// The keys, table by table.
pub(super) static SETTINGS: &[Key] = &[
    set(
        MACHINE,
        "kernel",
        |config| shown(&config.kernel),
        |config, value| {
            config.kernel = path(value)?.into();
            Ok(())
        },
    ),
    set(
        MACHINE,
        "image",
        |config| shown(&config.image),
        |config, value| {
            config.image = path(value)?.into();
            Ok(())
        },
    ),
    set(
        MACHINE,
        "kernel_params",
        |config| config.kernel_params.as_str().into(),
        |config, value| {
            text(value)?.clone_into(&mut config.kernel_params);
            Ok(())
        },
    ),
    set(
        MACHINE,
        "default_vcpus",
        |config| i64::from(config.vcpus).into(),
        |config, value| {
            config.vcpus = vcpus(value)?;
            Ok(())
        },
    )
    .annotated("hypervisor", "default_vcpus"),
    set(
        MACHINE,
        "default_maxvcpus",
        |config| i64::from(config.most_vcpus.unwrap_or(0)).into(),
        |config, value| {
            config.most_vcpus = unless_zero(number(value, 0..=MOST_VCPUS)?);
            Ok(())
        },
    )
    .annotated("hypervisor", "default_max_vcpus"),
    set(
        MACHINE,
        "default_memory",
        |config| i64::from(config.memory_mib).into(),
        |config, value| {
            config.memory_mib = memory(value)?;
            Ok(())
        },
    )
    .annotated("hypervisor", "default_memory"),
    set(
        MACHINE,
        "default_maxmemory",
        |config| i64::from(config.most_memory_mib.unwrap_or(0)).into(),
        |config, value| {
            config.most_memory_mib = match value.as_integer() {
                Some(0) => None,
                _ => Some(memory(value)?),
            };
            Ok(())
        },
    ),
    set(
        MACHINE,
        "overhead_vcpus",
        |config| config.overhead_vcpus.into(),
        |config, value| {
            config.overhead_vcpus = fraction(value)
                .filter(|wanted| (0.0..=MOST_VCPUS.into()).contains(wanted))
                .ok_or_else(|| format!("wants a number from 0 to {MOST_VCPUS}"))?;
            Ok(())
        },
    ),
    set(
        MACHINE,
        "overhead_memory",
        |config| i64::from(config.overhead_mib).into(),
        |config, value| {
            config.overhead_mib = number(value, 0..=u32::MAX)?;
            Ok(())
        },
    ),
    set(
        MACHINE,
        "enable_virtio_mem",
        |config| config.virtio_mem.into(),
        |config, value| {
            config.virtio_mem = flag(value)?;
            Ok(())
        },
    ),
    set(
        MACHINE,
        "reclaim_guest_freed_memory",
        |config| config.reclaim.into(),
        |config, value| {
            config.reclaim = flag(value)?;
            Ok(())
        },
    ),
    set(
        MACHINE,
        "virtio_fs_cache",
        |config| name(&config.shared_cache, CACHES),
        |config, value| {
            config.shared_cache = word(value, CACHES)?;
            Ok(())
        },
    )
    .annotated("hypervisor", "virtio_fs_cache"),
    set(
        MACHINE,
        "block_device_cache_direct",
        |config| config.disks.direct.into(),
        |config, value| {
            config.disks.direct = flag(value)?;
            Ok(())
        },
    ),
    set(
        MACHINE,
        "block_device_aio",
        |config| name(&config.disks.io_uring, AIO),
        |config, value| {
            config.disks.io_uring = word(value, AIO)?;
            Ok(())
        },
    ),
    set(
        MACHINE,
        "num_queues",
        |config| i64::from(config.disks.queues).into(),
        |config, value| {
            config.disks.queues = number(value, 1..=MAX_BLOCK_QUEUES)?;
            Ok(())
        },
    ),
    set(
        MACHINE,
        "disk_rate_limiter_bw_max_rate",
        |config| bits(config.disks.limits),
        |config, value| {
            config.disks.limits.bytes = bytes(value)?;
            Ok(())
        },
    ),
    set(
        MACHINE,
        "disk_rate_limiter_ops_max_rate",
        |config| whole(config.disks.limits.operations),
        |config, value| {
            config.disks.limits.operations = number(value, 0..=MOST_RATE)?;
            Ok(())
        },
    ),
    set(
        MACHINE,
        "enable_debug",
        |config| config.monitor.debug.into(),
        |config, value| {
            config.monitor.debug = flag(value)?;
            Ok(())
        },
    ),
    set(
        MACHINE,
        "log_level",
        |config| name(&config.monitor.level, LEVELS),
        |config, value| {
            config.monitor.level = word(value, LEVELS)?;
            Ok(())
        },
    ),
    set(
        MACHINE,
        "enable_annotations",
        |config| patterns(&config.allowed, "hypervisor"),
        |config, value| allow(config, "hypervisor", value),
    ),
    set(
        AGENT,
        "enable_debug",
        |config| config.agent.debug.into(),
        |config, value| {
            config.agent.debug = flag(value)?;
            Ok(())
        },
    ),
    set(
        AGENT,
        "log_level",
        |config| name(&config.agent.level, LEVELS),
        |config, value| {
            config.agent.level = word(value, LEVELS)?;
            Ok(())
        },
    ),
    set(
        AGENT,
        "debug_console_enabled",
        |config| config.debug_console.into(),
        |config, value| {
            config.debug_console = flag(value)?;
            Ok(())
        },
    ),
    set(
        AGENT,
        "reconnect_timeout_ms",
        |config| milliseconds(config.boot_timeout),
        |config, value| {
            let limit = Duration::from_millis(number(value, 1..=u32::MAX)?.into());
            config.boot_timeout = limit.max(SHORTEST_BOOT_TIMEOUT);
            Ok(())
        },
    ),
    set(
        AGENT,
        "create_container_timeout",
        |config| seconds(config.call_timeout),
        |config, value| {
            config.call_timeout = Duration::from_secs(number(value, 1..=u32::MAX)?.into());
            Ok(())
        },
    )
    .annotated("runtime", "create_container_timeout"),
    set(
        MACHINE,
        "rx_rate_limiter_max_rate",
        |config| bits(config.network.receive),
        |config, value| {
            config.network.receive.bytes = bytes(value)?;
            Ok(())
        },
    )
    .annotated("hypervisor", "rx_rate_limiter_max_rate"),
    set(
        MACHINE,
        "tx_rate_limiter_max_rate",
        |config| bits(config.network.transmit),
        |config, value| {
            config.network.transmit.bytes = bytes(value)?;
            Ok(())
        },
    )
    .annotated("hypervisor", "tx_rate_limiter_max_rate"),
    set(
        RUNTIME,
        "enable_debug",
        |config| config.log.debug.into(),
        |config, value| {
            config.log.debug = flag(value)?;
            Ok(())
        },
    ),
    set(
        RUNTIME,
        "log_level",
        |config| name(&config.log.level, LEVELS),
        |config, value| {
            config.log.level = word(value, LEVELS)?;
            Ok(())
        },
    ),
    set(
        MACHINE,
        "network_queues",
        |config| {
            i64::try_from(config.network.queues)
                .unwrap_or(i64::MAX)
                .into()
        },
        |config, value| {
            config.network.queues = number(value, 1..=MAX_QUEUE_PAIRS)?;
            Ok(())
        },
    )
    .annotated("hypervisor", "network_queues"),
    set(
        MACHINE,
        "disable_vhost_net",
        |config| (!config.network.vhost).into(),
        |config, value| {
            config.network.vhost = !flag(value)?;
            Ok(())
        },
    ),
    set(
        RUNTIME,
        "static_sandbox_resource_mgmt",
        |config| config.fixed_size.into(),
        |config, value| {
            config.fixed_size = flag(value)?;
            Ok(())
        },
    ),
    set(
        RUNTIME,
        "sandbox_cgroup_only",
        |config| config.cgroup_only.into(),
        |config, value| {
            config.cgroup_only = flag(value)?;
            Ok(())
        },
    ),
    set(
        RUNTIME,
        "enable_vcpus_pinning",
        |config| config.pin_vcpus.into(),
        |config, value| {
            config.pin_vcpus = flag(value)?;
            Ok(())
        },
    ),
    set(
        RUNTIME,
        "internetworking_model",
        |config| name(&config.network.model, MODELS),
        |config, value| {
            config.network.model = word(value, MODELS)?;
            Ok(())
        },
    )
    .annotated("runtime", "internetworking_model"),
    set(
        RUNTIME,
        "disable_guest_seccomp",
        |config| (!config.seccomp).into(),
        |config, value| {
            config.seccomp = !flag(value)?;
            Ok(())
        },
    )
    .annotated("runtime", "disable_guest_seccomp"),
    set(
        RUNTIME,
        "use_passfd_io",
        |config| config.pass_streams.into(),
        |config, value| {
            config.pass_streams = flag(value)?;
            Ok(())
        },
    ),
    set(
        RUNTIME,
        "passfd_listener_port",
        |config| i64::from(config.streams_port).into(),
        |config, value| {
            config.streams_port = number(value, 1..=u32::MAX)?;
            Ok(())
        },
    ),
    set(
        RUNTIME,
        "sandbox_bind_mounts",
        |config| {
            let shown = config.host_paths.iter().map(ToString::to_string);
            shown.map(Value::from).collect::<Vec<_>>().into()
        },
        |config, value| {
            config.host_paths = HostPath::parse_all(&texts(value)?)?;
            Ok(())
        },
    ),
    set(
        RUNTIME,
        "enable_annotations",
        |config| patterns(&config.allowed, "runtime"),
        |config, value| allow(config, "runtime", value),
    ),
];

/// A limit as Kata counts it, in bits.
fn bits(limits: RateLimits) -> Value {
    whole(limits.bytes.saturating_mul(BITS))
}

/// The bytes of a limit in bits; one below a byte is still a limit.
fn bytes(value: &Value) -> Read<u64> {
    let bits: u64 = number(value, 0..=MOST_RATE)?;
    Ok(bits.div_ceil(BITS))
}

fn whole(number: u64) -> Value {
    i64::try_from(number).unwrap_or(i64::MAX).into()
}

fn shown(path: &Path) -> Value {
    path.display().to_string().into()
}

fn unless_zero(number: u8) -> Option<u8> {
    (number > 0).then_some(number)
}

fn milliseconds(time: Duration) -> Value {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX).into()
}

fn seconds(time: Duration) -> Value {
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX).into()
}

fn memory(value: &Value) -> Read<u32> {
    number(value, LEAST_MEMORY..=u32::MAX)
        .map_err(|_| format!("wants at least {LEAST_MEMORY} (MiB)"))
}

/// A number of virtual CPUs as Kata writes it: a fraction is rounded up, 0 is the default, and a
/// negative one means all of the host's.
fn vcpus(value: &Value) -> Read<u8> {
    let wanted = fraction(value).filter(|wanted| wanted.is_finite());
    match wanted {
        Some(0.0) => Ok(Config::built_in().vcpus),
        Some(wanted) if wanted < 0.0 => Ok(host::cpus().min(MOST_VCPUS)),
        Some(wanted) => whole_cpus(wanted, MOST_VCPUS).ok_or(()),
        None => Err(()),
    }
    .map_err(|()| format!("wants at most {MOST_VCPUS}, or -1 for as many as the host has"))
}

fn patterns(allowed: &BTreeMap<&'static str, Vec<String>>, group: &str) -> Value {
    allowed.get(group).cloned().unwrap_or_default().into()
}

fn allow(config: &mut Config, group: &'static str, value: &Value) -> Read<()> {
    let patterns = texts(value)?;
    check_patterns(group, &patterns)?;
    config.allowed.insert(group, patterns);
    Ok(())
}
