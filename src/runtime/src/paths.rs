// SPDX-License-Identifier: Apache-2.0
//! Every path that the runtime uses on the host, each a function of identifiers that `cli` has
//! checked. The first three follow Kata's layout, so that its users find what they know.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Where containerd's shims keep their sockets.
const SOCKETS: &str = "/run/containerd/s";

/// The name of a sandbox on the host. Identifiers are unique within a namespace of containerd
/// only; `+` is in none of them.
pub(crate) fn sandbox_name(namespace: &str, id: &str) -> String {
    match namespace {
        // Bare, as with Kata.
        "k8s.io" | "default" => id.to_owned(),
        other => format!("{id}+{other}"),
    }
}

/// Where the sandboxes' own folders are.
pub(crate) const SANDBOXES: &str = "/run/kata";

/// A sandbox's own folder: sockets and the journal.
pub(crate) fn sandbox(sandbox: &str) -> PathBuf {
    Path::new(SANDBOXES).join(sandbox)
}

/// The host's end of the guest's vsock.
pub(crate) fn vsock(sandbox_id: &str) -> PathBuf {
    sandbox(sandbox_id).join("root/kata.hvsock")
}

/// Where the sandbox's shared tree is mounted, in the shim's own mount namespace.
pub(crate) fn share(sandbox: &str) -> PathBuf {
    Path::new("/run/kata-containers/shared/sandboxes").join(sandbox)
}

/// The journal of a sandbox's host objects.
pub(crate) fn journal(sandbox_id: &str) -> PathBuf {
    sandbox(sandbox_id).join("journal")
}

/// The shim's socket. One a sandbox: all containers of a pod come to the same address.
pub(crate) fn shim_socket(containerd: &str, namespace: &str, sandbox: &str) -> PathBuf {
    let mut hash = Sha256::new();
    for part in [containerd, namespace, sandbox] {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    let mut name = String::with_capacity(64);
    for byte in hash.finalize() {
        // Writing to a string can't fail.
        let _ = write!(name, "{byte:02x}");
    }
    Path::new(SOCKETS).join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sandboxes_of_other_namespaces_have_other_names() {
        assert_eq!(sandbox_name("k8s.io", "a"), "a");
        assert_ne!(sandbox_name("b", "a"), sandbox_name("c", "a"));
    }

    #[test]
    fn socket_addresses_differ_by_each_part() {
        let one = shim_socket("/c.sock", "default", "a");
        assert_eq!(one, shim_socket("/c.sock", "default", "a"));
        assert_ne!(one, shim_socket("/c.sock", "default", "b"));
        assert_ne!(one, shim_socket("/c.sock", "defaul", "ta"));
        // A Unix socket's path holds 107 bytes.
        assert!(one.as_os_str().len() < 108);
        assert!(vsock(&"x".repeat(76)).as_os_str().len() < 108);
    }
}
