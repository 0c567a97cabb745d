// SPDX-License-Identifier: Apache-2.0
//! How a sandbox's machine follows what its containers ask for, where its size is not fixed.
//!
//! It grows before a container may use more, and shrinks after none does. A guest that can't give
//! back what it uses keeps it for now, and gives it when it can: nothing fails by that.

use std::collections::HashMap;
use std::sync::Arc;

use protocols::agent::oci::LinuxResources;
use tracing::warn;
use vmm::control::{Request, Size};

use super::Sandbox;
use super::size::{Limits, sum};
use crate::error::{Kind, Result, ShimError};

/// The limits of the containers that there are.
#[derive(Debug, Default)]
pub(super) struct Demand {
    limits: HashMap<String, Limits>,
    /// What the guest was asked for last. It may be on its way there still.
    asked: Option<Size>,
}

impl Sandbox {
    /// A container comes: there is room for it when this returns.
    pub(crate) async fn admit(&self, container: &str, limits: Limits) -> Result<()> {
        self.look_at(container, limits);
        if self.is_fixed() {
            return Ok(());
        }
        // Held while the guest takes: sizes follow one another.
        let mut demand = self.demand.lock().await;
        demand.limits.insert(container.to_owned(), limits);
        let grown = self.grow(&mut demand).await;
        if grown.is_err() {
            demand.limits.remove(container);
        }
        grown
    }

    /// Changes a container's limits, with the machine around it.
    pub(crate) async fn update(&self, container: &str, resources: LinuxResources) -> Result<()> {
        if self.is_fixed() {
            self.look_at(container, Limits::default().changed_by(&resources));
            return self.agent.update(container, resources).await;
        }
        let mut demand = self.demand.lock().await;
        let before = demand.limits.get(container).copied().unwrap_or_default();
        let limits = before.changed_by(&resources);
        demand.limits.insert(container.to_owned(), limits);
        self.look_at(container, limits);
        let updated = match self.grow(&mut demand).await {
            Ok(()) => self.agent.update(container, resources).await,
            Err(error) => Err(error),
        };
        if updated.is_err() {
            demand.limits.insert(container.to_owned(), before);
        }
        self.shrink(&mut demand).await;
        updated
    }

    /// A container is gone: what it asked for may go, too. Nobody waits for that.
    pub(crate) fn dismiss(self: &Arc<Self>, container: &str) {
        let (sandbox, container) = (Arc::clone(self), container.to_owned());
        tokio::spawn(async move {
            let mut demand = sandbox.demand.lock().await;
            demand.limits.remove(&container);
            if !sandbox.has_ended() && !sandbox.was_stopped() {
                sandbox.shrink(&mut demand).await;
            }
        });
    }

    /// What the machine has now.
    pub(crate) fn size(&self) -> Size {
        self.vm.size().unwrap_or(self.plan.size)
    }

    /// Says of a limit that the machine won't reach.
    fn look_at(&self, container: &str, limits: Limits) {
        let most = self.plan.most;
        if limits.exceed(most) {
            warn!(
                container,
                ?limits,
                ?most,
                "the machine is smaller than the limits, and bounds them"
            );
        }
    }

    fn wanted(&self, demand: &Demand) -> Size {
        sum(self.plan.size, self.plan.most, demand.limits.values())
    }

    /// Whether the machine stays as it is.
    fn is_fixed(&self) -> bool {
        self.plan.size == self.plan.most
    }

    /// What the guest was asked for last.
    fn asked(&self, demand: &Demand) -> Size {
        demand.asked.unwrap_or(self.plan.size)
    }

    async fn grow(&self, demand: &mut Demand) -> Result<()> {
        let (plan, now, wanted) = (&self.plan, self.size(), self.wanted(demand));
        let asked = self.asked(demand);
        // A guest that has more may be about to give it back.
        if wanted.memory_mib > now.memory_mib.min(asked.memory_mib) {
            let mib = wanted.memory_mib;
            self.vm.resize(Request::ResizeMemory { mib }).await?;
            demand.asked.get_or_insert(plan.size).memory_mib = mib;
            let size = self.vm.resized(|size| size.memory_mib >= mib).await;
            let has = size.unwrap_or(plan.size).memory_mib;
            if has < mib {
                return Err(ShimError::new(
                    Kind::Internal,
                    format!("the guest took memory up to {has} of {mib} MiB"),
                ));
            }
        }
        if wanted.vcpus > now.vcpus.min(asked.vcpus) {
            let count = wanted.vcpus;
            self.vm.resize(Request::ResizeVcpus { count }).await?;
            demand.asked.get_or_insert(plan.size).vcpus = count;
            let plugged = count.saturating_sub(now.vcpus);
            self.agent.online_cpus(plugged.into()).await?;
            self.cpus.refresh(self.pid())?;
            self.cgroups.take_vcpus(self.pid())?;
        }
        Ok(())
    }

    async fn shrink(&self, demand: &mut Demand) {
        let (plan, now, wanted) = (&self.plan, self.size(), self.wanted(demand));
        let asked = self.asked(demand);
        // A guest that has less may be about to take it.
        if wanted.memory_mib < now.memory_mib.max(asked.memory_mib) {
            let mib = wanted.memory_mib;
            demand.asked.get_or_insert(plan.size).memory_mib = mib;
            let request = Request::ResizeMemory { mib };
            self.give_back(request, "MiB", |size| size.memory_mib <= mib)
                .await;
        }
        if wanted.vcpus < now.vcpus.max(asked.vcpus) {
            let count = wanted.vcpus;
            demand.asked.get_or_insert(plan.size).vcpus = count;
            let request = Request::ResizeVcpus { count };
            self.give_back(request, "vCPUs", |size| size.vcpus <= count)
                .await;
            if let Err(error) = self.cpus.refresh(self.pid()) {
                warn!(error = error.chain(), "vCPUs not pinned anew");
            }
        }
    }

    async fn give_back(&self, request: Request, what: &str, enough: impl Fn(Size) -> bool) {
        if let Err(error) = self.vm.resize(request.clone()).await {
            warn!(error = error.chain(), ?request, "not shrunk");
            return;
        }
        let size = self.vm.resized(&enough).await.unwrap_or(self.plan.size);
        if !enough(size) {
            warn!(
                ?request,
                ?size,
                "the guest can't give all of the {what} back yet"
            );
        }
    }
}
