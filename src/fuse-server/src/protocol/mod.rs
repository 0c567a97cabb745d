// SPDX-License-Identifier: Apache-2.0
//! The FUSE protocol, version 7, as `linux/fuse.h` defines it; names follow that header without
//! its `fuse_` prefix.

pub mod flags;
mod opcode;
mod structures;
mod wire;

pub use opcode::Opcode;
pub use structures::*;
pub use wire::Wire;

/// The protocol's major version.
pub const MAJOR: u32 = 7;
/// The newest minor version that this server speaks.
pub const MINOR: u32 = 41;
/// The oldest minor version served: the first with virtio-fs (Linux 5.4).
pub const MIN_MINOR: u32 = 31;
/// The root directory's node.
pub const ROOT_ID: u64 = 1;
/// The longest name of a directory entry, in bytes (`FUSE_NAME_MAX` is longer; the host's is not).
pub const NAME_MAX: usize = 255;
/// The longest path or symbolic link's text, with its NUL.
pub const PATH_MAX: usize = 4096;
