// SPDX-License-Identifier: Apache-2.0
//! The operations, by family. Each takes its arguments off the call, does one thing on the host
//! and answers.

mod attributes;
mod create;
mod directory;
mod file;
mod lookup;
mod names;
mod xattr;

pub(crate) use attributes::stat;
pub(crate) use lookup::RESOLVE;
