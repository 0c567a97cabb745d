// SPDX-License-Identifier: Apache-2.0
//! `bpf(2)`: a socket that is found whatever port of the loopback interface a connection is made
//! to (the kernel's `Documentation/bpf/prog_sk_lookup.rst`).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE: libc::c_int = 2;
const PROGRAM_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;

const MAP_OF_SOCKETS: u32 = 15;
const PROGRAM_OF_LOOKUP: u32 = 30;
const ATTACHED_TO_LOOKUP: u32 = 36;

/// The start of `union bpf_attr` for `BPF_MAP_CREATE`.
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

/// The start of `union bpf_attr` for `BPF_MAP_UPDATE_ELEM`.
#[repr(C)]
struct MapUpdate {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The start of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
struct ProgramLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

/// The start of `union bpf_attr` for `BPF_LINK_CREATE`.
#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

/// One instruction, as the kernel lays it out.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// Destination register in the low half, source register in the high half.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// Has `listener` take every connection to 127.0.0.0/8 in the network namespace, whatever the
/// port. What is returned keeps it so, and ends it when it is closed.
pub(crate) fn take_loopback_connections(
    namespace: BorrowedFd<'_>,
    listener: BorrowedFd<'_>,
) -> io::Result<OwnedFd> {
    let map = bpf(
        MAP_CREATE,
        &MapCreate {
            map_type: MAP_OF_SOCKETS,
            key_size: 4,
            value_size: 8,
            max_entries: 1,
        },
    )?;
    // SAFETY: the kernel has just made this descriptor.
    let map = unsafe { OwnedFd::from_raw_fd(map) };
    let key = 0_u32;
    let value = u64::from(number(listener.as_raw_fd()));
    bpf(
        MAP_UPDATE,
        &MapUpdate {
            map: number(map.as_raw_fd()),
            padding: 0,
            key: address(&raw const key),
            value: address(&raw const value),
            flags: 0,
        },
    )?;
    let instructions = lookup(map.as_raw_fd());
    let license = c"Apache-2.0";
    let program = bpf(
        PROGRAM_LOAD,
        &ProgramLoad {
            program_type: PROGRAM_OF_LOOKUP,
            instruction_count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
            instructions: address(instructions.as_ptr()),
            license: address(license.as_ptr()),
            log_level: 0,
            log_size: 0,
            log_buffer: 0,
            kernel_version: 0,
            flags: 0,
            name: *b"nutshell_lookup\0",
            interface: 0,
            attach_type: ATTACHED_TO_LOOKUP,
        },
    )?;
    // SAFETY: the kernel has just made this descriptor.
    let program = unsafe { OwnedFd::from_raw_fd(program) };
    // It holds the program, which holds the map.
    let link = bpf(
        LINK_CREATE,
        &LinkCreate {
            program: number(program.as_raw_fd()),
            target: number(namespace.as_raw_fd()),
            attach_type: ATTACHED_TO_LOOKUP,
            flags: 0,
        },
    )?;
    // SAFETY: the kernel has just made this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(link) })
}

/// The program: for a TCP connection to 127.0.0.0/8 it chooses the socket in the map; everything
/// else, and this where the socket is gone, goes its usual way.
fn lookup(map: RawFd) -> [Instruction; 23] {
    // Fields of `struct bpf_sk_lookup`.
    const FAMILY: i16 = 8;
    const PROTOCOL: i16 = 12;
    const LOCAL_IP4: i16 = 40;
    // Helpers.
    const MAP_LOOKUP: i32 = 1;
    const SK_RELEASE: i32 = 86;
    const SK_ASSIGN: i32 = 124;
    const SK_PASS: i32 = 1;
    [
        copy(6, 1),
        load_word(2, 6, FAMILY),
        // Each jump leads to the last two instructions.
        unless_equal(2, libc::AF_INET, 18),
        load_word(2, 6, PROTOCOL),
        unless_equal(2, libc::IPPROTO_TCP, 16),
        // The address is in the order of the wire.
        load_byte(2, 6, LOCAL_IP4),
        unless_equal(2, 127, 14),
        store_word(10, -4, 0),
        copy(2, 10),
        add(2, -4),
        // Two instructions for a constant of 64 bits; register 1 marks it as a map's descriptor.
        code(0x18, 1 | 1 << 4, 0, map),
        code(0, 0, 0, 0),
        call(MAP_LOOKUP),
        code(0x15, 0, 7, 0), // to the end if there is none
        copy(7, 0),
        copy(1, 6),
        copy(2, 7),
        set(3, 0),
        call(SK_ASSIGN),
        copy(1, 7),
        call(SK_RELEASE),
        set(0, SK_PASS),
        code(0x95, 0, 0, 0), // exit
    ]
}

const fn code(code: u8, registers: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers,
        offset,
        immediate,
    }
}

const fn copy(to: u8, from: u8) -> Instruction {
    code(0xbf, to | from << 4, 0, 0)
}

const fn set(register: u8, value: i32) -> Instruction {
    code(0xb7, register, 0, value)
}

const fn add(register: u8, value: i32) -> Instruction {
    code(0x07, register, 0, value)
}

const fn load_word(to: u8, from: u8, offset: i16) -> Instruction {
    code(0x61, to | from << 4, offset, 0)
}

const fn load_byte(to: u8, from: u8, offset: i16) -> Instruction {
    code(0x71, to | from << 4, offset, 0)
}

const fn store_word(at: u8, offset: i16, value: i32) -> Instruction {
    code(0x62, at, offset, value)
}

/// Jumps `distance` instructions further than to the next.
const fn unless_equal(register: u8, value: i32, distance: i16) -> Instruction {
    code(0x55, register, distance, value)
}

const fn call(helper: i32) -> Instruction {
    code(0x85, 0, 0, helper)
}

fn number(descriptor: RawFd) -> u32 {
    descriptor.cast_unsigned()
}

fn address<T>(pointer: *const T) -> u64 {
    pointer.addr() as u64
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<RawFd> {
    // SAFETY: the kernel reads as many bytes of the attributes as the last argument says, and takes
    // the rest for zero; what they point to lives through the call, at every caller.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            core::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    match RawFd::try_from(result) {
        Ok(descriptor) if descriptor >= 0 => Ok(descriptor),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_jump_leads_to_the_end() {
        let program = lookup(5);
        let end = program.len() - 2;
        assert_eq!(program[end], set(0, 1));
        let mut jumps = 0;
        for (at, instruction) in program.iter().enumerate() {
            if matches!(instruction.code, 0x15 | 0x55) {
                let target = at + 1 + usize::try_from(instruction.offset).unwrap();
                assert_eq!(target, end, "{instruction:?} at {at}");
                jumps += 1;
            }
        }
        assert_eq!(jumps, 4);
    }
}
