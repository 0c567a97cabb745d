// SPDX-License-Identifier: Apache-2.0
//! Mounts by descriptor: a file system or a bind is made detached, configured, and then attached
//! to a target that was resolved inside its root. No path is looked up twice, so nothing that a
//! container swaps in between is followed (CVE-2019-19921, CVE-2023-27561).

mod attach;
mod copy_up;
mod options;
mod resolve;

pub(crate) use attach::{
    attach, bind, clone_mount, detach, filesystem, map_ids, reconfigure, remount,
};
pub(crate) use copy_up::copy_up;
pub(crate) use options::{IdMap, MountOptions, Propagation};
pub(crate) use resolve::{Target, create_beneath, create_in_root, is_linked, open_in_root};
