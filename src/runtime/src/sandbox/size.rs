// SPDX-License-Identifier: Apache-2.0
//! How large a machine is: what its containers' limits ask for and what the guest needs beside,
//! or as configured where there is no limit. Memory that is never used still costs at boot, where
//! the kernel describes every page.

use std::collections::HashMap;

use protocols::containerd::cri::LinuxContainerResources;

use crate::config::{Config, whole_cpus};
use crate::error::{Context, Kind, Result};
use crate::spec::Spec;

/// The least for containers with a limit, in MiB: room for the guest's page cache.
const FLOOR: u64 = 256;

/// Annotations of containerd's CRI: the sums over the pod's containers.
const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// A machine's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) vcpus: u8,
    pub(crate) memory_mib: u32,
}

/// Limits as cgroups have them; absent, zero and negative mean none.
#[derive(Debug, Default, Clone, Copy)]
struct Limits {
    /// In bytes.
    memory: Option<i64>,
    /// Microseconds of CPU time in each period.
    quota: Option<i64>,
    period: Option<u64>,
}

impl Size {
    /// For a container that has its machine to itself.
    pub(crate) fn of_container(spec: &Spec, config: &Config) -> Result<Self> {
        let resources = spec.linux.resources.as_ref();
        let cpu = resources.and_then(|resources| resources.cpu.as_ref());
        let limits = Limits {
            memory: resources.and_then(|resources| resources.memory.as_ref()?.limit),
            quota: cpu.and_then(|cpu| cpu.quota),
            period: cpu.and_then(|cpu| cpu.period),
        };
        limits.size(config)
    }

    /// For a pod, whose runtime sums up its containers in annotations. The shares that stand
    /// beside them are weights between pods, and no size.
    pub(crate) fn of_pod(annotations: &HashMap<String, String>, config: &Config) -> Result<Self> {
        let limits = Limits {
            memory: number(annotations, MEMORY)?,
            quota: number(annotations, CPU_QUOTA)?,
            period: number(annotations, CPU_PERIOD)?,
        };
        limits.size(config)
    }

    /// For a pod, as Kubernetes itself says it.
    pub(crate) fn of_resources(
        resources: &LinuxContainerResources,
        config: &Config,
    ) -> Result<Self> {
        let limits = Limits {
            memory: Some(resources.memory_limit_in_bytes),
            quota: Some(resources.cpu_quota),
            period: u64::try_from(resources.cpu_period).ok(),
        };
        limits.size(config)
    }
}

impl Limits {
    fn size(self, config: &Config) -> Result<Size> {
        let configured = u64::from(config.memory_mib);
        let most = config.memory_limit();
        let memory = self
            .memory
            .and_then(|bytes| u64::try_from(bytes).ok())
            // A limit that no host has is no limit.
            .filter(|&bytes| bytes > 0 && bytes < 1 << 40)
            .map_or(configured, |bytes| {
                let wanted = (bytes >> 20).saturating_add(config.overhead_mib.into());
                wanted.max(FLOOR.min(configured))
            });
        // A limit grants nothing: a machine that is smaller keeps within it, too.
        let memory = u32::try_from(memory).unwrap_or(most).min(most);
        let quota = self.quota.filter(|&quota| quota > 0);
        let period = self.period.filter(|&period| period > 0);
        let vcpus = match quota.zip(period) {
            Some((quota, period)) => {
                let wanted = quota as f64 / period as f64 + config.overhead_vcpus;
                let most = config.vcpu_limit();
                whole_cpus(wanted, most).unwrap_or(most).max(config.vcpus)
            }
            None => config.vcpus,
        };
        Ok(Size {
            vcpus,
            memory_mib: memory,
        })
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
        let size = Size::of_container(&spec::read(text.as_bytes()).unwrap(), &config).unwrap();
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
            let size = limits.size(&config).unwrap();
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
        Size::of_pod(&annotations, &wide())
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
}
