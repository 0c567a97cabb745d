// SPDX-License-Identifier: Apache-2.0
//! The image `docker.io/library/busybox:latest`, made here from Debian's static busybox as an OCI archive
//! (OCI image layout 1.0 in a tar), so that nothing depends on a registry.

use crate::packages::{self, any};
use crate::{cache, progress, tar};
use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Name that `ctr images import` gives the image.
pub(crate) const NAME: &str = "docker.io/library/busybox:latest";
/// The same root file system with a command that waits: what keeps a pod's namespaces.
const PAUSE: &str = "docker.io/library/pause:latest";
const BUSYBOX: &str = "/bin/busybox";
/// Changes when this file's output does.
const RECIPE: &str = "2";

const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
bin:x:2:2:bin:/bin:/bin/false
mail:x:8:8:mail:/var/spool/mail:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
operator:x:37:37:Operator:/var:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
";
const GROUP: &str = "\
root:x:0:
daemon:x:1:
bin:x:2:
tty:x:5:
disk:x:6:
mail:x:8:
wheel:x:10:root
audio:x:29:
www-data:x:33:
utmp:x:43:
users:x:100:
nogroup:x:65534:
";

/// Returns the OCI archive.
pub(crate) fn archive() -> Result<PathBuf> {
    packages::ensure("the busybox image", &[any("busybox-static")])?;
    let binary = Path::new(BUSYBOX);
    let key = cache::Key::default()
        .text("recipe", RECIPE)
        .file(binary)?
        .finish();
    let folder = cache::folder("busybox-image", &key, |folder| {
        let applets = progress::output(Command::new(binary).arg("--list-full"))?;
        let content = fs::read(binary).with_context(|| format!("reading {BUSYBOX}"))?;
        let image = oci_archive(&layer(&content, &applets)?)?;
        fs::write(folder.join("busybox.tar"), image).context("writing the busybox image")
    })?;
    Ok(folder.join("busybox.tar"))
}

/// The root file system.
fn layer(binary: &[u8], applets: &str) -> Result<Vec<u8>> {
    let mut out = tar::Archive::new(Vec::new());
    let applets: BTreeSet<&str> = applets
        .lines()
        .filter(|path| *path != "bin/busybox" && !path.is_empty())
        .collect();
    let mut folders = BTreeSet::from([
        "bin",
        "dev",
        "etc",
        "home",
        "proc",
        "sys",
        "usr",
        "var",
        "var/spool",
        "var/www",
    ]);
    for path in &applets {
        for (end, _) in path.match_indices('/') {
            folders.extend(path.get(..end));
        }
    }
    for folder in folders {
        out.directory(folder, 0o755)?;
    }
    out.directory("root", 0o700)?;
    out.directory("tmp", 0o1777)?;
    out.directory("var/tmp", 0o1777)?;
    out.directory("var/spool/mail", 0o755)?;
    out.file("bin/busybox", 0o755, binary)?;
    for path in applets {
        out.symlink(path, BUSYBOX)?;
    }
    out.file("etc/passwd", 0o644, PASSWD.as_bytes())?;
    out.file("etc/group", 0o644, GROUP.as_bytes())?;
    out.file("etc/shadow", 0o640, b"root:*:0:0:99999:7:::\n")?;
    out.file("etc/hostname", 0o644, b"busybox\n")?;
    out.finish()
}

/// The layer with the configs and manifests of both images, and their index.
fn oci_archive(layer: &[u8]) -> Result<Vec<u8>> {
    let mut blobs = vec![layer.to_vec()];
    let mut entries = Vec::new();
    for (name, command) in [(NAME, &["sh"][..]), (PAUSE, &["sleep", "infinity"])] {
        let (entry, image) = image(name, command, layer)?;
        entries.push(entry);
        blobs.extend(image);
    }
    let index = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": entries,
    }))?;

    let mut out = tar::Archive::new(Vec::new());
    out.directory("blobs", 0o755)?;
    out.directory("blobs/sha256", 0o755)?;
    for blob in blobs {
        out.file(
            &format!("blobs/sha256/{}", cache::hex(&Sha256::digest(&blob))),
            0o644,
            &blob,
        )?;
    }
    out.file("index.json", 0o644, &index)?;
    out.file("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    out.finish()
}

/// An image's entry in the index, and its config and manifest.
fn image(name: &str, command: &[&str], layer: &[u8]) -> Result<(serde_json::Value, [Vec<u8>; 2])> {
    let config = serde_json::to_vec(&json!({
        "architecture": "amd64",
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Cmd": command,
        },
        "rootfs": { "type": "layers", "diff_ids": [digest(layer)] },
        "history": [{ "created": "1970-01-01T00:00:00Z", "created_by": "busybox-static" }],
    }))?;
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", layer)],
    }))?;
    let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
    if let Some(entry) = entry.as_object_mut() {
        entry.insert(
            "platform".to_owned(),
            json!({ "architecture": "amd64", "os": "linux" }),
        );
        entry.insert(
            "annotations".to_owned(),
            json!({ "io.containerd.image.name": name, "org.opencontainers.image.ref.name": "latest" }),
        );
    }
    Ok((entry, [config, manifest]))
}

fn descriptor(media_type: &str, blob: &[u8]) -> serde_json::Value {
    json!({ "mediaType": media_type, "digest": digest(blob), "size": blob.len() })
}

fn digest(blob: &[u8]) -> String {
    format!("sha256:{}", cache::hex(&Sha256::digest(blob)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layer_holds_applets_and_users_and_is_reproducible() {
        let build = || layer(b"binary", "bin/sh\nbin/busybox\nusr/bin/env\n").unwrap();
        let first = build();
        assert_eq!(first, build());
        let text = String::from_utf8_lossy(&first).into_owned();
        for needle in [
            "bin/sh\0",
            "usr/bin/env\0",
            "bin/busybox\0",
            "nobody:x:65534",
            "wheel:x:10:root",
        ] {
            assert!(text.contains(needle), "{needle}");
        }
    }
}
