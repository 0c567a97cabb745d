// SPDX-License-Identifier: Apache-2.0
//! Reads, writes and syncs of one file that go on while others begin (io_uring), straight from and to guest
//! memory.
//!
//! What is under way keeps guest memory mapped and its vectors in place; a ring that is dropped waits for
//! it first. No Rust reference to guest memory ever exists.

use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::squeue::Entry;
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, Probe, opcode};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The file among those that the ring knows.
const FILE: Fixed = Fixed(0);

/// What to do with the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    /// From the file into the buffers.
    Read,
    /// From the buffers into the file.
    Write,
    /// What was written is safe when this is done.
    Sync,
}

/// A ring for one file, and what is under way, each with a `T` of its owner's.
pub(crate) struct Ring<T> {
    ring: IoUring,
    /// Readable when something is done.
    event: EventFd,
    /// By what the kernel calls them.
    flights: Vec<Option<Flight<T>>>,
    free: Vec<usize>,
}

/// An operation under way.
struct Flight<T> {
    tag: T,
    operation: Operation,
    /// What is left. The kernel reads the list until the operation is done; it stays where it is in
    /// memory when this moves.
    vectors: Vec<libc::iovec>,
    /// Where in the file that is.
    offset: u64,
    /// Bytes moved so far.
    done: usize,
    /// What the vectors lie in.
    _memory: Arc<GuestMemoryMmap>,
}

// SAFETY: the vectors' addresses are the kernel's alone to read and write, and the memory that they lie in
// is kept by `_memory`, which may be dropped on any thread.
unsafe impl<T: Send> Send for Flight<T> {}

impl<T> Ring<T> {
    /// A ring for as many operations at a time.
    ///
    /// # Errors
    /// The kernel has none, lets this process have none, or can't do one of the operations.
    pub(crate) fn new(file: &impl AsRawFd, operations: u16) -> io::Result<Self> {
        let ring = IoUring::new(u32::from(operations))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
        ];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        let count = usize::from(operations);
        Ok(Self {
            ring,
            event,
            flights: (0..count).map(|_| None).collect(),
            free: (0..count).rev().collect(),
        })
    }

    /// Readable when something is done.
    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }

    /// Whether nothing is under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.free.len() == self.flights.len()
    }

    /// Prepares an operation on buffers in `memory`, at `offset` of the file; it begins with `submit`. Gives
    /// `tag` back where as much is under way as may be, or the buffers lie elsewhere.
    pub(crate) fn start(
        &mut self,
        tag: T,
        operation: Operation,
        memory: &Arc<GuestMemoryMmap>,
        buffers: &[VolatileSlice<'_>],
        offset: u64,
    ) -> Result<(), T> {
        let Some(vectors) = vectors(memory, buffers) else {
            return Err(tag);
        };
        let Some(slot) = self.free.pop() else {
            return Err(tag);
        };
        let flight = Flight {
            tag,
            operation,
            vectors,
            offset,
            done: 0,
            _memory: Arc::clone(memory),
        };
        let entry = entry(&flight, slot);
        if let Some(place) = self.flights.get_mut(slot) {
            *place = Some(flight);
        }
        // There is room for all that may be under way.
        if self.push(&entry).is_err()
            && let Some(flight) = self.take(slot)
        {
            return Err(flight.tag);
        }
        Ok(())
    }

    /// Lets the kernel begin what was prepared.
    ///
    /// # Errors
    /// The kernel took nothing; what was prepared stays so.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        retry(|| self.ring.submit())
    }

    /// Waits until something is done.
    ///
    /// # Errors
    /// The kernel took nothing; what was prepared stays so.
    pub(crate) fn wait(&mut self) -> io::Result<()> {
        retry(|| self.ring.submit_and_wait(1))
    }

    /// Takes something that is done: the bytes moved, which are fewer than asked for at the end of the file
    /// only. What goes on in a further step is prepared, and begins with `submit`.
    pub(crate) fn completed(&mut self) -> Option<(T, io::Result<usize>)> {
        loop {
            let completion = self.ring.completion().next()?;
            let slot = usize::try_from(completion.user_data()).unwrap_or(usize::MAX);
            let moved = match completion.result() {
                moved if moved >= 0 => Ok(usize::try_from(moved).unwrap_or_default()),
                error => Err(io::Error::from_raw_os_error(error.saturating_neg())),
            };
            let Some(Some(flight)) = self.flights.get_mut(slot) else {
                tracing::error!(slot, "the kernel has done what nobody asked for");
                continue;
            };
            let outcome = match moved {
                Ok(moved) => {
                    flight.advance(moved);
                    if moved == 0 || flight.vectors.is_empty() {
                        Some(Ok(flight.done))
                    } else {
                        None
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR | libc::EAGAIN) => None,
                    _ => Some(Err(error)),
                },
            };
            let rest = outcome.is_none().then(|| entry(flight, slot));
            let outcome = match rest {
                Some(rest) => self.push(&rest).err().map(Err),
                None => outcome,
            };
            if let Some(outcome) = outcome
                && let Some(flight) = self.take(slot)
            {
                return Some((flight.tag, outcome));
            }
        }
    }

    /// Queues what `entry` made of a flight that is in its slot.
    fn push(&mut self, entry: &Entry) -> io::Result<()> {
        // SAFETY: the flight's vectors are in memory that the flight keeps mapped, and flight and list
        // stay until the kernel has said that it is done: they are taken out of their slot by `completed`
        // alone, or where this fails, and `drop` waits.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.map_err(io::Error::other)
    }

    fn take(&mut self, slot: usize) -> Option<Flight<T>> {
        let flight = self.flights.get_mut(slot)?.take()?;
        self.free.push(slot);
        Some(flight)
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        while !self.is_idle() {
            if let Err(error) = self.wait() {
                // The kernel may write to it at any time.
                tracing::error!(%error, "can't wait for a disk; the memory it may use stays");
                mem::forget(mem::take(&mut self.flights));
                return;
            }
            while self.completed().is_some() {}
        }
    }
}

impl<T> std::fmt::Debug for Ring<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let under_way = self.flights.len().saturating_sub(self.free.len());
        let mut shown = formatter.debug_struct("Ring");
        shown.field("under_way", &under_way).finish_non_exhaustive()
    }
}

impl<T> Flight<T> {
    /// Goes past what was moved.
    fn advance(&mut self, moved: usize) {
        self.done = self.done.saturating_add(moved);
        let bytes = u64::try_from(moved).unwrap_or(u64::MAX);
        self.offset = self.offset.saturating_add(bytes);
        let (mut left, mut whole) = (moved, 0_usize);
        for vector in &mut self.vectors {
            if vector.iov_len > left {
                vector.iov_base = vector.iov_base.wrapping_byte_add(left);
                vector.iov_len = vector.iov_len.saturating_sub(left);
                break;
            }
            left = left.saturating_sub(vector.iov_len);
            whole = whole.saturating_add(1);
        }
        self.vectors.drain(..whole);
    }
}

fn entry<T>(flight: &Flight<T>, slot: usize) -> Entry {
    let vectors = flight.vectors.as_ptr();
    let count = u32::try_from(flight.vectors.len()).unwrap_or(u32::MAX);
    let entry = match flight.operation {
        Operation::Read => opcode::Readv::new(FILE, vectors, count)
            .offset(flight.offset)
            .build(),
        Operation::Write => opcode::Writev::new(FILE, vectors, count)
            .offset(flight.offset)
            .build(),
        Operation::Sync => opcode::Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build(),
    };
    entry.user_data(u64::try_from(slot).unwrap_or(u64::MAX))
}

/// The buffers for the kernel, if each lies in `memory`.
fn vectors(memory: &GuestMemoryMmap, buffers: &[VolatileSlice<'_>]) -> Option<Vec<libc::iovec>> {
    let in_memory = |vector: &libc::iovec| {
        let start = vector.iov_base.addr();
        memory.iter().any(|region| {
            let base = region.as_ptr().addr();
            let len = usize::try_from(region.len()).unwrap_or_default();
            start
                .checked_sub(base)
                .and_then(|at| at.checked_add(vector.iov_len))
                .is_some_and(|end| end <= len)
        })
    };
    let vectors: Vec<_> = buffers
        .iter()
        .map(|buffer| {
            let guard = buffer.ptr_guard_mut();
            libc::iovec {
                iov_base: guard.as_ptr().cast(),
                iov_len: guard.len(),
            }
        })
        .collect();
    vectors.iter().all(in_memory).then_some(vectors)
}

fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<()> {
    loop {
        match call() {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;
    use std::os::fd::OwnedFd;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn memory() -> Arc<GuestMemoryMmap> {
        let ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)];
        Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
    }

    fn slices(memory: &GuestMemoryMmap, at: u64, len: usize) -> Vec<VolatileSlice<'_>> {
        let slices = memory.get_slices(GuestAddress(at), len);
        slices.map(Result::unwrap).collect()
    }

    fn ring(file: &impl AsRawFd, operations: u16) -> Ring<u32> {
        Ring::new(file, operations).unwrap()
    }

    fn finish(ring: &mut Ring<u32>) -> Vec<(u32, io::Result<usize>)> {
        let mut done = Vec::new();
        while !ring.is_idle() {
            ring.wait().unwrap();
            done.extend(std::iter::from_fn(|| ring.completed()));
        }
        done.sort_by_key(|(tag, _)| *tag);
        done
    }

    #[test]
    fn bytes_go_between_file_and_memory() {
        let (memory, file) = (memory(), tempfile::tempfile().unwrap());
        let mut ring = ring(&file, 2);
        memory
            .write_slice(b"hello, ring", GuestAddress(0xffa))
            .unwrap();
        // Across two regions.
        let from = slices(&memory, 0xffa, 11);
        assert_eq!(from.len(), 2);
        ring.start(1, Operation::Write, &memory, &from, 5).unwrap();
        ring.start(2, Operation::Sync, &memory, &[], 0).unwrap();
        // As many as may be.
        assert_eq!(ring.start(3, Operation::Sync, &memory, &[], 0), Err(3));
        let done = finish(&mut ring);
        assert!(matches!(done[..], [(1, Ok(11)), (2, Ok(0))]), "{done:?}");
        let to = slices(&memory, 0x100, 20);
        ring.start(4, Operation::Read, &memory, &to, 5).unwrap();
        let done = finish(&mut ring);
        // The file has no more.
        assert!(matches!(done[..], [(4, Ok(11))]), "{done:?}");
        let mut read = [0; 12];
        memory.read_slice(&mut read, GuestAddress(0x100)).unwrap();
        assert_eq!(&read, b"hello, ring\0");
    }

    #[test]
    fn a_transfer_in_parts_is_one() {
        let (reader, mut writer) = io::pipe().unwrap();
        let memory = memory();
        let mut ring = ring(&reader, 1);
        // A pipe gives what it has.
        let to = slices(&memory, 0xffe, 6);
        ring.start(1, Operation::Read, &memory, &to, u64::MAX)
            .unwrap();
        ring.submit().unwrap();
        for part in [b"a", b"b", b"c"] {
            writer.write_all(part).unwrap();
            assert!(ring.completed().is_none());
            ring.submit().unwrap();
        }
        writer.write_all(b"def").unwrap();
        assert!(matches!(finish(&mut ring)[..], [(1, Ok(6))]));
        let mut read = [0; 6];
        memory.read_slice(&mut read, GuestAddress(0xffe)).unwrap();
        assert_eq!(&read, b"abcdef");
    }

    #[test]
    fn errors_are_the_kernel_s() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "x").unwrap();
        let (memory, file) = (memory(), File::open(&path).unwrap());
        let mut ring = ring(&file, 1);
        let from = slices(&memory, 0, 1);
        ring.start(1, Operation::Write, &memory, &from, 0).unwrap();
        let done = finish(&mut ring);
        let [(1, Err(error))] = &done[..] else {
            panic!("{done:?}");
        };
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn memory_of_others_is_not_taken() {
        let (memory, file) = (memory(), tempfile::tempfile().unwrap());
        let mut ring = ring(&file, 1);
        let mut own = [0; 16];
        let own = [VolatileSlice::from(&mut own[..])];
        assert_eq!(ring.start(1, Operation::Read, &memory, &own, 0), Err(1));
        assert!(ring.is_idle());
    }

    #[test]
    fn a_ring_that_is_dropped_waits() {
        let (reader, mut writer) = io::pipe().unwrap();
        let memory = memory();
        let reader = OwnedFd::from(reader);
        let mut ring = ring(&reader, 1);
        let to = slices(&memory, 0, 1);
        ring.start(1, Operation::Read, &memory, &to, u64::MAX)
            .unwrap();
        ring.submit().unwrap();
        let late = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(50));
            writer.write_all(b"x").unwrap();
        });
        drop(ring);
        let read: u8 = memory.read_obj(GuestAddress(0)).unwrap();
        assert_eq!(read, b'x');
        late.join().unwrap();
    }
}
