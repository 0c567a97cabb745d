// SPDX-License-Identifier: Apache-2.0
//! One write to an I/O port: the boot progress that the VMM records.

use std::io;

/// The port that firmware has always used for progress codes.
const PROGRESS_PORT: u16 = 0x80;
/// Code for "user space runs".
const INIT_RUNS: u8 = 0x41;

/// Tells the VMM that init runs.
///
/// # Errors
///
/// The kernel's, when the port may not be opened.
#[cfg(target_arch = "x86_64")]
pub(crate) fn announce_init() -> io::Result<()> {
    // SAFETY: changes only which ports this thread may use.
    let result = unsafe { libc::ioperm(libc::c_ulong::from(PROGRESS_PORT), 1, 1) };
    super::check(result.into())?;
    // SAFETY: the port is open to this thread; a write to it has no effect on memory.
    unsafe {
        core::arch::asm!("out dx, al", in("dx") PROGRESS_PORT, in("al") INIT_RUNS,
            options(nomem, nostack, preserves_flags));
    }
    Ok(())
}

/// Other architectures have no I/O ports.
///
/// # Errors
///
/// Never.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn announce_init() -> io::Result<()> {
    Ok(())
}
