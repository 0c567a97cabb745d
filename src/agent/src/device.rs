// SPDX-License-Identifier: Apache-2.0
//! Devices of a container: disks, which it gets as nodes with the guest's numbers, and PCI devices,
//! whose nodes are what the guest's drivers make of them.

use std::time::Duration;

use protocols::agent::agent::Device;
use protocols::agent::oci;

use crate::disk::{Disk, Transport};
use crate::error::{AgentError, Result};
use crate::kernel_events::KernelEvents;
use crate::pci;

/// A PCI device of the host that a driver of the guest's has.
const PCI: &str = "vfio-pci-gk";

/// Device types of this guest, as AgentDetails lists them.
pub(crate) fn types() -> impl Iterator<Item = &'static str> {
    Transport::ALL
        .into_iter()
        .filter(|transport| transport.is_there())
        .map(Transport::name)
        .chain([PCI])
}

/// Waits for PCI devices, each named as `HOST ADDRESS=PCI PATH`.
async fn plugged(options: &[String], patience: Duration) -> Result<()> {
    if options.is_empty() {
        return Err(AgentError::invalid("options: no PCI path is named"));
    }
    for option in options {
        let path = option
            .split_once('=')
            .ok_or_else(|| AgentError::invalid(format!("option {option:?}")))?
            .1;
        let path = pci::Path::parse(path)?;
        let events = KernelEvents::of_devices()?;
        let found = events.until(patience, || Ok(path.is_there().then_some(())));
        found.await?.ok_or_else(|| {
            AgentError::not_found(format!(
                "no PCI device appeared at {path} within {} s",
                patience.as_secs()
            ))
        })?;
    }
    Ok(())
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
        match (Transport::named(&device.type_), device.type_.as_str()) {
            (Some(transport), _) => {
                let source = match device.id.as_str() {
                    "" => &device.vm_path,
                    id => id,
                };
                let disk = Disk::await_at(transport, source, patience).await;
                found.push((device.container_path.as_str(), disk.map_err(named)?));
            }
            (None, PCI) => plugged(&device.options, patience).await.map_err(named)?,
            (None, other) => {
                let reason = match other {
                    "vfio-pci" => ": the guest kernel has no VFIO, its drivers have the device",
                    "blk-ccw" | "vfio-ap" | "vfio-ap-cold" => ": no such devices on this machine",
                    _ => "",
                };
                return Err(named(AgentError::unsupported(format!(
                    "device type {other:?} is not supported{reason}"
                ))));
            }
        }
    }
    replace(&found, spec.Linux.mut_or_insert_default())
}

/// Devices as disks that are all there.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(devices: &[Device], spec: &mut oci::Spec) {
    let found: Vec<_> = devices
        .iter()
        .map(|device| (device.container_path.as_str(), Disk::numbered(8, 16)))
        .collect();
    let _ = replace(&found, spec.Linux.mut_or_insert_default());
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
        let (major, minor) = disk.number();
        let (major, minor) = (major.into(), minor.into());
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
        Disk::numbered(8, minor)
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
    async fn a_pci_device_that_does_not_come_is_told() {
        // No machine has a bridge behind itself.
        let options = ["0000:01:00.0=1f.7/1f.7/1f.7".to_owned()];
        let error = plugged(&options, Duration::ZERO).await.unwrap_err();
        let expected = "no PCI device appeared at 1f.7/1f.7/1f.7 within 0 s";
        assert_eq!(error.line(), expected);
        for wrong in ["0000:01:00.0", "x=y", ""] {
            let refused = plugged(&[wrong.to_owned()], Duration::ZERO).await;
            refused.unwrap_err();
        }
        plugged(&[], Duration::ZERO).await.unwrap_err();
    }

    #[test]
    fn types_are_those_of_the_guest() {
        let types: Vec<_> = types().collect();
        for type_ in ["blk", "mmioblk", PCI] {
            assert!(types.contains(&type_), "{type_}: {types:?}");
        }
        assert_eq!(types.contains(&"scsi"), Transport::Scsi.is_there());
    }
}
