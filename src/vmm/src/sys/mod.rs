// SPDX-License-Identifier: Apache-2.0
//! The library's unsafe code: one operation a block, each with its reason. Every function here
//! is safe to call.

pub(crate) mod kvm;
pub(crate) mod mmap;
pub(crate) mod process;
pub(crate) mod tap;
pub(crate) mod uring;
pub(crate) mod vectored;
pub(crate) mod vhost;
