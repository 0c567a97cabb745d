// SPDX-License-Identifier: Apache-2.0
//! The sandbox's network: made with the machine, and followed as long as that runs.

use std::sync::Arc;

use tokio::select;
use tokio::task::spawn_blocking;
use tracing::{debug, warn};

use super::Sandbox;
use super::journal::Journal;
use super::plan::Plan;
use crate::config::Config;
use crate::error::{Context, Result};
use crate::network::{self, Counters, Device, Network, Settings};
use crate::raw;

/// Joins what the sandbox's network holds already; what cannot be joined is an error.
pub(super) fn make(
    plan: &Plan,
    config: &Config,
    journal: &mut Journal,
) -> Result<Option<(Network, Vec<Device>)>> {
    let Some(place) = &plan.network else {
        return Ok(None);
    };
    let settings = Settings {
        queues: config.network.queues.min(plan.size.vcpus.into()),
        ..config.network
    };
    let mut network = Network::new(place, settings)?;
    let mut plan = network.follow(journal)?;
    match plan.failures.pop() {
        Some(failure) => Err(failure),
        None => Ok(Some((network, plan.attach))),
    }
}

impl Sandbox {
    /// Gives the guest what has changed in its network since it was asked last, and does nothing
    /// where nothing has.
    pub(crate) async fn follow_network(&self) -> Result<()> {
        let Some(network) = &self.network else {
            return Ok(());
        };
        // Held to the end: the guest is told in the order of the changes.
        let mut network = Arc::clone(network).lock_owned().await;
        let mut journal = Arc::clone(&self.journal).lock_owned().await;
        let followed = spawn_blocking(move || {
            let plan = match journal.as_mut() {
                Some(journal) => network.follow(journal),
                // The sandbox is being removed.
                None => Ok(network::Plan::default()),
            };
            (network, plan)
        });
        let (mut network, plan) = followed.await.internal(|| "task".to_owned())?;
        let mut plan = plan?;
        for id in &plan.detach {
            plan.failures.extend(self.vm.detach(id).await.err());
        }
        for device in &plan.attach {
            if let Err(error) = self.vm.attach(device).await {
                network.reject(device);
                plan.failures.push(error);
            }
        }
        self.agent.update_network(&network.news()).await?;
        network.told();
        plan.failures.pop().map_or(Ok(()), Err)
    }

    /// What has passed its network so far.
    pub(crate) async fn counters(&self) -> Result<Vec<Counters>> {
        let Some(namespace) = self.namespace.clone() else {
            return Ok(Vec::new());
        };
        let counted = spawn_blocking(move || network::counters(&namespace)).await;
        let context = || "counters of the network namespace".to_owned();
        counted.internal(context)?.internal(context)
    }

    /// Follows the network until the machine ends.
    pub(crate) async fn watch_network(self: Arc<Self>) {
        select! {
            _ = self.ended() => {}
            result = self.watch() => {
                if let Err(error) = result {
                    warn!(sandbox = self.id, error = error.chain(), "network not followed");
                }
            }
        }
    }

    async fn watch(&self) -> Result<()> {
        let Some(network) = &self.network else {
            return Ok(());
        };
        let context = || "watch the network namespace".to_owned();
        let changes = network.lock().await.changes().internal(context)?;
        let changes = raw::await_readable(changes).internal(context)?;
        loop {
            let mut readable = changes.readable().await.internal(context)?;
            // First this: what comes after it wakes the next round.
            readable.clear_ready();
            match self.follow_network().await {
                Ok(()) => debug!(sandbox = self.id, "network followed"),
                Err(_) if self.was_stopped() => {}
                Err(error) => warn!(sandbox = self.id, error = error.chain(), "network changed"),
            }
        }
    }
}
