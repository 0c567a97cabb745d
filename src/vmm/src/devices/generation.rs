// SPDX-License-Identifier: Apache-2.0
//! The identifier of a machine's generation (Microsoft, "Virtual Machine Generation ID"): 16 bytes in
//! guest memory that are others in every machine, and in every machine that was made of another's
//! state. A guest that sees them change draws new random numbers.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::bus::BusDevice;
use crate::devices::virtio::GuestMemory;
use crate::interrupt::Line;

/// The identifier, and the register that says that it has changed: a byte, not 0 the first time that
/// it is read then.
#[derive(Debug)]
pub struct GenerationId {
    memory: GuestMemory,
    address: GuestAddress,
    line: Arc<dyn Line>,
    changed: AtomicBool,
}

impl GenerationId {
    /// Ports they take.
    pub const SIZE: u16 = 1;

    /// A new identifier at `address`; a change interrupts the guest by `line`.
    ///
    /// # Errors
    /// The address is not in guest memory, or the host has no random bytes.
    pub fn new(
        memory: GuestMemory,
        address: GuestAddress,
        line: Arc<dyn Line>,
    ) -> io::Result<Self> {
        let this = Self {
            memory,
            address,
            line,
            changed: AtomicBool::new(false),
        };
        this.write_new()?;
        Ok(this)
    }

    /// Makes the machine one of another generation, and tells the guest.
    ///
    /// # Errors
    /// The host has no random bytes.
    pub fn renew(&self) -> io::Result<()> {
        self.write_new()?;
        self.changed.store(true, Ordering::Release);
        self.line.raise();
        Ok(())
    }

    fn write_new(&self) -> io::Result<()> {
        let mut id = [0; 16];
        // So few bytes come at once or not at all.
        getrandom(&mut id, GetRandomFlags::empty())?;
        let memory = self.memory.memory();
        memory
            .write_slice(&id, self.address)
            .map_err(io::Error::other)
    }
}

impl BusDevice for GenerationId {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(byte) = data.first_mut() {
            *byte = self.changed.swap(false, Ordering::Acquire).into();
        }
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use vm_memory::GuestMemoryMmap;

    use super::*;

    #[derive(Debug, Default)]
    struct Count(AtomicUsize);

    impl Line for Count {
        fn raise(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_new_generation_has_another_identifier_and_is_told_once() {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let at = GuestAddress(0x800);
        let line = Arc::new(Count::default());
        let id = || ram.read_obj::<u128>(at).unwrap();
        assert_eq!(id(), 0);
        let memory = GuestMemory::new(ram.clone());
        let generation = GenerationId::new(memory.clone(), at, Arc::clone(&line) as _).unwrap();
        let first = id();
        assert_ne!(first, 0);
        let changed = || {
            let mut byte = [9];
            generation.read(0, &mut byte);
            byte[0]
        };
        assert_eq!((changed(), line.0.load(Ordering::Relaxed)), (0, 0));
        generation.renew().unwrap();
        assert_ne!(id(), first);
        assert_eq!(line.0.load(Ordering::Relaxed), 1);
        assert_eq!([changed(), changed()], [1, 0]);

        let outside = GuestAddress(0xff8);
        assert!(GenerationId::new(memory, outside, line).is_err());
    }
}
