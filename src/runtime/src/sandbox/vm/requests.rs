// SPDX-License-Identifier: Apache-2.0
//! What a running machine is asked for: devices that come, go and grow, and other sizes.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use tokio::time::timeout;
use vmm::control::{Block, RateLimits, Request};

use super::{Files, Vm, net};
use crate::error::{Context, Kind, Result, ShimError};
use crate::network::Device;

/// How long the monitor may take for an answer. Longer than it lets the guest's driver take, so
/// that no answer comes when nobody waits for it any more.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A disk as the guest is to see it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DiskSettings<'a> {
    pub(crate) id: &'a str,
    pub(crate) read_only: bool,
    pub(crate) queues: u16,
    pub(crate) io_uring: bool,
    pub(crate) limits: RateLimits,
}

impl Vm {
    /// Gives the running machine a network device.
    pub(crate) async fn attach(&self, device: &Device) -> Result<()> {
        let mut files = Files::default();
        let request = Request::AttachNet(net(device, &mut files));
        let what = || format!("attach the network device {}", device.id);
        self.ask(&request, &files.list, what).await.map(drop)
    }

    /// Takes a network device from the running machine.
    pub(crate) async fn detach(&self, id: &str) -> Result<()> {
        let request = Request::DetachNet { id: id.to_owned() };
        let what = || format!("detach the network device {id}");
        self.ask(&request, &[], what).await.map(drop)
    }

    /// Gives the machine a disk on `file`; the slot that it is in.
    pub(crate) async fn attach_disk(&self, disk: DiskSettings<'_>, file: &File) -> Result<u8> {
        let mut files = Files::default();
        let id = disk.id;
        let request = Request::AttachBlock(Block {
            id: id.to_owned(),
            file: files.add(file.as_fd()),
            read_only: disk.read_only,
            queues: disk.queues,
            io_uring: disk.io_uring,
            limits: disk.limits,
        });
        let what = || format!("attach the disk {id}");
        let slot = self.ask(&request, &files.list, what).await?;
        slot.ok_or_else(|| ShimError::new(Kind::Internal, format!("{}: no slot", what())))
    }

    /// Takes a disk from the machine.
    pub(crate) async fn detach_disk(&self, id: &str) -> Result<()> {
        let request = Request::DetachBlock { id: id.to_owned() };
        let what = || format!("detach the disk {id}");
        self.ask(&request, &[], what).await.map(drop)
    }

    /// Has the guest see that a disk is larger than it was.
    pub(crate) async fn grow_disk(&self, id: &str) -> Result<()> {
        let request = Request::GrowBlock { id: id.to_owned() };
        let what = || format!("grow the disk {id}");
        self.ask(&request, &[], what).await.map(drop)
    }

    /// Sends a request and waits for its answer.
    async fn ask(
        &self,
        request: &Request,
        files: &[BorrowedFd<'_>],
        context: impl Fn() -> String,
    ) -> Result<Option<u8>> {
        let _turn = self.turn.lock().await;
        let answer = self.request(request, files)?;
        timeout(ANSWER_TIMEOUT, answer)
            .await
            .context(Kind::DeadlineExceeded, &context)?
            .context(Kind::Unavailable, &context)?
            .internal(context)
    }

    /// Wants the machine to have so many vCPUs, or so much memory.
    pub(crate) async fn resize(&self, request: Request) -> Result<()> {
        let what = || "resize the machine".to_owned();
        self.ask(&request, &[], what).await.map(drop)
    }
}
