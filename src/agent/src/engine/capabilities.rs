// SPDX-License-Identifier: Apache-2.0
//! Capabilities: all five sets (capabilities(7)).

use protocols::agent::oci::LinuxCapabilities;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capability_is_in_bounding_set, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
    set_keep_capabilities,
};
use serde::{Deserialize, Serialize};

use crate::error::{AgentError, Context as _, Result};

/// Names by number, as in `linux/capability.h`.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The five sets as bit masks.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Sets {
    bounding: u64,
    effective: u64,
    inheritable: u64,
    permitted: u64,
    ambient: u64,
}

impl Sets {
    /// # Errors
    ///
    /// Names that this agent does not know, and ambient capabilities that the kernel would not
    /// grant because they are not both permitted and inheritable.
    pub(crate) fn new(capabilities: &LinuxCapabilities) -> Result<Self> {
        let sets = Self {
            bounding: mask("bounding", &capabilities.Bounding)?,
            effective: mask("effective", &capabilities.Effective)?,
            inheritable: mask("inheritable", &capabilities.Inheritable)?,
            permitted: mask("permitted", &capabilities.Permitted)?,
            ambient: mask("ambient", &capabilities.Ambient)?,
        };
        Ok(sets)
    }

    /// Drops what the bounding set lacks. Needs CAP_SETPCAP, so it comes first.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn limit(&self) -> Result<()> {
        for number in 0..64 {
            let one = CapabilitySet::from_bits_retain(1 << number);
            // EINVAL: the kernel knows no capability from here on.
            match capability_is_in_bounding_set(one) {
                Err(_) => break,
                Ok(true) if self.bounding & one.bits() == 0 => {
                    remove_capability_from_bounding_set(one)
                        .context(|| format!("drop capability {number} from the bounding set"))?;
                }
                Ok(_) => {}
            }
        }
        Ok(())
    }

    /// Applies permitted, effective, inheritable and then ambient. Capabilities of `besides` stay
    /// permitted and effective, for what is still to do.
    ///
    /// # Errors
    ///
    /// The kernel's: EPERM for a capability that the agent itself lacks.
    pub(crate) fn apply(&self, besides: u64) -> Result<()> {
        let set = CapabilitySet::from_bits_retain;
        set_capabilities(
            None,
            CapabilitySets {
                effective: set(self.effective | besides),
                permitted: set(self.permitted | besides),
                inheritable: set(self.inheritable),
            },
        )
        .context(|| "set capabilities")?;
        clear_ambient_capability_set().context(|| "clear ambient capabilities")?;
        for number in (0..64).filter(|number| self.ambient & (1 << number) != 0) {
            configure_capability_in_ambient_set(set(1 << number), true)
                .context(|| format!("raise ambient capability {}", name(number)))?;
        }
        Ok(())
    }
}

/// CAP_SYS_ADMIN, which installing a seccomp filter without `no_new_privs` needs.
pub(crate) const SYS_ADMIN: u64 = 1 << 21;

/// Lets capabilities survive the change of user that follows (PR_SET_KEEPCAPS); `execve(2)` clears
/// it again.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn keep_across_user_change() -> Result<()> {
    set_keep_capabilities(true).context(|| "keep capabilities")
}

/// Undoes [`keep_across_user_change`].
///
/// # Errors
///
/// The kernel's.
pub(crate) fn keep_no_longer() -> Result<()> {
    set_keep_capabilities(false).context(|| "keep capabilities no longer")
}

fn mask(set: &str, names: &[String]) -> Result<u64> {
    names.iter().try_fold(0, |mask, name| {
        let short = name.strip_prefix("CAP_").unwrap_or(name);
        let number = NAMES
            .iter()
            .position(|known| *known == short)
            .ok_or_else(|| {
                AgentError::unsupported(format!(
                    "process.capabilities.{set}: {name:?} is not a capability that this agent knows"
                ))
            })?;
        Ok(mask | (1 << number))
    })
}

fn name(number: usize) -> &'static str {
    NAMES.get(number).copied().unwrap_or("?")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn numbers_are_the_kernels() {
        assert_eq!(NAMES[21], "SYS_ADMIN");
        assert_eq!(mask("x", &names(&["CAP_SYS_ADMIN"])).unwrap(), SYS_ADMIN);
        assert_eq!(
            mask("x", &names(&["CAP_CHECKPOINT_RESTORE", "CHOWN"])).unwrap(),
            CapabilitySet::CHECKPOINT_RESTORE.bits() | CapabilitySet::CHOWN.bits()
        );
    }

    #[test]
    fn unknown_names_are_refused() {
        let error = Sets::new(&LinuxCapabilities {
            Ambient: names(&["CAP_FLY"]),
            ..LinuxCapabilities::default()
        })
        .unwrap_err();
        assert!(error.line().contains("ambient") && error.line().contains("CAP_FLY"));
    }
}
