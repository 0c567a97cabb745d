// SPDX-License-Identifier: Apache-2.0
//! The disks of a sandbox's machine beside its root's: each is plugged in for its first container
//! and pulled out after its last.
//!
//! Nothing of them is in the journal: an open file is all that there is on the host, and that ends
//! with the machine's process.

use std::collections::HashSet;
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError};

use protocols::agent::agent::{Device, Storage};
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use tracing::{debug, warn};
use vmm::control::RateLimits;

use super::Sandbox;
use super::vm::{DiskSettings, Vm};
use crate::disk::{Filesystem, Identity, Role, Wanted};
use crate::error::{Context, Result};
use crate::template::BLOB;

/// The disks.
#[derive(Debug)]
pub(super) struct Disks {
    settings: Settings,
    /// Who has asked for any: all others have nothing to wait for.
    askers: StdMutex<HashSet<String>>,
    plugged: Mutex<Plugged>,
}

/// How disks are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Settings {
    /// They are read and written past the host's page cache.
    pub(crate) direct: bool,
    /// Requests of one go on beside each other.
    pub(crate) io_uring: bool,
    /// The most queues of one.
    pub(crate) queues: u16,
    /// The most that one does.
    pub(crate) limits: RateLimits,
}

#[derive(Debug, Default)]
struct Plugged {
    /// How many there have ever been.
    count: usize,
    disks: Vec<Disk>,
}

#[derive(Debug)]
struct Disk {
    /// Its name in the machine.
    id: String,
    identity: Identity,
    /// Where the guest finds it.
    slot: u8,
    /// The containers that use it.
    users: Vec<String>,
}

/// A container's disks, for the agent.
#[derive(Debug, Default)]
pub(crate) struct InGuest {
    pub(crate) devices: Vec<Device>,
    pub(crate) storages: Vec<Storage>,
    /// Where the disks are that belong to the layer to come.
    blobs: Vec<String>,
}

impl Sandbox {
    /// Gives the machine what a container wants of the host's disks.
    pub(crate) async fn attach_disks(
        &self,
        container: &str,
        wanted: Vec<Wanted>,
    ) -> Result<InGuest> {
        self.disks.attach(&self.vm, container, wanted).await
    }

    /// Takes back the disks that only a container used which is gone.
    pub(crate) async fn detach_disks(&self, container: &str) {
        self.disks.detach(&self.vm, container).await;
    }
}

impl Disks {
    pub(super) fn new(settings: Settings) -> Self {
        Self {
            settings,
            askers: StdMutex::default(),
            plugged: Mutex::default(),
        }
    }

    /// Plugs in what a container wants: all of it, or nothing.
    pub(super) async fn attach(
        &self,
        vm: &Vm,
        container: &str,
        wanted: Vec<Wanted>,
    ) -> Result<InGuest> {
        let mut guest = InGuest::default();
        if !wanted.is_empty() {
            self.askers().insert(container.to_owned());
        }
        for wanted in wanted {
            let wanted = Arc::new(wanted);
            let slot = match self.attach_one(vm, container, &wanted).await {
                Ok(slot) => slot,
                Err(error) => {
                    self.detach(vm, container).await;
                    return Err(error);
                }
            };
            guest.add(&wanted, slot);
        }
        Ok(guest)
    }

    async fn attach_one(&self, vm: &Vm, container: &str, wanted: &Arc<Wanted>) -> Result<u8> {
        let looking = Arc::clone(wanted);
        let looked = spawn_blocking(move || looking.identity()).await;
        let identity = looked.internal(|| "task".to_owned())??;
        // Held to the end: two containers may want the same.
        let mut plugged = self.plugged.lock().await;
        let mut disks = plugged.disks.iter_mut();
        if let Some(disk) = disks.find(|disk| disk.identity == identity) {
            disk.users.push(container.to_owned());
            return Ok(disk.slot);
        }
        let (opening, direct) = (Arc::clone(wanted), self.settings.direct);
        let opened = spawn_blocking(move || opening.open(direct)).await;
        let file = opened.internal(|| "task".to_owned())??;
        let id = format!("disk{}", plugged.count);
        let settings = DiskSettings {
            id: &id,
            read_only: wanted.read_only,
            queues: self.settings.queues,
            io_uring: self.settings.io_uring,
            limits: self.settings.limits,
        };
        let slot = match vm.attach_disk(settings, &file).await {
            Ok(slot) => slot,
            Err(error) => return Err(wanted.failed(&error)),
        };
        debug!(container, id, slot, ?wanted, "disk plugged in");
        plugged.count = plugged.count.saturating_add(1);
        plugged.disks.push(Disk {
            id,
            identity,
            slot,
            users: vec![container.to_owned()],
        });
        Ok(slot)
    }

    /// Pulls out what nobody uses but a container, which is gone from the guest. What the guest
    /// does not let go of stays with the machine, and is not found there again: the guest may still let
    /// go of it, and another disk be where it was.
    pub(super) async fn detach(&self, vm: &Vm, container: &str) {
        if !self.askers().remove(container) {
            return;
        }
        let mut plugged = self.plugged.lock().await;
        let mut kept = Vec::new();
        for mut disk in plugged.disks.drain(..) {
            let used = disk.users.iter().any(|user| user == container);
            disk.users.retain(|user| user != container);
            if !used || !disk.users.is_empty() {
                kept.push(disk);
            } else if let Err(error) = vm.detach_disk(&disk.id).await {
                warn!(container, id = disk.id, error = error.chain(), "disk stays");
            }
        }
        plugged.disks = kept;
    }

    /// The name of the disk of this identity in the machine, if it has it.
    pub(super) async fn find(&self, identity: Identity) -> Option<String> {
        let plugged = self.plugged.lock().await;
        let mut disks = plugged.disks.iter();
        let disk = disks.find(|disk| disk.identity == identity)?;
        Some(disk.id.clone())
    }

    fn askers(&self) -> MutexGuard<'_, HashSet<String>> {
        self.askers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl InGuest {
    fn add(&mut self, wanted: &Wanted, slot: u8) {
        let place = format!("{slot:02x}");
        match &wanted.role {
            Role::Device(path) => self.devices.push(Device {
                id: place,
                type_: "blk".to_owned(),
                container_path: path.clone(),
                ..Device::default()
            }),
            Role::Filesystem(filesystem) => {
                self.storages.push(storage("blk", place, filesystem));
            }
            Role::Layer(filesystem) => {
                let mut storage = storage("erofs.multi-layer", place, filesystem);
                let blobs = self.blobs.drain(..);
                storage
                    .options
                    .extend(blobs.map(|blob| format!("{BLOB}{blob}")));
                self.storages.push(storage);
            }
            Role::Blob => self.blobs.push(place),
        }
    }
}

/// A file system on the disk at `place`, which `driver` of the agent's mounts.
fn storage(driver: &str, place: String, filesystem: &Filesystem) -> Storage {
    Storage {
        driver: driver.to_owned(),
        source: place,
        fstype: filesystem.kind.clone(),
        options: filesystem.options.clone(),
        mount_point: filesystem.point.clone(),
        // Counted by its users: it must be unmounted before its disk goes.
        fs_group: filesystem.group.clone().into(),
        ..Storage::default()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::disk;
    use crate::template::mount;

    #[test]
    fn a_layer_s_blobs_are_told_by_their_slots() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, content).unwrap();
            path.display().to_string()
        };
        let mut image = vec![0; 1024];
        image.extend(0xe0f5_e1e2_u32.to_le_bytes());
        let blob = format!("device={}", file("blob", b""));
        let options = [
            "upperdir={{ mount 0 }}/upper",
            "workdir={{ mount 0 }}/work",
            "lowerdir={{ mount 1 }}",
        ];
        let mounts = [
            mount("ext4", file("ext4", b""), &["rw", "loop"]),
            mount(
                "erofs",
                file("erofs", &image),
                &["ro", "loop", &blob, &blob],
            ),
            mount("format/overlay", "overlay", &options),
        ];
        let mut guest = InGuest::default();
        let wanted = disk::rootfs("c1", &mounts).unwrap();
        for (wanted, slot) in wanted.iter().zip(8..) {
            guest.add(wanted, slot);
        }
        let told: Vec<_> = guest
            .storages
            .iter()
            .map(|it| (it.driver.as_str(), it.source.as_str(), it.fstype.as_str()))
            .collect();
        let driver = "erofs.multi-layer";
        assert_eq!(told, [(driver, "08", "ext4"), (driver, "0b", "erofs")]);
        let options: Vec<_> = guest.storages[1]
            .options
            .iter()
            .map(String::as_str)
            .collect();
        assert_eq!(
            options,
            [
                "ro",
                "X-kata.multi-layer=true",
                "X-kata.overlay-lower",
                "device=09",
                "device=0a"
            ]
        );
        let same = |it: &Storage| Path::new(&it.mount_point).ends_with("c1/rootfs");
        assert!(guest.storages.iter().all(same));
    }
}
