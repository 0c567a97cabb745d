// SPDX-License-Identifier: Apache-2.0
//! Generates the messages of the container runtime interface into `OUT_DIR`.

use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

use protobuf_codegen::{Codegen, Customize};

const PROTO: &str = "protos/cri.proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={PROTO}");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo did not set OUT_DIR")?);
    Codegen::new()
        .pure()
        .include("protos")
        .input(PROTO)
        .out_dir(&out)
        .customize(Customize::default().lite_runtime(true))
        .run()?;
    // A nested module can't hold the inner attributes that a generated file opens with.
    let path = out.join("cri.rs");
    let text = fs::read_to_string(&path)?;
    let kept: String = text
        .lines()
        .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
        .flat_map(|line| [line, "\n"])
        .collect();
    fs::write(path, kept)?;
    Ok(())
}
