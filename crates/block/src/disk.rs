//! A disk as a controller sees it.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use memory::GuestMemory;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use crate::image::AtOnce;
use crate::pool::Pool;
use crate::ring::{Access, Ring};
use crate::throttle::{Limits, Throttle};
use crate::{
    Buffers, DiskOptions, DiskStats, ErrorPolicy, Image, IoError, OpenError, Operation, Request, SectorSize,
    Snapshot, SnapshotChange,
};

/// Accesses up to this are made on the thread that asks for them, where that needs no waiting. With more bytes, an I/O thread on another
/// processor wins.
const AT_ONCE_BYTES: u64 = 64 << 10;

/// Told when a request has failed and the machine is to stop until somebody has helped ([`ErrorPolicy::Stop`]). May be called on
/// any thread, also from within [`Disk::submit`].
pub trait TroubleSink: Send + Sync {
    /// `disk` is the name of the disk. [`Disk::retry`] tries again.
    fn trouble(&self, disk: &str, error: &IoError);
}

/// What a controller tells the guest about a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskInfo {
    /// Bytes, whole logical sectors.
    pub size_bytes: u64,
    /// Sector sizes.
    pub sectors: SectorSize,
    /// Writes are refused.
    pub read_only: bool,
    /// Discards give space back.
    pub discard: bool,
    /// Each write is stable when done: there is no volatile write cache.
    pub writethrough: bool,
}

struct Shared {
    name: String,
    image: Box<dyn Image>,
    memory: GuestMemory,
    options: DiskOptions,
    sectors: SectorSize,
    size_bytes: AtomicU64,
    stats: DiskStats,
    trouble: Arc<dyn TroubleSink>,
    progress: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Default)]
struct Progress {
    /// Requests whose `done` has not returned, without those held.
    in_flight: usize,
    /// Requests that wait for help.
    held: Vec<Job>,
}

/// A request on its way.
struct Job {
    request: Request,
    started: Instant,
}

/// Those who do requests.
struct Workers {
    shared: Arc<Shared>,
    pool: Pool,
    /// For what the kernel can do as it is, if the image has that.
    ring: Option<Ring>,
}

/// A disk.
pub struct Disk {
    // Let go of first: it starts what waits.
    throttle: Throttle<Job>,
    workers: Arc<Workers>,
    shared: Arc<Shared>,
}

impl Disk {
    /// A disk on an open image. `memory` is what the buffers of its requests are in.
    ///
    /// # Errors
    /// The image has no whole sectors, or an I/O thread cannot be started.
    pub fn new(
        image: Box<dyn Image>,
        memory: GuestMemory,
        options: DiskOptions,
        trouble: Arc<dyn TroubleSink>,
    ) -> Result<Self, OpenError> {
        let (least, suggested) = image.sectors();
        let sectors = options.sectors.unwrap_or(SectorSize { logical: least, physical: suggested });
        let size = image.size();
        let path = options.path();
        if size == 0 {
            return Err(OpenError::Empty { path });
        }
        if !size.is_multiple_of(u64::from(sectors.logical)) {
            return Err(OpenError::PartSector { path, size, sector: sectors.logical });
        }
        let pool = Pool::new(&options.name).map_err(|source| OpenError::Thread { path, source })?;
        let shared = Arc::new(Shared {
            name: options.name.clone(),
            image,
            memory,
            options,
            sectors,
            size_bytes: AtomicU64::new(size),
            stats: DiskStats::default(),
            trouble,
            progress: Mutex::default(),
            changed: Condvar::new(),
        });
        let ring = if shared.image.is_direct() { ring(&shared.name) } else { None };
        let workers = Arc::new(Workers { shared: shared.clone(), pool, ring });
        let of_throttle = workers.clone();
        let throttle = Throttle::new(&shared.name, move |job| Workers::start(&of_throttle, job));
        Ok(Disk { throttle, workers, shared })
    }

    /// What the guest may know.
    pub fn info(&self) -> DiskInfo {
        let options = &self.shared.options;
        DiskInfo {
            size_bytes: self.shared.size_bytes.load(Ordering::Acquire),
            sectors: self.shared.sectors,
            read_only: options.read_only,
            discard: options.discard && !options.read_only,
            writethrough: options.cache.writethrough(),
        }
    }

    /// Its name, for messages.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Counters.
    pub fn stats(&self) -> &DiskStats {
        &self.shared.stats
    }

    /// Takes a request. Its `done` is called when it has ended, perhaps before this returns.
    pub fn submit(&self, request: Request) {
        if let Err(error) = self.shared.check(&request) {
            return (request.done)(Err(error));
        }
        self.shared.lock().in_flight += 1;
        let job = Job { request, started: Instant::now() };
        let Request { operation, len, .. } = job.request;
        if let Some(job) = self.throttle.admit(operation, len, job) {
            Workers::start(&self.workers, job);
        }
    }

    /// The limits.
    pub fn limits(&self) -> Limits {
        self.throttle.limits()
    }

    /// Sets other limits, from now on and for what waits already.
    ///
    /// # Errors
    /// The host refuses a thread; the limits stay as they are.
    pub fn set_limits(&self, limits: Limits) -> io::Result<()> {
        self.throttle.set(limits)
    }

    /// Tries again what has failed and was held back. Call when the machine goes on.
    pub fn retry(&self) {
        let held = {
            let mut progress = self.shared.lock();
            progress.in_flight += progress.held.len();
            std::mem::take(&mut progress.held)
        };
        held.into_iter().for_each(|job| self.workers.queue(job));
    }

    /// Waits until every request has ended that was submitted, but for those held back after a failure. Limits do not count meanwhile.
    pub fn drain(&self) {
        self.throttle.hurry(true);
        let progress = self.shared.lock();
        let ended = self.shared.changed.wait_while(progress, |progress| progress.in_flight > 0);
        drop(ended.unwrap_or_else(PoisonError::into_inner));
        self.throttle.hurry(false);
    }

    /// Ends every request that was submitted, as a reset of the controller has to: afterwards none of them touches guest memory
    /// any more. Waits for those on their way; those held back after a failure end with [`IoError::Aborted`].
    pub fn abort(&self) {
        loop {
            self.drain();
            let held = {
                let mut progress = self.shared.lock();
                progress.in_flight += progress.held.len();
                std::mem::take(&mut progress.held)
            };
            if held.is_empty() {
                // What somebody has begun to try again in between counts as on its way.
                if self.shared.lock().in_flight == 0 {
                    return;
                }
                continue;
            }
            held.into_iter().for_each(|job| self.shared.finish(job, Err(IoError::Aborted)));
        }
    }

    /// The end: waits for what is on its way, forgets what is held back, makes all stable.
    ///
    /// # Errors
    /// The host's.
    pub fn close(&self) -> io::Result<()> {
        self.drain();
        let held = std::mem::take(&mut self.shared.lock().held);
        drop(held);
        if self.shared.options.read_only { Ok(()) } else { self.shared.image.close() }
    }

    /// Gives the disk another size in bytes, whole sectors, and its image with it. What is new reads as zeros.
    ///
    /// # Errors
    /// The host's; the format cannot; the size is not possible. `drain` has to be called before if it becomes smaller.
    pub fn resize(&self, len: u64) -> io::Result<()> {
        if len == 0 || !len.is_multiple_of(u64::from(self.shared.sectors.logical)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if self.shared.options.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        if len < self.info().size_bytes {
            self.shared.size_bytes.store(len, Ordering::Release);
        }
        let result = self.shared.image.resize(len);
        self.refresh_size();
        result
    }

    /// The snapshots within the image.
    ///
    /// # Errors
    /// As [`Image::snapshots`].
    pub fn snapshots(&self) -> io::Result<Vec<Snapshot>> {
        self.shared.image.snapshots()
    }

    /// Makes, applies or deletes a snapshot within the image, while no request is on its way: the machine is to be paused. After
    /// applying one the disk may have another size.
    ///
    /// # Errors
    /// As [`Image::change_snapshots`].
    pub fn change_snapshots(&self, change: SnapshotChange<'_>) -> io::Result<()> {
        self.drain();
        let result = self.shared.image.change_snapshots(change);
        self.refresh_size();
        result
    }

    /// Looks whether the image has another size. Returns the new one if so.
    pub fn refresh_size(&self) -> Option<u64> {
        let sector = u64::from(self.shared.sectors.logical);
        let size = self.shared.image.size() / sector * sector;
        (self.shared.size_bytes.swap(size, Ordering::AcqRel) != size).then_some(size)
    }
}

/// A ring, if the host has one for us.
fn ring(name: &str) -> Option<Ring> {
    Ring::new(name)
        .inspect_err(|error| tracing::info!("disk {name}: io_uring cannot be used, I/O threads are: {error}"))
        .ok()
}

impl Workers {
    /// Does a request, or has it done.
    fn start(workers: &Arc<Self>, job: Job) {
        if let Some(job) = workers.shared.at_once(job)
            && let Some(job) = Workers::try_ring(workers, job)
        {
            workers.queue(job);
        }
    }

    /// Has an I/O thread do a request.
    fn queue(&self, job: Job) {
        let shared = self.shared.clone();
        self.pool.push(Box::new(move || shared.run(job)));
    }

    /// Gives a request to the ring, if it can take it.
    fn try_ring(workers: &Arc<Self>, mut job: Job) -> Option<Job> {
        let Some(ring) = &workers.ring else { return Some(job) };
        let Request { operation, offset, .. } = job.request;
        let (write, stable) = match operation {
            Operation::Read => (false, false),
            Operation::Write { fua } => (true, fua || workers.shared.options.cache.writethrough()),
            _ => return Some(job),
        };
        let mut access = None;
        let found = workers.shared.with_buffers(&mut job.request, false, |buffers| {
            if let Some(file) = workers.shared.image.direct(write, offset, buffers) {
                let vector = |buffer: &VolatileSlice<'_>| libc::iovec {
                    iov_base: buffer.ptr_guard_mut().as_ptr().cast(),
                    iov_len: buffer.len(),
                };
                access = Some(Access {
                    file,
                    write,
                    stable,
                    offset,
                    vectors: buffers.iter().map(vector).collect(),
                });
            }
            Ok(())
        });
        let Some(access) = access.filter(|_| found.is_ok()) else { return Some(job) };
        // The job is where both ends find it: the ring if it takes the access, we if not.
        let place = Arc::new(Mutex::new(Some(job)));
        let take = |place: &Mutex<Option<Job>>| place.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (of_ring, kept) = (place.clone(), workers.clone());
        let ended = Box::new(move |complete| {
            let Some(job) = take(&of_ring) else { return };
            if complete {
                if !write {
                    kept.shared.mark_filled(&job.request);
                }
                kept.shared.finish(job, Ok(()));
            } else {
                kept.queue(job);
            }
        });
        // SAFETY: the file is the image's, and the buffers are guest memory or the job's own, whose place on the heap does not change;
        // `ended` keeps all three, as `kept` and `of_ring`.
        match unsafe { ring.submit(access, ended) } {
            Ok(()) => None,
            Err(_not_taken) => take(&place),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, request: &Request) -> Result<(), IoError> {
        let Request { operation, offset, len, ref buffers, .. } = *request;
        if operation == Operation::Flush {
            return Ok(());
        }
        if operation.changes_disk() && self.options.read_only {
            return Err(IoError::ReadOnly);
        }
        let sector = u64::from(self.sectors.logical);
        let end = offset.checked_add(len).ok_or(IoError::OutOfRange)?;
        if offset % sector != 0 || len % sector != 0 || end > self.size_bytes.load(Ordering::Acquire) {
            return Err(IoError::OutOfRange);
        }
        let has_data = matches!(operation, Operation::Read | Operation::Write { .. });
        if has_data && buffers.len() != Some(len) {
            return Err(IoError::Buffers);
        }
        Ok(())
    }

    /// Does a request on this thread, if that needs no waiting.
    fn at_once(&self, mut job: Job) -> Option<Job> {
        let Request { operation, len, .. } = job.request;
        if len > AT_ONCE_BYTES {
            return Some(job);
        }
        match (self.image.at_once(), operation) {
            (AtOnce::Always, _) => {
                self.run(job);
                None
            }
            (AtOnce::CachedReads, Operation::Read) => {
                let offset = job.request.offset;
                let read = |buffers: &[VolatileSlice<'_>]| self.image.try_read(offset, buffers);
                match self.with_buffers(&mut job.request, true, read) {
                    Ok(()) => {
                        self.finish(job, Ok(()));
                        None
                    }
                    // Whatever it is, an I/O thread finds out.
                    Err(_) => Some(job),
                }
            }
            _ => Some(job),
        }
    }

    /// Does a request and ends it, or holds it back.
    fn run(&self, mut job: Job) {
        let result = self.perform(&mut job.request);
        let Err(error) = &result else { return self.finish(job, result) };
        let hosts_fault = matches!(error, IoError::NoSpace | IoError::Host(_));
        let policy = match job.request.operation {
            _ if !hosts_fault => ErrorPolicy::Report,
            Operation::Read => self.options.read_errors,
            _ => self.options.write_errors,
        };
        tracing::debug!("disk {}: {:?}: {error}", self.name, job.request);
        match policy {
            ErrorPolicy::Report => self.finish(job, result),
            ErrorPolicy::Ignore => self.finish(job, Ok(())),
            ErrorPolicy::Stop => {
                let error = error.clone();
                self.lock().held.push(job);
                // Who waits for all to have ended finds that this has failed again.
                self.trouble.trouble(&self.name, &error);
                self.lock().in_flight -= 1;
                self.changed.notify_all();
            }
        }
    }

    fn perform(&self, request: &mut Request) -> Result<(), IoError> {
        let Request { operation, offset, len, .. } = *request;
        let writethrough = self.options.cache.writethrough();
        match operation {
            Operation::Read => self.with_buffers(request, true, |buffers| self.image.read(offset, buffers)),
            Operation::Write { fua } => self.with_buffers(request, false, |buffers| {
                self.image.write(offset, buffers, fua || writethrough)
            }),
            Operation::Flush => Ok(self.image.flush()?),
            Operation::Discard if !self.options.discard => Ok(()),
            Operation::Discard => Ok(self.image.discard(offset, len)?),
            Operation::WriteZeroes { unmap, fua } => {
                self.image.write_zeroes(offset, len, unmap && self.options.discard)?;
                if fua || writethrough { Ok(self.image.flush()?) } else { Ok(()) }
            }
        }
    }

    /// Finds the buffers of a request and notes that guest memory is written, if it is.
    fn with_buffers(
        &self,
        request: &mut Request,
        filled: bool,
        access: impl FnOnce(&[VolatileSlice<'_>]) -> io::Result<()>,
    ) -> Result<(), IoError> {
        let spans = match &mut request.buffers {
            Buffers::Host(bytes) => return Ok(access(&[VolatileSlice::from(bytes.as_mut_slice())])?),
            Buffers::Guest(spans) => spans,
        };
        let mut slices = Vec::with_capacity(spans.len());
        for span in spans.iter() {
            for slice in self.memory.get_slices(span.address, span.len) {
                slices.push(slice.map_err(|_| IoError::Buffers)?);
            }
        }
        let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
        let plain: Vec<_> = guards
            .iter()
            // SAFETY: the slice is mapped guest memory for as long as the guard lives, which is longer than this.
            .map(|guard| unsafe { VolatileSlice::new(guard.as_ptr(), guard.len()) })
            .collect();
        let result = access(&plain);
        if filled {
            // Also after a failure: some of it may have been read.
            slices.iter().for_each(|slice| slice.bitmap().mark_dirty(0, slice.len()));
        }
        Ok(result?)
    }

    /// Notes that the buffers in guest memory have been written.
    fn mark_filled(&self, request: &Request) {
        let Buffers::Guest(spans) = &request.buffers else { return };
        for slice in spans.iter().flat_map(|span| self.memory.get_slices(span.address, span.len)).flatten() {
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }

    fn finish(&self, job: Job, result: Result<(), IoError>) {
        let Job { request: Request { operation, len, buffers, done, .. }, started } = job;
        self.stats.count(operation, len, started.elapsed(), result.is_err());
        let bytes = match buffers {
            Buffers::Host(bytes) => bytes,
            Buffers::Guest(_) => Vec::new(),
        };
        done(result.map(|()| bytes));
        self.lock().in_flight -= 1;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests;
