//! qcow2 images (`docs/interop/qcow2` of QEMU), read and written through imago.
//!
//! imago is told nothing that has not been checked (`header`), and what an image refers to is opened by `open`, so that
//! whatever is below can have any format. If it panics nevertheless, over metadata that contradict themselves, the image fails every
//! request from then on.
//!
//! What is written is in the file when the write is done, but for the metadata that say where it is, which imago keeps and a flush
//! writes. The host's caches may write both in any order, so in case the power is lost the refcounts could be too low, and clusters be
//! given away twice. Therefore the image is marked dirty from its first write until it is closed, as QEMU does with lazy refcounts, and
//! an image that is found dirty has its refcounts raised to what they must be (`metadata`). Version 2 has no such mark.

pub(crate) mod header;
pub(crate) mod metadata;
pub(crate) mod snapshots;
pub(crate) mod storage;
#[cfg(test)]
mod tests;

use std::io;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::format::PreallocateMode;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, ShallowMapping};
use vm_memory::VolatileSlice;

use self::header::{DIRTY, Header, INCOMPATIBLE_AT};
use self::metadata::Metadata;
use self::storage::Store;
use super::fault::Fault;
use super::raw::RawImage;
use super::{Image, Snapshot, SnapshotChange, write_zero_bytes};
use crate::OpenError;
use crate::open::{Opening, Reference};

/// A qcow2 image.
pub struct Qcow2Image {
    path: PathBuf,
    file: Arc<RawImage>,
    data_file: Option<Arc<RawImage>>,
    backing: Option<Arc<dyn Image>>,
    writable: bool,
    version: u32,
    cluster: u64,
    /// What imago makes of it. Whoever takes away or moves clusters has it alone. `None` if it could not be opened again.
    access: RwLock<Option<ManuallyDrop<FormatAccess<Store>>>>,
    /// imago has panicked.
    failed: AtomicBool,
    /// Whether the file is marked dirty.
    dirty: Mutex<bool>,
}

impl Qcow2Image {
    /// The image in `file`, which is at `path`; what it refers to is opened by `opening`.
    pub(crate) fn open(
        file: RawImage,
        path: &Path,
        writable: bool,
        opening: &mut Opening,
    ) -> Result<Self, OpenError> {
        let mut header = Header::read(&file).map_err(|fault| fault.of(path, "qcow2"))?;
        if writable && header.incompatible & DIRTY != 0 {
            tracing::warn!(
                "disk image {}: was not closed properly; its refcounts are being checked",
                path.display()
            );
            let invalid = |e: io::Error| Fault::Invalid(e.to_string()).of(path, "qcow2");
            Metadata::new(&file, header.clone()).raise_refcounts().map_err(invalid)?;
            header = Header::read(&file).map_err(|fault| fault.of(path, "qcow2"))?;
        }
        let data_file = match &header.data_file {
            None => None,
            Some(None) => {
                let reason = "does not name its external data file; set it with qemu-img amend".to_owned();
                return Err(OpenError::Unsupported { path: path.to_owned(), reason });
            }
            Some(Some(name)) => Some(Arc::new(opening.data_file(Reference { name, of: path }, writable)?)),
        };
        let backing = match &header.backing {
            None => None,
            Some(name) => {
                Some(opening.backing(Reference { name, of: path }, header.backing_format.as_deref())?)
            }
        };
        let image = Qcow2Image {
            path: path.to_owned(),
            file: Arc::new(file),
            data_file,
            backing,
            writable,
            version: header.version,
            cluster: header.cluster(),
            access: RwLock::new(None),
            failed: AtomicBool::new(false),
            dirty: Mutex::new(false),
        };
        let access = image.begin().map_err(|e| Fault::Invalid(e.to_string()).of(path, "qcow2"))?;
        *image.exclusive() = Some(access);
        Ok(image)
    }

    /// Has imago open the image as it is in the file now.
    fn begin(&self) -> io::Result<ManuallyDrop<FormatAccess<Store>>> {
        let hide_dirty = !self.writable;
        self.guarded(|| {
            let backing = match &self.backing {
                None => None,
                Some(image) => {
                    let raw = Raw::open_image(Store::disk(image.clone()), false)?;
                    Some(FormatAccess::new(raw))
                }
            };
            let data = self.data_file.as_ref().map(|file| Store::file(file.clone(), false));
            let qcow2 = Qcow2::<Store>::builder(Store::file(self.file.clone(), hide_dirty))
                .write(self.writable)
                .backing(backing)
                .data_file(data)
                .open(DenyImplicitOpenGate::default())?;
            Ok(ManuallyDrop::new(FormatAccess::new(qcow2)))
        })
    }

    /// Calls imago, and survives its panics.
    fn guarded<T>(&self, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.failed.load(Ordering::Acquire) {
            return Err(io::Error::other("the image has failed before; check it with qemu-img check"));
        }
        catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| {
            self.failed.store(true, Ordering::Release);
            tracing::error!(
                "disk image {}: its metadata are broken; it is not used any more",
                self.path.display()
            );
            Err(io::Error::other("the metadata of the image are broken; check it with qemu-img check"))
        })
    }

    fn shared(&self) -> RwLockReadGuard<'_, Option<ManuallyDrop<FormatAccess<Store>>>> {
        self.access.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn exclusive(&self) -> RwLockWriteGuard<'_, Option<ManuallyDrop<FormatAccess<Store>>>> {
        self.access.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Uses the image together with others.
    fn with<T>(&self, call: impl FnOnce(&FormatAccess<Store>) -> io::Result<T>) -> io::Result<T> {
        let access = self.shared();
        let access = access.as_ref().ok_or_else(closed)?;
        self.guarded(|| call(access))
    }

    /// Uses the image alone.
    fn alone<T>(&self, call: impl FnOnce(&mut FormatAccess<Store>) -> io::Result<T>) -> io::Result<T> {
        let mut access = self.exclusive();
        let access = access.as_mut().ok_or_else(closed)?;
        self.guarded(|| call(access))
    }

    /// Before the first change: marks the file dirty. To be called with `access` held, so that it stays so until the change is made.
    fn begin_changes(&self) -> io::Result<()> {
        let mut dirty = self.dirty.lock().unwrap_or_else(PoisonError::into_inner);
        if *dirty || self.version < 3 {
            return Ok(());
        }
        self.mark(true)?;
        *dirty = true;
        Ok(())
    }

    /// Sets or clears the dirty bit in the file, for good.
    fn mark(&self, dirty: bool) -> io::Result<()> {
        let mut bits = [0; 8];
        self.file.read_bytes(INCOMPATIBLE_AT, &mut bits)?;
        let bits = u64::from_be_bytes(bits);
        let bits = if dirty { bits | DIRTY } else { bits & !DIRTY };
        self.file.write_bytes(INCOMPATIBLE_AT, &bits.to_be_bytes())?;
        self.file.flush()
    }

    /// Writes all that imago keeps, and takes the mark away.
    fn finish_changes(&self, access: &FormatAccess<Store>) -> io::Result<()> {
        self.guarded(|| {
            access.flush()?;
            access.sync()
        })?;
        let mut dirty = self.dirty.lock().unwrap_or_else(PoisonError::into_inner);
        if *dirty {
            self.mark(false)?;
            *dirty = false;
        }
        Ok(())
    }

    /// Has `change` made to the metadata in the file while imago does not look.
    fn quiesced<T>(&self, change: impl FnOnce(&RawImage) -> io::Result<T>) -> io::Result<T> {
        if !self.writable {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        let mut access = self.exclusive();
        let open = access.as_ref().ok_or_else(closed)?;
        self.finish_changes(open)?;
        if let Some(open) = access.take() {
            // Nothing is left in it that it could write.
            self.guarded(|| {
                drop(ManuallyDrop::into_inner(open));
                Ok(())
            })?;
        }
        let result = change(&self.file);
        // What has not worked may have been begun.
        *access = Some(self.begin()?);
        result
    }

    /// Gives up a range, or makes it zeros, piece by piece as its mapping goes; what the host's file had for it is given back.
    fn give_up(&self, mut offset: u64, mut len: u64, zero: bool) -> io::Result<()> {
        while len > 0 {
            let done = self.alone(|access| {
                self.begin_changes()?;
                let (mapping, mapped) = access.get_shallow_mapping(offset, len)?;
                if mapped == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                let data = match mapping {
                    ShallowMapping::Zero { .. } => return Ok(mapped),
                    // Clusters that nobody else refers to.
                    ShallowMapping::Raw { offset: at, writable: true, .. } => Some(at),
                    _ => None,
                };
                if zero {
                    access.discard_to_zero(offset, mapped)?;
                } else {
                    access.discard_to_any(offset, mapped)?;
                }
                if let Some(at) = data {
                    self.give_back(at, offset, mapped, access.size())?;
                }
                Ok(mapped)
            })?;
            offset += done;
            len -= done;
        }
        Ok(())
    }

    /// Punches a hole where the whole clusters of a range were. `at` is where `offset` was in the file.
    fn give_back(&self, at: u64, offset: u64, len: u64, size: u64) -> io::Result<()> {
        let start = offset.next_multiple_of(self.cluster);
        let end = offset + len;
        let end =
            if end == size { end.next_multiple_of(self.cluster) } else { end / self.cluster * self.cluster };
        if start >= end {
            return Ok(());
        }
        let file = self.data_file.as_ref().unwrap_or(&self.file);
        file.discard(at + (start - offset), end - start)
    }
}

fn closed() -> io::Error {
    io::Error::other("the image could not be opened again after its metadata were changed")
}

impl Image for Qcow2Image {
    fn size(&self) -> u64 {
        self.with(|access| Ok(access.size())).unwrap_or(0)
    }

    fn sectors(&self) -> (u32, u32) {
        (512, 4096)
    }

    fn read(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.with(|access| {
            let (vector, _mapped) = IoVectorMut::from_volatile_slice(buffers);
            access.readv(vector, offset)
        })
    }

    fn write(&self, offset: u64, buffers: &[VolatileSlice<'_>], stable: bool) -> io::Result<()> {
        self.with(|access| {
            self.begin_changes()?;
            let (vector, _mapped) = IoVector::from_volatile_slice(buffers);
            access.writev(vector, offset)?;
            if stable {
                access.flush()?;
                access.sync()?;
            }
            Ok(())
        })
    }

    fn flush(&self) -> io::Result<()> {
        if !self.writable {
            return Ok(());
        }
        self.with(|access| {
            access.flush()?;
            access.sync()
        })
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.give_up(offset, len, false) {
            // Version 2.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            other => other,
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let result = if unmap {
            self.give_up(offset, len, true)
        } else {
            self.with(|access| {
                self.begin_changes()?;
                access.write_zeroes(offset, len)
            })
        };
        match result {
            // Version 2.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => write_zero_bytes(self, offset, len),
            other => other,
        }
    }

    fn close(&self) -> io::Result<()> {
        if !self.writable {
            return Ok(());
        }
        let access = self.exclusive();
        self.finish_changes(access.as_ref().ok_or_else(closed)?)
    }

    fn resize(&self, len: u64) -> io::Result<()> {
        if self.snapshots().is_ok_and(|list| !list.is_empty()) && len < self.size() {
            return Err(io::Error::other(
                "an image with snapshots cannot be made smaller; delete the snapshots first",
            ));
        }
        self.alone(|access| {
            self.begin_changes()?;
            access.resize(len, PreallocateMode::None)?;
            access.flush()?;
            access.sync()
        })
    }

    fn snapshots(&self) -> io::Result<Vec<Snapshot>> {
        let _still = self.exclusive();
        let header = Header::read(&self.file).map_err(|refusal| io::Error::other(format!("{refusal:?}")))?;
        Metadata::new(&self.file, header).snapshots()
    }

    fn change_snapshots(&self, change: SnapshotChange<'_>) -> io::Result<()> {
        self.quiesced(|file| snapshots::change(file, change))
    }
}

impl Drop for Qcow2Image {
    fn drop(&mut self) {
        if self.writable
            && !self.failed.load(Ordering::Acquire)
            && let Err(error) = self.close()
        {
            tracing::error!("disk image {}: closing it: {error}", self.path.display());
        }
        let access = self.access.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        // After a panic nothing of imago is run any more, which would write what it has in its caches.
        if let Some(access) = access.filter(|_| !self.failed.load(Ordering::Acquire)) {
            let _ = catch_unwind(AssertUnwindSafe(|| drop(ManuallyDrop::into_inner(access))));
        }
    }
}
