// SPDX-License-Identifier: Apache-2.0
//! The operator's tool.

use std::process::ExitCode;

fn main() -> ExitCode {
    runtime::kata_ctl()
}
