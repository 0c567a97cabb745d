// SPDX-License-Identifier: Apache-2.0
//! `rootfs-builder --agent FILE --output FILE`: the guest image.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Parser;
use rootfs_builder::{erofs, tree};

/// The image's largest size in bytes: it is resident in every guest's page cache.
const MAX_IMAGE: usize = 12 << 20;

/// Builds the read-only guest image from the agent, byte for byte the same on every machine.
#[derive(Debug, Parser)]
struct Arguments {
    /// The agent: a static x86-64 executable.
    #[arg(long)]
    agent: PathBuf,
    /// Where the image goes; replaced whole or not at all.
    #[arg(long)]
    output: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let agent = fs::read(&arguments.agent)
        .with_context(|| format!("can't read the agent {}", arguments.agent.display()))?;
    ensure!(
        agent.starts_with(b"\x7fELF"),
        "the agent {} is not an ELF executable",
        arguments.agent.display()
    );
    let image = erofs::image(&tree::guest_image(agent)?)?;
    ensure!(
        image.len() <= MAX_IMAGE,
        "the image is {} bytes long; {MAX_IMAGE} is the limit",
        image.len()
    );
    let unfinished = arguments.output.with_added_extension("new");
    fs::write(&unfinished, &image)
        .and_then(|()| fs::rename(&unfinished, &arguments.output))
        .with_context(|| format!("can't write the image {}", arguments.output.display()))
}
