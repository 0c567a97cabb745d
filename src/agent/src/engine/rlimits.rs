// SPDX-License-Identifier: Apache-2.0
//! Resource limits of a process (getrlimit(2)).

use protocols::agent::oci::POSIXRlimit;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};

use crate::error::{AgentError, Context as _, Result};

/// One limit.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Limit {
    name: String,
    soft: u64,
    hard: u64,
}

impl Limit {
    /// # Errors
    ///
    /// An unknown name, or a soft limit above the hard one.
    pub(crate) fn new(limit: &POSIXRlimit) -> Result<Self> {
        if resource(&limit.Type).is_none() {
            return Err(AgentError::invalid(format!(
                "process.rlimits: {:?} is unknown",
                limit.Type
            )));
        }
        if limit.Soft > limit.Hard {
            return Err(AgentError::invalid(format!(
                "process.rlimits: {}: soft limit {} is above hard limit {}",
                limit.Type, limit.Soft, limit.Hard
            )));
        }
        Ok(Self {
            name: limit.Type.clone(),
            soft: limit.Soft,
            hard: limit.Hard,
        })
    }

    /// All of a process's limits.
    ///
    /// # Errors
    ///
    /// A wrong one, or two of one kind.
    pub(crate) fn all(limits: &[POSIXRlimit]) -> Result<Vec<Self>> {
        let mut all: Vec<Self> = Vec::new();
        for limit in limits {
            let limit = Self::new(limit)?;
            if all.iter().any(|other| other.name == limit.name) {
                return Err(AgentError::invalid(format!(
                    "process.rlimits: {} appears twice",
                    limit.name
                )));
            }
            all.push(limit);
        }
        Ok(all)
    }

    /// Raises this process's hard limit where the limit to come is above it: a user namespace has
    /// no right to.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn raise(&self) -> Result<()> {
        let Some(resource) = resource(&self.name) else {
            return Ok(());
        };
        let now = getrlimit(resource);
        if now.maximum.is_none_or(|hard| hard >= self.hard) {
            return Ok(());
        }
        let limit = Rlimit {
            current: now.current,
            maximum: Some(self.hard).filter(|hard| *hard != u64::MAX),
        };
        setrlimit(resource, limit).context(|| format!("raise {}", self.name))
    }

    /// Applies the limit to this process.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn apply(&self) -> Result<()> {
        let Some(resource) = resource(&self.name) else {
            return Ok(());
        };
        // `rustix` says "no limit" with None; RLIM_INFINITY is all ones.
        let value = |number| Some(number).filter(|number| *number != u64::MAX);
        let limit = Rlimit {
            current: value(self.soft),
            maximum: value(self.hard),
        };
        setrlimit(resource, limit).context(|| format!("set {}", self.name))
    }
}

fn resource(name: &str) -> Option<Resource> {
    Some(match name {
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_STACK" => Resource::Stack,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(name: &str, soft: u64, hard: u64) -> Result<Limit> {
        Limit::new(&POSIXRlimit {
            Type: name.to_owned(),
            Soft: soft,
            Hard: hard,
            ..POSIXRlimit::default()
        })
    }

    #[test]
    fn checks_names_and_order() {
        limit("RLIMIT_NOFILE", 1024, 1024).unwrap();
        assert!(
            limit("RLIMIT_LUCK", 1, 2)
                .unwrap_err()
                .line()
                .contains("RLIMIT_LUCK")
        );
        limit("RLIMIT_NOFILE", 2, 1).unwrap_err();
        let twice = ["RLIMIT_CPU"; 2].map(|name| POSIXRlimit {
            Type: name.to_owned(),
            ..POSIXRlimit::default()
        });
        assert!(Limit::all(&twice).unwrap_err().line().contains("twice"));
    }
}
