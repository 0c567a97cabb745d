// SPDX-License-Identifier: Apache-2.0
//! MSI-X (PCI 3.0, section 6.8.2): a table of messages that the driver writes, each maskable.
//!
//! A device triggers vectors from its worker while a vCPU masks them, so each vector's state is
//! two atomics and triggering takes no lock. A masked vector pends and is sent when it is
//! unmasked.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::interrupt::{MsiController, MsiMessage, MsiSource};

/// Bytes of the capability after its ID and link.
pub const MSIX_CAPABILITY_LEN: usize = 10;

/// Bytes of a table entry.
const ENTRY: usize = 16;

/// Message control: enable, function mask.
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;

/// Vector control: masked.
const ENTRY_MASKED: u32 = 1;

#[derive(Debug)]
struct Vector {
    source: Box<dyn MsiSource>,
    /// Masked by its entry or by the function: a trigger pends.
    masked: AtomicBool,
    pending: AtomicBool,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    message: MsiMessage,
    masked: bool,
    /// What the source was last routed to.
    routed: Option<MsiMessage>,
}

#[derive(Debug)]
struct Table {
    entries: Vec<Entry>,
    mask_all: bool,
}

/// The table, the pending bits and the interrupt sources of one function.
#[derive(Debug)]
pub struct Msix {
    vectors: Vec<Vector>,
    enabled: AtomicBool,
    table: Mutex<Table>,
}

impl Msix {
    /// `count` vectors (1 to 2048), masked, MSI-X disabled: the state after reset.
    ///
    /// # Errors
    /// The controller has no source left.
    pub fn new(count: u16, controller: &dyn MsiController) -> io::Result<Self> {
        let mut vectors = Vec::with_capacity(usize::from(count));
        for _ in 0..count {
            vectors.push(Vector {
                source: controller.source()?,
                masked: AtomicBool::new(true),
                pending: AtomicBool::new(false),
            });
        }
        let entry = Entry {
            message: MsiMessage::default(),
            masked: true,
            routed: None,
        };
        Ok(Self {
            table: Mutex::new(Table {
                entries: vec![entry; vectors.len()],
                mask_all: false,
            }),
            vectors,
            enabled: AtomicBool::new(false),
        })
    }

    /// Number of vectors.
    #[must_use]
    pub fn len(&self) -> u16 {
        u16::try_from(self.vectors.len()).unwrap_or(u16::MAX)
    }

    /// Whether there is no vector.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// The capability's body (message control, table and pending bits by BAR and offset) and its
    /// writable bits.
    #[must_use]
    pub fn capability(
        &self,
        bar: u8,
        table: u32,
        pending: u32,
    ) -> ([u8; MSIX_CAPABILITY_LEN], [u8; 2]) {
        let size = self.len().saturating_sub(1).to_le_bytes();
        let table = (table | u32::from(bar)).to_le_bytes();
        let pending = (pending | u32::from(bar)).to_le_bytes();
        let mut body = [0; MSIX_CAPABILITY_LEN];
        let fields = size.iter().chain(&table).chain(&pending);
        for (byte, value) in body.iter_mut().zip(fields) {
            *byte = *value;
        }
        (body, (CONTROL_ENABLE | CONTROL_MASK_ALL).to_le_bytes())
    }

    /// Whether the driver uses MSI-X at all.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::SeqCst)
    }

    /// Takes over the message control word that the driver wrote.
    pub fn set_control(&self, control: u16) {
        let mut table = self.lock();
        self.enabled
            .store(control & CONTROL_ENABLE != 0, Ordering::SeqCst);
        table.mask_all = control & CONTROL_MASK_ALL != 0;
        for index in 0..self.vectors.len() {
            self.update(&mut table, index);
        }
    }

    /// Reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        let table = self.lock();
        let Some(entry) = table.entries.get(offset / ENTRY) else {
            return;
        };
        let bytes = entry.to_bytes();
        for (byte, value) in data.iter_mut().zip(bytes.iter().skip(offset % ENTRY)) {
            *byte = *value;
        }
    }

    /// Writes the table: aligned accesses of 4 or 8 bytes within an entry; others are ignored, as
    /// the specification lets them be undefined.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len()) {
            return;
        }
        let index = offset / ENTRY;
        let mut table = self.lock();
        let Some(entry) = table.entries.get_mut(index) else {
            return;
        };
        let mut bytes = entry.to_bytes();
        for (byte, value) in bytes.iter_mut().skip(offset % ENTRY).zip(data) {
            *byte = *value;
        }
        entry.set_bytes(&bytes);
        self.update(&mut table, index);
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        let bytes = self.vectors.chunks(8).skip(offset);
        for (byte, vectors) in data.iter_mut().zip(bytes) {
            for (bit, vector) in vectors.iter().enumerate() {
                *byte |= u8::from(vector.pending.load(Ordering::SeqCst)) << bit;
            }
        }
    }

    /// Sends vector `index`, or lets it pend while it is masked. Vectors that don't exist, such
    /// as virtio's "no vector", send nothing.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn trigger(&self, index: u16) -> io::Result<()> {
        let Some(vector) = self.vectors.get(usize::from(index)) else {
            return Ok(());
        };
        if !self.enabled() {
            return Ok(());
        }
        if vector.masked.load(Ordering::SeqCst) {
            vector.pending.store(true, Ordering::SeqCst);
            // An unmasking may have looked at `pending` just before: look again, so that one of
            // the two sends it.
            if vector.masked.load(Ordering::SeqCst) || !vector.pending.swap(false, Ordering::SeqCst)
            {
                return Ok(());
            }
        }
        vector.source.trigger()
    }

    /// Back to the state after reset.
    pub fn reset(&self) {
        let mut table = self.lock();
        self.enabled.store(false, Ordering::SeqCst);
        table.mask_all = false;
        for (entry, vector) in table.entries.iter_mut().zip(&self.vectors) {
            entry.message = MsiMessage::default();
            entry.masked = true;
            vector.masked.store(true, Ordering::SeqCst);
            vector.pending.store(false, Ordering::SeqCst);
        }
    }

    /// Brings a vector in line with its entry.
    fn update(&self, table: &mut Table, index: usize) {
        let mask_all = table.mask_all || !self.enabled();
        let (Some(entry), Some(vector)) = (table.entries.get_mut(index), self.vectors.get(index))
        else {
            return;
        };
        if mask_all || entry.masked {
            vector.masked.store(true, Ordering::SeqCst);
            return;
        }
        if entry.routed != Some(entry.message) {
            // Routes are costly to change, so only what is used is set.
            if let Err(error) = vector.source.route(entry.message) {
                tracing::warn!(%error, vector = index, "can't route an interrupt");
                return;
            }
            entry.routed = Some(entry.message);
        }
        vector.masked.store(false, Ordering::SeqCst);
        if vector.pending.swap(false, Ordering::SeqCst)
            && let Err(error) = vector.source.trigger()
        {
            tracing::warn!(%error, vector = index, "can't send a pending interrupt");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn to_bytes(self) -> [u8; ENTRY] {
        let control = if self.masked { ENTRY_MASKED } else { 0 };
        let low = u128::from(self.message.address);
        let data = u128::from(self.message.data) << 64;
        (low | data | u128::from(control) << 96).to_le_bytes()
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "takes fields out of a packed entry"
    )]
    fn set_bytes(&mut self, bytes: &[u8; ENTRY]) {
        let raw = u128::from_le_bytes(*bytes);
        // The two lowest address bits are always zero (6.8.2.7).
        self.message.address = raw as u64 & !3;
        self.message.data = (raw >> 64) as u32;
        self.masked = (raw >> 96) as u32 & ENTRY_MASKED != 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::mock::{MockController, Sent};

    const ENABLED: u16 = CONTROL_ENABLE;

    fn msix() -> (Msix, Sent) {
        let controller = MockController::default();
        (Msix::new(3, &controller).unwrap(), controller.sent)
    }

    fn program(msix: &Msix, vector: u64, message: MsiMessage, masked: u32) {
        let at = vector * 16;
        let address = message.address.to_le_bytes();
        msix.write_table(at, &address[..4]);
        msix.write_table(at + 4, &address[4..]);
        msix.write_table(at + 8, &message.data.to_le_bytes());
        msix.write_table(at + 12, &masked.to_le_bytes());
    }

    const MESSAGE: MsiMessage = MsiMessage {
        address: 0xfee0_1000,
        data: 0x41,
    };

    #[test]
    fn an_unmasked_vector_sends_its_message() {
        let (msix, sent) = msix();
        msix.set_control(ENABLED);
        program(&msix, 1, MESSAGE, 0);
        msix.trigger(1).unwrap();
        assert_eq!(sent.take(), [MESSAGE]);
        msix.trigger(0xffff).unwrap();
        msix.trigger(0).unwrap();
        assert_eq!(sent.take(), []);
    }

    #[test]
    fn a_masked_vector_pends_until_unmasked() {
        let (msix, sent) = msix();
        msix.set_control(ENABLED);
        program(&msix, 2, MESSAGE, 1);
        msix.trigger(2).unwrap();
        msix.trigger(2).unwrap();
        assert_eq!(sent.take(), []);
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [4, 0, 0, 0, 0, 0, 0, 0]);
        msix.write_table(2 * 16 + 12, &[0; 4]);
        assert_eq!(sent.take(), [MESSAGE]);
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [0; 8]);
    }

    #[test]
    fn the_function_mask_holds_all_vectors() {
        let (msix, sent) = msix();
        msix.set_control(ENABLED | CONTROL_MASK_ALL);
        program(&msix, 0, MESSAGE, 0);
        msix.trigger(0).unwrap();
        assert_eq!(sent.take(), []);
        msix.set_control(ENABLED);
        assert_eq!(sent.take(), [MESSAGE]);
    }

    #[test]
    fn nothing_is_sent_while_disabled_or_after_reset() {
        let (msix, sent) = msix();
        program(&msix, 0, MESSAGE, 0);
        msix.trigger(0).unwrap();
        msix.set_control(ENABLED);
        assert_eq!(sent.take(), []);
        msix.reset();
        msix.set_control(ENABLED);
        msix.trigger(0).unwrap();
        assert_eq!(sent.take(), []);
    }

    #[test]
    fn odd_accesses_do_no_harm() {
        let (msix, _) = msix();
        msix.write_table(1, &[1, 2, 3, 4]);
        msix.write_table(0, &[1]);
        msix.write_table(u64::MAX, &[0; 4]);
        msix.write_table(3 * 16, &[0; 8]);
        let mut data = [1; 8];
        msix.read_table(u64::MAX, &mut data);
        assert_eq!(data, [0; 8]);
        msix.read_table(12, &mut data);
        assert_eq!(data, [1, 0, 0, 0, 0, 0, 0, 0]);
        msix.read_pending(u64::MAX, &mut data);
    }
}
