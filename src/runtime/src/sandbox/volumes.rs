// SPDX-License-Identifier: Apache-2.0
//! Direct-assigned volumes that the machine has: what their file systems hold, and their growth.

use std::path::Path;

use protocols::agent::csi::VolumeStatsResponse;
use tokio::task::spawn_blocking;

use super::Sandbox;
use crate::disk;
use crate::error::{Context, Kind, Result, ShimError};

/// A volume of this sandbox.
struct Volume {
    /// Its disk's name in the machine.
    disk: String,
    /// Where the guest has it mounted.
    point: String,
}

impl Sandbox {
    /// What a volume's file system holds.
    pub(crate) async fn volume_stats(&self, volume: &Path) -> Result<VolumeStatsResponse> {
        let volume = self.volume(volume).await?;
        self.agent.volume_stats(&volume.point).await
    }

    /// A volume's file system takes `size` bytes of its disk, which has grown on the host.
    pub(crate) async fn resize_volume(&self, volume: &Path, size: u64) -> Result<()> {
        let volume = self.volume(volume).await?;
        self.vm.grow_disk(&volume.disk).await?;
        self.agent.resize_volume(&volume.point, size).await
    }

    async fn volume(&self, path: &Path) -> Result<Volume> {
        let none = || {
            let text = format!("sandbox {} has no volume {}", self.id, path.display());
            ShimError::new(Kind::NotFound, text)
        };
        let told = path.to_owned();
        let found = spawn_blocking(move || match disk::volume(&told)? {
            Some((wanted, point)) => Ok(Some((wanted.identity()?, point))),
            None => Ok(None),
        });
        let found: Option<_> = found.await.internal(|| "task".to_owned()).flatten()?;
        let (identity, point) = found.ok_or_else(none)?;
        let disk = self.disks.find(identity).await.ok_or_else(none)?;
        Ok(Volume { disk, point })
    }
}
