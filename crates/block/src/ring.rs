//! io_uring(7) for raw images past the page cache: one thread gives requests to the kernel, many at a time, and sees them end.
//!
//! Threads of vCPUs do not submit themselves: the kernel would interrupt the one that submitted whenever a request ends.
//!
//! Only what the kernel can do as it is comes here. What fails, or ends short, is done again by an I/O thread, which finds out why.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use io_uring::{IoUring, opcode, squeue, types};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;

/// Requests at a time; more go to the I/O threads.
const ENTRIES: u32 = 256;
/// The most buffers of a request (`IOV_MAX`).
const MAX_VECTORS: usize = 1024;
/// Marks the read of the event that wakes the thread.
const WAKE: u64 = u64::MAX;

/// Called when a request has ended: whether all of it was done.
type Ended = Box<dyn FnOnce(bool) + Send>;

/// An access that the kernel can make as it is.
pub(crate) struct Access<'a> {
    /// The file, opened with O_DIRECT.
    pub file: &'a File,
    /// Whether the file is written.
    pub write: bool,
    /// Whether it has to be stable when done.
    pub stable: bool,
    /// Where in the file, in bytes.
    pub offset: u64,
    /// The buffers. They have to stay until the access has ended.
    pub vectors: Vec<libc::iovec>,
}

/// An access that is to be made or on its way.
struct Pending {
    entry: squeue::Entry,
    /// Read by the kernel when the access is submitted.
    _vectors: Vec<libc::iovec>,
    len: usize,
    ended: Ended,
}

// SAFETY: the vectors and the entry have addresses only; what is there is kept by `ended`, which can be sent.
unsafe impl Send for Pending {}

#[derive(Default)]
struct State {
    /// What the thread has not yet seen.
    queue: VecDeque<Pending>,
    /// Accesses that have not ended.
    outstanding: usize,
    /// The thread waits, or is about to, and has to be woken.
    sleeping: bool,
    closing: bool,
}

struct Shared {
    state: Mutex<State>,
    /// Wakes the thread.
    event: OwnedFd,
}

/// A ring and its thread. Dropping it waits for what is on its way.
pub(crate) struct Ring {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Ring {
    /// A ring, whose thread is called `name`.
    ///
    /// # Errors
    /// The host knows no io_uring, or does not permit it.
    pub fn new(name: &str) -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC)?;
        let shared = Arc::new(Shared { state: Mutex::default(), event });
        let of_thread = shared.clone();
        let (ready, made) = channel();
        // The ring belongs to the thread that makes it.
        let thread = thread::Builder::new().name(format!("{name}/ring")).spawn(move || {
            let ring = IoUring::builder()
                .setup_single_issuer()
                .setup_defer_taskrun()
                .build(ENTRIES)
                .or_else(|_| IoUring::new(ENTRIES));
            match ring {
                Ok(ring) => {
                    let _ = ready.send(Ok(()));
                    of_thread.run(ring);
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        })?;
        made.recv().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))?;
        Ok(Ring { shared, thread: Some(thread) })
    }

    /// Has an access made. `ended` is called on the ring's thread.
    ///
    /// # Errors
    /// There is no room; `ended` comes back.
    ///
    /// # Safety
    /// The file and the memory that the vectors describe must stay until `ended` is called.
    pub unsafe fn submit(&self, access: Access<'_>, ended: Ended) -> Result<(), Ended> {
        let Access { file, write, stable, offset, vectors } = access;
        if vectors.len() > MAX_VECTORS {
            return Err(ended);
        }
        let file = types::Fd(file.as_raw_fd());
        let (pointer, count) = (vectors.as_ptr(), vectors.len() as u32);
        let entry = if write {
            let flags = if stable { libc::RWF_DSYNC } else { 0 };
            opcode::Writev::new(file, pointer, count).offset(offset).rw_flags(flags).build()
        } else {
            opcode::Readv::new(file, pointer, count).offset(offset).build()
        };
        let len = vectors.iter().map(|vector| vector.iov_len).sum();
        let mut state = self.shared.lock();
        if state.closing || state.outstanding >= ENTRIES as usize - 1 {
            return Err(ended);
        }
        state.outstanding += 1;
        state.queue.push_back(Pending { entry, _vectors: vectors, len, ended });
        let wake = std::mem::take(&mut state.sleeping);
        drop(state);
        if wake {
            self.shared.wake();
        }
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Fails only if it has been woken 2^64 times.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// The thread.
    fn run(&self, mut ring: IoUring) {
        let mut pending: Vec<Option<Pending>> = Vec::new();
        let mut free: Vec<usize> = Vec::new();
        // Lives as long as the ring, which is dropped before it.
        let mut count = Box::new([0u8; 8]);
        let mut armed = false;
        loop {
            if !armed {
                let event = types::Fd(self.event.as_raw_fd());
                let entry = opcode::Read::new(event, count.as_mut_ptr(), 8).build().user_data(WAKE);
                // SAFETY: the buffer lives longer than the ring, and nobody else uses it.
                armed = unsafe { ring.submission().push(&entry) }.is_ok();
            }
            let (new, wait) = {
                let mut state = self.lock();
                if state.closing && state.outstanding == 0 {
                    break;
                }
                let new = std::mem::take(&mut state.queue);
                state.sleeping = new.is_empty();
                let wait = usize::from(state.sleeping);
                (new, wait)
            };
            for access in new {
                let slot = free.pop().unwrap_or_else(|| {
                    pending.push(None);
                    pending.len() - 1
                });
                let entry = access.entry.clone().user_data(slot as u64);
                // SAFETY: the vectors are kept in `pending`, and the file and memory by whoever submitted, until it has ended.
                if unsafe { ring.submission().push(&entry) }.is_err() {
                    // Cannot be: there are more entries than may be outstanding. Then an I/O thread does it.
                    free.push(slot);
                    self.lock().outstanding -= 1;
                    (access.ended)(false);
                } else if let Some(place) = pending.get_mut(slot) {
                    *place = Some(access);
                }
            }
            match ring.submit_and_wait(wait) {
                Ok(_) => {}
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {}
                Err(error) => tracing::error!("waiting for io_uring: {error}"),
            }
            self.lock().sleeping = false;
            let ended: Vec<_> = ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
            for (slot, result) in ended {
                if slot == WAKE {
                    armed = false;
                    continue;
                }
                let slot = slot as usize;
                if let Some(Pending { len, ended, .. }) = pending.get_mut(slot).and_then(Option::take) {
                    free.push(slot);
                    self.lock().outstanding -= 1;
                    ended(usize::try_from(result) == Ok(len));
                }
            }
        }
        if armed {
            // The read of the event is still on its way into `count`.
            self.wake();
            let _ = ring.submit_and_wait(1);
        }
        drop(ring);
        drop(count);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.wake();
        if let Some(thread) =
            self.thread.take().filter(|thread| thread.thread().id() != thread::current().id())
        {
            let _ = thread.join();
        }
    }
}
