// SPDX-License-Identifier: Apache-2.0
//! Files that were opened with O_DIRECT: the kernel moves whole blocks only, to and from addresses
//! that are multiples of a block. What a driver asks for is a multiple of a sector and lies
//! anywhere; where it doesn't fit, it goes by way of a buffer that does.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, OFlags, StatxFlags, fcntl_getfl, ioctl_blksszget, statx};

use super::request::{Buffers, SECTOR};

/// Bytes moved through the buffer at a time, or a block if that is more.
const PIECE: usize = 256 << 10;

/// How such a file is read and written.
#[derive(Debug)]
pub(super) struct Direct {
    /// Bytes of a block: a power of two, and a sector at least.
    block: usize,
    /// Who changes the file.
    writers: Arc<Writers>,
}

/// Who changes a part of a block reads and writes all of it, and must be alone; all others that change the
/// file may do so beside each other. No lock: a write may begin in one call and end in another.
#[derive(Debug, Default)]
struct Writers {
    sharing: Mutex<usize>,
    none: Condvar,
}

/// Somebody who changes whole blocks, until it is dropped.
#[derive(Debug)]
pub(super) struct Share(Arc<Writers>);

impl Writers {
    fn lock(&self) -> MutexGuard<'_, usize> {
        self.sharing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for all others, and keeps new ones from beginning as long as the guard is held.
    fn alone(&self) -> MutexGuard<'_, usize> {
        let sharing = self.none.wait_while(self.lock(), |sharing| *sharing > 0);
        sharing.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut sharing = self.0.lock();
        *sharing = sharing.saturating_sub(1);
        if *sharing == 0 {
            self.0.none.notify_all();
        }
    }
}

/// Where in the file a piece of a transfer lies.
#[derive(Debug)]
struct Span {
    /// Where its first block begins.
    start: u64,
    /// Bytes before it in that block.
    skip: usize,
    /// Bytes of it.
    len: usize,
    /// Bytes of its blocks.
    blocks: usize,
}

impl Direct {
    /// None for a file that was opened otherwise.
    pub(super) fn of(file: &File) -> io::Result<Option<Self>> {
        if !fcntl_getfl(file)?.contains(OFlags::DIRECT) {
            return Ok(None);
        }
        Ok(Some(Self::with_block(block(file)?)))
    }

    pub(super) fn with_block(block: u64) -> Self {
        let block = usize::try_from(block.max(SECTOR)).ok();
        let block = block.and_then(usize::checked_next_power_of_two);
        Self {
            block: block.unwrap_or(PIECE),
            writers: Arc::default(),
        }
    }

    /// Bytes of a block.
    pub(super) fn block(&self) -> u64 {
        u64::try_from(self.block).unwrap_or(u64::MAX)
    }

    /// Whether the kernel takes a transfer as it is.
    pub(super) fn fits(&self, buffers: &Buffers<'_>, offset: u64) -> bool {
        offset.is_multiple_of(self.block()) && buffers.are_aligned(self.block)
    }

    /// Held while whole blocks change, or the kernel looks after those that do in part.
    pub(super) fn share(&self) -> Share {
        let mut sharing = self.writers.lock();
        *sharing = sharing.saturating_add(1);
        Share(Arc::clone(&self.writers))
    }

    /// Fills the buffers from `offset` of the file.
    pub(super) fn read(
        &self,
        file: &File,
        mut buffers: Buffers<'_>,
        mut offset: u64,
    ) -> io::Result<()> {
        let mut bounce = Bounce::new(self, &buffers);
        while let Some(span) = self.span(offset, &buffers) {
            let blocks = bounce.get(span.blocks)?;
            file.read_exact_at(blocks, span.start)?;
            let (_, bytes) = blocks
                .split_at_checked(span.skip)
                .ok_or(ErrorKind::InvalidInput)?;
            buffers.write(bytes.get(..span.len).ok_or(ErrorKind::InvalidInput)?);
            buffers.skip(span.len);
            offset = span.end();
        }
        Ok(())
    }

    /// Writes the buffers to `offset` of the file.
    pub(super) fn write(
        &self,
        file: &File,
        mut buffers: Buffers<'_>,
        mut offset: u64,
    ) -> io::Result<()> {
        let mut bounce = Bounce::new(self, &buffers);
        while let Some(span) = self.span(offset, &buffers) {
            let partial = span.len != span.blocks;
            let _alone = partial.then(|| self.writers.alone());
            let _shared = (!partial).then(|| self.share());
            let blocks = bounce.get(span.blocks)?;
            if partial {
                file.read_exact_at(blocks, span.start)?;
            }
            let (_, bytes) = blocks
                .split_at_mut_checked(span.skip)
                .ok_or(ErrorKind::InvalidInput)?;
            let bytes = bytes.get_mut(..span.len).ok_or(ErrorKind::InvalidInput)?;
            buffers.read(bytes).ok_or(ErrorKind::InvalidInput)?;
            file.write_all_at(blocks, span.start)?;
            buffers.skip(span.len);
            offset = span.end();
        }
        Ok(())
    }

    /// As much as goes through the buffer at once; none if nothing is left.
    fn span(&self, offset: u64, buffers: &Buffers<'_>) -> Option<Span> {
        let start = offset.checked_sub(offset.checked_rem(self.block())?)?;
        let skip = usize::try_from(offset.checked_sub(start)?).ok()?;
        let len = buffers.len().min(self.piece().checked_sub(skip)?);
        let blocks = skip.checked_add(len)?;
        let blocks = blocks.checked_next_multiple_of(self.block)?;
        (len > 0).then_some(Span {
            start,
            skip,
            len,
            blocks,
        })
    }

    fn piece(&self) -> usize {
        PIECE.max(self.block)
    }
}

impl Span {
    fn end(&self) -> u64 {
        let bytes = self.skip.saturating_add(self.len);
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        self.start.saturating_add(bytes)
    }
}

/// What a block is: the device's own word, the file system's (Linux 6.1), or the least that the
/// file system gives out, which is no less than what its device moves.
fn block(file: &File) -> io::Result<u64> {
    if let Ok(size) = ioctl_blksszget(file) {
        return Ok(size.into());
    }
    let asked = StatxFlags::DIOALIGN;
    if let Ok(told) = statx(file, c"", AtFlags::EMPTY_PATH, asked)
        && told.stx_mask & asked.bits() != 0
        && told.stx_dio_offset_align > 0
    {
        let block = told.stx_dio_offset_align.max(told.stx_dio_mem_align);
        return Ok(block.into());
    }
    Ok(file.metadata()?.blksize())
}

/// Memory of ours that begins at a multiple of a block.
#[derive(Debug)]
struct Bounce {
    bytes: Vec<u8>,
    start: usize,
}

impl Bounce {
    /// Room for the largest span of `buffers`.
    fn new(direct: &Direct, buffers: &Buffers<'_>) -> Self {
        // The transfer begins and ends within a block.
        let edges = direct.block.saturating_mul(2);
        let room = buffers.len().saturating_add(edges).min(direct.piece());
        let bytes = vec![0; room.saturating_add(direct.block)];
        let start = bytes.as_ptr().align_offset(direct.block);
        Self { bytes, start }
    }

    fn get(&mut self, len: usize) -> io::Result<&mut [u8]> {
        let end = self.start.checked_add(len).ok_or(ErrorKind::InvalidInput)?;
        let bytes = self.bytes.get_mut(self.start..end);
        Ok(bytes.ok_or(ErrorKind::InvalidInput)?)
    }
}
