// SPDX-License-Identifier: Apache-2.0
//! What is asked of a container that exists: terminal sizes, pause, limits, statistics.

use std::sync::Arc;

use protobuf::MessageField;
use protocols::agent::agent::StatsContainerResponse;
use protocols::agent::oci;

use super::{Actor, Report, answer};
use crate::container::process::{Phase, precondition};
use crate::container::{Command, Reply};
use crate::error::Result;

impl Actor {
    pub(super) fn resize(&mut self, exec: &str, rows: u32, columns: u32, reply: Reply<()>) {
        let process = match self.process(exec) {
            Ok(process) => process,
            Err(error) => return answer(reply, Err(error)),
        };
        // As with runc's shim: without a terminal there is nothing to do.
        let ended = matches!(process.phase, Phase::Stopped(_) | Phase::Deleting(_));
        if !process.stdio.terminal || ended {
            return answer(reply, Ok(()));
        }
        if let Some(spec) = &mut process.spec {
            // Not in the guest yet: it begins with this size.
            spec.ConsoleSize = MessageField::some(oci::Box {
                Height: rows,
                Width: columns,
                ..oci::Box::default()
            });
            return answer(reply, Ok(()));
        }
        let name = process.name.clone();
        self.call(|agent| async move { answer(reply, agent.resize(&name, rows, columns).await) });
    }

    /// For calls that concern a container that runs.
    fn check_running(&self) -> Result<()> {
        if self.init.phase == Phase::Running {
            Ok(())
        } else {
            Err(precondition("the container does not run"))
        }
    }

    pub(super) fn pause(&self, reply: Reply<()>) {
        let checked = self.check_running().and_then(|()| {
            if self.paused {
                Err(precondition("the container is paused"))
            } else {
                Ok(())
            }
        });
        if let Err(error) = checked {
            return answer(reply, Err(error));
        }
        let (id, handle) = (self.id.clone(), self.handle.clone());
        self.call(|agent| async move {
            let result = agent.pause(&id).await;
            handle.tell(Command::Report(Report::Paused { result, reply }));
        });
    }

    pub(super) fn resume(&self, reply: Reply<()>) {
        let checked = self.check_running().and_then(|()| {
            if self.paused {
                Ok(())
            } else {
                Err(precondition("the container is not paused"))
            }
        });
        if let Err(error) = checked {
            return answer(reply, Err(error));
        }
        let (id, handle) = (self.id.clone(), self.handle.clone());
        self.call(|agent| async move {
            let result = agent.resume(&id).await;
            handle.tell(Command::Report(Report::Resumed { result, reply }));
        });
    }

    pub(super) fn update(&self, resources: oci::LinuxResources, cpus: &str, reply: Reply<()>) {
        if !cpus.is_empty()
            && let Err(error) = self.sandbox.assign_cpus(&self.id, cpus)
        {
            return answer(reply, Err(error));
        }
        let (id, sandbox) = (self.id.clone(), Arc::clone(&self.sandbox));
        tokio::spawn(async move { answer(reply, sandbox.update(&id, resources).await) });
    }

    pub(super) fn stats(&self, reply: Reply<StatsContainerResponse>) {
        let id = self.id.clone();
        self.call(|agent| async move { answer(reply, agent.stats(&id).await) });
    }
}
