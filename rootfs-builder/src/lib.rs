// SPDX-License-Identifier: Apache-2.0
//! The guest image: a read-only EROFS file system that holds the agent and empty mount points.
//!
//! The same agent gives the same bytes on every machine: entries are laid out in name order,
//! owners are root, times are zero, and nothing of the building host is read but the agent.

pub mod erofs;
pub mod tree;

mod crc32c;
