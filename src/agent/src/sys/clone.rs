// SPDX-License-Identifier: Apache-2.0
//! `clone3(2)` for the single-threaded helper that starts containers.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// Proof that this process has one thread.
///
/// A child made by a raw clone of a threaded process may inherit a locked allocator, and then
/// hangs at its first allocation. With one thread the child is an ordinary copy.
#[derive(Debug)]
pub(crate) struct SingleThreaded(());

impl SingleThreaded {
    /// Looks at the process. Nothing may start a thread as long as the proof exists.
    ///
    /// # Errors
    ///
    /// When there is more than one thread or /proc can't be read.
    pub(crate) fn prove() -> io::Result<Self> {
        // A folder of /proc/self/task for each thread, and its own two links.
        let links = rustix::fs::stat("/proc/self/task")?.st_nlink;
        if links == 3 {
            Ok(Self(()))
        } else {
            Err(io::Error::other("helper process has more than one thread"))
        }
    }
}

/// Which side of a clone this is.
#[derive(Debug)]
pub(crate) enum Side {
    /// The caller; the child's pid and pidfd.
    Parent(i32, OwnedFd),
    /// The new process.
    Child,
}

/// Clones this process as a *sibling*: the child's parent is this process's own parent, the agent
/// (CLONE_PARENT). The child starts in `cgroup` (CLONE_INTO_CGROUP: a later move would wait for a
/// grace period, about 10 ms) and in the new namespaces of `namespaces` (CLONE_NEW*).
///
/// # Errors
///
/// The kernel's.
pub(crate) fn clone_sibling(
    _proof: &SingleThreaded,
    namespaces: u64,
    cgroup: BorrowedFd<'_>,
) -> io::Result<Side> {
    let flags = u64::from(libc::CLONE_PARENT.cast_unsigned()) | CLONE_INTO_CGROUP | namespaces;
    // With CLONE_PARENT the kernel takes the caller's own exit signal and wants 0 here.
    clone(flags, 0, cgroup.as_raw_fd())
}

/// Like fork in a process with one thread, of which the callers have proof.
fn clone(flags: u64, exit_signal: u64, cgroup: RawFd) -> io::Result<Side> {
    let mut pidfd: RawFd = -1;
    let arguments = libc::clone_args {
        flags: u64::from(libc::CLONE_PIDFD.cast_unsigned()) | flags,
        pidfd: (&raw mut pidfd).addr() as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: u64::from(cgroup.cast_unsigned()),
    };
    // SAFETY: like fork in a process with one thread, which the proof says; memory is copied, and
    // the kernel writes the pidfd only into the parent's `pidfd`, which lives through the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const arguments,
            size_of::<libc::clone_args>(),
        )
    };
    let pid = super::check(result)?;
    if pid == 0 {
        return Ok(Side::Child);
    }
    // SAFETY: CLONE_PIDFD made this descriptor for us.
    let pidfd = unsafe { super::own(pidfd.into()) }?;
    let pid = i32::try_from(pid).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    Ok(Side::Parent(pid, pidfd))
}

/// A process that does nothing but keep its namespaces alive. It ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Holder {
    pid: i32,
    pidfd: OwnedFd,
}

impl Holder {
    /// Clones this process into the new namespaces of `namespaces` (CLONE_NEW*).
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn clone(_proof: &SingleThreaded, namespaces: u64) -> io::Result<Self> {
        let exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
        match clone(namespaces, exit_signal, 0)? {
            Side::Parent(pid, pidfd) => Ok(Self { pid, pidfd }),
            Side::Child => super::process::wait_for_the_end(),
        }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = super::process::send_signal(self.pidfd.as_fd(), libc::SIGKILL);
        let id = rustix::process::WaitId::PidFd(self.pidfd.as_fd());
        let _ = rustix::process::waitid(id, rustix::process::WaitIdOptions::EXITED);
    }
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
