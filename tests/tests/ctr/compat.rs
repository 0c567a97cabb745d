// SPDX-License-Identifier: Apache-2.0
//! Programs of 32 bits: images of i386 exist, and some are older than 64-bit time.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Result, ensure};
use tests::bundle::Bundle;
use tests::scenario::{Outcome, scenario};

/// Where the program's one segment is loaded: the file, headers and all, and zeroes behind it.
const BASE: u32 = 0x0804_8000;
/// Bytes of the segment.
const SIZE: u32 = 0x1000;
/// Zeroes: no seconds, no nanoseconds.
const ZEROES: u32 = BASE + 0x800;
/// Room for answers.
const ROOM: u32 = BASE + 0xa00;

/// Of ELF's header (elf(5), `Elf32_Ehdr`), and of one for a segment (`Elf32_Phdr`).
const HEADER: u16 = 52;
const SEGMENT: u16 = 32;
const START: u32 = HEADER as u32 + SEGMENT as u32;

/// System calls of i386, by number, and two arguments. Each gives root 0.
const CALLS: [(u32, u32, u32); 4] = [
    // clock_gettime of CLOCK_MONOTONIC, and nanosleep: times of 32 bits.
    (265, 1, ROOM),
    (162, ZEROES, 0),
    // getuid, of 16 bits.
    (24, 0, 0),
    // newuname.
    (122, ROOM, 0),
];

#[test]
fn a_program_of_32_bits() -> Outcome {
    scenario(|ctr| {
        let bundle = Bundle::new(ctr, "/bin/old; echo $?")?;
        let path = bundle.root().join("bin/old");
        fs::write(&path, program()?)?;
        fs::set_permissions(&path, PermissionsExt::from_mode(0o755))?;
        let output = ctr.run_config(&bundle.write()?, "old")?.exits(0)?;
        ensure!(
            output.text() == "0",
            "{output}\nexpected 0, not the call that failed"
        );
        Ok(())
    })
}

/// An ELF that makes each call, and exits with 0 or with the number, from 1 on, of the one that failed.
fn program() -> Result<Vec<u8>> {
    let mut code = Vec::new();
    for (call, number) in CALLS.into_iter().zip(1..) {
        code.extend(system_call(call));
        // test eax, eax; jz over the exit
        let exit = system_call((1, number, 0));
        code.extend([0x85, 0xc0, 0x74, u8::try_from(exit.len())?]);
        code.extend(exit);
    }
    code.extend(system_call((1, 0, 0)));

    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // An executable for the 80386.
    let halves = |file: &mut Vec<u8>, halves: &[u16]| {
        file.extend(halves.iter().flat_map(|half| half.to_le_bytes()));
    };
    let words = |file: &mut Vec<u8>, words: &[u32]| {
        file.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    };
    halves(&mut file, &[2, 3]);
    words(&mut file, &[1, BASE + START, HEADER.into(), 0, 0]);
    halves(&mut file, &[HEADER, SEGMENT, 1, 0, 0, 0]);
    let length = START.saturating_add(u32::try_from(code.len())?);
    // To load, from the file's start; to read, write and execute.
    words(&mut file, &[1, 0, BASE, BASE, length, SIZE, 7, SIZE]);
    file.extend(code);
    Ok(file)
}

/// mov eax, ...; mov ebx, ...; mov ecx, ...; int 0x80
fn system_call((number, first, second): (u32, u32, u32)) -> Vec<u8> {
    let mut code = Vec::new();
    for (instruction, value) in [(0xb8, number), (0xbb, first), (0xb9, second)] {
        code.push(instruction);
        code.extend(value.to_le_bytes());
    }
    code.extend([0xcd, 0x80]);
    code
}
