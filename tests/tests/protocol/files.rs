// SPDX-License-Identifier: Apache-2.0
//! Files that the runtime copies into the guest.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Result, ensure};
use protocols::agent::agent::CopyFileRequest;

use crate::client::{INVALID, call, refused};
use crate::host::{GUEST, Host, SHARED};

/// Regular file, readable by its owner alone (`stat(2)`).
const MODE: u32 = 0o100_600;

pub(crate) async fn copy(host: &Host) -> Result<()> {
    let copy = async |path: &str| {
        call!(
            host.client.agent,
            copy_file,
            CopyFileRequest {
                path: path,
                file_size: 5_i64,
                file_mode: MODE,
                dir_mode: 0o755_u32,
                uid: 1000_i32,
                gid: 1001_i32,
                data: b"words".to_vec(),
            }
        )
    };
    let path = format!("{SHARED}/copied/file");
    copy(&path).await?;
    let seen = host
        .look(&format!(
            "stat -c '%u %g %a' {GUEST}{path}; cat {GUEST}{path}"
        ))
        .await?;
    ensure!(seen == "1000 1001 600\nwords", "{seen}");
    // That place is shared.
    let file = host.shared("copied/file");
    let status = fs::metadata(&file)?;
    ensure!(
        fs::read(&file)? == b"words"
            && (status.uid(), status.gid(), status.mode()) == (1000, 1001, MODE),
        "{status:?}"
    );
    refused(INVALID, "/etc/x", copy("/etc/x").await)?;
    let left = host.look(&format!("ls {GUEST}/etc")).await?;
    ensure!(!left.split_whitespace().any(|name| name == "x"), "{left}");
    Ok(())
}
