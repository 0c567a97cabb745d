// SPDX-License-Identifier: Apache-2.0
//! Reads an uncompressed ELF kernel: where its segments go, and its PVH entry point.
//!
//! The file is the owner's, but may be damaged or of another kind: counts and sizes are bounded
//! and every sum is checked (linux-loader's advisory GHSA-52h2-m2cf-9jh6 shows what follows
//! otherwise). No bytes are loaded here: `Segment` says what belongs where.

use std::io;

use thiserror::Error;

use super::layout;

const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const MAX_PROGRAM_HEADERS: u16 = 64;
const MAX_NOTES: u64 = 64 * 1024;

const MAGIC: &[u8] = b"\x7fELF";
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// The note that holds the PVH entry point (Xen's `public/elfnote.h`).
const NOTE_NAME: &[u8] = b"Xen\0";
const NOTE_PHYS32_ENTRY: u32 = 18;

/// Why a file is no kernel for this machine.
#[derive(Debug, Error)]
pub enum KernelError {
    /// It can't be read, or ends before the data it announces.
    #[error("can't read it")]
    Read(#[from] io::Error),
    /// No ELF header.
    #[error("it is not an ELF file; an uncompressed vmlinux is needed")]
    NotElf,
    /// ELF for another machine.
    #[error("it is not a 64-bit x86 ELF file")]
    OtherMachine,
    /// No PVH entry point.
    #[error("it has no PVH entry point (CONFIG_PVH)")]
    NoPvhEntry,
    /// Fields that contradict each other.
    #[error("its {0} make no sense")]
    Malformed(&'static str),
    /// Its segments lie outside of the guest's memory.
    #[error("it needs {needed_mib} MiB of guest memory, and there are {memory_mib} MiB")]
    TooLarge {
        /// Memory up to the kernel's end.
        needed_mib: u64,
        /// The guest's memory below the device hole.
        memory_mib: u64,
    },
}

/// Bytes of the file that belong in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where they begin in the file.
    pub file_offset: u64,
    /// Their number.
    pub file_size: u64,
    /// Where they go in guest memory.
    pub address: u64,
}

/// A kernel's layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// The 32-bit entry point of the PVH boot protocol.
    pub entry: u32,
    /// What to load; memory beside it is left zero.
    pub segments: Vec<Segment>,
    /// The first address behind the kernel, its zeroed data included.
    pub end: u64,
}

impl Kernel {
    /// Reads the headers by `read_at`, which fills a buffer from an offset of the file.
    /// `memory` is the guest's memory in bytes that starts at address 0.
    ///
    /// # Errors
    /// See `KernelError`.
    pub fn parse(
        mut read_at: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
        memory: u64,
    ) -> Result<Self, KernelError> {
        let mut header = [0; ELF_HEADER];
        match read_at(0, &mut header) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(KernelError::NotElf);
            }
            other => other?,
        }
        if !header.starts_with(MAGIC) {
            return Err(KernelError::NotElf);
        }
        let class = (u8_at(&header, 4), u8_at(&header, 5));
        if class != (CLASS_64, LITTLE_ENDIAN) || u16_at(&header, 18) != MACHINE_X86_64 {
            return Err(KernelError::OtherMachine);
        }
        let count = u16_at(&header, 56);
        if usize::from(u16_at(&header, 54)) != PROGRAM_HEADER || count > MAX_PROGRAM_HEADERS {
            return Err(KernelError::Malformed("program headers"));
        }
        let mut headers = vec![0; PROGRAM_HEADER.saturating_mul(count.into())];
        read_at(u64_at(&header, 32), &mut headers)?;

        // First whether it is a kernel at all: that is the better message for other files.
        let mut entry = None;
        for header in headers.chunks_exact(PROGRAM_HEADER) {
            if u32_at(header, 0) == PT_NOTE && entry.is_none() {
                let size = u64_at(header, 32);
                if size > MAX_NOTES {
                    return Err(KernelError::Malformed("notes"));
                }
                let mut notes = vec![0; usize::try_from(size).unwrap_or_default()];
                read_at(u64_at(header, 8), &mut notes)?;
                entry = pvh_entry(&notes);
            }
        }
        let mut kernel = Self {
            entry: entry.ok_or(KernelError::NoPvhEntry)?,
            segments: Vec::new(),
            end: 0,
        };
        for header in headers.chunks_exact(PROGRAM_HEADER) {
            if u32_at(header, 0) == PT_LOAD {
                kernel.add(header, memory)?;
            }
        }
        let entry = u64::from(kernel.entry);
        let inside = |segment: &Segment| {
            let end = segment.address.saturating_add(segment.file_size);
            (segment.address..end).contains(&entry)
        };
        if !kernel.segments.iter().any(inside) {
            return Err(KernelError::Malformed("segments and entry point"));
        }
        Ok(kernel)
    }

    fn add(&mut self, header: &[u8], memory: u64) -> Result<(), KernelError> {
        let segment = Segment {
            file_offset: u64_at(header, 8),
            address: u64_at(header, 24),
            file_size: u64_at(header, 32),
        };
        let memory_size = u64_at(header, 40);
        let malformed = KernelError::Malformed("segments");
        if segment.file_size > memory_size || segment.address < layout::KERNEL_START {
            return Err(malformed);
        }
        let file_end = segment.file_offset.checked_add(segment.file_size);
        let end = segment.address.checked_add(memory_size);
        let (Some(_), Some(end)) = (file_end, end) else {
            return Err(malformed);
        };
        if end > memory {
            const MIB: u64 = 1 << 20;
            return Err(KernelError::TooLarge {
                needed_mib: end.div_ceil(MIB),
                memory_mib: memory / MIB,
            });
        }
        self.end = self.end.max(end);
        if segment.file_size > 0 {
            self.segments.push(segment);
        }
        Ok(())
    }
}

/// Looks for the entry point in a note segment: pairs of name and description, each padded to
/// four bytes.
fn pvh_entry(mut notes: &[u8]) -> Option<u32> {
    loop {
        let (header, rest) = notes.split_at_checked(12)?;
        let name_size = usize::try_from(u32_at(header, 0)).ok()?;
        let description_size = usize::try_from(u32_at(header, 4)).ok()?;
        let (name, rest) = rest.split_at_checked(name_size.checked_next_multiple_of(4)?)?;
        if u32_at(header, 8) == NOTE_PHYS32_ENTRY && name.get(..name_size)? == NOTE_NAME {
            // Four bytes, or eight with the upper ones zero.
            let description = rest.get(..description_size)?;
            return match description_size {
                4 => Some(u32_at(description, 0)),
                8 => u32::try_from(u64_at(description, 0)).ok(),
                _ => None,
            };
        }
        let skip = description_size.checked_next_multiple_of(4)?;
        (_, notes) = rest.split_at_checked(skip)?;
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    for (to, from) in field.iter_mut().zip(bytes.iter().skip(at)) {
        *to = *from;
    }
    field
}

fn u8_at(bytes: &[u8], at: usize) -> u8 {
    let [byte] = field(bytes, at);
    byte
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(field(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY: u64 = 64 << 20;

    /// A kernel of one segment and one note segment.
    fn image() -> Vec<u8> {
        let mut image = vec![0; 0x2000];
        image[..6].copy_from_slice(b"\x7fELF\x02\x01");
        image[18] = 62;
        image[32..40].copy_from_slice(&64_u64.to_le_bytes());
        image[54] = 56;
        image[56] = 2;
        program_header(&mut image, 0, PT_LOAD, [0x1000, 0x100_0000, 0x1000, 0x8000]);
        program_header(&mut image, 1, PT_NOTE, [0x800, 0, 56, 56]);
        // Another note first: the search must go on behind it.
        note(&mut image[0x800..], 6, b"GNU\0", &[1, 2, 3, 4, 5]);
        note(
            &mut image[0x800 + 24..],
            18,
            b"Xen\0",
            &0x100_0010_u64.to_le_bytes(),
        );
        image
    }

    fn program_header(image: &mut [u8], index: usize, kind: u32, fields: [u64; 4]) {
        let at = 64 + index * 56;
        let [offset, address, file_size, memory_size] = fields.map(u64::to_le_bytes);
        image[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        image[at + 8..at + 16].copy_from_slice(&offset);
        image[at + 24..at + 32].copy_from_slice(&address);
        image[at + 32..at + 40].copy_from_slice(&file_size);
        image[at + 40..at + 48].copy_from_slice(&memory_size);
    }

    fn note(to: &mut [u8], kind: u32, name: &[u8], description: &[u8]) {
        to[..4].copy_from_slice(&(name.len() as u32).to_le_bytes());
        to[4..8].copy_from_slice(&(description.len() as u32).to_le_bytes());
        to[8..12].copy_from_slice(&kind.to_le_bytes());
        to[12..16].copy_from_slice(name);
        to[16..16 + description.len()].copy_from_slice(description);
    }

    fn parse(image: &[u8]) -> Result<Kernel, KernelError> {
        let read = |offset: u64, buffer: &mut [u8]| {
            let rest = usize::try_from(offset).ok().and_then(|at| image.get(at..));
            let source = rest.and_then(|rest| rest.get(..buffer.len()));
            let source = source.ok_or(io::ErrorKind::UnexpectedEof)?;
            buffer.copy_from_slice(source);
            Ok(())
        };
        Kernel::parse(read, MEMORY)
    }

    #[test]
    fn a_kernel_is_read() {
        let kernel = parse(&image()).unwrap();
        assert_eq!(kernel.entry, 0x100_0010);
        assert_eq!(kernel.end, 0x100_8000);
        let segment = Segment {
            file_offset: 0x1000,
            file_size: 0x1000,
            address: 0x100_0000,
        };
        assert_eq!(kernel.segments, [segment]);
    }

    #[test]
    fn other_files_are_told_apart() {
        assert!(matches!(parse(b""), Err(KernelError::NotElf)));
        assert!(matches!(parse(&[0; 100]), Err(KernelError::NotElf)));
        let mut image = image();
        image[18] = 183;
        assert!(matches!(parse(&image), Err(KernelError::OtherMachine)));
    }

    #[test]
    fn a_kernel_without_pvh_is_refused() {
        let mut image = image();
        image[0x800 + 24 + 8] = 17;
        assert!(matches!(parse(&image), Err(KernelError::NoPvhEntry)));
    }

    #[test]
    fn an_entry_outside_of_the_segments_is_refused() {
        let mut image = image();
        note(
            &mut image[0x800 + 24..],
            18,
            b"Xen\0",
            &0x200_0000_u64.to_le_bytes(),
        );
        assert!(matches!(parse(&image), Err(KernelError::Malformed(_))));
    }

    #[test]
    fn memory_that_is_too_small_is_told_in_mib() {
        let mut image = image();
        program_header(
            &mut image,
            0,
            PT_LOAD,
            [0x1000, 0x100_0000, 0x1000, 65 << 20],
        );
        let error = parse(&image).unwrap_err().to_string();
        assert_eq!(
            error,
            "it needs 81 MiB of guest memory, and there are 64 MiB"
        );
    }

    #[test]
    fn contradicting_segments_are_refused() {
        for fields in [
            [0x1000, 0x100_0000, 0x1000, 0xfff],
            [0x1000, 0x1000, 0x1000, 0x1000],
            [u64::MAX, 0x100_0000, 0x1000, 0x1000],
            [0x1000, u64::MAX, 0x1000, 0x1000],
        ] {
            let mut image = image();
            program_header(&mut image, 0, PT_LOAD, fields);
            assert!(
                matches!(parse(&image), Err(KernelError::Malformed(_))),
                "{fields:?}"
            );
        }
    }

    #[test]
    fn damage_anywhere_does_no_harm() {
        let image = image();
        for at in 0..0x840 {
            for value in [0, 1, 0x7f, 0xff] {
                let mut image = image.clone();
                image[at] = value;
                let _ = parse(&image);
            }
        }
        for len in 0..image.len() {
            let _ = parse(&image[..len]);
        }
    }
}
