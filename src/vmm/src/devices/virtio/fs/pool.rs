// SPDX-License-Identifier: Apache-2.0
//! Threads that share one queue.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuse_server::Server;
use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::buffers::split;
use crate::devices::virtio::{
    ActiveQueue, DeviceFault, EventHandler, GuestMemory, Interrupt, Poller, Worker,
};

const KICK: u64 = 0;

/// A queue and those who serve it.
#[derive(Debug)]
struct Shared {
    kick: EventFd,
    ring: Mutex<Ring>,
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    server: Arc<Server>,
}

/// What the lock is about.
#[derive(Debug)]
struct Ring {
    queue: ActiveQueue,
    /// Threads that wait for a kick.
    idle: usize,
}

/// Starts `threads` threads that serve `active`.
///
/// # Errors
/// A thread can't be had, or can't be what the server needs.
pub(super) fn start(
    threads: usize,
    active: ActiveQueue,
    memory: &GuestMemory,
    interrupt: &Arc<dyn Interrupt>,
    server: &Arc<Server>,
) -> io::Result<Vec<Worker>> {
    let name = format!("fs{}", active.index());
    let shared = Arc::new(Shared {
        kick: active.kick().try_clone()?,
        ring: Mutex::new(Ring {
            queue: active,
            idle: threads,
        }),
        memory: memory.clone(),
        interrupt: Arc::clone(interrupt),
        server: Arc::clone(server),
    });
    // Whatever the driver did before there was anyone to kick.
    shared.kick.write(1)?;
    (0..threads)
        .map(|_| {
            let shared = Arc::clone(&shared);
            Worker::spawn_with(&name, Arc::clone(interrupt), move || {
                let worker = shared.server.worker()?;
                Ok(Handler { shared, worker })
            })
        })
        .collect()
}

/// One of the threads.
#[derive(Debug)]
struct Handler {
    shared: Arc<Shared>,
    worker: fuse_server::Worker,
}

impl EventHandler for Handler {
    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        // A kick wakes one thread, not all.
        poller.add(&self.shared.kick, KICK, EventSet::IN | EventSet::EXCLUSIVE)
    }

    fn handle(&mut self, _: &Poller, _: u64, _: EventSet) -> Result<(), DeviceFault> {
        let shared = Arc::clone(&self.shared);
        // Nothing to read is fine: another thread has taken the kick, or has served it.
        let _ = shared.kick.read();
        let memory = shared.memory.memory();
        let mut ring = shared.lock();
        ring.idle = ring.idle.saturating_sub(1);
        self.serve(&shared, &memory, ring)
    }
}

impl Handler {
    /// Serves chains until there are none, or until it is time to look at the stop event.
    fn serve<'s>(
        &mut self,
        shared: &'s Shared,
        memory: &GuestMemoryMmap,
        mut ring: MutexGuard<'s, Ring>,
    ) -> Result<(), DeviceFault> {
        for _ in 0..ring.queue.rings().size() {
            let Some(chain) = Shared::pop(&mut ring, memory)? else {
                // Under the lock that saw the queue empty and armed: whoever comes next knows that
                // this thread is to be woken.
                ring.idle = ring.idle.saturating_add(1);
                return Ok(());
            };
            let head = chain.head_index();
            if ring.idle > 0 && ring.queue.arm(memory)? {
                // More has come: for the next thread, in case this request takes long.
                shared.wake()?;
            }
            drop(ring);
            let written = match split(memory, chain) {
                Ok((request, mut reply)) => {
                    self.shared
                        .server
                        .handle(&mut self.worker, &request, &mut reply)
                }
                // No request and nobody to tell: the chain goes back empty.
                Err(_) => 0,
            };
            ring = shared.lock();
            shared.complete(&mut ring, memory, head, written)?;
        }
        // There may be more, and no kick will say so.
        ring.idle = ring.idle.saturating_add(1);
        shared.wake()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the next chain; if there is none, the driver will kick for the next one.
    fn pop<'m>(
        ring: &mut Ring,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, DeviceFault> {
        loop {
            if let Some(chain) = ring.queue.pop(memory)? {
                return Ok(Some(chain));
            }
            if !ring.queue.arm(memory)? {
                return Ok(None);
            }
        }
    }

    /// Wakes a thread as a kick would.
    fn wake(&self) -> Result<(), DeviceFault> {
        let what = "can't wake another thread";
        let woken = self.kick.write(1);
        woken.map_err(|source| DeviceFault::Host { what, source })
    }

    fn complete(
        &self,
        ring: &mut Ring,
        memory: &GuestMemoryMmap,
        head: u16,
        written: usize,
    ) -> Result<(), DeviceFault> {
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        ring.queue.complete(memory, head, written)?;
        ring.queue.signal(memory, &*self.interrupt)
    }
}
