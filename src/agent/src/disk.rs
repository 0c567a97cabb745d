// SPDX-License-Identifier: Apache-2.0
//! Disks of the guest, each found in the way of what it is attached by.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FileType, Mode, OFlags, major, minor, open, stat};

use crate::error::{AgentError, Result};
use crate::kernel_events::KernelEvents;
use crate::pci;

/// What a disk is attached by.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Transport {
    /// virtio-blk on PCI, by its path there or its node.
    Pci,
    /// virtio-blk at fixed addresses, by its node.
    Mmio,
    /// A SCSI disk, by `ID:LUN`.
    Scsi,
    /// Persistent memory, by its node.
    Nvdimm,
}

impl Transport {
    pub(crate) const ALL: [Self; 4] = [Self::Pci, Self::Mmio, Self::Scsi, Self::Nvdimm];

    /// The one that a driver or device type of the protocol means.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|transport| transport.name() == name)
    }

    /// Its name in the protocol.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Pci => "blk",
            Self::Mmio => "mmioblk",
            Self::Scsi => "scsi",
            Self::Nvdimm => "nvdimm",
        }
    }

    /// Whether the guest kernel has it.
    pub(crate) fn is_there(self) -> bool {
        match self {
            Self::Pci | Self::Mmio => true,
            Self::Scsi => Path::new(SCSI).exists(),
            Self::Nvdimm => Path::new(NVDIMM).exists(),
        }
    }

    pub(crate) fn place(self, source: &str) -> Result<Place> {
        if !self.is_there() {
            let name = self.name();
            return Err(AgentError::unsupported(format!(
                "{name}: the guest kernel has no such disks"
            )));
        }
        match self {
            _ if source.starts_with("/dev/") => Ok(Place::Node(PathBuf::from(source))),
            Self::Pci => Ok(Place::Pci(pci::Path::parse(source)?)),
            Self::Scsi => Place::scsi(source)
                .ok_or_else(|| AgentError::invalid(format!("SCSI address {source:?}"))),
            Self::Mmio | Self::Nvdimm => Err(AgentError::invalid(format!(
                "{source:?} is not a path below /dev"
            ))),
        }
    }
}

/// Where the kernel has each bus, if it knows it at all.
const SCSI: &str = "/sys/bus/scsi/devices";
const NVDIMM: &str = "/sys/bus/nd";

/// A disk that is there.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    major: u32,
    minor: u32,
}

/// How a disk is named.
#[derive(Debug)]
pub(crate) enum Place {
    Pci(pci::Path),
    Node(PathBuf),
    /// The ending of the SCSI device's name; which host adapter it is at is not known.
    Scsi(String),
}

impl Disk {
    /// Its major and minor number.
    pub(crate) fn number(&self) -> (u32, u32) {
        (self.major, self.minor)
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn numbered(major: u32, minor: u32) -> Self {
        Self {
            path: PathBuf::from("/dev/vdb"),
            major,
            minor,
        }
    }

    /// The disk that `transport` has at `source`, for which it waits until `patience` is over: a
    /// plugged disk comes in the kernel's own time.
    ///
    /// # Errors
    ///
    /// A source that can't be one, a transport that the guest lacks, or no disk there in time.
    pub(crate) async fn await_at(
        transport: Transport,
        source: &str,
        patience: Duration,
    ) -> Result<Self> {
        let place = transport.place(source)?;
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
    /// `ID:LUN`, in decimal.
    fn scsi(address: &str) -> Option<Self> {
        let (id, lun) = address.split_once(':')?;
        let number = |text: &str| text.parse::<u16>().ok();
        Some(Self::Scsi(format!(":0:{}:{}", number(id)?, number(lun)?)))
    }

    fn find(&self) -> Option<Disk> {
        let path = match self {
            Self::Pci(path) => Path::new("/dev").join(path.block_device()?),
            Self::Node(path) => path.clone(),
            Self::Scsi(ending) => Path::new("/dev").join(scsi_disk(Path::new(SCSI), ending)?),
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

/// The name of the disk of the SCSI device whose name ends in `ending`.
fn scsi_disk(devices: &Path, ending: &str) -> Option<String> {
    let names = |folder: &Path| -> Vec<String> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    };
    let device = names(devices)
        .into_iter()
        .find(|name| name.ends_with(ending))?;
    names(&devices.join(device).join("block")).pop()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_disk_that_does_not_come_is_told() {
        let error = Disk::await_at(Transport::Mmio, "/dev/null", Duration::ZERO).await;
        let error = error.unwrap_err();
        assert_eq!(error.line(), "no disk appeared at /dev/null within 0 s");
        for transport in Transport::ALL {
            let none = Disk::await_at(transport, "null", Duration::ZERO).await;
            none.unwrap_err();
        }
    }

    #[test]
    fn scsi_disks_are_found_by_id_and_unit() {
        let devices = tempfile::tempdir().unwrap();
        fs::create_dir_all(devices.path().join("2:0:0:1/block/sdb")).unwrap();
        fs::create_dir_all(devices.path().join("2:0:0:11/block/sdc")).unwrap();
        let found = |address: &str| match Place::scsi(address) {
            Some(Place::Scsi(ending)) => scsi_disk(devices.path(), &ending),
            _ => None,
        };
        assert_eq!(found("0:1").as_deref(), Some("sdb"));
        assert_eq!(found("0:11").as_deref(), Some("sdc"));
        for nothing in ["0:2", "1", "0:x", "", "0:1:2", "-1:0"] {
            assert_eq!(found(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn what_the_kernel_lacks_is_refused_by_name() {
        for transport in Transport::ALL {
            if !transport.is_there() {
                let line = transport.place("/dev/x").unwrap_err().line();
                assert!(line.starts_with(transport.name()), "{line}");
            }
        }
    }
}
