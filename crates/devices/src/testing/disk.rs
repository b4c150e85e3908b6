//! Disks for controllers' tests: in memory, observed, failing on demand.

use std::io;
use std::sync::{Arc, Mutex};

use block::image::AtOnce;
use block::{Disk, DiskOptions, Image, IoError, Source, TroubleSink};
use memory::GuestMemory;
use vm_memory::VolatileSlice;

/// A disk's contents in memory. Each access is remembered, and the next ones can be made to fail.
#[derive(Default)]
pub struct Contents {
    bytes: Mutex<Vec<u8>>,
    accesses: Mutex<Vec<String>>,
    failures: Mutex<Vec<io::Error>>,
}

impl Contents {
    pub fn bytes(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap()
    }

    /// What has been done to it since the last time this was asked: `read 200+1000`, offset and length in hexadecimal.
    pub fn accesses(&self) -> Vec<String> {
        std::mem::take(&mut self.accesses.lock().unwrap())
    }

    /// Makes the next access fail.
    pub fn fail(&self, error: io::ErrorKind) {
        self.failures.lock().unwrap().push(error.into());
    }

    fn access(&self, what: &str, offset: u64, len: u64) -> io::Result<()> {
        self.accesses.lock().unwrap().push(format!("{what} {offset:x}+{len:x}"));
        self.failures.lock().unwrap().pop().map_or(Ok(()), Err)
    }
}

/// The [`block::Image`] of [`Contents`].
pub struct TestImage {
    pub contents: Arc<Contents>,
    pub at_once: AtOnce,
}

fn len_of(buffers: &[VolatileSlice<'_>]) -> u64 {
    buffers.iter().map(|b| b.len() as u64).sum()
}

impl Image for TestImage {
    fn size(&self) -> u64 {
        self.contents.bytes().len() as u64
    }

    fn at_once(&self) -> AtOnce {
        self.at_once
    }

    fn read(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.contents.access("read", offset, len_of(buffers))?;
        let bytes = self.contents.bytes();
        let mut from = &bytes[offset as usize..];
        for buffer in buffers {
            buffer.copy_from(&from[..buffer.len()]);
            from = &from[buffer.len()..];
        }
        Ok(())
    }

    fn write(&self, offset: u64, buffers: &[VolatileSlice<'_>], stable: bool) -> io::Result<()> {
        self.contents.access(if stable { "write stable" } else { "write" }, offset, len_of(buffers))?;
        let mut bytes = self.contents.bytes();
        let mut to = &mut bytes[offset as usize..];
        for buffer in buffers {
            buffer.copy_to(&mut to[..buffer.len()]);
            to = &mut to[buffer.len()..];
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.contents.access("flush", 0, 0)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.contents.access("discard", offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.contents.access(if unmap { "unmap" } else { "zero" }, offset, len)?;
        self.contents.bytes()[offset as usize..][..len as usize].fill(0);
        Ok(())
    }
}

/// Remembers what stopped the machine.
#[derive(Default)]
pub struct Troubles(pub Mutex<Vec<String>>);

impl TroubleSink for Troubles {
    fn trouble(&self, disk: &str, error: &IoError) {
        self.0.lock().unwrap().push(format!("{disk}: {error}"));
    }
}

/// Guest memory from address 0 and a disk whose requests end before [`Disk::submit`] returns.
pub struct DiskBed {
    pub memory: GuestMemory,
    pub contents: Arc<Contents>,
    pub troubles: Arc<Troubles>,
    pub disk: Arc<Disk>,
}

impl DiskBed {
    /// A disk whose every byte is the low byte of its sector's number; `change` may change its options.
    pub fn new(memory_bytes: u64, sectors: u64, change: impl FnOnce(&mut DiskOptions)) -> Self {
        Self::with(AtOnce::Always, memory_bytes, sectors, change)
    }

    /// The same, but requests end on the disk's own threads if `at_once` says so.
    pub fn with(
        at_once: AtOnce,
        memory_bytes: u64,
        sectors: u64,
        change: impl FnOnce(&mut DiskOptions),
    ) -> Self {
        let region = memory::create_region("test", 0, memory_bytes).unwrap();
        let memory = memory::join_regions(vec![region]).unwrap();
        let contents = Arc::new(Contents::default());
        *contents.bytes() = (0..sectors * 512).map(|at| (at / 512) as u8).collect();
        let mut options = DiskOptions::new(Source::Ram(sectors * 512));
        change(&mut options);
        let troubles = Arc::new(Troubles::default());
        let image = Box::new(TestImage { contents: contents.clone(), at_once });
        let disk = Arc::new(Disk::new(image, memory.clone(), options, troubles.clone()).unwrap());
        DiskBed { memory, contents, troubles, disk }
    }
}
