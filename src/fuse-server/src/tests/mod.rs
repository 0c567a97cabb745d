// SPDX-License-Identifier: Apache-2.0
//! The server as its guest sees it.

mod hostile;
mod mounts;
mod operations;
mod ownership;
