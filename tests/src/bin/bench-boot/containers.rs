// SPDX-License-Identifier: Apache-2.0
//! A container from `ctr run --rm` to its end, against runc; and what an idle one costs.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use tests::configured::Configured;
use tests::ctr::Ctr;
use tests::procs::{self, Process};

use crate::report::Row;
use crate::{Settings, agent};

const RUNC: &str = "io.containerd.runc.v2";
const MIB: f64 = 1024.0;

/// Runs pairs of containers.
pub(crate) fn pairs(settings: &Settings, ctr: &Ctr) -> Result<Row> {
    let runc = ctr.with_runtime(RUNC);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for pair in 0..=settings.pairs {
        let our = ctr.run(&[], "bench-run", &["true"])?.exits(0)?.elapsed;
        let their = runc.run(&[], "bench-run", &["true"])?.exits(0)?.elapsed;
        eprintln!("ctr run {pair}: ours {our:.2?}, runc {their:.2?}");
        if pair > 0 {
            ours.push(our.as_secs_f64() * 1e3);
            theirs.push(their.as_secs_f64() * 1e3);
        }
    }
    let promise = "at most 3x runc's";
    Ok(Row::pairs(
        "ctr run --rm",
        "ms",
        (ours, theirs),
        "runc",
        promise,
    ))
}

/// Memory of the processes behind an idle container in a guest of 256 MiB.
pub(crate) fn footprints(ctr: &Ctr) -> Result<Vec<Row>> {
    let host = Configured::with(ctr, "[hypervisor.dragonball]\ndefault_memory = 256\n")?;
    let rows = idle(host.ctr());
    host.ctr().sweep()?;
    rows
}

fn idle(ctr: &Ctr) -> Result<Vec<Row>> {
    let id = "bench-idle";
    ctr.run_detached(&[], id, &["sleep", "1000"])?;
    let (shim, vmm) = (procs::shim(id)?, procs::vmm(id)?);
    let pss = pss(&shim)? + pss(&vmm)?;
    let mut rows = vec![
        Row::single(
            "VMM, private, guest memory aside",
            "MiB",
            private(&vmm)?,
            "3 MiB",
        ),
        Row::single("shim, private", "MiB", private(&shim)?, "6 MiB"),
        Row::single(
            "agent, resident",
            "MiB",
            kib(agent::resident(id)? / 1024) / MIB,
            "4 MiB",
        ),
        Row::single("idle pod, PSS, guest memory included", "MiB", pss, "40 MiB"),
    ];

    let runc = ctr.with_runtime(RUNC);
    let id = "bench-idle-runc";
    runc.run_detached(&[], id, &["sleep", "1000"])?;
    let shim = procs::shim(id)?;
    rows.push(Row::single(
        "runc's shim, private, for scale",
        "MiB",
        private(&shim)?,
        "-",
    ));
    Ok(rows)
}

fn pss(process: &Process) -> Result<f64> {
    Ok(kib(process.kilobytes("smaps_rollup", "Pss")?) / MIB)
}

/// Private memory in MiB, without mappings that are guest memory: those of 16 MiB or more.
fn private(process: &Process) -> Result<f64> {
    const GUEST: f64 = 16.0 * MIB;
    let path = process.path("smaps");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let (mut sum, mut guest) = (0.0, false);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else {
            continue;
        };
        let value = value.parse().map_or(0.0, kib);
        match key {
            "Size:" => guest = value >= GUEST,
            "Private_Clean:" | "Private_Dirty:" if !guest => sum += value,
            _ => {}
        }
    }
    Ok(sum / MIB)
}

/// Sizes of the programs.
pub(crate) fn sizes(settings: &Settings) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut size = |name, path: &Path, promise| -> Result<()> {
        let bytes = fs::metadata(path)
            .with_context(|| path.display().to_string())?
            .len();
        rows.push(Row::single(name, "MiB", kib(bytes / 1024) / MIB, promise));
        Ok(())
    };
    size("shim's binary", &settings.shim, "12 MiB")?;
    size("guest image", &settings.image()?, "12 MiB")?;
    if let Some(agent) = &settings.agent {
        size("agent's binary", agent, "4 MiB")?;
    }
    Ok(rows)
}

#[expect(clippy::cast_precision_loss, reason = "sizes far below 2^52")]
fn kib(value: u64) -> f64 {
    value as f64
}
