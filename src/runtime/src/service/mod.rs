// SPDX-License-Identifier: Apache-2.0
//! containerd's view of the shim: the Task service, and the Sandbox service beside it.

mod create;
mod sandbox;
mod shim;
mod stats;
mod task;

pub(crate) use sandbox::SandboxService;
pub(crate) use shim::Shim;
pub(crate) use task::TaskService;
