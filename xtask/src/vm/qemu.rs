// SPDX-License-Identifier: Apache-2.0
//! The QEMU that the dev VM runs on: the system's, less one store that loses guests.
//!
//! KVM injects an interrupt as it enters a guest. QEMU's software CPU delivers it within VMRUN
//! (`helper_vmrun` in QEMU's target/i386/tcg/system/svm_helper.c, 10.0 to 11.1), yet leaves its vector
//! in `exception_index`, where what is still to be delivered stands. When the CPU's loop is left before
//! the guest's next exit, for whatever reason of QEMU's own, the guest gets the interrupt a second
//! time, whether it takes interrupts just then or not. It hangs on a spin lock that its own processor
//! holds, or ends by a triple fault.
//!
//! Seen with QEMU's own `microvm` as the monitor, four guests at a time: 5 of 160 lost at their boot, and
//! at least 12 of the first 50 with `thread=single`, which leaves the loop all the time; none of 48
//! with that and without the store. Another fault is left, seen under heavy traffic, and not understood.

use crate::{cache, packages, progress};
use anyhow::{Context, Result};
use std::fs::{self, Permissions};
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The Debian package and where its program lies.
const PACKAGE: &str = "qemu-system-x86";
const PROGRAM: &str = "/usr/bin/qemu-system-x86_64";

/// The stores before the delivery, as gcc 12 to 15 compile them; `None` is any byte (an offset).
#[rustfmt::skip]
const STORES: &[Option<u8>] = {
    const fn is(byte: u8) -> Option<u8> { Some(byte) }
    &[
        // env->error_code = error code
        is(0x44), is(0x89), is(0xab), None, None, is(0), is(0),
        // cs->exception_index = vector; the CPU's common part comes before its own
        is(0x89), is(0xb3), None, None, is(0xff), is(0xff),
        // env->exception_is_int = 0
        is(0xc7), is(0x83), None, None, is(0), is(0), is(0), is(0), is(0), is(0),
        // env->exception_next_eip = -1
        is(0x48), is(0xc7), is(0x83), None, None, is(0), is(0),
        is(0xff), is(0xff), is(0xff), is(0xff),
    ]
};
/// Where among them the one is that is too much.
const SURPLUS: Range<usize> = 7..13;
/// An instruction of the same length that does nothing.
const NOTHING: [u8; 6] = [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00];

/// The program to run: a mended copy, or the system's own where the place is not found.
pub(super) fn program() -> Result<PathBuf> {
    let version = packages::version(PACKAGE)?;
    let size = fs::metadata(PROGRAM).context(PROGRAM)?.len();
    let key = cache::Key::default()
        .text("version", &version)
        .text("size", &size.to_string())
        .text("mend", &format!("{STORES:?}"))
        .finish();
    let folder = cache::folder("qemu", &key, |folder| {
        let mut code = fs::read(PROGRAM).with_context(|| format!("reading {PROGRAM}"))?;
        if mend(&mut code) {
            let copy = folder.join("qemu-system-x86_64");
            fs::write(&copy, code)?;
            fs::set_permissions(&copy, Permissions::from_mode(0o755))?;
        }
        Ok(())
    })?;
    let mended = folder.join("qemu-system-x86_64");
    if mended.exists() {
        return Ok(mended);
    }
    progress::note(&format!(
        "QEMU {version} is not known: run as it is, it may lose guests under load"
    ));
    Ok(Path::new(PROGRAM).to_owned())
}

/// Takes the store out; false, and nothing changed, where there is not exactly one such place.
fn mend(code: &mut [u8]) -> bool {
    let matches = |window: &[u8]| {
        let mut pairs = window.iter().zip(STORES);
        pairs.all(|(byte, wanted)| wanted.is_none_or(|wanted| wanted == *byte))
    };
    let mut places = code
        .windows(STORES.len())
        .enumerate()
        .filter(|(_, window)| matches(window))
        .map(|(place, _)| place);
    let (Some(place), None) = (places.next(), places.next()) else {
        return false;
    };
    let range = place.saturating_add(SURPLUS.start)..place.saturating_add(SURPLUS.end);
    code.get_mut(range)
        .map(|store| store.copy_from_slice(&NOTHING))
        .is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the compiler made of it in Debian 12's backports.
    const DEBIAN_12: &[u8] = &[
        0x44, 0x89, 0xab, 0xe0, 0x33, 0x00, 0x00, 0x89, 0xb3, 0x10, 0xd7, 0xff, 0xff, 0xc7, 0x83,
        0xe4, 0x33, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x48, 0xc7, 0x83, 0xe8, 0x33, 0x00, 0x00,
        0xff, 0xff, 0xff, 0xff,
    ];

    #[test]
    fn one_place_is_mended_and_nothing_else() {
        let mut code = [&[0x90; 9], DEBIAN_12, &[0xc3; 5]].concat();
        assert!(mend(&mut code));
        let mut wanted = [&[0x90; 9], DEBIAN_12, &[0xc3; 5]].concat();
        wanted[16..22].copy_from_slice(&NOTHING);
        assert_eq!(code, wanted);
        // It is not there any more.
        assert!(!mend(&mut code));
        assert_eq!(code, wanted);
    }

    #[test]
    fn what_is_there_twice_is_left_alone() {
        let mut code = [DEBIAN_12, DEBIAN_12].concat();
        assert!(!mend(&mut code));
        assert_eq!(code, [DEBIAN_12, DEBIAN_12].concat());
    }
}
