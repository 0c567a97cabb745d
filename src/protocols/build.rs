// SPDX-License-Identifier: Apache-2.0
//! Generates the messages, servers and clients of `protos/` into `OUT_DIR`, one folder a family:
//! file names repeat between the families, and a family's files refer to each other as siblings.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> io::Result<()> {
    let out = env::var_os("OUT_DIR")
        .map(PathBuf::from)
        .ok_or_else(|| io::Error::other("cargo did not set OUT_DIR"))?;
    for family in ["agent", "containerd"] {
        generate(family, &out.join(family))?;
    }
    Ok(())
}

fn generate(family: &str, out: &Path) -> io::Result<()> {
    let folder = Path::new("protos").join(family);
    println!("cargo:rerun-if-changed={}", folder.display());
    let mut inputs = fs::read_dir(&folder)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<Vec<_>>>()?;
    inputs.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "proto")
    });
    inputs.sort();
    fs::create_dir_all(out)?;
    Codegen::new()
        .out_dir(out)
        .inputs(&inputs)
        .include("protos")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            gen_mod: true,
            ..Customize::default()
        })
        .rust_protobuf_customize(
            ProtobufCustomize::default()
                .gen_mod_rs(true)
                // No reflection: nothing prints or merges messages by name, and the tables would
                // be a large part of both binaries.
                .lite_runtime(true),
        )
        .run()?;
    hoist_inner_attributes(out)
}

/// Generated files open with inner attributes, which a nested module that `include!` brings in
/// can't hold; `lib.rs` states them once, outside.
fn hoist_inner_attributes(out: &Path) -> io::Result<()> {
    for entry in fs::read_dir(out)? {
        let path = entry?.path();
        let text = fs::read_to_string(&path)?;
        let kept: String = text
            .lines()
            .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
            .flat_map(|line| [line, "\n"])
            .collect();
        fs::write(&path, kept)?;
    }
    Ok(())
}
