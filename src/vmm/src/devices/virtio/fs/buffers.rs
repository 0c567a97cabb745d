// SPDX-License-Identifier: Apache-2.0
//! A descriptor chain as a FUSE request and the room for its reply.

use std::io;
use std::os::fd::BorrowedFd;

use fuse_server::{ReplyBuffer, RequestBuffer};
use rustix::io::{Errno, ReadWriteFlags, Result};
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use crate::sys::vectored;

/// The most pieces of guest memory taken of one chain: what one system call takes. A driver needs
/// one a page of the largest request and a few for headers; an indirect table could hold 65536.
const MAX_PIECES: usize = vectored::MAX_BUFFERS;

/// Guest memory in order, addressed as one run of bytes.
#[derive(Debug)]
struct Pieces<'m> {
    slices: Vec<VolatileSlice<'m>>,
    length: usize,
}

impl<'m> Pieces<'m> {
    fn collect(
        memory: &'m GuestMemoryMmap,
        parts: impl Iterator<Item = (GuestAddress, u32)>,
        access: Permissions,
    ) -> Result<Self> {
        let mut slices = Vec::new();
        let mut length: usize = 0;
        for (address, part) in parts {
            let part = usize::try_from(part).map_err(|_| Errno::FAULT)?;
            if part == 0 {
                continue;
            }
            let found = memory.get_slices(address, part, access);
            for slice in found.map_err(|_| Errno::FAULT)? {
                slices.push(slice.map_err(|_| Errno::FAULT)?);
            }
            if slices.len() > MAX_PIECES {
                return Err(Errno::INVAL);
            }
            length = length.checked_add(part).ok_or(Errno::FAULT)?;
        }
        Ok(Self { slices, length })
    }

    /// The pieces that make up `length` bytes from `position` on.
    fn part(&self, position: usize, length: usize) -> Result<Vec<VolatileSlice<'m>>> {
        let end = position.checked_add(length).ok_or(Errno::FAULT)?;
        if end > self.length {
            return Err(Errno::FAULT);
        }
        let mut pieces = Vec::with_capacity(self.slices.len());
        let (mut skip, mut wanted) = (position, length);
        for slice in &self.slices {
            if wanted == 0 {
                break;
            }
            if skip >= slice.len() {
                skip = skip.saturating_sub(slice.len());
                continue;
            }
            let here = slice.len().saturating_sub(skip).min(wanted);
            let piece = slice.subslice(skip, here).map_err(|_| Errno::FAULT)?;
            pieces.push(piece);
            skip = 0;
            wanted = wanted.saturating_sub(here);
        }
        Ok(pieces)
    }
}

/// What the driver made readable: a request.
#[derive(Debug)]
pub(super) struct Request<'m>(Pieces<'m>);

/// What the driver made writable: room for the reply.
#[derive(Debug)]
pub(super) struct Reply<'m>(Pieces<'m>);

/// Both parts of a chain.
///
/// # Errors
/// A part lies outside of guest memory, or there are too many.
pub(super) fn split<'m>(
    memory: &'m GuestMemoryMmap,
    chain: DescriptorChain<&'m GuestMemoryMmap>,
) -> Result<(Request<'m>, Reply<'m>)> {
    let part = |part: Descriptor| (part.addr(), part.len());
    let readable = Pieces::collect(
        memory,
        chain.clone().readable().map(part),
        Permissions::Read,
    )?;
    let writable = Pieces::collect(memory, chain.writable().map(part), Permissions::Write)?;
    Ok((Request(readable), Reply(writable)))
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::INVAL)
}

impl RequestBuffer for Request<'_> {
    fn length(&self) -> usize {
        self.0.length
    }

    fn copy_to(&self, position: usize, target: &mut [u8]) -> Result<()> {
        let mut rest = target;
        for piece in self.0.part(position, rest.len())? {
            let (now, later) = rest.split_at_mut_checked(piece.len()).ok_or(Errno::FAULT)?;
            piece.read_slice(now, 0).map_err(|_| Errno::FAULT)?;
            rest = later;
        }
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
        let pieces = self.0.part(position, length)?;
        vectored::write_at_with(&file, &pieces, offset, flags).map_err(|error| errno(&error))
    }
}

impl ReplyBuffer for Reply<'_> {
    fn length(&self) -> usize {
        self.0.length
    }

    fn copy_from(&mut self, position: usize, source: &[u8]) -> Result<()> {
        let mut rest = source;
        for piece in self.0.part(position, source.len())? {
            let (now, later) = rest.split_at_checked(piece.len()).ok_or(Errno::FAULT)?;
            piece.write_slice(now, 0).map_err(|_| Errno::FAULT)?;
            rest = later;
        }
        Ok(())
    }

    fn read_file(
        &mut self,
        position: usize,
        length: usize,
        file: BorrowedFd<'_>,
        offset: u64,
    ) -> Result<usize> {
        let pieces = self.0.part(position, length)?;
        vectored::read_at(&file, &pieces, offset).map_err(|error| errno(&error))
    }
}
