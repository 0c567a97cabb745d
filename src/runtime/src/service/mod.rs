// SPDX-License-Identifier: Apache-2.0
//! containerd's view of the shim: the Task service.

mod create;
mod stats;
mod task;

pub(crate) use task::TaskService;
