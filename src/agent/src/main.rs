// SPDX-License-Identifier: Apache-2.0
//! The program `kata-agent`; everything is in the library, where the fuzz targets reach it too.

use std::process::ExitCode;

fn main() -> ExitCode {
    kata_agent::main()
}
