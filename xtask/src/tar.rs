// SPDX-License-Identifier: Apache-2.0
//! Writer of POSIX ustar archives (IEEE Std 1003.1, pax), deterministic: owner root, time 0.

use anyhow::{Context, Result, bail};
use std::io::Write;

const BLOCK: usize = 512;
/// Longest name and link target without an extension.
const NAME_MAX: usize = 100;

/// What a header describes.
#[derive(Clone, Copy)]
enum Type {
    File = b'0' as isize,
    Symlink = b'2' as isize,
    Directory = b'5' as isize,
}

/// An archive being written.
pub(crate) struct Archive<W: Write> {
    out: W,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out }
    }

    pub(crate) fn directory(&mut self, name: &str, mode: u32) -> Result<()> {
        self.header(&format!("{name}/"), mode, 0, Type::Directory, "")
    }

    pub(crate) fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.header(name, mode, content.len(), Type::File, "")?;
        self.out.write_all(content)?;
        self.zeros(
            content
                .len()
                .next_multiple_of(BLOCK)
                .saturating_sub(content.len()),
        )
    }

    pub(crate) fn symlink(&mut self, name: &str, target: &str) -> Result<()> {
        self.header(name, 0o777, 0, Type::Symlink, target)
    }

    pub(crate) fn finish(mut self) -> Result<W> {
        self.zeros(BLOCK.saturating_mul(2))?;
        Ok(self.out)
    }

    fn header(
        &mut self,
        name: &str,
        mode: u32,
        size: usize,
        kind: Type,
        target: &str,
    ) -> Result<()> {
        if name.len() > NAME_MAX || target.len() > NAME_MAX {
            bail!("name too long for ustar: {name}");
        }
        let kind = u8::try_from(kind as isize).context("type flag")?;
        // Fields in order, each padded with zeros: name, mode, uid, gid, size, mtime, checksum, type,
        // link target, magic and version, user, group.
        let mut header = Vec::with_capacity(BLOCK);
        let mut field = |value: &str, width: usize| {
            header.extend(value.as_bytes());
            header.extend(std::iter::repeat_n(0, width.saturating_sub(value.len())));
        };
        field(name, NAME_MAX);
        field(&format!("{mode:07o}"), 8);
        field("0000000", 8);
        field("0000000", 8);
        field(&format!("{size:011o}"), 12);
        field("00000000000", 12);
        // The checksum counts its own field as spaces.
        field("        ", 8);
        field(&char::from(kind).to_string(), 1);
        field(target, NAME_MAX);
        field("ustar\u{0}00", 8);
        field("root", 32);
        field("root", 32);
        header.resize(BLOCK, 0);
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header.splice(148..156, format!("{sum:06o}\0 ").into_bytes());
        Ok(self.out.write_all(&header)?)
    }

    fn zeros(&mut self, count: usize) -> Result<()> {
        Ok(self.out.write_all(&vec![0; count])?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn tar_reads_it_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tar");
        let mut archive = Archive::new(Vec::new());
        archive.directory("d", 0o1777).unwrap();
        archive.file("d/f", 0o640, b"hello").unwrap();
        archive.symlink("d/l", "/d/f").unwrap();
        std::fs::write(&path, archive.finish().unwrap()).unwrap();
        let listing = Command::new("tar").arg("-tvf").arg(&path).output().unwrap();
        assert!(listing.status.success());
        let listing = String::from_utf8(listing.stdout).unwrap();
        let words: Vec<Vec<&str>> = listing
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(words[0][0..2], ["drwxrwxrwt", "root/root"]);
        assert_eq!((words[1][0], words[1][2]), ("-rw-r-----", "5"));
        assert!(listing.contains("d/l -> /d/f"));
    }
}
