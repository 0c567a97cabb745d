// SPDX-License-Identifier: Apache-2.0
//! The QEMU that the dev VM runs on: the system's, less three stores that lose guests.
//!
//! All are in its software CPU, and are mended in a copy of the program:
//!
//! - KVM injects an interrupt as it enters a guest. QEMU delivers it within VMRUN (`helper_vmrun` in
//!   target/i386/tcg/system/svm_helper.c, 10.0 to 11.1), yet leaves its vector in `exception_index`, where
//!   what is still to be delivered stands. When the CPU's loop is left before the guest's next exit, for
//!   whatever reason of QEMU's own, the guest gets the interrupt a second time, whether it takes interrupts
//!   just then or not. It hangs on a spin lock that its own processor holds, or ends by a triple fault.
//! - Each load of the FPU's state, on any processor, clears IGNNE# in the first one's `hflags2`
//!   (`cpu_clear_ignne` in target/i386/tcg/system/fpu_helper.c, called by `cpu_set_fpus`, 10.0 to 11.1).
//!   That is a read and a write of a word which the first processor changes at the same time, at each VMRUN
//!   and #VMEXIT: the bit that says that nested paging is on is lost, or comes back in the host, or GIF
//!   does. A guest then runs without nested paging, a triple fault, or the dev VM takes an interrupt with
//!   the guest's segments, and dies. Only a DOS with CR0.NE = 0 would miss IGNNE#.
//! - VMRUN asks for the guest's virtual interrupt in the processor's `interrupt_request` by a read and a
//!   write without the lock under which others set their requests there (10.0; atomic since 10.2). Theirs
//!   can be lost, the timer's too, which is not set again before it has been served: the processor then
//!   stays with what it runs until somebody else interrupts it.
//!
//! Seen of the first with QEMU's own `microvm` as the monitor, four guests at a time: 5 of 160 lost at their
//! boot, and at least 12 of the first 50 with `thread=single`, which leaves the loop all the time; none of
//! 48 with that and without the store. The second ends about one guest of a hundred, on a busy host one of
//! thirty. The third was found by reading.

use crate::{cache, packages, progress};
use anyhow::{Context, Result};
use std::fs::{self, Permissions};
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

/// The Debian package and where its program lies.
const PACKAGE: &str = "qemu-system-x86";
const PROGRAM: &str = "/usr/bin/qemu-system-x86_64";

/// A store that is made better, or none, in the program.
#[derive(Debug)]
struct Mend {
    /// What it stores, in which function.
    name: &'static str,
    /// The code around it, as gcc 12 to 15 compile it; `None` is any byte (an offset).
    code: &'static [Option<u8>],
    /// Where in the code the store is.
    store: Range<usize>,
    /// What becomes of it.
    change: fn(&mut [u8]),
    /// The first version that has no such store.
    until: Option<u32>,
}

const MENDS: [Mend; 3] = [VMRUN, IGNNE, VIRQ];

#[rustfmt::skip]
const VMRUN: Mend = Mend {
    name: "the vector in helper_vmrun",
    code: &[
        // env->error_code = error code
        is(0x44), is(0x89), is(0xab), None, None, is(0), is(0),
        // cs->exception_index = vector; the CPU's common part comes before its own
        is(0x89), is(0xb3), None, None, is(0xff), is(0xff),
        // env->exception_is_int = 0
        is(0xc7), is(0x83), None, None, is(0), is(0), is(0), is(0), is(0), is(0),
        // env->exception_next_eip = -1
        is(0x48), is(0xc7), is(0x83), None, None, is(0), is(0),
        is(0xff), is(0xff), is(0xff), is(0xff),
    ],
    store: 7..13,
    change: nothing,
    until: None,
};

#[rustfmt::skip]
const IGNNE: Mend = Mend {
    name: "the flag in cpu_clear_ignne",
    code: &[
        // env->hflags2 &= ~HF2_IGNNE_MASK
        is(0x81), is(0xa0), None, None, is(0), is(0), is(0x7f), is(0xff), is(0xff), is(0xff),
        // the stack's pointer, and the registers emptied before the return
        is(0x48), is(0x83), is(0xc4), is(0x08), is(0x31), is(0xc0),
    ],
    store: 0..10,
    change: nothing,
    until: None,
};

#[rustfmt::skip]
const VIRQ: Mend = Mend {
    name: "the request in helper_vmrun",
    code: &[
        // cs->interrupt_request |= CPU_INTERRUPT_VIRQ
        is(0x81), is(0x8b), None, None, is(0xff), is(0xff), is(0), is(0x01), is(0), is(0),
    ],
    store: 0..10,
    change: locked,
    until: Some(11),
};

/// Does nothing instead.
fn nothing(store: &mut [u8]) {
    store.fill(NOP);
}

/// `orl $0x100, offset(%rbx)` becomes `lock orb $1, offset+1(%rbx)`.
fn locked(store: &mut [u8]) {
    if let &mut [_, _, a, b, c, d, ..] = store {
        let [a, b, c, d] = i32::from_le_bytes([a, b, c, d])
            .wrapping_add(1)
            .to_le_bytes();
        store.copy_from_slice(&[0xf0, 0x80, 0x8b, a, b, c, d, 0x01, NOP, NOP]);
    }
}

/// The instruction that does nothing.
const NOP: u8 = 0x90;
/// Where the names of the mends stand that found no place.
const MISSED: &str = "missed";

const fn is(byte: u8) -> Option<u8> {
    Some(byte)
}

/// The program to run: a mended copy; what could not be mended in it is said.
pub(super) fn program() -> Result<PathBuf> {
    let version = packages::version(PACKAGE)?;
    let size = fs::metadata(PROGRAM).context(PROGRAM)?.len();
    let key = cache::Key::default()
        .text("version", &version)
        .text("size", &size.to_string())
        .text(
            "mends",
            &format!("{:?}", MENDS.map(|mend| (mend.code, mend.store, mend.name))),
        )
        .finish();
    let folder = cache::folder("qemu", &key, |folder| {
        let mut code = fs::read(PROGRAM).with_context(|| format!("reading {PROGRAM}"))?;
        let missed = MENDS.iter().filter(|mend| !mend.apply(&mut code));
        let missed: Vec<_> = missed.map(|mend| mend.name).collect();
        fs::write(folder.join(MISSED), missed.join("\n"))?;
        let copy = folder.join("qemu-system-x86_64");
        fs::write(&copy, code)?;
        fs::set_permissions(&copy, Permissions::from_mode(0o755))?;
        Ok(())
    })?;
    let missed = fs::read_to_string(folder.join(MISSED)).context("what QEMU was not mended of")?;
    for mend in MENDS {
        if missed.lines().any(|name| name == mend.name) && mend.is_in(&version) {
            progress::note(&format!(
                "QEMU {version}: {} was not found and stays as it is; guests may be lost",
                mend.name
            ));
        }
    }
    Ok(folder.join("qemu-system-x86_64"))
}

impl Mend {
    /// Whether a QEMU of that version, as Debian writes it, has the store.
    fn is_in(&self, version: &str) -> bool {
        let upstream = version
            .split_once(':')
            .map_or(version, |(_, version)| version);
        let major = upstream
            .split('.')
            .next()
            .and_then(|major| major.parse().ok());
        self.until
            .is_none_or(|until| major.is_none_or(|major: u32| major < until))
    }

    /// Changes the store; false, and nothing changed, where there is not exactly one such place.
    fn apply(&self, code: &mut [u8]) -> bool {
        let matches = |window: &[u8]| {
            let mut pairs = window.iter().zip(self.code);
            pairs.all(|(byte, wanted)| wanted.is_none_or(|wanted| wanted == *byte))
        };
        let mut places = code
            .windows(self.code.len())
            .enumerate()
            .filter(|(_, window)| matches(window))
            .map(|(place, _)| place);
        let (Some(place), None) = (places.next(), places.next()) else {
            return false;
        };
        let range = place.saturating_add(self.store.start)..place.saturating_add(self.store.end);
        code.get_mut(range).map(self.change).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the compiler made of them in Debian 12's backports.
    const VMRUN_OF_DEBIAN_12: &[u8] = &[
        0x44, 0x89, 0xab, 0xe0, 0x33, 0x00, 0x00, 0x89, 0xb3, 0x10, 0xd7, 0xff, 0xff, 0xc7, 0x83,
        0xe4, 0x33, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x48, 0xc7, 0x83, 0xe8, 0x33, 0x00, 0x00,
        0xff, 0xff, 0xff, 0xff,
    ];
    const IGNNE_OF_DEBIAN_12: &[u8] = &[
        0x81, 0xa0, 0x74, 0x2c, 0x00, 0x00, 0x7f, 0xff, 0xff, 0xff, 0x48, 0x83, 0xc4, 0x08, 0x31,
        0xc0, 0x31, 0xd2,
    ];
    const VIRQ_OF_DEBIAN_12: &[u8] = &[0x81, 0x8b, 0x10, 0xd5, 0xff, 0xff, 0, 1, 0, 0];
    const ALL: [(Mend, &[u8]); 3] = [
        (VMRUN, VMRUN_OF_DEBIAN_12),
        (IGNNE, IGNNE_OF_DEBIAN_12),
        (VIRQ, VIRQ_OF_DEBIAN_12),
    ];

    #[test]
    fn one_place_is_mended_and_nothing_else() {
        for (mend, place) in ALL {
            let mut code = [&[0xcc; 9], place, &[0xc3; 5]].concat();
            let before = code.clone();
            assert!(mend.apply(&mut code), "{}", mend.name);
            let store = mend.store.start + 9..mend.store.end + 9;
            assert_ne!(code[store.clone()], before[store.clone()], "{}", mend.name);
            assert_eq!(code[..store.start], before[..store.start]);
            assert_eq!(code[store.end..], before[store.end..]);
            // It is not there any more.
            let mended = code.clone();
            assert!(!mend.apply(&mut code));
            assert_eq!(code, mended);
        }
    }

    #[test]
    fn a_request_is_set_atomically_in_its_own_byte() {
        let mut code = VIRQ_OF_DEBIAN_12.to_vec();
        assert!(VIRQ.apply(&mut code));
        assert_eq!(
            code,
            [0xf0, 0x80, 0x8b, 0x11, 0xd5, 0xff, 0xff, 0x01, 0x90, 0x90]
        );
        // Newer ones do so themselves.
        assert!(VIRQ.is_in("1:10.0.2+ds-2+deb13u1~bpo12+1"));
        assert!(!VIRQ.is_in("1:11.1.3+ds-1") && IGNNE.is_in("1:11.1.3+ds-1"));
    }

    #[test]
    fn what_is_there_twice_is_left_alone() {
        for (mend, place) in ALL {
            let mut code = [place, place].concat();
            assert!(!mend.apply(&mut code), "{}", mend.name);
            assert_eq!(code, [place, place].concat());
        }
    }

    #[test]
    fn a_locked_change_of_another_word_is_left_alone() {
        // `lock andl $~0x80, …(%rbx)`: an atomic store elsewhere in QEMU.
        let mut code = [
            0xf0, 0x81, 0xa3, 0x3c, 0x0c, 0x00, 0x00, 0x7f, 0xff, 0xff, 0xff, 0x48, 0x83, 0xc4,
            0x08, 0x31, 0xc0,
        ];
        let before = code;
        assert!(!IGNNE.apply(&mut code));
        assert_eq!(code, before);
    }
}
