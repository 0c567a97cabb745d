// SPDX-License-Identifier: Apache-2.0
//! Calls about mounted volumes: GetVolumeStats and ResizeVolume.

use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use protobuf::EnumOrUnknown;
use protocols::agent::csi::{VolumeStatsResponse, VolumeUsage, volume_usage};
use rustix::fs::{CWD, Mode, OFlags, fstat, fstatfs, fstatvfs, major, minor, openat};
use rustix::io::Errno;

use crate::error::{AgentError, Context as _, Kind, Result};
use crate::kernel_events::KernelEvents;
use crate::sys::grow;
use crate::task::blocking;

/// `statfs(2)`: what the kernel can make larger.
const EXT4: i64 = 0xef53;
const XFS: i64 = 0x5846_5342;

/// Bytes of the unit in which the kernel tells a disk's size.
const SECTOR: u64 = 512;

fn open(path: &str, flags: OFlags) -> Result<OwnedFd> {
    openat(CWD, path, flags | OFlags::CLOEXEC, Mode::empty()).map_err(|error| {
        let named = AgentError::io(format!("volume {path:?}"), error);
        match error {
            Errno::NOENT => named.with_kind(Kind::NotFound),
            _ => named,
        }
    })
}

/// GetVolumeStats.
///
/// # Errors
///
/// NOT_FOUND for a volume that is not there.
pub(super) fn stats(path: &str) -> Result<VolumeStatsResponse> {
    let context = || format!("volume {path:?}");
    let volume = open(path, OFlags::PATH)?;
    let all = fstatvfs(&volume).context(context)?;
    let bytes = |blocks: u64| blocks.saturating_mul(all.f_frsize);
    let usage = |available, total, free: u64, unit| VolumeUsage {
        available,
        total,
        used: u64::saturating_sub(total, free),
        unit: EnumOrUnknown::new(unit),
        ..VolumeUsage::default()
    };
    Ok(VolumeStatsResponse {
        usage: vec![
            usage(
                bytes(all.f_bavail),
                bytes(all.f_blocks),
                bytes(all.f_bfree),
                volume_usage::Unit::BYTES,
            ),
            usage(
                all.f_favail,
                all.f_files,
                all.f_ffree,
                volume_usage::Unit::INODES,
            ),
        ],
        ..VolumeStatsResponse::default()
    })
}

/// ResizeVolume: the file system takes `size` bytes of its disk, which has grown to that, or does so
/// before `patience` is over: the kernel hears of it in its own time.
///
/// # Errors
///
/// NOT_FOUND for a volume that is not there, UNIMPLEMENTED for a file system that does not grow, the
/// wrong state where its disk is smaller, and the kernel's own.
pub(super) async fn resize(path: String, size: u64, patience: Duration) -> Result<()> {
    let opened = path.clone();
    let (root, disk) = blocking(move || disk_of(&opened)).await?;
    let events = KernelEvents::of_devices()?;
    let mut has = 0;
    let found = events.until(patience, || {
        has = disk_size(&disk).with_name(&path)?;
        Ok((has >= size).then_some(()))
    });
    if found.await?.is_none() {
        return Err(AgentError::precondition(format!(
            "volume {path:?}: its disk has {has} bytes, not {size}"
        )));
    }
    blocking(move || grow(&root, size).with_name(&path)).await
}

/// The root of a volume, and where the kernel tells the size of its disk.
fn disk_of(path: &str) -> Result<(OwnedFd, String)> {
    let root = open(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
    let number = fstat(&root).context(|| format!("volume {path:?}"))?.st_dev;
    let kind = fstatfs(&root)
        .context(|| format!("volume {path:?}"))?
        .f_type;
    if ![EXT4, XFS].contains(&kind) {
        return Err(AgentError::unsupported(format!(
            "volume {path:?}: file systems of type {kind:#x} are not resized"
        )));
    }
    let (major, minor) = (major(number), minor(number));
    Ok((root, format!("/sys/dev/block/{major}:{minor}/size")))
}

fn disk_size(disk: &str) -> Result<u64> {
    let text = fs::read_to_string(disk).context(|| format!("read {disk:?}"))?;
    let sectors = text.trim().parse::<u64>().unwrap_or_default();
    Ok(sectors.saturating_mul(SECTOR))
}

fn grow(root: &OwnedFd, size: u64) -> Result<()> {
    let now = fstatfs(root).context(|| "size")?;
    let grown = if now.f_type == XFS {
        grow::xfs(root.as_fd(), size)
    } else {
        let block = u64::try_from(now.f_bsize).unwrap_or_default();
        grow::ext4(root.as_fd(), size.checked_div(block).unwrap_or_default())
    };
    match grown {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Err(AgentError::invalid(
            format!("it can't have {size} bytes: it has more, or too few of them"),
        )),
        grown => grown.context(|| format!("grow it to {size} bytes")),
    }
}

/// Says which volume an error is about.
trait Named<T> {
    fn with_name(self, path: &str) -> Result<T>;
}

impl<T> Named<T> for Result<T> {
    fn with_name(self, path: &str) -> Self {
        self.map_err(|error| {
            AgentError::new(error.kind(), format!("volume {path:?}: {}", error.line()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_has_a_size() {
        let place = tempfile::tempdir().unwrap();
        let stats = stats(place.path().to_str().unwrap()).unwrap();
        assert!(stats.usage[0].total > 0);
        let error = super::stats("/no/such/volume").unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
    }

    #[tokio::test]
    async fn what_does_not_grow_is_refused_by_name() {
        for (path, kind) in [
            ("/no/such/volume", Kind::NotFound),
            ("/proc", Kind::Unsupported),
        ] {
            let error = resize(path.to_owned(), 1 << 20, Duration::ZERO).await;
            let error = error.unwrap_err();
            assert_eq!(error.kind(), kind);
            assert!(error.line().contains(path), "{}", error.line());
        }
    }
}
