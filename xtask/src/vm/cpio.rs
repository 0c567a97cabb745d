// SPDX-License-Identifier: Apache-2.0
//! Writer of the "newc" cpio archives that Linux takes as initramfs
//! (kernel's Documentation/driver-api/early-userspace/buffer-format.rst).

use anyhow::{Context, Result};
use std::io::Write;

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
/// Name that ends an archive.
const TRAILER: &str = "TRAILER!!!";

/// An archive being written.
pub(crate) struct Archive<W: Write> {
    out: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, inode: 0 }
    }

    pub(crate) fn directory(&mut self, name: &str) -> Result<()> {
        self.entry(name, DIRECTORY, &[])
    }

    pub(crate) fn file(&mut self, name: &str, content: &[u8]) -> Result<()> {
        self.entry(name, EXECUTABLE, content)
    }

    pub(crate) fn finish(mut self) -> Result<W> {
        self.entry(TRAILER, 0, &[])?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.inode = self.inode.wrapping_add(1);
        let size = u32::try_from(content.len())
            .with_context(|| format!("{name} is too large for cpio"))?;
        let name_size = name.len().saturating_add(1);
        // Fields: inode, mode, uid, gid, links, mtime, size, device and rdev (major, minor), name, check.
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            0,
            0,
            u32::try_from(name_size)?,
            0,
        ];
        self.out.write_all(b"070701")?;
        for field in fields {
            write!(self.out, "{field:08x}")?;
        }
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(&[0])?;
        // The header is 110 bytes; name and content are each padded to 4.
        self.pad(name_size.saturating_add(110))?;
        self.out.write_all(content)?;
        self.pad(content.len())
    }

    fn pad(&mut self, length: usize) -> Result<()> {
        let gap = length.next_multiple_of(4).saturating_sub(length);
        Ok(self.out.write_all([0; 4].get(..gap).unwrap_or_default())?)
    }
}
