// SPDX-License-Identifier: Apache-2.0
//! The shim that containerd runs, under the name by which it looks for it.

use std::process::ExitCode;

fn main() -> ExitCode {
    runtime::shim()
}
