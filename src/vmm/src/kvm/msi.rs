// SPDX-License-Identifier: Apache-2.0
//! Message-signalled interrupts as KVM's irqfds: an event descriptor each, bound to a route (GSI)
//! that holds the message.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::io_error;
use crate::interrupt::{MsiController, MsiMessage, MsiSource};

/// GSIs below are left to an IOAPIC's pins.
const FIRST_GSI: u32 = 24;
/// As many routes as KVM takes (`KVM_MAX_IRQ_ROUTES`).
const END_GSI: u32 = 4096;

/// All routes of the VM; KVM takes the whole table at each change.
#[derive(Debug)]
struct Routes {
    /// Given back by sources that are gone.
    free: Vec<u32>,
    next: u32,
    messages: BTreeMap<u32, MsiMessage>,
}

#[derive(Debug)]
pub(super) struct Router {
    vm: Arc<VmFd>,
    routes: Arc<Mutex<Routes>>,
}

#[derive(Debug)]
struct Source {
    vm: Arc<VmFd>,
    routes: Arc<Mutex<Routes>>,
    gsi: u32,
    event: EventFd,
}

impl Router {
    pub(super) fn new(vm: Arc<VmFd>) -> Self {
        let routes = Routes {
            free: Vec::new(),
            next: FIRST_GSI,
            messages: BTreeMap::new(),
        };
        Self {
            vm,
            routes: Arc::new(Mutex::new(routes)),
        }
    }
}

impl Routes {
    /// A number that no source has.
    fn take(&mut self) -> io::Result<u32> {
        if let Some(gsi) = self.free.pop() {
            return Ok(gsi);
        }
        let gsi = self.next;
        if gsi >= END_GSI {
            return Err(io::Error::other("KVM has no interrupt route left"));
        }
        self.next = gsi.saturating_add(1);
        Ok(gsi)
    }

    /// Has KVM take over all messages.
    fn apply(&self, vm: &VmFd) -> io::Result<()> {
        let entries: Vec<_> = self.messages.iter().map(entry).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(io::Error::other)?;
        vm.set_gsi_routing(&table).map_err(io_error)
    }
}

impl MsiController for Router {
    fn source(&self) -> io::Result<Box<dyn MsiSource>> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let gsi = routes.take()?;
        Ok(Box::new(Source {
            vm: Arc::clone(&self.vm),
            routes: Arc::clone(&self.routes),
            gsi,
            event,
        }))
    }
}

impl MsiSource for Source {
    fn route(&self, message: MsiMessage) -> io::Result<()> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let first = routes.messages.insert(self.gsi, message).is_none();
        routes.apply(&self.vm)?;
        if first {
            let result = self.vm.register_irqfd(&self.event, self.gsi);
            result.map_err(io_error)?;
        }
        Ok(())
    }

    fn trigger(&self) -> io::Result<()> {
        self.event.write(1)
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        if routes.messages.remove(&self.gsi).is_some() {
            let unbound = self.vm.unregister_irqfd(&self.event, self.gsi);
            let gone = unbound
                .map_err(io_error)
                .and_then(|()| routes.apply(&self.vm));
            if let Err(error) = gone {
                tracing::warn!(%error, "can't give an interrupt route back");
                return;
            }
        }
        routes.free.push(self.gsi);
    }
}

fn entry((gsi, message): (&u32, &MsiMessage)) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: *gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    let [a, b, c, d, e, f, g, h] = message.address.to_le_bytes();
    entry.u.msi.address_lo = u32::from_le_bytes([a, b, c, d]);
    entry.u.msi.address_hi = u32::from_le_bytes([e, f, g, h]);
    entry.u.msi.data = message.data;
    entry
}
