//! A disk on an image whose failures and waits the test controls.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, channel};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testing::{Troubles, disk_read, disk_write, guest_memory, options, request};
use crate::{CacheMode, Limit, Limits, Rate, Source, Span};

const LEN: usize = 1 << 20;

/// What an image has been asked.
#[derive(Default)]
struct Script {
    bytes: Mutex<Vec<u8>>,
    calls: Mutex<Vec<String>>,
    /// Errors of the next calls, one each.
    failures: Mutex<VecDeque<i32>>,
    /// Writes wait for a word from here.
    gate: Mutex<Option<Receiver<()>>>,
}

struct ScriptedImage(Arc<Script>, AtOnce);

impl ScriptedImage {
    fn call(&self, what: String) -> io::Result<()> {
        self.0.calls.lock().unwrap().push(what);
        self.0
            .failures
            .lock()
            .unwrap()
            .pop_front()
            .map_or(Ok(()), |code| Err(io::Error::from_raw_os_error(code)))
    }
}

impl Image for ScriptedImage {
    fn size(&self) -> u64 {
        self.0.bytes.lock().unwrap().len() as u64
    }

    fn at_once(&self) -> AtOnce {
        self.1
    }

    fn read(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.call(format!("read {offset}"))?;
        let bytes = self.0.bytes.lock().unwrap();
        let mut at = offset as usize;
        for buffer in buffers {
            buffer.copy_from(&bytes[at..at + buffer.len()]);
            at += buffer.len();
        }
        Ok(())
    }

    fn write(&self, offset: u64, buffers: &[VolatileSlice<'_>], stable: bool) -> io::Result<()> {
        if let Some(gate) = &*self.0.gate.lock().unwrap() {
            gate.recv().unwrap();
        }
        self.call(format!("write {offset}{}", if stable { " stable" } else { "" }))?;
        let mut bytes = self.0.bytes.lock().unwrap();
        let mut at = offset as usize;
        for buffer in buffers {
            buffer.copy_to(&mut bytes[at..at + buffer.len()]);
            at += buffer.len();
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.call("flush".into())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.call(format!("discard {offset} {len}"))
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.call(format!("zero {offset} {len} {unmap}"))
    }
}

struct Bed {
    disk: Disk,
    script: Arc<Script>,
    troubles: Arc<Troubles>,
    memory: GuestMemory,
}

fn bed_with(at_once: AtOnce, change: impl FnOnce(&mut DiskOptions)) -> Bed {
    let script = Arc::new(Script { bytes: Mutex::new(vec![0; LEN]), ..Script::default() });
    let troubles = Arc::new(Troubles::default());
    let memory = guest_memory();
    let mut options = DiskOptions::new(Source::Ram(0));
    change(&mut options);
    let image = Box::new(ScriptedImage(script.clone(), at_once));
    let disk = Disk::new(image, memory.clone(), options, troubles.clone()).unwrap();
    Bed { disk, script, troubles, memory }
}

fn bed() -> Bed {
    bed_with(AtOnce::Never, |_| {})
}

impl Bed {
    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.script.calls.lock().unwrap())
    }

    fn fail_next(&self, codes: &[i32]) {
        self.script.failures.lock().unwrap().extend(codes);
    }

    fn submit(
        &self,
        operation: Operation,
        offset: u64,
        len: u64,
        spans: &[(u64, usize)],
    ) -> Receiver<Result<Vec<u8>, IoError>> {
        let (done, ended) = channel();
        let spans =
            spans.iter().map(|(address, len)| Span { address: GuestAddress(*address), len: *len }).collect();
        self.disk.submit(Request {
            operation,
            offset,
            len,
            buffers: Buffers::Guest(spans),
            done: Box::new(move |result| done.send(result).unwrap()),
        });
        ended
    }

    fn guest(
        &self,
        operation: Operation,
        offset: u64,
        len: u64,
        spans: &[(u64, usize)],
    ) -> Result<Vec<u8>, IoError> {
        self.submit(operation, offset, len, spans).recv().unwrap()
    }

    fn dirty_pages(&self) -> Vec<u64> {
        let words = take_dirty(&self.memory);
        (0..words.len() as u64 * 64)
            .filter(|page| words[*page as usize / 64] >> (page % 64) & 1 != 0)
            .collect()
    }
}

fn take_dirty(memory: &GuestMemory) -> Vec<u64> {
    let region: &vm_memory::MmapRegion<_> = memory.find_region(GuestAddress(0)).unwrap();
    region.bitmap().take_dirty()
}

const WRITE: Operation = Operation::Write { fua: false };

#[test]
fn ranges_and_buffers_are_checked_before_anything_is_done() {
    let bed = bed();
    let end = LEN as u64;
    let cases = [
        (Operation::Read, 0, 512, &[(0, 511)][..], IoError::Buffers),
        (Operation::Read, 0, 512, &[], IoError::Buffers),
        (WRITE, 0, 512, &[(0, 512), (0, 512)], IoError::Buffers),
        (WRITE, 0, 1024, &[(0, usize::MAX), (0, 1025)], IoError::Buffers),
        (Operation::Read, 1, 512, &[(0, 512)], IoError::OutOfRange),
        (Operation::Read, 0, 100, &[(0, 100)], IoError::OutOfRange),
        (Operation::Read, end, 512, &[(0, 512)], IoError::OutOfRange),
        (WRITE, end - 512, 1024, &[(0, 1024)], IoError::OutOfRange),
        (Operation::Discard, u64::MAX - 511, 512, &[], IoError::OutOfRange),
        (Operation::Discard, 512, u64::MAX - 511, &[], IoError::OutOfRange),
        (Operation::WriteZeroes { unmap: true, fua: false }, end, 512, &[], IoError::OutOfRange),
    ];
    for (operation, offset, len, spans, error) in cases {
        assert_eq!(bed.guest(operation, offset, len, spans), Err(error), "{operation:?} {offset} {len}");
    }
    // Beyond the memory: seen when the buffers are looked for, and no reason to stop the machine.
    for spans in [[(1 << 20, 512)], [((1 << 20) - 256, 512)], [(u64::MAX - 100, 512)]] {
        assert_eq!(bed.guest(Operation::Read, 0, 512, &spans), Err(IoError::Buffers));
        assert_eq!(bed.guest(WRITE, 0, 512, &spans), Err(IoError::Buffers));
    }
    assert_eq!(bed.calls(), Vec::<String>::new());
    assert!(bed.troubles.wait(0).is_empty());
    let read_only = bed_with(AtOnce::Never, |options| options.read_only = true);
    for operation in [WRITE, Operation::Discard, Operation::WriteZeroes { unmap: false, fua: false }] {
        assert_eq!(read_only.guest(operation, 0, 512, &[(0, 512)]), Err(IoError::ReadOnly));
    }
    assert_eq!(read_only.guest(Operation::Flush, 7, 7, &[]), Ok(vec![]));
}

#[test]
fn data_comes_from_the_buffers_in_their_order_and_goes_there() {
    for at_once in [AtOnce::Never, AtOnce::CachedReads, AtOnce::Always] {
        let bed = bed_with(at_once, |_| {});
        bed.memory.write_slice(&[1; 512], GuestAddress(0x5000)).unwrap();
        bed.memory.write_slice(&[2; 512], GuestAddress(0x1000)).unwrap();
        bed.dirty_pages();
        bed.guest(WRITE, 512, 1024, &[(0x5000, 512), (0x1000, 512)]).unwrap();
        assert_eq!(bed.script.bytes.lock().unwrap()[512..1536], [[1; 512], [2; 512]].concat());
        assert_eq!(bed.dirty_pages(), [] as [u64; 0], "writing to the disk does not write guest memory");
        bed.guest(Operation::Read, 512, 1024, &[(0x2f80, 256), (0x8000, 768)]).unwrap();
        let mut read = [0; 1024];
        bed.memory.read_slice(&mut read[..256], GuestAddress(0x2f80)).unwrap();
        bed.memory.read_slice(&mut read[256..], GuestAddress(0x8000)).unwrap();
        assert_eq!(read[..], [[1; 512], [2; 512]].concat());
        assert_eq!(bed.dirty_pages(), [2, 3, 8], "with {at_once:?}");
        let host = disk_read(&bed.disk, 512, 1024).unwrap();
        assert_eq!(host, [[1; 512], [2; 512]].concat());
        assert_eq!(bed.dirty_pages(), [] as [u64; 0]);
    }
}

#[test]
fn what_was_perhaps_read_is_dirty_also_after_a_failure() {
    let bed = bed_with(AtOnce::Never, |options| options.read_errors = ErrorPolicy::Report);
    bed.dirty_pages();
    bed.fail_next(&[libc::EIO]);
    assert!(matches!(bed.guest(Operation::Read, 0, 512, &[(0x3000, 512)]), Err(IoError::Host(_))));
    assert_eq!(bed.dirty_pages(), [3]);
}

#[test]
fn policies() {
    let bed = bed_with(AtOnce::Never, |options| {
        options.read_errors = ErrorPolicy::Report;
        options.write_errors = ErrorPolicy::Ignore;
    });
    bed.fail_next(&[libc::EIO]);
    assert!(matches!(disk_read(&bed.disk, 0, 512), Err(IoError::Host(_))));
    bed.fail_next(&[libc::ENOSPC]);
    disk_write(&bed.disk, 0, &[1; 512]).unwrap();
    bed.fail_next(&[libc::EIO]);
    request(&bed.disk, Operation::Flush, 0, 0, vec![]).unwrap();
    let bed = bed_with(AtOnce::Never, |options| options.write_errors = ErrorPolicy::Report);
    for (code, error) in [
        (libc::ENOSPC, IoError::NoSpace),
        (libc::EDQUOT, IoError::NoSpace),
        (libc::EROFS, IoError::ReadOnly),
        (libc::EOPNOTSUPP, IoError::Unsupported),
    ] {
        bed.fail_next(&[code]);
        assert_eq!(disk_write(&bed.disk, 0, &[1; 512]), Err(error));
    }
}

#[test]
fn a_failure_stops_the_machine_and_is_tried_again() {
    let bed = bed();
    bed.fail_next(&[libc::ENOSPC, libc::EIO]);
    let ended = bed.submit(WRITE, 0, 512, &[(0, 512)]);
    bed.disk.drain();
    assert_eq!(bed.troubles.wait(1), [IoError::NoSpace]);
    assert!(ended.try_recv().is_err(), "the guest knows nothing");
    bed.disk.retry();
    bed.disk.drain();
    assert_eq!(bed.troubles.wait(2).len(), 2);
    assert!(ended.try_recv().is_err());
    bed.disk.retry();
    assert_eq!(ended.recv().unwrap(), Ok(vec![]));
    assert_eq!(bed.calls(), ["write 0", "write 0", "write 0"]);
    bed.disk.retry();
    bed.disk.drain();
    assert_eq!(bed.calls(), [] as [&str; 0], "only once");
    // Closing forgets what is held.
    bed.fail_next(&[libc::EIO]);
    let ended = bed.submit(WRITE, 0, 512, &[(0, 512)]);
    bed.disk.close().unwrap();
    assert!(ended.recv().is_err(), "its end is never told");
    assert_eq!(bed.calls(), ["write 0", "flush"]);
}

#[test]
fn draining_waits_for_what_is_on_its_way() {
    let bed = bed();
    let (open, gate) = channel();
    *bed.script.gate.lock().unwrap() = Some(gate);
    let ended: Vec<_> = (0..4).map(|index| bed.submit(WRITE, index * 512, 512, &[(0, 512)])).collect();
    std::thread::scope(|scope| {
        let draining = scope.spawn(|| bed.disk.drain());
        for _ in 0..3 {
            open.send(()).unwrap();
        }
        // One is left, so it cannot have ended.
        assert!(!draining.is_finished());
        open.send(()).unwrap();
        draining.join().unwrap();
    });
    assert!(ended.iter().all(|ended| ended.try_recv() == Ok(Ok(vec![]))), "each had ended");
}

#[test]
fn draining_does_not_wait_for_limits() {
    let bed = bed();
    let slow = Limit { operations: Some(Rate { per_second: 1, burst: 1 }), bytes: None };
    bed.disk.set_limits(Limits { total: slow, ..Limits::default() }).unwrap();
    let ended: Vec<_> = (0..100).map(|index| bed.submit(WRITE, index * 512, 512, &[(0, 512)])).collect();
    bed.disk.drain();
    assert!(ended.iter().all(|ended| ended.try_recv() == Ok(Ok(vec![]))));
    assert_eq!(bed.disk.limits().total, slow);
}

#[test]
fn what_has_to_be_stable_is() {
    let bed = bed();
    request(&bed.disk, Operation::Write { fua: true }, 0, 512, vec![1; 512]).unwrap();
    request(&bed.disk, WRITE, 0, 512, vec![1; 512]).unwrap();
    request(&bed.disk, Operation::WriteZeroes { unmap: true, fua: true }, 0, 512, vec![]).unwrap();
    request(&bed.disk, Operation::WriteZeroes { unmap: false, fua: false }, 0, 512, vec![]).unwrap();
    request(&bed.disk, Operation::Discard, 512, 1024, vec![]).unwrap();
    assert_eq!(
        bed.calls(),
        ["write 0 stable", "write 0", "zero 0 512 true", "flush", "zero 0 512 false", "discard 512 1024"]
    );
    let bed = bed_with(AtOnce::Never, |options| {
        options.cache = CacheMode::Writethrough;
        options.discard = false;
    });
    request(&bed.disk, WRITE, 0, 512, vec![1; 512]).unwrap();
    request(&bed.disk, Operation::WriteZeroes { unmap: true, fua: false }, 0, 512, vec![]).unwrap();
    request(&bed.disk, Operation::Discard, 0, 512, vec![]).unwrap();
    assert_eq!(bed.calls(), ["write 0 stable", "zero 0 512 false", "flush"], "nodelete does not unmap");
    assert!(bed.disk.info().writethrough && !bed.disk.info().discard);
}

#[test]
fn everything_is_counted() {
    let bed = bed_with(AtOnce::Never, |options| options.read_errors = ErrorPolicy::Report);
    disk_write(&bed.disk, 0, &[1; 4096]).unwrap();
    disk_write(&bed.disk, 0, &[1; 512]).unwrap();
    disk_read(&bed.disk, 0, 1024).unwrap();
    bed.fail_next(&[libc::EIO]);
    disk_read(&bed.disk, 0, 1024).unwrap_err();
    request(&bed.disk, Operation::Flush, 0, 0, vec![]).unwrap();
    request(&bed.disk, Operation::Discard, 0, 8192, vec![]).unwrap();
    let list = bed.disk.stats().list();
    let value = |name: &str| list.iter().find(|(found, _)| found == name).unwrap().1;
    assert_eq!((value("write operations"), value("write bytes"), value("write errors")), (2, 4608, 0));
    assert_eq!((value("read operations"), value("read bytes"), value("read errors")), (1, 1024, 1));
    assert_eq!((value("flush operations"), value("discard bytes")), (1, 8192));
    assert!(value("write nanoseconds") > 0);
}

/// Through io_uring where the host has it, and the same without.
#[test]
fn past_the_page_cache_with_many_requests_at_a_time() {
    let directory = tempfile::tempdir_in("/tmp").unwrap();
    let path = directory.path().join("image");
    std::fs::write(&path, vec![0; LEN]).unwrap();
    let memory = guest_memory();
    let options = DiskOptions { cache: CacheMode::None, ..options(&path) };
    let disk = Disk::open(options, memory.clone(), Arc::new(Troubles::default())).unwrap();
    assert_eq!(disk.workers.ring.is_some(), Ring::new("probe").is_ok());
    let (done, ended) = channel();
    let submit = |operation, index: u64, address: u64, len: usize| {
        let done = done.clone();
        disk.submit(Request {
            operation,
            offset: index * 2048,
            len: len as u64,
            buffers: Buffers::Guest(vec![Span { address: GuestAddress(address), len }]),
            done: Box::new(move |result| done.send(result).unwrap()),
        });
    };
    // Aligned ones, and every third in memory that the kernel does not take as it is.
    let address = |index: u64| index * 1024 + u64::from(index.is_multiple_of(3));
    for index in 0..400 {
        memory.write_slice(&[index as u8 | 1; 512], GuestAddress(address(index))).unwrap();
        submit(Operation::Write { fua: index % 7 == 0 }, index, address(index), 512);
    }
    assert!((0..400).all(|_| ended.recv().unwrap().is_ok()));
    let contents = std::fs::read(&path).unwrap();
    for index in 0..400usize {
        assert_eq!(contents[index * 2048..][..1024], [[index as u8 | 1; 512], [0; 512]].concat(), "{index}");
    }
    memory.write_slice(&vec![0xee; 420_000], GuestAddress(0)).unwrap();
    take_dirty(&memory);
    for index in 0..400 {
        submit(Operation::Read, index, address(index), 512);
    }
    assert!((0..400).all(|_| ended.recv().unwrap().is_ok()));
    for index in 0..400 {
        let mut read = [0; 513];
        memory.read_slice(&mut read, GuestAddress(address(index))).unwrap();
        assert_eq!(read[..], [&[index as u8 | 1; 512][..], &[0xee]].concat(), "{index}");
    }
    let dirty = take_dirty(&memory);
    assert_eq!(dirty.iter().map(|word| word.count_ones()).sum::<u32>(), 100, "the pages read into");
    // The file becomes shorter behind our back: the ring ends short, an I/O thread finds out.
    std::fs::File::options().write(true).open(&path).unwrap().set_len(LEN as u64 - 4096).unwrap();
    submit(Operation::Read, 511, 0, 512);
    assert!(matches!(ended.recv().unwrap(), Err(IoError::Host(_))));
}
