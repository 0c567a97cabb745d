// SPDX-License-Identifier: Apache-2.0
//! The control queue (section 5.1.6.5). One command is offered: how many queue pairs are in use.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::tap::Tap;
use crate::devices::virtio::{
    ActiveQueue, DeviceFault, EventHandler, GuestMemory, Interrupt, Poller,
};

/// Class, command and a number of pairs.
const COMMAND_LEN: usize = 4;

/// Uses the first `pairs` taps and no other.
pub(super) fn use_pairs(taps: &[Arc<Tap>], pairs: usize) -> io::Result<()> {
    for (number, tap) in taps.iter().enumerate() {
        tap.set_attached(number < pairs)?;
    }
    Ok(())
}

/// The queue on its worker.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) queue: ActiveQueue,
    pub(super) taps: Vec<Arc<Tap>>,
}

impl EventHandler for Control {
    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add(self.queue.kick(), 0, EventSet::IN)?;
        // Whatever the driver did before there was a worker to kick.
        self.queue.kick().write(1)
    }

    fn handle(&mut self, _: &Poller, _token: u64, _: EventSet) -> Result<(), DeviceFault> {
        let memory = self.memory.memory();
        let taps = &self.taps;
        self.queue.serve(&memory, &*self.interrupt, |chain| {
            serve(&memory, chain, taps.len(), |pairs| use_pairs(taps, pairs))
        })
    }
}

/// Carries out the command in `chain`, of a device with `max` pairs.
pub(super) fn serve(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    max: usize,
    use_pairs: impl FnOnce(usize) -> io::Result<()>,
) -> Result<u32, DeviceFault> {
    let outside = |_| DeviceFault::Driver("a buffer lies outside of memory");
    let mut command = Vec::with_capacity(COMMAND_LEN);
    for descriptor in chain.clone().readable() {
        let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
        let mut part = vec![0; len.min(COMMAND_LEN.saturating_sub(command.len()))];
        let read = memory.read_slice(&mut part, descriptor.addr());
        read.map_err(outside)?;
        command.extend(part);
    }
    let answer = chain.writable().find(|descriptor| descriptor.len() > 0);
    let answer: GuestAddress = answer
        .ok_or(DeviceFault::Driver("a command has no room for its answer"))?
        .addr();
    let done = match pairs(&command).filter(|pairs| (1..=max).contains(pairs)) {
        Some(pairs) => use_pairs(pairs).inspect_err(
            |error| tracing::warn!(%error, pairs, "can't change the queue pairs of a tap"),
        ),
        None => Err(io::ErrorKind::Unsupported.into()),
    };
    let code = if done.is_ok() {
        VIRTIO_NET_OK
    } else {
        VIRTIO_NET_ERR
    };
    let code = u8::try_from(code).unwrap_or(u8::MAX);
    memory.write_obj(code, answer).map_err(outside)?;
    Ok(1)
}

/// The number in a command to set the pairs.
fn pairs(command: &[u8]) -> Option<usize> {
    let [class, code, low, high] = *command else {
        return None;
    };
    let set = u32::from(class) == VIRTIO_NET_CTRL_MQ
        && u32::from(code) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
    set.then_some(usize::from(u16::from_le_bytes([low, high])))
}
