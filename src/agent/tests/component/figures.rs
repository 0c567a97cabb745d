// SPDX-License-Identifier: Apache-2.0
//! Figures of the agent as a container engine, beside runc on the same machine, in turn: JSON on
//! standard output. It never fails for being slow. `cargo xtask bench` runs it.
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    missing_debug_implementations,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::absolute_paths,
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout
)]

mod conformance;
mod rig;

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use conformance::{Bench, Bundle};

const PAIRS: usize = 15;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let bench = Bench::new().await?;
    let config = bench.config(&[], Some("sleep 1000"))?;
    let (mut ours, mut runcs) = (Vec::new(), Vec::new());
    for pair in 0..PAIRS {
        let id = format!("pair{pair}");
        let spec = bench.protocol.spec(&config)?;
        let begin = Instant::now();
        bench.rig.create(&id, spec).await?;
        bench.rig.start(&id).await?;
        ours.push(begin.elapsed());
        bench.rig.remove(&id).await?;

        let bundle = Bundle::new(&bench.on_host(&config)?)?;
        let begin = Instant::now();
        for verb in ["create", "start"] {
            // The container keeps the streams of its runtime: nobody waits for their end.
            let status = bundle
                .runc(verb)
                .stdin(std::process::Stdio::null())
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null())
                .status()
                .context("runc")?;
            ensure!(status.success(), "runc {verb}: {status}");
        }
        runcs.push(begin.elapsed());
        let output = bundle.runc("delete").arg("--force").output()?;
        ensure!(output.status.success(), "runc delete: {output:?}");
    }

    bench
        .rig
        .create("idle", bench.protocol.spec(&config)?)
        .await?;
    bench.rig.start("idle").await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let status = fs::read_to_string(format!("/proc/{}/status", bench.rig.pid()?))?;
    let resident = |key: &str| -> Result<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        let words = line.with_context(|| format!("no {key}"))?;
        let number = words.split_whitespace().next().context("no number")?;
        Ok(number.parse()?)
    };
    let milliseconds = |times: &[Duration]| -> Vec<f64> {
        times
            .iter()
            .map(|time| time.as_secs_f64() * 1000.0)
            .collect()
    };
    let figures = json!({
        "create and start, ms": {
            "agent": milliseconds(&ours),
            "runc": milliseconds(&runcs),
            "medians": [median(&ours), median(&runcs)],
            "ratio": median(&ours) / median(&runcs),
        },
        "agent with one idle container, KiB": {
            "resident": resident("VmRSS:")?,
            "of that anonymous": resident("RssAnon:")?,
        },
    });
    println!("{}", serde_json::to_string_pretty(&figures)?);
    Ok(())
}

/// In milliseconds.
fn median(times: &[Duration]) -> f64 {
    let mut times = times.to_vec();
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1000.0
}
