// SPDX-License-Identifier: Apache-2.0
//! How large a machine is: what its containers' limits ask for and what the guest needs beside,
//! or as configured where there is no limit. Memory that is never used still costs at boot, where
//! the kernel describes every page.
//!
//! That holds where the size is fixed. Else a machine boots as configured, and has what its
//! containers' limits ask for beside, as they come, change and go.

use std::collections::HashMap;

use protocols::agent::oci::LinuxResources;
use protocols::containerd::cri::LinuxContainerResources;
use vmm::control::MEMORY_STEP;
pub(crate) use vmm::control::Size;

use crate::config::{Config, whole_cpus};
use crate::error::{Context, Kind, Result};
use crate::spec::Spec;

/// The least for containers with a limit, in MiB: room for the guest's page cache.
const FLOOR: u64 = 256;

/// Annotations of containerd's CRI: the sums over the pod's containers.
const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// Limits as cgroups have them; absent, zero and negative mean none.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// In bytes.
    memory: Option<i64>,
    /// Microseconds of CPU time in each period.
    quota: Option<i64>,
    period: Option<u64>,
}

/// The size that a machine boots with, where it is to have `fixed`; and the one that it may grow to.
pub(crate) fn bounds(fixed: Size, config: &Config) -> (Size, Size) {
    if config.fixed_size {
        return (fixed, fixed);
    }
    let size = Size {
        vcpus: config.vcpus,
        memory_mib: config.memory_mib,
    };
    let most = Size {
        vcpus: config.vcpu_limit(),
        memory_mib: if config.virtio_mem {
            config.memory_limit()
        } else {
            config.memory_mib
        },
    };
    (size, most)
}

/// What a machine that boots with `size` and may grow to `most` is to have for containers with
/// these limits: each adds its own. One without a limit has its part of the rest.
pub(super) fn sum<'a>(size: Size, most: Size, all: impl Iterator<Item = &'a Limits>) -> Size {
    let (mut mib, mut cpus) = (0_u64, f64::from(size.vcpus));
    for limits in all {
        mib = mib.saturating_add(limits.bytes().map_or(0, |bytes| bytes.div_ceil(1 << 20)));
        cpus += limits.cpus().unwrap_or(0.0);
    }
    let room = most.memory_mib.saturating_sub(size.memory_mib);
    let room = room.saturating_sub(room.checked_rem(MEMORY_STEP).unwrap_or_default());
    let more = u32::try_from(mib).unwrap_or(room);
    let more = more.checked_next_multiple_of(MEMORY_STEP).unwrap_or(room);
    Size {
        vcpus: whole_cpus(cpus, most.vcpus).unwrap_or(most.vcpus),
        memory_mib: size.memory_mib.saturating_add(more.min(room)),
    }
}

/// For a container that has its machine to itself.
pub(crate) fn of_container(spec: &Spec, config: &Config) -> Size {
    Limits::of(spec).size(config)
}

/// For a pod, whose runtime sums up its containers in annotations. The shares that stand
/// beside them are weights between pods, and no size.
pub(crate) fn of_pod(annotations: &HashMap<String, String>, config: &Config) -> Result<Size> {
    let limits = Limits {
        memory: number(annotations, MEMORY)?,
        quota: number(annotations, CPU_QUOTA)?,
        period: number(annotations, CPU_PERIOD)?,
    };
    Ok(limits.size(config))
}

/// For a pod, as Kubernetes itself says it.
pub(crate) fn of_resources(resources: &LinuxContainerResources, config: &Config) -> Size {
    let limits = Limits {
        memory: Some(resources.memory_limit_in_bytes),
        quota: Some(resources.cpu_quota),
        period: u64::try_from(resources.cpu_period).ok(),
    };
    limits.size(config)
}

impl Limits {
    /// Those of a container.
    pub(crate) fn of(spec: &Spec) -> Self {
        let resources = spec.linux.resources.as_ref();
        let cpu = resources.and_then(|resources| resources.cpu.as_ref());
        Self {
            memory: resources.and_then(|resources| resources.memory.as_ref()?.limit),
            quota: cpu.and_then(|cpu| cpu.quota),
            period: cpu.and_then(|cpu| cpu.period),
        }
    }

    /// With what an update changes: a value of 0 leaves the one that is there.
    pub(super) fn changed_by(self, resources: &LinuxResources) -> Self {
        let cpu = &resources.CPU;
        let memory = Some(resources.Memory.Limit).filter(|&limit| limit != 0);
        Self {
            memory: memory.or(self.memory),
            quota: Some(cpu.Quota).filter(|&quota| quota != 0).or(self.quota),
            period: Some(cpu.Period)
                .filter(|&period| period > 0)
                .or(self.period),
        }
    }

    /// Whether a machine of this size can't use all of them.
    pub(super) fn exceed(self, size: Size) -> bool {
        let bytes = u64::from(size.memory_mib) << 20;
        self.bytes().is_some_and(|limit| limit > bytes)
            || self.cpus().is_some_and(|limit| limit > size.vcpus.into())
    }

    fn bytes(self) -> Option<u64> {
        self.memory
            .and_then(|bytes| u64::try_from(bytes).ok())
            // A limit that no host has is no limit.
            .filter(|&bytes| bytes > 0 && bytes < 1 << 40)
    }

    fn cpus(self) -> Option<f64> {
        let quota = self.quota.filter(|&quota| quota > 0)?;
        let period = self.period.filter(|&period| period > 0)?;
        Some(quota as f64 / period as f64)
    }

    fn size(self, config: &Config) -> Size {
        let configured = u64::from(config.memory_mib);
        let most = config.memory_limit();
        let memory = self.bytes().map_or(configured, |bytes| {
            let wanted = (bytes >> 20).saturating_add(config.overhead_mib.into());
            wanted.max(FLOOR.min(configured))
        });
        // A limit grants nothing: a machine that is smaller keeps within it, too.
        let memory = u32::try_from(memory).unwrap_or(most).min(most);
        let vcpus = self.cpus().map_or(config.vcpus, |cpus| {
            let most = config.vcpu_limit();
            let wanted = whole_cpus(cpus + config.overhead_vcpus, most);
            wanted.unwrap_or(most).max(config.vcpus)
        });
        Size {
            vcpus,
            memory_mib: memory,
        }
    }
}

fn number<T>(annotations: &HashMap<String, String>, name: &str) -> Result<Option<T>>
where
    T: std::str::FromStr,
    T::Err: std::error::Error + Send + Sync + 'static,
{
    annotations
        .get(name)
        .map(|value| value.parse())
        .transpose()
        .context(Kind::InvalidArgument, || {
            let value = annotations.get(name).map_or("", String::as_str);
            format!("annotation {name}: {value:?}")
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec;

    /// Where the host's size is no bound.
    fn wide() -> Config {
        Config::of_text(
            "[hypervisor.dragonball]\ndefault_maxvcpus = 32\ndefault_maxmemory = 1000000\n",
        )
    }

    fn sized(resources: &str) -> (u8, u32) {
        let text = format!("{{\"linux\": {{\"resources\": {resources}}}}}");
        let config = wide();
        let size = of_container(&spec::read(text.as_bytes()).unwrap(), &config);
        (size.vcpus, size.memory_mib)
    }

    #[test]
    fn a_machine_is_as_large_as_its_limits_ask() {
        assert_eq!(sized("{}"), (1, 2048));
        assert_eq!(sized(r#"{"memory": {"limit": 67108864}}"#), (1, 256));
        assert_eq!(sized(r#"{"memory": {"limit": 4294967296}}"#), (1, 4160));
        assert_eq!(sized(r#"{"memory": {"limit": -1}}"#), (1, 2048));
        assert_eq!(
            sized(r#"{"memory": {"limit": 9223372036854771712}}"#),
            (1, 2048)
        );
        assert_eq!(
            sized(r#"{"cpu": {"quota": 250000, "period": 100000}}"#),
            (3, 2048)
        );
        assert_eq!(sized(r#"{"cpu": {"quota": 1, "period": 0}}"#), (1, 2048));
        assert_eq!(
            sized(r#"{"cpu": {"quota": 99000000, "period": 1000}}"#),
            (32, 2048)
        );
    }

    #[test]
    fn the_operator_bounds_a_machine_and_adds_to_it() {
        let config = Config::of_text(
            "[hypervisor.dragonball]\ndefault_maxvcpus = 4\ndefault_maxmemory = 2048\n\
             overhead_vcpus = 0.25\noverhead_memory = 32\n",
        );
        let size = |quota, memory: i64| {
            let limits = Limits {
                memory: Some(memory << 20),
                quota: Some(quota),
                period: Some(100_000),
            };
            let size = limits.size(&config);
            (size.vcpus, size.memory_mib)
        };
        assert_eq!(size(175_000, 1024), (2, 1056));
        assert_eq!(size(200_000, 1024), (3, 1056));
        assert_eq!(size(900_000, 8192), (4, 2048));
    }

    fn pod(values: [&str; 3]) -> Result<Size> {
        let annotations = [CPU_QUOTA, CPU_PERIOD, MEMORY]
            .into_iter()
            .zip(values)
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        of_pod(&annotations, &wide())
    }

    #[test]
    fn a_pod_is_as_large_as_its_annotations_ask() {
        let size = |values| pod(values).map(|size| (size.vcpus, size.memory_mib));
        assert_eq!(size(["0", "100000", "0"]).unwrap(), (1, 2048));
        assert_eq!(size(["150000", "100000", "1073741824"]).unwrap(), (2, 1088));
        assert_eq!(size(["-1", "100000", "-1"]).unwrap(), (1, 2048));
        let error = pod(["many", "100000", "0"]).unwrap_err();
        assert!(error.chain().contains(CPU_QUOTA), "{}", error.chain());
    }

    fn limits(memory: i64, quota: i64) -> Limits {
        Limits {
            memory: Some(memory),
            quota: Some(quota),
            period: Some(100_000),
        }
    }

    #[test]
    fn a_machine_that_grows_has_what_it_boots_with_and_the_sum_of_the_limits() {
        let config = Config::of_text(
            "[hypervisor.dragonball]\ndefault_memory = 256\ndefault_maxmemory = 2049\n\
             default_maxvcpus = 4\n[runtime]\nstatic_sandbox_resource_mgmt = false\n",
        );
        let fixed = Size {
            vcpus: 3,
            memory_mib: 500,
        };
        let (size, most) = bounds(fixed, &config);
        assert_eq!((size.vcpus, size.memory_mib), (1, 256));
        assert_eq!((most.vcpus, most.memory_mib), (4, 2049));
        let sum = |all: &[Limits]| {
            let size = sum(size, most, all.iter());
            (size.vcpus, size.memory_mib)
        };
        assert_eq!(sum(&[]), (1, 256));
        assert_eq!(sum(&[Limits::default(), limits(-1, -1)]), (1, 256));
        assert_eq!(sum(&[limits(64 << 20, 50_000)]), (2, 320));
        // Halves make one CPU together, and a part of a MiB counts.
        assert_eq!(sum(&[limits(1, 50_000), limits(5 << 20, 50_000)]), (2, 262));
        assert_eq!(sum(&[limits(1 << 39, 900_000)]), (4, 2048));
        assert_eq!(sum(&[limits(i64::MAX, i64::MIN)]), (1, 256));
    }

    #[test]
    fn limits_may_be_more_than_a_machine() {
        let size = Size {
            vcpus: 2,
            memory_mib: 100,
        };
        assert!(!limits(100 << 20, 200_000).exceed(size));
        assert!(limits((100 << 20) + 1, -1).exceed(size));
        assert!(limits(0, 200_001).exceed(size));
        assert!(!limits(-1, -1).exceed(size));
    }

    #[test]
    fn an_update_changes_what_it_names() {
        let mut update = LinuxResources::new();
        let before = limits(64 << 20, 50_000);
        assert_eq!(before.changed_by(&update), before);
        update.Memory.mut_or_insert_default().Limit = -1;
        update.CPU.mut_or_insert_default().Quota = 100_000;
        assert_eq!(before.changed_by(&update), limits(-1, 100_000));
    }
}
