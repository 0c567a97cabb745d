// SPDX-License-Identifier: Apache-2.0
//! The PVH boot protocol: what the kernel finds in memory (Xen's `public/arch-x86/hvm/start_info.h`,
//! version 1).

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;

/// Memory map types, those of E820.
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// Why the kernel can't be told what it needs.
#[derive(Debug, Error)]
pub enum StartInfoError {
    /// Linux cuts it off silently; better to say so.
    #[error("the kernel command line is {length} bytes long, the limit is {limit}")]
    CommandLineLength {
        /// Its length without the final NUL.
        length: usize,
        /// The greatest length.
        limit: usize,
    },
    /// It holds a NUL byte.
    #[error("the kernel command line holds a NUL byte")]
    CommandLineNul,
    /// Guest memory is too small for it.
    #[error("guest memory is too small for the boot tables")]
    Memory(#[from] GuestMemoryError),
}

/// Writes start info, memory map and command line. `bytes` is the size of guest memory, `rsdp`
/// where the ACPI tables are.
///
/// # Errors
/// The command line is not usable or memory is too small.
pub fn write_start_info(
    memory: &GuestMemoryMmap,
    bytes: u64,
    cmdline: &str,
    rsdp: GuestAddress,
) -> Result<(), StartInfoError> {
    let limit = layout::COMMAND_LINE_SIZE.saturating_sub(1);
    if cmdline.len() > limit {
        let length = cmdline.len();
        return Err(StartInfoError::CommandLineLength { length, limit });
    }
    if cmdline.contains('\0') {
        return Err(StartInfoError::CommandLineNul);
    }
    let mut line = cmdline.as_bytes().to_vec();
    line.push(0);
    memory.write_slice(&line, layout::COMMAND_LINE)?;

    let map = memory_map(bytes);
    let mut table = Vec::new();
    for (start, end, kind) in &map {
        table.extend(start.to_le_bytes());
        table.extend(end.saturating_sub(*start).to_le_bytes());
        table.extend(kind.to_le_bytes());
        table.extend(0_u32.to_le_bytes());
    }
    memory.write_slice(&table, layout::MEMORY_MAP)?;

    let mut info = Vec::new();
    info.extend(MAGIC.to_le_bytes());
    info.extend(VERSION.to_le_bytes());
    // No flags, no modules.
    info.extend([0; 16]);
    info.extend(layout::COMMAND_LINE.0.to_le_bytes());
    info.extend(rsdp.0.to_le_bytes());
    info.extend(layout::MEMORY_MAP.0.to_le_bytes());
    info.extend(u32::try_from(map.len()).unwrap_or_default().to_le_bytes());
    info.extend(0_u32.to_le_bytes());
    memory.write_slice(&info, layout::START_INFO)?;
    Ok(())
}

/// Start, end and type of each range.
fn memory_map(bytes: u64) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::LOW_MEMORY_END, RAM),
        (layout::ACPI.start, layout::ACPI.end, RESERVED),
    ];
    for range in layout::memory_ranges(bytes) {
        map.push((range.start.max(layout::KERNEL_START), range.end, RAM));
    }
    // Linux trusts ECAM only where it is reserved.
    map.push((layout::ECAM.start, layout::ECAM.end, RESERVED));
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    const RSDP: GuestAddress = GuestAddress(0xe_0000);

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    #[test]
    fn start_info_points_to_the_rest() {
        let memory = memory();
        write_start_info(&memory, 256 << 20, "quiet", RSDP).unwrap();
        let at = |offset: u64| GuestAddress(layout::START_INFO.0 + offset);
        assert_eq!(memory.read_obj::<u32>(at(0)).unwrap(), MAGIC);
        assert_eq!(memory.read_obj::<u32>(at(4)).unwrap(), 1);
        let line: u64 = memory.read_obj(at(24)).unwrap();
        let mut text = [0; 6];
        memory.read_slice(&mut text, GuestAddress(line)).unwrap();
        assert_eq!(&text, b"quiet\0");
        assert_eq!(memory.read_obj::<u64>(at(32)).unwrap(), RSDP.0);
        let map: u64 = memory.read_obj(at(40)).unwrap();
        assert_eq!(memory.read_obj::<u32>(at(48)).unwrap(), 4);
        let entry = |index: u64| {
            let at = GuestAddress(map + index * 24);
            let size = memory.read_obj::<u64>(GuestAddress(at.0 + 8)).unwrap();
            (memory.read_obj::<u64>(at).unwrap(), size)
        };
        assert_eq!(entry(0), (0, 0xa_0000));
        assert_eq!(entry(2), (0x10_0000, 255 << 20));
        assert_eq!(entry(3), (0xe000_0000, 1 << 20));
    }

    #[test]
    fn bad_command_lines_are_refused() {
        let memory = memory();
        let longest = "x".repeat(2047);
        write_start_info(&memory, 1 << 20, &longest, RSDP).unwrap();
        for line in [format!("{longest}x"), "a\0b".to_owned()] {
            assert!(write_start_info(&memory, 1 << 20, &line, RSDP).is_err());
        }
    }
}
