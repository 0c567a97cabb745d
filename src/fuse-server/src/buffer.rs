// SPDX-License-Identifier: Apache-2.0
//! Where requests come from and replies go to.
//!
//! A request or reply is a run of bytes addressed by position, wherever its owner keeps it: guest
//! memory behind descriptors, or a plain slice. File data moves between it and a file in one
//! system call and never through this crate. The bytes may change while they are looked at (the
//! guest owns them), so the server copies everything it decides upon exactly once.

use std::os::fd::BorrowedFd;

use rustix::io::{Errno, ReadWriteFlags, Result};
use rustix::io::{IoSlice, pread, pwritev2};

/// A request: what the driver made readable.
pub trait RequestBuffer {
    /// Its length in bytes.
    fn length(&self) -> usize;

    /// Copies the bytes at `position` into `target`, all of it.
    ///
    /// # Errors
    /// `FAULT` if the request ends before.
    fn copy_to(&self, position: usize, target: &mut [u8]) -> Result<()>;

    /// Writes `length` bytes from `position` on into `file` at `offset`. Returns how many were
    /// written.
    ///
    /// # Errors
    /// `FAULT` if the request ends before; otherwise what pwritev2(2) says.
    fn write_file(
        &self,
        position: usize,
        length: usize,
        file: BorrowedFd<'_>,
        offset: u64,
        flags: ReadWriteFlags,
    ) -> Result<usize>;
}

/// Room for a reply: what the driver made writable.
pub trait ReplyBuffer {
    /// Its length in bytes.
    fn length(&self) -> usize;

    /// Copies `source` to `position`, all of it.
    ///
    /// # Errors
    /// `FAULT` if it doesn't fit.
    fn copy_from(&mut self, position: usize, source: &[u8]) -> Result<()>;

    /// Reads up to `length` bytes of `file` from `offset` on to `position`. Returns how many were
    /// read: less than `length` only at the end of the file.
    ///
    /// # Errors
    /// `FAULT` if they wouldn't fit; otherwise what preadv(2) says.
    fn read_file(
        &mut self,
        position: usize,
        length: usize,
        file: BorrowedFd<'_>,
        offset: u64,
    ) -> Result<usize>;
}

/// `length` bytes of `bytes` from `position` on.
fn part(position: usize, length: usize) -> Result<std::ops::Range<usize>> {
    let end = position.checked_add(length).ok_or(Errno::FAULT)?;
    Ok(position..end)
}

impl RequestBuffer for &[u8] {
    fn length(&self) -> usize {
        self.len()
    }

    fn copy_to(&self, position: usize, target: &mut [u8]) -> Result<()> {
        let source = self
            .get(part(position, target.len())?)
            .ok_or(Errno::FAULT)?;
        target.copy_from_slice(source);
        Ok(())
    }

    fn write_file(
        &self,
        position: usize,
        length: usize,
        file: BorrowedFd<'_>,
        offset: u64,
        flags: ReadWriteFlags,
    ) -> Result<usize> {
        let source = self.get(part(position, length)?).ok_or(Errno::FAULT)?;
        pwritev2(file, &[IoSlice::new(source)], offset, flags)
    }
}

impl ReplyBuffer for &mut [u8] {
    fn length(&self) -> usize {
        self.len()
    }

    fn copy_from(&mut self, position: usize, source: &[u8]) -> Result<()> {
        let target = self
            .get_mut(part(position, source.len())?)
            .ok_or(Errno::FAULT)?;
        target.copy_from_slice(source);
        Ok(())
    }

    fn read_file(
        &mut self,
        position: usize,
        length: usize,
        file: BorrowedFd<'_>,
        offset: u64,
    ) -> Result<usize> {
        let target = self.get_mut(part(position, length)?).ok_or(Errno::FAULT)?;
        pread(file, target, offset)
    }
}
