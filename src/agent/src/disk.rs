// SPDX-License-Identifier: Apache-2.0
//! Disks of the guest, and how a container gets one as a device node.

use std::path::{Path, PathBuf};
use std::time::Duration;

use protocols::agent::agent::Device;
use protocols::agent::oci;
use rustix::fs::{FileType, Mode, OFlags, major, minor, open, stat};

use crate::error::{AgentError, Result};
use crate::kernel_events::KernelEvents;
use crate::pci;

/// Device types of this agent, as AgentDetails lists them.
pub(crate) const DEVICE_TYPES: [&str; 1] = ["blk"];

/// A disk that is there.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    major: u32,
    minor: u32,
}

/// How a disk is named.
#[derive(Debug)]
enum Place {
    Pci(pci::Path),
    Node(PathBuf),
}

impl Disk {
    /// The disk at `source`, a PCI path or a path below `/dev`, for which it waits until `patience`
    /// is over: a plugged disk comes in the kernel's own time.
    ///
    /// # Errors
    ///
    /// A source that is neither, or no disk there in time.
    pub(crate) async fn await_at(source: &str, patience: Duration) -> Result<Self> {
        let place = if source.starts_with("/dev/") {
            Place::Node(PathBuf::from(source))
        } else {
            Place::Pci(pci::Path::parse(source)?)
        };
        let events = KernelEvents::of_devices()?;
        let found = events.until(patience, || Ok(place.find())).await?;
        found.ok_or_else(|| {
            AgentError::not_found(format!(
                "no disk appeared at {source} within {} s",
                patience.as_secs()
            ))
        })
    }
}

impl Place {
    fn find(&self) -> Option<Disk> {
        let path = match self {
            Self::Pci(path) => Path::new("/dev").join(path.block_device()?),
            Self::Node(path) => path.clone(),
        };
        let found = stat(&path).ok()?;
        if FileType::from_raw_mode(found.st_mode) != FileType::BlockDevice {
            return None;
        }
        // The kernel makes the node first, and tells of the disk once it can be opened.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        open(&path, flags, Mode::empty()).ok()?;
        Some(Disk {
            path,
            major: major(found.st_rdev),
            minor: minor(found.st_rdev),
        })
    }
}

/// Puts the guest's numbers in place of the host's, in a spec's devices and in the rules about
/// them. Waits for the disks.
///
/// # Errors
///
/// A device that is no disk, that the spec does not have, or that does not appear in time.
pub(crate) async fn resolve(
    devices: &[Device],
    spec: &mut oci::Spec,
    patience: Duration,
) -> Result<()> {
    // All of them first: a number of the guest's may be another device's on the host.
    let mut found = Vec::new();
    for device in devices {
        let named = |error: AgentError| {
            let line = format!("device {:?}: {}", device.container_path, error.line());
            AgentError::new(error.kind(), line)
        };
        if !DEVICE_TYPES.contains(&device.type_.as_str()) {
            return Err(named(AgentError::unsupported(format!(
                "device type {:?} is not supported",
                device.type_
            ))));
        }
        let source = match device.id.as_str() {
            "" => &device.vm_path,
            id => id,
        };
        let disk = Disk::await_at(source, patience).await.map_err(named)?;
        found.push((device.container_path.as_str(), disk));
    }
    replace(&found, spec.Linux.mut_or_insert_default())
}

fn replace(disks: &[(&str, Disk)], linux: &mut oci::Linux) -> Result<()> {
    let mut numbers = Vec::new();
    for (path, disk) in disks {
        let node = linux.Devices.iter_mut().find(|node| node.Path == *path);
        let node = node.ok_or_else(|| {
            AgentError::invalid(format!("device {path:?}: not among linux.devices"))
        })?;
        if node.Type != "b" {
            return Err(AgentError::invalid(format!(
                "device {path:?}: linux.devices has another type, {:?}",
                node.Type
            )));
        }
        let (major, minor) = (disk.major.into(), disk.minor.into());
        numbers.push(((node.Major, node.Minor), (major, minor)));
        (node.Major, node.Minor) = (major, minor);
    }
    for rule in &mut linux.Resources.mut_or_insert_default().Devices {
        let is = |(host, _): &&((i64, i64), _)| *host == (rule.Major, rule.Minor);
        if rule.Type == "b"
            && let Some((_, guest)) = numbers.iter().find(is)
        {
            (rule.Major, rule.Minor) = *guest;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(path: &str, kind: &str, minor: i64) -> oci::LinuxDevice {
        oci::LinuxDevice {
            Path: path.to_owned(),
            Type: kind.to_owned(),
            Major: 8,
            Minor: minor,
            ..oci::LinuxDevice::default()
        }
    }

    fn rule(kind: &str, minor: i64) -> oci::LinuxDeviceCgroup {
        oci::LinuxDeviceCgroup {
            Allow: true,
            Type: kind.to_owned(),
            Major: 8,
            Minor: minor,
            ..oci::LinuxDeviceCgroup::default()
        }
    }

    fn disk(minor: u32) -> Disk {
        Disk {
            path: PathBuf::from("/dev/vdb"),
            major: 8,
            minor,
        }
    }

    #[test]
    fn numbers_of_the_host_become_the_guest_s() {
        let mut linux = oci::Linux {
            Devices: vec![node("/dev/a", "b", 0), node("/dev/b", "b", 16)],
            ..oci::Linux::default()
        };
        // The second disk's number on the host is the first one's in the guest.
        linux.Resources.mut_or_insert_default().Devices =
            vec![rule("b", 0), rule("b", 16), rule("c", 0), rule("b", 32)];
        replace(&[("/dev/a", disk(16)), ("/dev/b", disk(48))], &mut linux).unwrap();
        let minors: Vec<_> = linux.Devices.iter().map(|node| node.Minor).collect();
        assert_eq!(minors, [16, 48]);
        let minors: Vec<_> = linux.Resources.Devices.iter().map(|it| it.Minor).collect();
        assert_eq!(minors, [16, 48, 0, 32]);
    }

    #[test]
    fn a_disk_stands_for_a_block_device_of_the_spec() {
        let mut linux = oci::Linux {
            Devices: vec![node("/dev/a", "c", 0)],
            ..oci::Linux::default()
        };
        for path in ["/dev/a", "/dev/b"] {
            let error = replace(&[(path, disk(0))], &mut linux).unwrap_err();
            assert!(error.line().contains(path), "{}", error.line());
        }
    }

    #[tokio::test]
    async fn a_disk_that_does_not_come_is_told() {
        let error = Disk::await_at("/dev/null", Duration::ZERO)
            .await
            .unwrap_err();
        assert_eq!(error.line(), "no disk appeared at /dev/null within 0 s");
        assert!(Disk::await_at("null", Duration::ZERO).await.is_err());
    }
}
