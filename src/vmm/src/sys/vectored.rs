// SPDX-License-Identifier: Apache-2.0
//! Reads and writes of files and sockets straight from and to guest memory.
//!
//! No Rust reference to guest memory ever exists, only addresses that the kernel reads or writes:
//! the guest may change the bytes at any time.

use std::io;
use std::os::fd::AsRawFd;

use rustix::io::ReadWriteFlags;
use vm_memory::VolatileSlice;

/// Most buffers of one call (`IOV_MAX`).
pub(crate) const MAX_BUFFERS: usize = 1024;

/// Reads from `offset` of the file into the buffers; returns the bytes read.
pub(crate) fn read_at(
    file: &impl AsRawFd,
    buffers: &[VolatileSlice<'_>],
    offset: u64,
) -> io::Result<usize> {
    let guards: Vec<_> = buffers.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let vectors: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let (count, offset) = arguments(vectors.len(), offset)?;
    retry(|| {
        // SAFETY: each vector is a slice of guest memory that `buffers` keeps mapped for the
        // call; the kernel writes bytes only, and nothing holds a reference to them.
        unsafe { libc::preadv64(file.as_raw_fd(), vectors.as_ptr(), count, offset) }
    })
}

/// Writes the buffers to `offset` of the file; returns the bytes written.
pub(crate) fn write_at(
    file: &impl AsRawFd,
    buffers: &[VolatileSlice<'_>],
    offset: u64,
) -> io::Result<usize> {
    write_at_with(file, buffers, offset, ReadWriteFlags::empty())
}

/// The same with flags: `APPEND` writes to the end instead.
pub(crate) fn write_at_with(
    file: &impl AsRawFd,
    buffers: &[VolatileSlice<'_>],
    offset: u64,
    flags: ReadWriteFlags,
) -> io::Result<usize> {
    let guards: Vec<_> = buffers.iter().map(VolatileSlice::ptr_guard).collect();
    let vectors: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast_mut().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let (count, offset) = arguments(vectors.len(), offset)?;
    let flags = flags.bits().cast_signed();
    retry(|| {
        // SAFETY: each vector is a slice of guest memory that `buffers` keeps mapped for the
        // call; the kernel only reads from it.
        unsafe { libc::pwritev64v2(file.as_raw_fd(), vectors.as_ptr(), count, offset, flags) }
    })
}

/// Reads from a descriptor that has no position, such as a tap, into the buffers; returns the bytes
/// read.
pub(crate) fn read(file: &impl AsRawFd, buffers: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let guards: Vec<_> = buffers.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let vectors: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let count = libc::c_int::try_from(vectors.len()).map_err(io::Error::other)?;
    retry(|| {
        // SAFETY: each vector is memory that `buffers` keeps mapped for the call; the kernel
        // writes bytes only, and nothing holds a reference to them.
        unsafe { libc::readv(file.as_raw_fd(), vectors.as_ptr(), count) }
    })
}

/// Writes the buffers to a descriptor that has no position; returns the bytes written.
pub(crate) fn write(file: &impl AsRawFd, buffers: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let guards: Vec<_> = buffers.iter().map(VolatileSlice::ptr_guard).collect();
    let vectors: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast_mut().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let count = libc::c_int::try_from(vectors.len()).map_err(io::Error::other)?;
    retry(|| {
        // SAFETY: each vector is memory that `buffers` keeps mapped for the call; the kernel only
        // reads from it.
        unsafe { libc::writev(file.as_raw_fd(), vectors.as_ptr(), count) }
    })
}

/// Sends the buffers on a socket, without waiting and without SIGPIPE; returns the bytes sent.
pub(crate) fn send(socket: &impl AsRawFd, buffers: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let guards: Vec<_> = buffers.iter().map(VolatileSlice::ptr_guard).collect();
    let mut vectors: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast_mut().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let message = message(&mut vectors);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    retry(|| {
        // SAFETY: `message` points at `vectors`, each a slice of guest memory that `buffers` keeps
        // mapped for the call; the kernel only reads from it.
        unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) }
    })
}

/// Receives from a socket into the buffers, without waiting; returns the bytes received, 0 at
/// the end of the stream.
pub(crate) fn receive(socket: &impl AsRawFd, buffers: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let guards: Vec<_> = buffers.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let mut vectors: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let mut message = message(&mut vectors);
    retry(|| {
        // SAFETY: `message` points at `vectors`, each a slice of guest memory that `buffers` keeps
        // mapped for the call; the kernel writes bytes only, and nothing holds a reference to
        // them. There is no room for control data.
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) }
    })
}

fn message(vectors: &mut [libc::iovec]) -> libc::msghdr {
    libc::msghdr {
        msg_name: std::ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: vectors.as_mut_ptr(),
        msg_iovlen: vectors.len(),
        msg_control: std::ptr::null_mut(),
        msg_controllen: 0,
        msg_flags: 0,
    }
}

fn arguments(count: usize, offset: u64) -> io::Result<(libc::c_int, i64)> {
    let count = libc::c_int::try_from(count).map_err(io::Error::other)?;
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    Ok((count, offset))
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(done) => return Ok(done),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn bytes_go_through_several_slices() {
        let (one, other) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (*b"hello ", *b"world");
        let from = [
            VolatileSlice::from(&mut a[..]),
            VolatileSlice::from(&mut b[..]),
        ];
        assert_eq!(send(&one, &from).unwrap(), 11);
        let (mut c, mut d) = ([0; 3], [0; 100]);
        let to = [
            VolatileSlice::from(&mut c[..]),
            VolatileSlice::from(&mut d[..]),
        ];
        assert_eq!(receive(&other, &to).unwrap(), 11);
        assert_eq!((&c, &d[..8]), (b"hel", &b"lo world"[..]));
    }

    #[test]
    fn neither_waits_and_the_end_is_told() {
        let (one, other) = UnixStream::pair().unwrap();
        let mut bytes = [0; 4096];
        let slices = [VolatileSlice::from(&mut bytes[..])];
        let nothing = receive(&one, &slices).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        let full = loop {
            if let Err(error) = send(&one, &slices) {
                break error;
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        drop(one);
        let end = loop {
            match receive(&other, &slices) {
                Ok(0) => break 0,
                Ok(_) => {}
                Err(error) => panic!("{error}"),
            }
        };
        assert_eq!(end, 0);
        let gone = send(&other, &slices).unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::BrokenPipe);
    }
}
