// SPDX-License-Identifier: Apache-2.0
//! Sockets between guest and host (vsock(7)).

use std::io;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};

use ttrpc::asynchronous::Server;

/// The host's context identifier.
const HOST: u32 = libc::VMADDR_CID_HOST;

fn socket(extra: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: creates a descriptor, touches no memory.
    let result = unsafe {
        libc::socket(
            libc::AF_VSOCK,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC | extra,
            0,
        )
    };
    let fd = super::check(result.into())?;
    // SAFETY: the kernel has just made this descriptor.
    unsafe { super::own(fd) }
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all-zero bytes are a valid `sockaddr_vm`.
    let mut address: libc::sockaddr_vm = unsafe { core::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).unwrap_or_default();
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

const ADDRESS_LENGTH: libc::socklen_t = size_of_u32::<libc::sockaddr_vm>();

#[expect(clippy::cast_possible_truncation, reason = "an address has 16 bytes")]
const fn size_of_u32<T>() -> u32 {
    size_of::<T>() as u32
}

/// A non-blocking socket that listens on `port` of context `cid`.
///
/// # Errors
///
/// The kernel's: no vsock transport, or the port is taken.
pub(crate) fn listen(cid: u32, port: u32) -> io::Result<OwnedFd> {
    let socket = socket(libc::SOCK_NONBLOCK)?;
    let address = address(cid, port);
    // SAFETY: the address lives through the call and the length is its own.
    let result = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            ADDRESS_LENGTH,
        )
    };
    super::check(result.into())?;
    // SAFETY: touches no memory.
    let result = unsafe { libc::listen(socket.as_raw_fd(), 128) };
    super::check(result.into())?;
    Ok(socket)
}

/// Starts to connect to `port` of the host, without waiting. The socket becomes writable when
/// the connection stands or has failed.
///
/// # Errors
///
/// The kernel's, when the attempt can't even start.
pub(crate) fn connect_host(port: u32) -> io::Result<OwnedFd> {
    let socket = socket(libc::SOCK_NONBLOCK)?;
    let address = address(HOST, port);
    // SAFETY: the address lives through the call and the length is its own.
    let result = unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            ADDRESS_LENGTH,
        )
    };
    match super::check(result.into()) {
        Ok(_) => Ok(socket),
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

/// Gives the listening socket to the server.
///
/// # Errors
///
/// The server's.
pub(crate) fn serve(server: Server, listener: OwnedFd) -> ttrpc::Result<Server> {
    // SAFETY: the descriptor is an open vsock listener, and its ownership goes to the server.
    unsafe { server.add_vsock_listener(listener.into_raw_fd()) }
}
