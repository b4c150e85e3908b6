//! One request: header, data, status (virtio 1.2 §5.2.6).

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use block::{Buffers, IoError, Operation, Request, Span};
use memory::GuestMemory;
use vm_memory::{Address, Bytes};

use super::bits::{SECTOR, request, status};
use super::{Blk, MAX_RANGE_SECTORS, MAX_RANGES};
use crate::virtio::{Buffer, Driver, Virtqueue};

/// Takes the first `count` bytes off a list of pieces and copies them; `None` if there are fewer.
fn take<const N: usize>(memory: &GuestMemory, spans: &mut Vec<Span>) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    let mut used = 0;
    for span in spans.iter_mut() {
        let part = span.len.min(N - filled);
        memory.read_slice(&mut bytes[filled..filled + part], span.address).ok()?;
        filled += part;
        if part < span.len {
            *span = Span { address: span.address.checked_add(part as u64)?, len: span.len - part };
            break;
        }
        used += 1;
    }
    spans.drain(..used);
    (filled == N).then_some(bytes)
}

/// Takes the last byte off a list of pieces: where the status goes.
fn take_last(spans: &mut Vec<Span>) -> Option<vm_memory::GuestAddress> {
    while spans.last().is_some_and(|span| span.len == 0) {
        spans.pop();
    }
    let last = spans.last_mut()?;
    last.len -= 1;
    let address = last.address.checked_add(last.len as u64)?;
    if last.len == 0 {
        spans.pop();
    }
    Some(address)
}

/// A request's way back.
struct Answer {
    memory: GuestMemory,
    queue: Arc<Virtqueue>,
    buffer: Buffer,
    status: vm_memory::GuestAddress,
}

impl Answer {
    /// Ends the request, `written` bytes of data having been written before the status.
    fn give(self, status: u8, written: u32) {
        // A status that is not in guest memory is the driver's loss; the buffer goes back all the same.
        let _ = self.memory.write_slice(&[status], self.status);
        self.queue.push(&self.buffer, written.saturating_add(1));
    }
}

fn status_of(error: &IoError) -> u8 {
    if *error == IoError::Unsupported { status::UNSUPP } else { status::IOERR }
}

/// Starts the request in a buffer.
pub(super) fn start(blk: &Blk, driver: &Driver, queue: &Arc<Virtqueue>, mut buffer: Buffer, through: bool) {
    let mut readable = std::mem::take(&mut buffer.chain.readable);
    let mut writable = buffer.chain.writable.clone();
    let header = take::<{ request::HEADER_BYTES }>(&blk.memory, &mut readable);
    let (Some(header), Some(status)) = (header, take_last(&mut writable)) else {
        tracing::warn!("virtio-blk: a request without header or status");
        return driver.needs_reset();
    };
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let kind = u32::from_le_bytes([t0, t1, t2, t3]);
    let sector = u64::from_le_bytes(sector);
    let answer = Answer { memory: blk.memory.clone(), queue: queue.clone(), buffer, status };
    match kind {
        request::IN => transfer(blk, answer, Operation::Read, sector, writable),
        request::OUT => transfer(blk, answer, Operation::Write { fua: through }, sector, readable),
        request::FLUSH => submit(blk, answer, Operation::Flush, (0, 0), Vec::new()),
        request::GET_ID => give_id(blk, answer, &writable),
        request::DISCARD | request::WRITE_ZEROES => ranges(blk, answer, kind, readable, through),
        _ => answer.give(status::UNSUPP, 0),
    }
}

fn transfer(blk: &Blk, answer: Answer, operation: Operation, sector: u64, data: Vec<Span>) {
    let len = data.iter().map(|span| span.len as u64).sum();
    match sector.checked_mul(SECTOR) {
        Some(offset) => submit(blk, answer, operation, (offset, len), data),
        None => answer.give(status::IOERR, 0),
    }
}

fn submit(blk: &Blk, answer: Answer, operation: Operation, (offset, len): (u64, u64), data: Vec<Span>) {
    let written = if operation == Operation::Read { u32::try_from(len).unwrap_or(u32::MAX) } else { 0 };
    blk.disk.submit(Request {
        operation,
        offset,
        len,
        buffers: Buffers::Guest(data),
        done: Box::new(move |result| match result {
            Ok(_) => answer.give(status::OK, written),
            Err(error) => answer.give(status_of(&error), 0),
        }),
    });
}

/// The serial number, filled up with zeros; a shorter buffer gets as much as fits.
fn give_id(blk: &Blk, answer: Answer, data: &[Span]) {
    let mut id = [0; request::ID_BYTES];
    id.iter_mut().zip(blk.config.serial.bytes()).for_each(|(to, byte)| *to = byte);
    let mut left = &id[..];
    for span in data {
        let (part, rest) = left.split_at(span.len.min(left.len()));
        if blk.memory.write_slice(part, span.address).is_err() {
            return answer.give(status::IOERR, 0);
        }
        left = rest;
    }
    answer.give(status::OK, (request::ID_BYTES - left.len()) as u32);
}

/// Discard and write zeroes: a list of ranges, all of which are looked at before the first is touched.
fn ranges(blk: &Blk, answer: Answer, kind: u32, mut data: Vec<Span>, through: bool) {
    let info = blk.disk.info();
    let discard = kind == request::DISCARD;
    if info.read_only || discard && !info.discard {
        return answer.give(status::UNSUPP, 0);
    }
    let total: u64 = data.iter().map(|span| span.len as u64).sum();
    let count = total / request::RANGE_BYTES as u64;
    if count == 0 || count > u64::from(MAX_RANGES) || !total.is_multiple_of(request::RANGE_BYTES as u64) {
        return answer.give(status::IOERR, 0);
    }
    let mut parts = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let Some(range) = take::<{ request::RANGE_BYTES }>(&blk.memory, &mut data) else {
            return answer.give(status::IOERR, 0);
        };
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = range;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes(flags);
        // Unknown flags, and unmap for a discard, are to be refused (§5.2.6.2).
        let known = if discard { 0 } else { request::UNMAP };
        if flags & !known != 0 {
            return answer.give(status::UNSUPP, 0);
        }
        let end = sector.checked_add(sectors.into()).and_then(|end| end.checked_mul(SECTOR));
        if end.is_none_or(|end| end > info.size_bytes) || sectors > MAX_RANGE_SECTORS {
            return answer.give(status::IOERR, 0);
        }
        let operation = match discard {
            true => Operation::Discard,
            false => Operation::WriteZeroes { unmap: flags & request::UNMAP != 0, fua: through },
        };
        parts.push((operation, sector * SECTOR, u64::from(sectors) * SECTOR));
    }
    let all = Arc::new(All {
        left: AtomicUsize::new(parts.len()),
        status: AtomicU8::new(status::OK),
        answer: std::sync::Mutex::new(Some(answer)),
    });
    for (operation, offset, len) in parts {
        let all = all.clone();
        blk.disk.submit(Request {
            operation,
            offset,
            len,
            buffers: Buffers::NONE,
            done: Box::new(move |result| all.part_ended(result.err())),
        });
    }
}

/// A request that ends when all its parts have.
struct All {
    left: AtomicUsize,
    status: AtomicU8,
    answer: std::sync::Mutex<Option<Answer>>,
}

impl All {
    fn part_ended(&self, error: Option<IoError>) {
        if let Some(error) = error {
            self.status.store(status_of(&error), Ordering::Relaxed);
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1
            && let Some(answer) = crate::access::lock(&self.answer).take()
        {
            answer.give(self.status.load(Ordering::Relaxed), 0);
        }
    }
}
