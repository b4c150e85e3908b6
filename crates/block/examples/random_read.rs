//! Measures 4 KiB random reads past the page cache: `random_read FILE [SECONDS]`, once as a disk does them and once with the I/O threads
//! only. FILE should be larger than what the host's storage caches; it is only read.

use std::env;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use block::image::raw::RawImage;
use block::{
    Buffers, CacheMode, Disk, DiskOptions, Image, IoError, Operation, Request, Source, Span, TroubleSink,
};
use vm_memory::{GuestAddress, VolatileSlice};

const BLOCK: u64 = 4096;

/// A raw image without [`Image::direct`], so that every request goes to an I/O thread.
struct ByThreads(RawImage);

impl Image for ByThreads {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn read(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.0.read(offset, buffers)
    }
    fn write(&self, _: u64, _: &[VolatileSlice<'_>], _: bool) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}

struct NoTrouble;

impl TroubleSink for NoTrouble {
    fn trouble(&self, disk: &str, error: &IoError) {
        eprintln!("{disk}: {error}");
    }
}

/// Reads per second with so many at a time, and the processor time that one took.
fn measure(disk: &Disk, depth: u64, time: Duration) -> (f64, Duration) {
    let blocks = disk.info().size_bytes / BLOCK;
    let (done, ended) = channel();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut submit = |slot: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let done = done.clone();
        disk.submit(Request {
            operation: Operation::Read,
            offset: random % blocks * BLOCK,
            len: BLOCK,
            buffers: Buffers::Guest(vec![Span { address: GuestAddress(slot * BLOCK), len: BLOCK as usize }]),
            done: Box::new(move |result| {
                if result.is_ok() {
                    let _ = done.send(slot);
                }
            }),
        });
    };
    let (start, processor) = (Instant::now(), processor_time());
    (0..depth).for_each(&mut submit);
    let mut count = 0;
    while start.elapsed() < time {
        let Ok(slot) = ended.recv() else { break };
        count += 1;
        submit(slot);
    }
    let took = start.elapsed();
    disk.drain();
    (count as f64 / took.as_secs_f64(), (processor_time() - processor) / count.max(1))
}

fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = env::args().skip(1);
    let path = PathBuf::from(arguments.next().ok_or("usage: random_read FILE [SECONDS]")?);
    let time = Duration::from_secs(arguments.next().map_or(Ok(3), |text| text.parse())?);
    let memory = memory::join_regions(vec![memory::create_region("ram", 0, 1 << 20)?])?;
    let options = DiskOptions {
        read_only: true,
        cache: CacheMode::None,
        ..DiskOptions::new(Source::Path(path.clone()))
    };
    let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(&path)?;
    let image = Box::new(ByThreads(RawImage::new(file, CacheMode::None)?));
    let threads = Disk::new(image, memory.clone(), options.clone(), Arc::new(NoTrouble))?;
    let ring = Disk::open(options, memory, Arc::new(NoTrouble))?;
    for depth in [1, 4, 8, 32] {
        for (name, disk) in [("as a disk", &ring), ("by threads", &threads)] {
            let (rate, processor) = measure(disk, depth, time);
            println!("depth {depth:2}, {name}: {rate:8.0} reads/s, {processor:?} of processor each");
        }
    }
    Ok(())
}
