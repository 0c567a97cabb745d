// SPDX-License-Identifier: Apache-2.0
//! Boot time, container time and footprints, beside the programs they are to be compared with.
//!
//! Run as root where `/dev/kvm` runs ordinary guests and containerd has our runtime: in the dev VM.
//! JSON on standard output, a table on standard error. It never fails for being slow; it fails
//! where something can't be measured.

mod agent;
mod boot;
mod containers;
mod report;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Parser;
use tests::ctr::Ctr;
use tests::installed::installed;

#[derive(Debug, Parser)]
struct Settings {
    /// Our `boot` example; without it the boots are left out.
    #[arg(long)]
    boot: Option<PathBuf>,
    /// Guest kernel; the installed one where absent.
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// Guest image; the installed one where absent.
    #[arg(long)]
    image: Option<PathBuf>,
    /// The shim's binary.
    #[arg(long, default_value = "/usr/local/bin/containerd-shim-kata-v2")]
    shim: PathBuf,
    /// The agent's binary; without it its size is left out.
    #[arg(long)]
    agent: Option<PathBuf>,
    /// Pairs of each comparison.
    #[arg(long, default_value_t = 5)]
    pairs: usize,
    /// Leave out what needs containerd.
    #[arg(long)]
    boots_only: bool,
}

impl Settings {
    fn kernel(&self) -> Result<PathBuf> {
        self.kernel
            .clone()
            .map_or_else(|| installed("vmlinux.container"), Ok)
    }

    fn image(&self) -> Result<PathBuf> {
        self.image
            .clone()
            .map_or_else(|| installed("kata-containers.img"), Ok)
    }
}

fn main() -> Result<()> {
    let settings = Settings::parse();
    ensure!(
        settings.pairs >= 5,
        "a comparison takes at least five pairs"
    );
    boot::check(&settings)?;
    let mut rows = containers::sizes(&settings)?;
    let mut timeline = Vec::new();
    let mut left_out = vec!["create to agent ready, from a template (no templates yet)".to_owned()];
    if settings.boot.is_some() {
        let (row, lines) = boot::measure(&settings)?;
        rows.push(row);
        timeline = lines;
    } else {
        left_out.push("start to init (--boot not given)".to_owned());
    }
    if settings.boots_only {
        left_out.push("containers (--boots-only)".to_owned());
    } else {
        let ctr = Ctr::from_env();
        rows.push(containers::pairs(&settings, &ctr)?);
        rows.extend(containers::footprints(&ctr)?);
    }
    report::print(&rows, &timeline, &left_out);
    println!("{:#}", report::json(&rows, &timeline, &left_out));
    Ok(())
}
