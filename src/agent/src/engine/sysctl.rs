// SPDX-License-Identifier: Apache-2.0
//! Kernel parameters of a container. The pod has a kernel of its own, so parameters that are not
//! bound to a namespace are allowed too: they change this pod's guest and nothing else.

use std::os::fd::AsFd as _;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::system::setdomainname;

use crate::error::{AgentError, Context as _, Result};
use crate::mount::{self, MountOptions};

/// The path below `/proc/sys` of a name in either form, `net.ipv4.ip_forward` or
/// `net/ipv4/ip_forward`; in the first, a slash stands for a dot of an interface's name.
///
/// # Errors
///
/// Names that would leave the folder.
pub(crate) fn path(name: &str) -> Result<String> {
    let slash_form = match (name.find('.'), name.find('/')) {
        (Some(dot), Some(slash)) => slash < dot,
        (_, slash) => slash.is_some(),
    };
    let path = if slash_form {
        name.to_owned()
    } else {
        name.chars()
            .map(|letter| match letter {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect()
    };
    let wrong = |part: &str| part.is_empty() || part == "." || part == "..";
    if path.split('/').any(wrong) {
        return Err(AgentError::invalid(format!("linux.sysctl: {name:?}")));
    }
    Ok(path)
}

/// Writes the parameters through a procfs of our own that is attached nowhere, so that no mount
/// of the container can redirect the write (CVE-2025-52881).
///
/// # Errors
///
/// The kernel's, with the parameter's name.
pub(crate) fn apply(sysctls: &[(String, String)]) -> Result<()> {
    if sysctls.is_empty() {
        return Ok(());
    }
    // Owned by the machine's root where the UTS namespace isn't: the call asks the namespace.
    let (domain, sysctls): (Vec<_>, Vec<_>) = sysctls
        .iter()
        .partition(|(name, _)| name == "kernel/domainname");
    for (_, value) in domain {
        setdomainname(value.as_bytes()).context(|| format!("set domain name {value:?}"))?;
    }
    let proc = mount::filesystem("proc", "proc", &MountOptions::default())?;
    for (name, value) in sysctls {
        let context = || format!("set sysctl {name:?} to {value:?}");
        let file = openat2(
            proc.as_fd(),
            format!("sys/{name}"),
            OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV,
        )
        .context(context)?;
        rustix::io::write(&file, value.as_bytes()).context(context)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_a_name() {
        assert_eq!(path("net.ipv4.ip_forward").unwrap(), "net/ipv4/ip_forward");
        assert_eq!(path("net/ipv4/ip_forward").unwrap(), "net/ipv4/ip_forward");
        assert_eq!(
            path("net.ipv4.conf.eth0/1.forwarding").unwrap(),
            "net/ipv4/conf/eth0.1/forwarding"
        );
        assert_eq!(
            path("net/ipv4/conf/eth0.1/forwarding").unwrap(),
            "net/ipv4/conf/eth0.1/forwarding"
        );
        for wrong in ["", "..", "kernel..x", "../x", "a/../b", "/x"] {
            path(wrong).unwrap_err();
        }
    }
}
