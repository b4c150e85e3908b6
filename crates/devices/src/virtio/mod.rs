//! Virtio devices (Virtual I/O Device (VIRTIO) Version 1.2).
//!
//! A [`VirtioDevice`] is what differs between a disk and a network card: features, configuration, what its queues carry.
//! [`pci::VirtioPci`] is what they share: the registers by which a driver finds, negotiates and starts a device, over PCI, for modern and
//! for legacy drivers. Between them are [`Virtqueue`]s: the device pops buffers, works, and pushes them back; the transport interrupts.

pub mod bits;
pub mod blk;
pub mod pci;
pub mod queue;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use memory::GuestMemory;
use serde_json::Value;

use crate::access::lock;
use crate::snapshot::SnapshotError;
use pci::signals::Signals;
use queue::{Chain, Queue, QueueError, QueueState};

/// A device behind a virtio transport.
pub trait VirtioDevice: Send + Sync {
    /// What it is ([`bits::device_type`]).
    fn device_type(&self) -> u16;

    /// Base class, subclass and programming interface of its PCI function.
    fn class(&self) -> (u8, u8, u8);

    /// The features of this type of device that it offers.
    fn features(&self) -> u64;

    /// The most entries of each of its queues.
    fn queue_sizes(&self) -> Vec<u16>;

    /// The driver reads its configuration, zeros beyond its end.
    fn config_read(&self, offset: u64, data: &mut [u8]);

    /// The driver writes its configuration.
    fn config_write(&self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready. Called once in a life, before any notification.
    fn activate(&self, driver: Driver);

    /// There may be buffers in a queue. Called by vCPU threads, several at once.
    fn notify(&self, queue: u16);

    /// The driver takes a queue, or all of them, back: returns when none of its buffers is in use any more.
    fn drain(&self);

    /// Back to the state before [`VirtioDevice::activate`]; called after [`VirtioDevice::drain`].
    fn reset(&self);

    /// Its own registers for a snapshot.
    fn save(&self) -> Value {
        Value::Null
    }

    /// Puts back what [`VirtioDevice::save`] returned.
    ///
    /// # Errors
    /// The state is not one of this device.
    fn restore(&self, _state: &Value) -> Result<(), SnapshotError> {
        Ok(())
    }
}

/// What a driver that is ready has settled.
#[derive(Clone)]
pub struct Driver {
    /// Negotiated features.
    pub features: u64,
    /// The queues, whether or not the driver uses them.
    pub queues: Vec<Arc<Virtqueue>>,
    signals: Arc<Signals>,
}

impl Driver {
    /// Whether a feature has been negotiated.
    pub fn has(&self, feature: u64) -> bool {
        self.features & feature == feature
    }

    /// The device's configuration has changed.
    pub fn config_changed(&self) {
        self.signals.config_changed();
    }

    /// The driver has broken the rules in a way that leaves no way to go on.
    pub fn needs_reset(&self) {
        self.signals.needs_reset();
    }
}

/// A queue as a device uses it.
pub struct Virtqueue {
    queue: Mutex<Queue>,
    index: u16,
    /// Counts the lives of the queue: a buffer of an earlier one is never given back.
    life: AtomicU32,
    signals: Arc<Signals>,
}

/// A buffer on loan from a driver.
#[derive(Debug)]
pub struct Buffer {
    /// What is in it.
    pub chain: Chain,
    life: u32,
}

impl Virtqueue {
    pub(super) fn new(memory: GuestMemory, index: u16, max_size: u16, signals: Arc<Signals>) -> Self {
        let queue = Mutex::new(Queue::new(memory, max_size));
        Virtqueue { queue, index, life: AtomicU32::new(0), signals }
    }

    /// Runs `look` on the ring.
    pub(super) fn with<T>(&self, look: impl FnOnce(&mut Queue) -> T) -> T {
        look(&mut lock(&self.queue))
    }

    /// Ends the queue's life: nothing that was popped before is pushed any more.
    pub(super) fn reset(&self) {
        let mut queue = lock(&self.queue);
        self.life.fetch_add(1, Ordering::Relaxed);
        queue.reset();
    }

    pub(super) fn restore(&self, state: &QueueState) {
        *lock(&self.queue).state_mut() = state.clone();
    }

    /// Takes all buffers that are available, and sees to it that the driver notifies of the next. A broken ring stops the device.
    ///
    /// Buffers are given to `take` in turn; no lock is held then.
    pub fn take_all(&self, mut take: impl FnMut(Buffer)) {
        /// Buffers that are taken at a time, so that completing the first need not wait for the last.
        const BATCH: usize = 64;
        let mut batch = Vec::new();
        loop {
            let more = self.pop(&mut batch, BATCH);
            batch.drain(..).for_each(&mut take);
            if !more {
                return;
            }
        }
    }

    /// Pops up to `count` buffers. False says that there were no more, and that the driver has been told to notify.
    fn pop(&self, batch: &mut Vec<Buffer>, count: usize) -> bool {
        if !self.signals.may_access_memory() {
            return false;
        }
        let mut queue = lock(&self.queue);
        if !queue.state().enabled {
            return false;
        }
        let life = self.life.load(Ordering::Relaxed);
        let mut pop = || -> Result<bool, QueueError> {
            queue.set_notifications(false)?;
            loop {
                while batch.len() < count {
                    let Some(chain) = queue.pop()? else { break };
                    batch.push(Buffer { chain, life });
                }
                if batch.len() == count {
                    return Ok(true);
                }
                queue.set_notifications(true)?;
                match queue.pop()? {
                    Some(chain) => batch.push(Buffer { chain, life }),
                    None => return Ok(false),
                }
                queue.set_notifications(false)?;
            }
        };
        let result = pop();
        drop(queue);
        result.unwrap_or_else(|error| {
            self.broken(&error);
            false
        })
    }

    /// Gives a buffer back, with how many bytes were written to it, and interrupts if the driver wants that.
    pub fn push(&self, buffer: &Buffer, written: u32) {
        let mut queue = lock(&self.queue);
        if buffer.life != self.life.load(Ordering::Relaxed) || !queue.state().enabled {
            return;
        }
        let result = queue.push(&buffer.chain, written);
        drop(queue);
        match result {
            Ok(true) => self.signals.queue_used(self.index),
            Ok(false) => {}
            Err(error) => self.broken(&error),
        }
    }

    fn broken(&self, error: &QueueError) {
        tracing::warn!("virtio queue {}: {error}", self.index);
        self.signals.needs_reset();
    }
}
