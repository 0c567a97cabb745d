// SPDX-License-Identifier: Apache-2.0
//! The image as the format's own checker sees it (Debian package erofs-utils).

#![allow(clippy::tests_outside_test_module, clippy::unwrap_used, missing_docs)]

use std::fs;
use std::process::Command;

use rootfs_builder::{erofs, tree};

#[test]
fn the_checker_accepts_the_image_and_extracts_what_went_in() {
    let folder = tempfile::tempdir().unwrap();
    let agent: Vec<u8> = (0..300_001_u32).map(|n| (n % 251) as u8).collect();
    let path = folder.path().join("image");
    fs::write(
        &path,
        erofs::image(&tree::guest_image(agent.clone()).unwrap()).unwrap(),
    )
    .unwrap();
    let extracted = folder.path().join("extracted");
    let output = Command::new("fsck.erofs")
        .arg(format!("--extract={}", extracted.display()))
        .arg(&path)
        .output()
        .expect("fsck.erofs of erofs-utils runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(
        fs::read(extracted.join("usr/bin/kata-agent")).unwrap(),
        agent
    );
    let link = fs::read_link(extracted.join("sbin/init")).unwrap();
    assert_eq!(link.to_str(), Some("../usr/bin/kata-agent"));
    let mut top: Vec<_> = fs::read_dir(&extracted)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    top.sort();
    assert_eq!(
        top,
        [
            "dev", "etc", "mnt", "proc", "run", "sbin", "sys", "tmp", "usr", "var"
        ]
    );
}

#[test]
fn a_damaged_image_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let mut image = erofs::image(&tree::guest_image(vec![0x7f; 9000]).unwrap()).unwrap();
    image[1024 + 40] ^= 1;
    fs::write(&path, image).unwrap();
    let output = Command::new("fsck.erofs")
        .arg(&path)
        .output()
        .expect("fsck.erofs runs");
    // Version 1.5 reports the mismatch and still exits with 0.
    let text = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("checksum"),
        "the checksum must cover the superblock: {text:?}"
    );
}
