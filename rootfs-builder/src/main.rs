// SPDX-License-Identifier: Apache-2.0
//! `rootfs-builder --agent FILE [--shell FILE] --output FILE`: the guest image.

use std::fs;
use std::path::{Path, PathBuf};

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
    /// A shell for the debug console, such as busybox: a static executable.
    #[arg(long)]
    shell: Option<PathBuf>,
    /// Where the image goes; replaced whole or not at all.
    #[arg(long)]
    output: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let mut root = tree::guest_image(executable("agent", &arguments.agent)?)?;
    if let Some(shell) = &arguments.shell {
        tree::add_shell(&mut root, executable("shell", shell)?)?;
    }
    let image = erofs::image(&root)?;
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

fn executable(what: &str, path: &Path) -> anyhow::Result<Vec<u8>> {
    let content =
        fs::read(path).with_context(|| format!("can't read the {what} {}", path.display()))?;
    ensure!(
        content.starts_with(b"\x7fELF"),
        "the {what} {} is not an ELF executable",
        path.display()
    );
    Ok(content)
}
