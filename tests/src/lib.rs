// SPDX-License-Identifier: Apache-2.0
//! What the suites share: `ctr` and the processes behind it, a terminal, private containerds, and
//! the check that nothing is left behind.

pub mod bundle;
pub mod containerd;
pub mod ctr;
pub mod installed;
pub mod leaks;
pub mod process;
pub mod procs;
pub mod pty;
pub mod scenario;
pub mod wait;
