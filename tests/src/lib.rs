// SPDX-License-Identifier: Apache-2.0
//! What the suites share: `ctr` and the processes behind it, a terminal, private containerds, and
//! the check that nothing is left behind.

pub mod autopsy;
pub mod bundle;
pub mod cni;
pub mod configured;
pub mod confined;
pub mod containerd;
pub mod cri;
pub mod ctr;
pub mod descriptors;
pub mod disk;
pub mod handlers;
pub mod harness;
pub mod installed;
pub mod leaks;
pub mod machine;
pub mod netlink;
pub mod netns;
pub mod node;
pub mod pattern;
pub mod pod;
pub mod process;
pub mod procs;
pub mod pty;
pub mod scenario;
pub mod slow_fs;
pub mod sys;
pub mod tasks;
pub mod volume;
pub mod wait;
