// SPDX-License-Identifier: Apache-2.0
//! Doorbells as KVM's ioeventfds.

use std::io;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::io_error;
use crate::interrupt::{DoorbellAddress, Doorbells};

#[derive(Debug)]
pub(super) struct IoEvents {
    vm: Arc<VmFd>,
}

impl IoEvents {
    pub(super) fn new(vm: Arc<VmFd>) -> Self {
        Self { vm }
    }
}

impl Doorbells for IoEvents {
    fn attach(&self, address: DoorbellAddress, bell: &EventFd) -> io::Result<()> {
        let address = address.into();
        let result = self.vm.register_ioevent(bell, &address, NoDatamatch);
        result.map_err(io_error)
    }

    fn detach(&self, address: DoorbellAddress, bell: &EventFd) -> io::Result<()> {
        let address = address.into();
        let result = self.vm.unregister_ioevent(bell, &address, NoDatamatch);
        result.map_err(io_error)
    }
}

impl From<DoorbellAddress> for IoEventAddress {
    fn from(address: DoorbellAddress) -> Self {
        match address {
            DoorbellAddress::Memory(address) => Self::Mmio(address),
            DoorbellAddress::Port(port) => Self::Pio(port.into()),
        }
    }
}
