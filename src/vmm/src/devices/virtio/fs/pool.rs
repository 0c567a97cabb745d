// SPDX-License-Identifier: Apache-2.0
//! Threads that share one queue.

use std::io;
use std::ops::RangeInclusive;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

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

/// How long all threads may be at their requests before there is one more.
const PATIENCE: Duration = Duration::from_millis(100);

/// A queue and those who serve it.
#[derive(Debug)]
struct Shared {
    /// Of the threads.
    name: String,
    kick: EventFd,
    ring: Mutex<Ring>,
    /// For the watch.
    none_idle: Condvar,
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
    /// Requests that were served so far. Wraps.
    served: u64,
    /// Whether the watch sleeps. It is woken when no thread is idle any more.
    watch_sleeps: bool,
    /// Whether the watch is to end.
    over: bool,
}

/// Threads that serve one queue.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    /// Gives back the workers that it has added.
    watch: Option<JoinHandle<Vec<Worker>>>,
}

impl Pool {
    /// Starts as many threads as `threads` begins with. While all of them wait for the host, as for a
    /// file system that hangs, there will be more of them, up to its end: the rest of the tree must
    /// not hang with a part of it.
    ///
    /// # Errors
    /// A thread can't be had, or can't be what the server needs.
    pub(super) fn start(
        threads: RangeInclusive<usize>,
        active: ActiveQueue,
        memory: &GuestMemory,
        interrupt: &Arc<dyn Interrupt>,
        server: &Arc<Server>,
    ) -> io::Result<Self> {
        let (first, most) = threads.into_inner();
        let shared = Arc::new(Shared {
            name: format!("fs{}", active.index()),
            kick: active.kick().try_clone()?,
            ring: Mutex::new(Ring {
                queue: active,
                idle: first,
                served: 0,
                watch_sleeps: false,
                over: false,
            }),
            none_idle: Condvar::new(),
            memory: memory.clone(),
            interrupt: Arc::clone(interrupt),
            server: Arc::clone(server),
        });
        // Whatever the driver did before there was anyone to kick.
        shared.kick.write(1)?;
        let mut pool = Self {
            shared: Arc::clone(&shared),
            workers: (0..first)
                .map(|_| shared.add_worker())
                .collect::<io::Result<_>>()?,
            watch: None,
        };
        if let Some(more) = most.checked_sub(first).filter(|more| *more > 0) {
            let watch = thread::Builder::new().name(format!("{}-watch", shared.name));
            pool.watch = Some(watch.spawn(move || shared.watch(more))?);
        }
        Ok(pool)
    }
}

impl Drop for Pool {
    /// Each thread ends with the request that it is on.
    fn drop(&mut self) {
        self.shared.end_watch();
        if let Some(watch) = self.watch.take() {
            match watch.join() {
                Ok(added) => self.workers.extend(added),
                Err(_) => tracing::error!("the watch over a pool of threads had panicked"),
            }
        }
        self.workers.clear();
    }
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
        if ring.idle == 0 && ring.watch_sleeps {
            ring.watch_sleeps = false;
            shared.none_idle.notify_one();
        }
        let outcome = self.serve(&shared, &memory, ring);
        if outcome.is_err() {
            // The device is broken until its reset: more threads would only find the same.
            shared.end_watch();
        }
        outcome
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
    fn add_worker(self: &Arc<Self>) -> io::Result<Worker> {
        let shared = Arc::clone(self);
        Worker::spawn_with(&self.name, Arc::clone(&self.interrupt), move || {
            let worker = shared.server.worker()?;
            Ok(Handler { shared, worker })
        })
    }

    /// Adds a thread whenever none is idle and none gets on, `more` at most. They stay.
    fn watch(self: &Arc<Self>, more: usize) -> Vec<Worker> {
        let mut added = Vec::new();
        let mut ring = self.lock();
        while !ring.over && added.len() < more {
            // Woken it looks around for a while, whether a thread is idle again or not: what wakes it
            // may happen at each request.
            ring.watch_sleeps = ring.idle > 0;
            let sleeps = |ring: &mut Ring| ring.watch_sleeps && !ring.over;
            let woken = self.none_idle.wait_while(ring, sleeps);
            ring = woken.unwrap_or_else(PoisonError::into_inner);

            let before = ring.served;
            let waited = self
                .none_idle
                .wait_timeout_while(ring, PATIENCE, |ring| !ring.over);
            (ring, _) = waited.unwrap_or_else(PoisonError::into_inner);
            if ring.over || ring.idle > 0 || ring.served != before {
                continue;
            }
            // Before the thread is there: a kick that nobody took yet would be its first.
            ring.idle = ring.idle.saturating_add(1);
            drop(ring);
            let outcome = self.add_worker();
            ring = self.lock();
            match outcome {
                Ok(worker) => added.push(worker),
                Err(error) => {
                    ring.idle = ring.idle.saturating_sub(1);
                    tracing::warn!(%error, device = self.name, "no more threads for a file system that hangs");
                    break;
                }
            }
            // Nobody has looked at the queue since the last thread went to its request.
            if let Err(error) = self.kick.write(1) {
                tracing::error!(%error, device = self.name, "can't wake a thread");
            }
        }
        added
    }

    fn end_watch(&self) {
        self.lock().over = true;
        self.none_idle.notify_one();
    }

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
        ring.served = ring.served.wrapping_add(1);
        ring.queue.complete(memory, head, written)?;
        ring.queue.signal(memory, &*self.interrupt)
    }
}
