// SPDX-License-Identifier: Apache-2.0
//! A request and its answer as they lie in memory (virtio 1.2, section 5.15.6).

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestMemoryMmap};

use super::region::{Region, State, Verdict, bytes};
use crate::devices::virtio::DeviceFault;
use crate::devices::virtio::pages::discard;

/// Types of requests.
pub(super) const PLUG: u16 = 0;
pub(super) const UNPLUG: u16 = 1;
pub(super) const UNPLUG_ALL: u16 = 2;
pub(super) const STATE: u16 = 3;

/// Types of answers.
pub(super) const ACK: u16 = 0;
pub(super) const NACK: u16 = 1;
pub(super) const ERROR: u16 = 3;

/// Bytes of a request: its type, six of padding, an address, a number of blocks, six of padding.
pub(super) const REQUEST: usize = 24;
/// Bytes of an answer: its type, six of padding, a state.
pub(super) const ANSWER: usize = 10;

/// Serves one request. Returns the bytes of its answer.
pub(super) fn serve(
    region: &mut Region,
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
) -> Result<u32, DeviceFault> {
    let request = read(memory, chain.clone())?;
    let (kind, address, count) = fields(&request);
    let (answer, state) = match kind {
        PLUG => (answer(region.plug(address, count)), None),
        UNPLUG => {
            let verdict = region.unplug(address, count);
            if verdict == Verdict::Done {
                give_back(memory, address, bytes(count.into()))?;
            }
            (answer(verdict), None)
        }
        UNPLUG_ALL => {
            region.unplug_all();
            give_back(memory, region.start(), region.size())?;
            (ACK, None)
        }
        STATE => {
            let state = region.state(address, count);
            (if state.is_some() { ACK } else { ERROR }, state)
        }
        _ => (ERROR, None),
    };
    let state = match state {
        None | Some(State::Plugged) => 0,
        Some(State::Unplugged) => 1,
        Some(State::Mixed) => 2_u16,
    };
    write(memory, chain, answer, state)
}

fn answer(verdict: Verdict) -> u16 {
    match verdict {
        Verdict::Done => ACK,
        Verdict::Refused => NACK,
        Verdict::Wrong => ERROR,
    }
}

fn give_back(memory: &GuestMemoryMmap, address: u64, len: u64) -> Result<(), DeviceFault> {
    discard(memory, address, usize::try_from(len).unwrap_or(usize::MAX))
}

/// Type, address and number of blocks.
fn fields(request: &[u8; REQUEST]) -> (u16, u64, u16) {
    let [a, b, _, _, _, _, _, _, rest @ ..] = *request;
    let [address @ .., c, d, _, _, _, _, _, _] = rest;
    let (kind, count) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
    (kind, u64::from_le_bytes(address), count)
}

/// Copies a request out of its chain, however the driver has cut it.
fn read(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
) -> Result<[u8; REQUEST], DeviceFault> {
    let mut request = [0; REQUEST];
    let mut rest = request.as_mut_slice();
    for descriptor in chain.readable() {
        let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
        let (part, after) = rest.split_at_mut(len.min(rest.len()));
        memory
            .read_slice(part, descriptor.addr())
            .map_err(|_| DeviceFault::Driver("a buffer lies outside of memory"))?;
        rest = after;
    }
    if rest.is_empty() {
        Ok(request)
    } else {
        Err(DeviceFault::Driver("a request is too short"))
    }
}

fn write(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    answer: u16,
    state: u16,
) -> Result<u32, DeviceFault> {
    let mut bytes = [0; ANSWER];
    let fields = [(0, answer.to_le_bytes()), (8, state.to_le_bytes())];
    for (at, value) in fields {
        for (to, from) in bytes.iter_mut().skip(at).zip(value) {
            *to = from;
        }
    }
    let mut rest = bytes.as_slice();
    for descriptor in chain.writable() {
        let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
        let (part, after) = rest.split_at(len.min(rest.len()));
        memory
            .write_slice(part, descriptor.addr())
            .map_err(|_| DeviceFault::Driver("a buffer lies outside of memory"))?;
        rest = after;
    }
    if rest.is_empty() {
        Ok(u32::try_from(ANSWER).unwrap_or_default())
    } else {
        Err(DeviceFault::Driver("there is no room for an answer"))
    }
}
