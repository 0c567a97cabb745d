// SPDX-License-Identifier: Apache-2.0
//! The configuration file: Kata's tables and keys.
//!
//! `KEYS` is all that a file may hold. A key either sets something, or stands for a choice that
//! this build has already made; then the one value that agrees with it is accepted, so that a
//! file may state it, and any other is an error.

use std::time::Duration;

use toml::{Table, Value};

use super::{Config, LEAST_MEMORY, MOST_VCPUS};

/// What a key does with its value: sets it, or says what it wants instead.
type Apply = fn(&mut Config, &Value) -> Result<(), String>;

/// The machine's keys are in the table that Kata's files use for a built-in monitor.
const MACHINE: &str = "hypervisor.dragonball";

/// Agents may need longer than Kata's files say; Kata's own floor.
const SHORTEST_BOOT_TIMEOUT: Duration = Duration::from_secs(10);

const KEYS: &[(&str, &str, Apply)] = &[
    (MACHINE, "kernel", |config, value| {
        config.kernel = path(value)?.into();
        Ok(())
    }),
    (MACHINE, "image", |config, value| {
        config.image = path(value)?.into();
        Ok(())
    }),
    (MACHINE, "kernel_params", |config, value| {
        text(value)?.clone_into(&mut config.kernel_params);
        Ok(())
    }),
    (MACHINE, "default_vcpus", |config, value| {
        config.vcpus = value
            .as_integer()
            .and_then(|count| u8::try_from(count).ok())
            .filter(|count| (1..=MOST_VCPUS).contains(count))
            .ok_or_else(|| format!("wants a number from 1 to {MOST_VCPUS}"))?;
        Ok(())
    }),
    (MACHINE, "default_memory", |config, value| {
        config.memory_mib = value
            .as_integer()
            .and_then(|size| u32::try_from(size).ok())
            .filter(|size| *size >= LEAST_MEMORY)
            .ok_or_else(|| format!("wants at least {LEAST_MEMORY} (MiB)"))?;
        Ok(())
    }),
    (MACHINE, "enable_debug", |config, value| {
        set(&mut config.guest_console, value)
    }),
    (MACHINE, "rootfs_type", |_, value| only(value, "erofs")),
    (MACHINE, "vm_rootfs_driver", |_, value| {
        only(value, "virtio-blk-pci")
    }),
    (MACHINE, "shared_fs", |_, value| {
        only(value, "inline-virtio-fs")
    }),
    ("agent.kata", "enable_debug", |config, value| {
        set(&mut config.agent_debug, value)
    }),
    ("agent.kata", "reconnect_timeout_ms", |config, value| {
        config.boot_timeout = Duration::from_millis(positive(value)?).max(SHORTEST_BOOT_TIMEOUT);
        Ok(())
    }),
    ("agent.kata", "create_container_timeout", |config, value| {
        config.call_timeout = Duration::from_secs(positive(value)?);
        Ok(())
    }),
    ("runtime", "name", |_, value| only(value, "virt_container")),
    ("runtime", "hypervisor_name", |_, value| {
        only(value, "dragonball")
    }),
    ("runtime", "agent_name", |_, value| only(value, "kata")),
    ("runtime", "enable_debug", |config, value| {
        set(&mut config.debug, value)
    }),
    ("runtime", "internetworking_model", |_, value| {
        only(value, "none")
    }),
    ("runtime", "disable_guest_seccomp", |config, value| {
        let mut disable = false;
        set(&mut disable, value)?;
        config.seccomp = !disable;
        Ok(())
    }),
];

/// Applies a file's keys. The error names every key that is wrong.
pub(super) fn apply(mut config: Config, text: &str) -> Result<Config, String> {
    let file: Table = text.parse().map_err(|error: toml::de::Error| {
        error
            .to_string()
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    })?;
    let mut reasons = Vec::new();
    for (name, value) in &file {
        table(&mut config, name, value, &mut reasons);
    }
    if reasons.is_empty() {
        Ok(config)
    } else {
        Err(reasons.join("; "))
    }
}

/// Applies a table of the file, or one in it.
fn table(config: &mut Config, name: &str, value: &Value, reasons: &mut Vec<String>) {
    let Some(entries) = value.as_table() else {
        reasons.push(format!("unknown key {name}"));
        return;
    };
    for (key, value) in entries {
        let known = KEYS
            .iter()
            .find(|(table, known, _)| *table == name && known == key);
        match known {
            Some((_, _, apply)) => {
                if let Err(reason) = apply(config, value) {
                    reasons.push(format!("{name}.{key} = {value}: {reason}"));
                }
            }
            None if value.is_table() => table(config, &format!("{name}.{key}"), value, reasons),
            None => reasons.push(format!("unknown or unsupported key {name}.{key}")),
        }
    }
}

fn text(value: &Value) -> Result<&str, String> {
    value.as_str().ok_or_else(|| "wants a string".to_owned())
}

fn path(value: &Value) -> Result<&str, String> {
    text(value)
        .ok()
        .filter(|path| path.starts_with('/'))
        .ok_or_else(|| "wants an absolute path".to_owned())
}

fn positive(value: &Value) -> Result<u64, String> {
    value
        .as_integer()
        .and_then(|number| u64::try_from(number).ok())
        .filter(|number| *number > 0)
        .ok_or_else(|| "wants a positive number".to_owned())
}

fn set(flag: &mut bool, value: &Value) -> Result<(), String> {
    *flag = value
        .as_bool()
        .ok_or_else(|| "wants true or false".to_owned())?;
    Ok(())
}

fn only(value: &Value, supported: &str) -> Result<(), String> {
    if value.as_str() == Some(supported) {
        Ok(())
    } else {
        Err(format!("this build supports {supported:?} only"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kata_s_keys_are_applied() {
        let text = r#"
            [hypervisor.dragonball]
            kernel = "/boot/k"
            default_vcpus = 4
            default_memory = 512
            kernel_params = "a=b"
            shared_fs = "inline-virtio-fs"
            [agent.kata]
            reconnect_timeout_ms = 3000
            create_container_timeout = 5
            [runtime]
            disable_guest_seccomp = true
        "#;
        let config = apply(Config::built_in(), text).unwrap();
        assert_eq!(config.kernel.to_str(), Some("/boot/k"));
        assert_eq!((config.vcpus, config.memory_mib), (4, 512));
        assert_eq!(config.boot_timeout, SHORTEST_BOOT_TIMEOUT);
        assert_eq!(config.call_timeout, Duration::from_secs(5));
        assert!(!config.seccomp);
    }

    #[test]
    fn every_wrong_key_is_named() {
        let text = r#"
            colour = 1
            [hypervisor.qemu]
            path = "/usr/bin/qemu"
            [hypervisor.dragonball]
            default_vcpus = 0
            default_memory = 8
            kernel = "vmlinux"
            enable_hugepages = true
            [runtime]
            internetworking_model = "macvtap"
        "#;
        let reasons = apply(Config::built_in(), text).unwrap_err();
        for name in [
            "colour",
            "hypervisor.qemu.path",
            "hypervisor.dragonball.default_vcpus = 0",
            "hypervisor.dragonball.default_memory = 8",
            "hypervisor.dragonball.kernel",
            "hypervisor.dragonball.enable_hugepages",
            "runtime.internetworking_model = \"macvtap\"",
        ] {
            assert!(reasons.contains(name), "{name} in {reasons}");
        }
    }

    #[test]
    fn a_broken_file_is_one_line() {
        let reasons = apply(Config::built_in(), "[runtime\nname=").unwrap_err();
        assert!(!reasons.contains('\n'));
    }
}
