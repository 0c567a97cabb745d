// SPDX-License-Identifier: Apache-2.0
//! The process-wide calls on the way to `execve(2)`, and signals by pidfd.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// One classic BPF instruction of a seccomp filter.
pub(crate) type FilterInstruction = libc::sock_filter;

/// Sends `signal` to the process of `pidfd`. `rustix` has the call, but not real-time signals.
///
/// # Errors
///
/// ESRCH when the process has ended; EINVAL for a number that is no signal.
pub(crate) fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: no signal information is passed, so no memory is read.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            core::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    super::check(result)?;
    Ok(())
}

/// Gives every signal its default action and unblocks all: Rust's runtime ignores SIGPIPE, and
/// ignored signals stay ignored across `execve(2)`.
pub(crate) fn reset_signals() {
    // `struct kernel_sigaction`: handler, flags, restorer, mask. All zero is the default action.
    let default = [0_u64; 4];
    for signal in 1..=64 {
        // Past the C library, which hides two signals of its own that may be ignored as well.
        // SAFETY: the kernel reads the structure and an 8-byte mask; SIG_DFL runs no code of
        // ours. SIGKILL and SIGSTOP are refused, which is right.
        let _ = unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                core::ptr::null_mut::<u64>(),
                size_of::<u64>(),
            )
        };
    }
    // SAFETY: all-zero bytes are a valid, empty set.
    let none: libc::sigset_t = unsafe { core::mem::zeroed() };
    // SAFETY: reads `none`, which lives through the call.
    let _ = unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, core::ptr::null_mut()) };
}

/// Marks every descriptor from `first` on close-on-exec, so that the container's program gets its
/// standard streams and nothing else (CVE-2024-21626: a leaked folder of the host).
///
/// # Errors
///
/// The kernel's.
pub(crate) fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: only changes flags of descriptors.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    super::check(result)?;
    Ok(())
}

/// Closes every descriptor from `first` on.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: the caller uses none of them from here on; closing touches no memory.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    super::check(result)?;
    Ok(())
}

/// Leaves the current cgroup namespace for a new one whose root is the current cgroup.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn new_cgroup_namespace() -> io::Result<()> {
    // SAFETY: no descriptor table or memory is unshared.
    let result = unsafe { libc::unshare(libc::CLONE_NEWCGROUP) };
    super::check(result.into())?;
    Ok(())
}

/// Leaves the current mount namespace for a copy of it. The process has one thread.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn new_mount_namespace() -> io::Result<()> {
    // SAFETY: no descriptor table or memory is unshared.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    super::check(result.into())?;
    Ok(())
}

/// Leaves the current IPC and UTS namespaces, for this thread only.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn new_ipc_and_uts_namespaces() -> io::Result<()> {
    // SAFETY: no descriptor table or memory is unshared.
    let result = unsafe { libc::unshare(libc::CLONE_NEWIPC | libc::CLONE_NEWUTS) };
    super::check(result.into())?;
    Ok(())
}

/// Installs a seccomp filter.
///
/// # Errors
///
/// The kernel's: EACCES without CAP_SYS_ADMIN and without `no_new_privs`.
pub(crate) fn install_filter(filter: &[FilterInstruction], flags: u32) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel only reads the program and its instructions, which live through the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    };
    super::check(result)?;
    Ok(())
}

/// Replaces this process by `path`. Only returns on failure.
pub(crate) fn execute(path: &CString, arguments: &[CString], environment: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings
            .iter()
            .map(|string| string.as_ptr())
            .chain([core::ptr::null()])
            .collect()
    };
    let arguments = pointers(arguments);
    let environment = pointers(environment);
    // SAFETY: path and strings end in NUL, both arrays end in NULL, and all outlive the call.
    unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

/// Does nothing but let children end: the kernel keeps no status of them.
pub(crate) fn reap_for_ever() -> ! {
    reset_signals();
    // SAFETY: SIG_IGN runs no code of ours.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    loop {
        // SAFETY: waits for a signal and touches no memory.
        unsafe { libc::pause() };
    }
}

/// Waits until this process is killed, at the latest when its parent ends.
pub(crate) fn wait_for_the_end() -> ! {
    // SAFETY: asks for a signal and touches no memory.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    loop {
        // SAFETY: waits for a signal and touches no memory.
        unsafe { libc::pause() };
    }
}

/// Ends the process at once, without the clean-up that belongs to its parent.
pub(crate) fn exit_now(status: i32) -> ! {
    // SAFETY: never returns and touches no memory.
    unsafe { libc::_exit(status) }
}
