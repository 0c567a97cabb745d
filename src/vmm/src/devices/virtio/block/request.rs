// SPDX-License-Identifier: Apache-2.0
//! One request (virtio 1.2, section 5.2.6): a header that the device reads, data, and a status
//! byte that it writes. The header is copied once and only the copy is looked at; data goes
//! between file and guest memory with no copy between, but for what O_DIRECT can't move.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use fuse_server::Complaints;
use virtio_queue::DescriptorChain;
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice,
};

use super::device::{FEATURE_DISCARD, FEATURE_FLUSH, FEATURE_WRITE_ZEROES, MAX_BUFFERS};
use super::direct::Direct;
use super::discard::Clearing;
use crate::devices::virtio::DeviceFault;
use crate::sys::uring::Operation;
use crate::sys::vectored;

/// Bytes of a sector, the unit of all addresses.
pub(super) const SECTOR: u64 = 512;
/// Bytes of the serial number that GET_ID answers with.
pub(super) const SERIAL_LEN: usize = 20;

const HEADER: usize = 16;

/// Request types.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// Status values.
pub(super) const OK: u8 = 0;
pub(super) const IO_ERROR: u8 = 1;
pub(super) const UNSUPPORTED: u8 = 2;

/// What requests work on.
#[derive(Debug)]
pub(super) struct Disk {
    /// In logs.
    pub(super) name: String,
    pub(super) file: File,
    /// How to go about it, if it was opened with O_DIRECT.
    pub(super) direct: Option<Direct>,
    /// How many it has; they may become more.
    pub(super) sectors: AtomicU64,
    /// Bytes written to fill ranges with zeroes, which a request has none of, and not paid for yet.
    pub(super) filled: AtomicU64,
    pub(super) read_only: bool,
    pub(super) serial: [u8; SERIAL_LEN],
    pub(super) complaints: Complaints,
}

/// Buffers of guest memory in the driver's order.
#[derive(Debug, Default)]
pub(super) struct Buffers<'a>(Vec<VolatileSlice<'a>>);

/// A request's outcome: its status, and the bytes written to the guest before the status byte.
pub(super) type Outcome = Result<usize, u8>;

/// A request, as the driver has made it.
#[derive(Debug)]
pub(super) struct Request<'a> {
    /// Absent where it is too short.
    header: Option<[u8; HEADER]>,
    readable: Buffers<'a>,
    writable: Buffers<'a>,
    /// Where its status goes.
    pub(super) status: GuestAddress,
}

/// A request that moves data between disk and memory, or waits for the disk, and nothing else.
#[derive(Debug)]
pub(super) struct Transfer<'r, 'a> {
    pub(super) operation: Operation,
    pub(super) buffers: &'r [VolatileSlice<'a>],
    /// In the file.
    pub(super) offset: u64,
    pub(super) bytes: usize,
}

impl Disk {
    /// What it holds.
    pub(super) fn bytes(&self) -> u64 {
        self.sectors().saturating_mul(SECTOR)
    }

    pub(super) fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Relaxed)
    }

    /// As many sectors as its file has now; bytes past the last whole sector don't count, nor, past
    /// the host's page cache, those past the last whole block.
    pub(super) fn count_sectors(file: &File, direct: Option<&Direct>) -> io::Result<u64> {
        // Works for a block device too, where the metadata says 0. Nobody reads from where it is then.
        let mut file = file;
        let bytes = file.seek(SeekFrom::End(0))?;
        let block = direct.map_or(SECTOR, Direct::block);
        let rest = bytes.checked_rem(block).unwrap_or_default();
        Ok(bytes.saturating_sub(rest) / SECTOR)
    }

    /// Serves a request of a driver that agreed on `features`, and returns the bytes written to guest
    /// memory.
    ///
    /// # Errors
    /// The place for the status isn't there: no answer is possible then.
    pub(super) fn serve(
        &self,
        memory: &GuestMemoryMmap,
        request: Request<'_>,
        features: u64,
    ) -> Result<u32, DeviceFault> {
        let status = request.status;
        let outcome = match request.header {
            Some(header) => self.run(header, request.readable, request.writable, features),
            None => Err(IO_ERROR),
        };
        answer(memory, status, outcome)
    }

    fn run(
        &self,
        header: [u8; HEADER],
        readable: Buffers<'_>,
        writable: Buffers<'_>,
        features: u64,
    ) -> Outcome {
        let (kind, sector) = parse(header);
        match kind {
            IN => {
                let (offset, len) = self.range(sector, &writable)?;
                self.read(writable, offset)?;
                Ok(len)
            }
            OUT if self.read_only => Err(IO_ERROR),
            OUT => {
                let (offset, _) = self.range(sector, &readable)?;
                self.write(readable, offset)?;
                self.written(features)
            }
            FLUSH => self.flush().map(|()| 0),
            GET_ID => Ok(writable.write(&self.serial)),
            // Offered on a writable disk only.
            DISCARD | WRITE_ZEROES if self.read_only => Err(IO_ERROR),
            DISCARD if features & FEATURE_DISCARD != 0 => {
                self.clear(Clearing::Discard, &readable).map(|()| 0)
            }
            WRITE_ZEROES if features & FEATURE_WRITE_ZEROES != 0 => {
                self.clear(Clearing::Zeroes, &readable)?;
                self.written(features)
            }
            _ => Err(UNSUPPORTED),
        }
    }

    /// The request as one operation of the kernel's, if it is no more than that.
    pub(super) fn transfer_of<'r, 'a>(&self, request: &'r Request<'a>) -> Option<Transfer<'r, 'a>> {
        let (kind, sector) = parse(request.header?);
        let (operation, buffers) = match kind {
            IN => (Operation::Read, &request.writable),
            OUT if !self.read_only => (Operation::Write, &request.readable),
            FLUSH => {
                return Some(Transfer {
                    operation: Operation::Sync,
                    buffers: &[],
                    offset: 0,
                    bytes: 0,
                });
            }
            _ => return None,
        };
        let (offset, bytes) = self.range(sector, buffers).ok()?;
        let direct = self.direct.as_ref();
        let fits = direct.is_none_or(|direct| direct.fits(buffers, offset));
        (fits && bytes > 0).then_some(Transfer {
            operation,
            buffers: &buffers.0,
            offset,
            bytes,
        })
    }

    /// What has become of a transfer that moved so many bytes of those asked for, of a driver that agreed on
    /// `features`.
    pub(super) fn transferred(
        &self,
        operation: Operation,
        bytes: usize,
        moved: io::Result<usize>,
        features: u64,
    ) -> Outcome {
        match moved {
            Ok(moved) if moved < bytes => Err(self.failed(&io::ErrorKind::UnexpectedEof.into())),
            Err(error) => Err(self.failed(&error)),
            Ok(_) => match operation {
                Operation::Read => Ok(bytes),
                Operation::Write => self.written(features),
                Operation::Sync => Ok(0),
            },
        }
    }

    /// Where on the disk a transfer of all of `buffers` lies, if it does.
    fn range(&self, sector: u64, buffers: &Buffers<'_>) -> Result<(u64, usize), u8> {
        let len = buffers.len();
        let bytes = u64::try_from(len).map_err(|_| IO_ERROR)?;
        if !bytes.is_multiple_of(SECTOR) {
            return Err(IO_ERROR);
        }
        Ok((self.offset(sector, bytes / SECTOR)?, len))
    }

    /// The first byte of `count` sectors from `sector` on, if the disk has all of them.
    pub(super) fn offset(&self, sector: u64, count: u64) -> Result<u64, u8> {
        let end = sector.checked_add(count).ok_or(IO_ERROR)?;
        if end > self.sectors() {
            return Err(IO_ERROR);
        }
        sector.checked_mul(SECTOR).ok_or(IO_ERROR)
    }

    pub(super) fn read(&self, buffers: Buffers<'_>, offset: u64) -> Result<(), u8> {
        match &self.direct {
            Some(direct) if !direct.fits(&buffers, offset) => direct
                .read(&self.file, buffers, offset)
                .map_err(|error| self.failed(&error)),
            _ => self.transfer(buffers, offset, vectored::read_at),
        }
    }

    pub(super) fn write(&self, buffers: Buffers<'_>, offset: u64) -> Result<(), u8> {
        match &self.direct {
            Some(direct) if !direct.fits(&buffers, offset) => direct
                .write(&self.file, buffers, offset)
                .map_err(|error| self.failed(&error)),
            direct => {
                let _shared = direct.as_ref().map(Direct::share);
                self.transfer(buffers, offset, vectored::write_at)
            }
        }
    }

    fn transfer(
        &self,
        mut buffers: Buffers<'_>,
        mut offset: u64,
        call: impl Fn(&File, &[VolatileSlice<'_>], u64) -> io::Result<usize>,
    ) -> Result<(), u8> {
        while !buffers.0.is_empty() {
            let done = match call(&self.file, &buffers.0, offset) {
                Ok(done) if done > 0 => done,
                // The file has become shorter than the disk.
                Ok(_) => return Err(self.failed(&io::ErrorKind::UnexpectedEof.into())),
                Err(error) => return Err(self.failed(&error)),
            };
            buffers.skip(done);
            let step = u64::try_from(done).unwrap_or(u64::MAX);
            offset = offset.saturating_add(step);
        }
        Ok(())
    }

    /// Ends a request that has changed the disk: a driver that can't flush expects what is written
    /// to be safe (section 5.2.6.2).
    fn written(&self, features: u64) -> Outcome {
        if features & FEATURE_FLUSH == 0 {
            self.flush()?;
        }
        Ok(0)
    }

    fn flush(&self) -> Result<(), u8> {
        self.file.sync_data().map_err(|error| self.failed(&error))
    }

    /// The status of a request that the host has failed. The operator hears of it, for the guest can't
    /// help it; where the kernel can say so, by the name of the file.
    pub(super) fn failed(&self, error: &io::Error) -> u8 {
        if self.complaints.are_due() {
            let link = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let file = fs::read_link(link).unwrap_or_default();
            let disk = &self.name;
            tracing::warn!(disk, ?file, %error, "the host can't do what the guest asks of a disk");
        }
        IO_ERROR
    }
}

/// The type and the sector.
fn parse(header: [u8; HEADER]) -> (u32, u64) {
    let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    (u32::from_le_bytes([t0, t1, t2, t3]), sector)
}

/// Writes the status, and returns the bytes written to guest memory.
pub(super) fn answer(
    memory: &GuestMemoryMmap,
    status: GuestAddress,
    outcome: Outcome,
) -> Result<u32, DeviceFault> {
    let (code, written) = match outcome {
        Ok(written) => (OK, written),
        Err(code) => (code, 0),
    };
    let stored = memory.write_obj(code, status);
    stored.map_err(|_| DeviceFault::Driver("a status byte lies outside of memory"))?;
    Ok(u32::try_from(written.saturating_add(1)).unwrap_or(u32::MAX))
}

impl<'a> Request<'a> {
    /// Takes a chain apart: a header, data, and a byte for the status at its end.
    ///
    /// # Errors
    /// The driver left no byte for the status, or memory that isn't there.
    pub(super) fn of(
        memory: &'a GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<Self, DeviceFault> {
        let outside = |_| DeviceFault::Driver("a buffer lies outside of memory");
        let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
        let mut status = None;
        for descriptor in chain {
            let (list, access) = if descriptor.is_write_only() {
                (&mut writable, Permissions::Write)
            } else if writable.0.is_empty() {
                (&mut readable, Permissions::Read)
            } else {
                // Section 2.7.4.2.
                return Err(DeviceFault::Driver("a buffer to read follows one to write"));
            };
            let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
            let slices = memory.get_slices(descriptor.addr(), len, access);
            for slice in slices.map_err(outside)? {
                let slice = slice.map_err(outside)?;
                if !slice.is_empty() {
                    list.0.push(slice);
                }
            }
            if list.0.len() > MAX_BUFFERS {
                return Err(DeviceFault::Driver("a request has too many buffers"));
            }
            if descriptor.is_write_only()
                && let Some(last) = descriptor.len().checked_sub(1)
            {
                status = descriptor.addr().checked_add(last.into());
            }
        }
        let none = DeviceFault::Driver("a request has no status byte");
        let (Some(status), Some(())) = (status, writable.drop_last_byte()) else {
            return Err(none);
        };
        let header = readable.take_header();
        Ok(Self {
            header,
            readable,
            writable,
            status,
        })
    }
}

impl<'a> Buffers<'a> {
    /// Memory of ours.
    pub(super) fn of(bytes: &'a mut [u8]) -> Self {
        Self(vec![VolatileSlice::from(bytes)])
    }

    /// Whether each begins and ends at a multiple of `block`.
    pub(super) fn are_aligned(&self, block: usize) -> bool {
        self.0.iter().all(|slice| {
            let start = slice.ptr_guard().as_ptr().addr();
            start.is_multiple_of(block) && slice.len().is_multiple_of(block)
        })
    }

    pub(super) fn len(&self) -> usize {
        let lens = self.0.iter().map(VolatileSlice::len);
        lens.fold(0, usize::saturating_add)
    }

    /// Copies the header out of the front, however the driver has cut it.
    fn take_header(&mut self) -> Option<[u8; HEADER]> {
        let mut header = [0; HEADER];
        self.read(&mut header)?;
        self.skip(HEADER);
        Some(header)
    }

    /// Fills `bytes` from the front, if there are as many.
    pub(super) fn read(&self, mut bytes: &mut [u8]) -> Option<()> {
        for slice in &self.0 {
            let (now, later) = bytes.split_at_mut(slice.len().min(bytes.len()));
            slice.read_slice(now, 0).ok()?;
            bytes = later;
        }
        bytes.is_empty().then_some(())
    }

    /// Cuts the last byte off, if there is one.
    fn drop_last_byte(&mut self) -> Option<()> {
        let last = self.0.pop()?;
        let data = last.subslice(0, last.len().checked_sub(1)?).ok()?;
        if !data.is_empty() {
            self.0.push(data);
        }
        Some(())
    }

    /// Drops `count` bytes from the front.
    pub(super) fn skip(&mut self, mut count: usize) {
        let mut whole = 0_usize;
        for slice in &mut self.0 {
            if slice.len() > count {
                if let Ok(rest) = slice.offset(count) {
                    *slice = rest;
                }
                break;
            }
            count = count.saturating_sub(slice.len());
            whole = whole.saturating_add(1);
        }
        self.0.drain(..whole);
    }

    /// Writes as much of `bytes` as there is room for.
    pub(super) fn write(&self, mut bytes: &[u8]) -> usize {
        let mut written = 0_usize;
        for slice in &self.0 {
            let (now, later) = bytes.split_at(slice.len().min(bytes.len()));
            slice.copy_from(now);
            written = written.saturating_add(now.len());
            bytes = later;
        }
        written
    }
}
