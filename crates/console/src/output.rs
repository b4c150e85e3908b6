//! What vCPUs and the console's thread share: the output buffer and the wake-up descriptor.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use devices::host::ByteSink;
use rustix::event::{EventfdFlags, eventfd};

/// Bytes that may wait for a listener who is slow.
pub const CAPACITY_BYTES: usize = 256 << 10;
/// Newest bytes that are kept while nobody listens.
pub const SCROLLBACK_BYTES: usize = 64 << 10;
/// How long a vCPU waits, once, for a listener whose buffer is full.
const PATIENCE: Duration = Duration::from_millis(200);

#[derive(Default)]
struct Output {
    bytes: VecDeque<u8>,
    /// Somebody listens.
    attached: bool,
    /// The listener has exhausted a vCPU's patience; bytes are dropped until it takes some.
    stalled: bool,
    lost_bytes: u64,
}

/// See the module.
pub struct Shared {
    output: Mutex<Output>,
    room: Condvar,
    wake: OwnedFd,
    shutdown: AtomicBool,
    input_ready: AtomicBool,
    patience: Duration,
}

impl Shared {
    pub fn new() -> io::Result<Self> {
        Self::with_patience(PATIENCE)
    }

    /// With another [`PATIENCE`].
    fn with_patience(patience: Duration) -> io::Result<Self> {
        Ok(Shared {
            patience,
            output: Mutex::default(),
            room: Condvar::new(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            shutdown: AtomicBool::new(false),
            input_ready: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Readable once [`Shared::wake`] has been called.
    pub fn wake_fd(&self) -> &OwnedFd {
        &self.wake
    }

    fn wake(&self) {
        // Fails only if the counter is full, and then the thread is awake.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Makes [`Shared::wake_fd`] wait for the next call.
    pub fn clear_wake(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }

    pub fn shut_down(&self) {
        self.shutdown.store(true, Ordering::Release);
        self.wake();
    }

    pub fn is_shutting_down(&self) -> bool {
        self.shutdown.load(Ordering::Acquire)
    }

    /// Whether the device has made room for input since the last call.
    pub fn take_input_ready(&self) -> bool {
        self.input_ready.swap(false, Ordering::AcqRel)
    }

    /// Somebody listens, or does not any more.
    pub fn set_attached(&self, attached: bool) {
        let mut output = self.lock();
        if output.attached == attached {
            return;
        }
        output.attached = attached;
        output.stalled = false;
        output.trim();
        self.room.notify_all();
    }

    /// Copies the oldest bytes into `chunk`; returns how many.
    pub fn peek(&self, chunk: &mut [u8]) -> usize {
        let output = self.lock();
        let (front, back) = output.bytes.as_slices();
        let from_front = front.len().min(chunk.len());
        let from_back = back.len().min(chunk.len() - from_front);
        chunk[..from_front].copy_from_slice(&front[..from_front]);
        chunk[from_front..from_front + from_back].copy_from_slice(&back[..from_back]);
        from_front + from_back
    }

    /// Removes the oldest bytes, which have been delivered.
    pub fn consume(&self, count: usize) {
        let mut output = self.lock();
        let count = count.min(output.bytes.len());
        output.bytes.drain(..count);
        if output.bytes.len() < CAPACITY_BYTES {
            output.stalled = false;
            self.room.notify_all();
        }
    }

    pub fn has_output(&self) -> bool {
        !self.lock().bytes.is_empty()
    }

    pub fn lost_bytes(&self) -> u64 {
        self.lock().lost_bytes
    }
}

impl Output {
    /// While nobody listens, drops all but the newest bytes.
    fn trim(&mut self) {
        if !self.attached {
            let excess = self.bytes.len().saturating_sub(SCROLLBACK_BYTES);
            self.bytes.drain(..excess);
            self.lost_bytes += excess as u64;
        }
    }
}

impl ByteSink for Shared {
    fn write(&self, bytes: &[u8]) {
        let mut output = self.lock();
        let full = |output: &mut Output| {
            output.attached && !output.stalled && output.bytes.len() + bytes.len() > CAPACITY_BYTES
        };
        if full(&mut output) {
            let (guard, waited) = self
                .room
                .wait_timeout_while(output, self.patience, |output| full(output))
                .unwrap_or_else(|e| e.into_inner());
            output = guard;
            if waited.timed_out() {
                output.stalled = true;
            }
        }
        if output.attached && output.bytes.len() + bytes.len() > CAPACITY_BYTES {
            output.lost_bytes += bytes.len() as u64;
            return;
        }
        let wake = output.attached && output.bytes.is_empty();
        output.bytes.extend(bytes);
        output.trim();
        drop(output);
        if wake {
            self.wake();
        }
    }

    fn input_ready(&self) {
        self.input_ready.store(true, Ordering::Release);
        self.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_newest_while_nobody_listens() {
        let shared = Shared::new().unwrap();
        for i in 0..SCROLLBACK_BYTES + 10 {
            shared.write(&[(i % 251) as u8]);
        }
        assert_eq!(shared.lost_bytes(), 10);
        let mut first = [0; 2];
        assert_eq!(shared.peek(&mut first), 2);
        assert_eq!(first, [10, 11]);
    }

    #[test]
    fn a_stuck_listener_delays_once_and_then_loses() {
        let shared = Shared::new().unwrap();
        shared.set_attached(true);
        shared.write(&vec![1; CAPACITY_BYTES]);
        // Both of these would never return if each waited until there is room.
        shared.write(&[2]);
        shared.write(&[3; 5]);
        assert_eq!(shared.lost_bytes(), 6);
        shared.consume(1);
        shared.write(&[4]);
        assert_eq!(shared.lost_bytes(), 6, "there is room again");
    }

    #[test]
    fn a_vcpu_waits_for_a_slow_listener() {
        // However slow this host is.
        let shared = std::sync::Arc::new(Shared::with_patience(Duration::MAX).unwrap());
        shared.set_attached(true);
        shared.write(&vec![1; CAPACITY_BYTES]);
        let writer = std::thread::spawn({
            let shared = shared.clone();
            move || shared.write(&[9])
        });
        shared.consume(CAPACITY_BYTES);
        writer.join().unwrap();
        assert_eq!(shared.lost_bytes(), 0);
        let mut byte = [0];
        assert_eq!((shared.peek(&mut byte), byte), (1, [9]));
    }
}
