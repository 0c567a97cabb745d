// SPDX-License-Identifier: Apache-2.0
//! The container engine: turns an OCI spec into processes.
//!
//! 1. `spec` checks a spec and turns it into a `plan`: what the spec asks is in the plan, or the
//!    whole request is refused with the field's name.
//! 2. `launch` (in the agent) starts a helper, sends it the plan and the descriptors it needs,
//!    and follows what it reports.
//! 3. `helper` (this binary again, one thread) joins namespaces and clones the new process, which
//!    becomes a child of the agent, in its cgroup from its first instruction.
//! 4. `process` (in the new process) builds the container's file system (`rootfs`), applies
//!    users, capabilities and filters, reports that it is ready, and waits for the word to
//!    execute the program.
//!
//! An error at any step comes back over the same socket and names the object.

mod capabilities;
mod channel;
mod command;
mod devices;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod helper;
mod hooks;
mod launch;
mod masks;
mod plan;
mod pod_init;
mod process;
mod rlimits;
mod rootfs;
mod seccomp;
mod spec;
mod sysctl;
mod terminal;
mod user;
mod user_namespace;

pub(crate) use helper::{ROLE as HELPER_ROLE, main as helper_main};
pub(crate) use hooks::Hooks;
pub(crate) use launch::{Gate, Launched, Launcher, Streams};
pub(crate) use plan::{ContainerPlan, Namespace, ProcessPlan};
pub(crate) use spec::{Joins, container, process};
pub(crate) use terminal::resize as resize_terminal;
