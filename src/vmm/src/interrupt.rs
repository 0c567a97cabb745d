// SPDX-License-Identifier: Apache-2.0
//! What devices need of the hypervisor: message-signalled interrupts out, doorbells in.
//!
//! Traits, so that device code neither names KVM nor needs it in tests.

use std::fmt::Debug;
use std::io;

use vmm_sys_util::eventfd::EventFd;

/// What an interrupt writes, and where: the two halves of an MSI-X table entry (PCI 3.0, 6.8.2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Guest physical address; on x86 it holds the destination CPU.
    pub address: u64,
    /// Data; on x86 it holds the vector.
    pub data: u32,
}

/// One interrupt source with a message of its own.
pub trait MsiSource: Debug + Send + Sync {
    /// Sets the message; later triggers send it.
    ///
    /// # Errors
    /// The kernel refused the route.
    fn route(&self, message: MsiMessage) -> io::Result<()>;

    /// Sends the message.
    ///
    /// # Errors
    /// The kernel refused it.
    fn trigger(&self) -> io::Result<()>;
}

/// Gives out interrupt sources.
pub trait MsiController: Debug + Send + Sync {
    /// A new source; it sends nothing until it is routed.
    ///
    /// # Errors
    /// No descriptor or route is left.
    fn source(&self) -> io::Result<Box<dyn MsiSource>>;
}

/// A wire to an interrupt controller's pin.
pub trait Line: Debug + Send + Sync {
    /// Interrupts once.
    fn raise(&self);
}

/// Where the guest rings for a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DoorbellAddress {
    /// A write to this guest physical address.
    Memory(u64),
    /// A write to this I/O port.
    Port(u16),
}

/// Has the kernel turn guest writes into events, with no exit to this process (ioeventfd).
pub trait Doorbells: Debug + Send + Sync {
    /// Writes of any value and width to `address` signal `bell` from now on.
    ///
    /// # Errors
    /// The address is taken or the kernel refused.
    fn attach(&self, address: DoorbellAddress, bell: &EventFd) -> io::Result<()>;

    /// Undoes `attach`.
    ///
    /// # Errors
    /// It was not attached.
    fn detach(&self, address: DoorbellAddress, bell: &EventFd) -> io::Result<()>;
}

#[cfg(any(test, fuzzing))]
pub(crate) mod mock {
    //! A controller that keeps what it would have sent.

    #![expect(clippy::unwrap_used, reason = "a test that can't go on should stop")]

    use std::mem;
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Messages sent so far.
    #[derive(Debug, Clone, Default)]
    pub(crate) struct Sent(Arc<Mutex<Vec<MsiMessage>>>);

    impl Sent {
        pub(crate) fn take(&self) -> Vec<MsiMessage> {
            mem::take(&mut self.0.lock().unwrap())
        }
    }

    #[derive(Debug, Default)]
    pub(crate) struct MockController {
        pub(crate) sent: Sent,
    }

    #[derive(Debug)]
    struct MockSource {
        sent: Sent,
        message: Mutex<Option<MsiMessage>>,
    }

    impl MsiSource for MockSource {
        fn route(&self, message: MsiMessage) -> io::Result<()> {
            *self.message.lock().unwrap() = Some(message);
            Ok(())
        }

        fn trigger(&self) -> io::Result<()> {
            let message = self.message.lock().unwrap().expect("routed before sent");
            self.sent.0.lock().unwrap().push(message);
            Ok(())
        }
    }

    impl MsiController for MockController {
        fn source(&self) -> io::Result<Box<dyn MsiSource>> {
            Ok(Box::new(MockSource {
                sent: self.sent.clone(),
                message: Mutex::new(None),
            }))
        }
    }

    /// Doorbells that are attached now.
    #[derive(Debug, Clone, Default)]
    pub(crate) struct MockDoorbells(pub(crate) Arc<Mutex<Vec<DoorbellAddress>>>);

    impl Doorbells for MockDoorbells {
        fn attach(&self, address: DoorbellAddress, _bell: &EventFd) -> io::Result<()> {
            self.0.lock().unwrap().push(address);
            Ok(())
        }

        fn detach(&self, address: DoorbellAddress, _bell: &EventFd) -> io::Result<()> {
            self.0.lock().unwrap().retain(|other| *other != address);
            Ok(())
        }
    }
}
