// SPDX-License-Identifier: Apache-2.0
//! `bpf(2)`: loads a device filter and attaches it to a cgroup.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// One eBPF instruction, as the kernel lays it out.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Instruction {
    /// Operation code.
    pub(crate) code: u8,
    /// Destination register in the low half, source register in the high half.
    pub(crate) registers: u8,
    /// Jump distance or memory offset.
    pub(crate) offset: i16,
    /// Constant operand.
    pub(crate) immediate: i32,
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// The start of `union bpf_attr` for BPF_PROG_LOAD.
#[repr(C)]
struct Load {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    program_flags: u32,
}

/// The start of `union bpf_attr` for BPF_PROG_ATTACH.
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    attach_type: u32,
    attach_flags: u32,
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads `size` bytes of the attributes, which live through the call, and
    // treats what lies past `size` as zero.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            core::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    super::check(result)
}

/// Loads a program of type "cgroup device".
///
/// # Errors
///
/// The kernel's; EINVAL or EACCES when its verifier refuses the program.
pub(crate) fn load_device_filter(program: &[Instruction]) -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let attributes = Load {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len())
            .map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
        instructions: program.as_ptr().addr() as u64,
        license: license.as_ptr().addr() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        program_flags: 0,
    };
    let fd = bpf(BPF_PROG_LOAD, &attributes)?;
    // SAFETY: the kernel has just made this descriptor.
    unsafe { super::own(fd) }
}

/// Makes `program` decide about the device accesses of `cgroup`, beside those of its ancestors.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn attach_device_filter(
    cgroup: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
) -> io::Result<()> {
    let attributes = Attach {
        target: cgroup.as_raw_fd().cast_unsigned(),
        program: program.as_raw_fd().cast_unsigned(),
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI,
    };
    bpf(BPF_PROG_ATTACH, &attributes)?;
    Ok(())
}
