//! NVM commands: the namespace's data (NVMe 1.4 §6).

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use block::{Buffers, IoError, Operation, Request};
use vm_memory::Bytes;

use super::bits::{Status, nvm, size};
use super::{Command, MDTS, Nvme, Tag};
use crate::access::lock;

/// What a failure of the disk is for the driver.
fn status_of(operation: Operation, error: &IoError) -> Status {
    match (error, operation) {
        (IoError::OutOfRange, _) => Status::LBA_OUT_OF_RANGE,
        (IoError::ReadOnly, _) => Status::WRITE_PROTECTED,
        (IoError::Buffers, _) => Status::DATA_TRANSFER_ERROR,
        (IoError::NoSpace, _) => Status::CAPACITY_EXCEEDED,
        (_, Operation::Read) => Status::READ_ERROR,
        (_, Operation::Flush) => Status::INTERNAL_ERROR,
        _ => Status::WRITE_FAULT,
    }
}

/// A range of the namespace in bytes.
#[derive(Clone, Copy)]
struct Range {
    offset: u64,
    len: u64,
}

impl Nvme {
    /// Carries out a command of an I/O queue.
    pub(super) fn io(&self, tag: Tag, command: &Command) {
        let namespace = command.namespace();
        // A flush may be for all namespaces, of which there is one.
        let all = command.opcode() == nvm::FLUSH && namespace == u32::MAX;
        if namespace != 1 && !all {
            return self.complete(tag, Status::INVALID_NAMESPACE, 0);
        }
        let fua = command.dword(12) & nvm::FUA != 0;
        let started = match command.opcode() {
            nvm::FLUSH => self.submit(tag, Operation::Flush, Range { offset: 0, len: 0 }, Buffers::NONE),
            nvm::READ => self.transfer(tag, command, Operation::Read),
            nvm::WRITE => self.transfer(tag, command, Operation::Write { fua }),
            nvm::COMPARE => self.compare(tag, command),
            nvm::WRITE_ZEROES => {
                let unmap = command.dword(12) & nvm::DEALLOCATE != 0;
                self.range(command).and_then(|range| {
                    self.submit(tag, Operation::WriteZeroes { unmap, fua }, range, Buffers::NONE)
                })
            }
            nvm::DATASET_MANAGEMENT if self.config.dataset_management => self.deallocate(tag, command),
            _ => Err(Status::INVALID_OPCODE),
        };
        if let Err(status) = started {
            self.complete(tag, status, 0);
        }
    }

    /// The blocks that a command is for: the first in dwords 10 and 11, their number less one in dword 12.
    fn range(&self, command: &Command) -> Result<Range, Status> {
        let blocks = u64::from(command.dword(12) as u16) + 1;
        self.blocks(command.qword(10), blocks)
    }

    fn blocks(&self, first: u64, count: u64) -> Result<Range, Status> {
        let unit = u64::from(self.config.block_bytes);
        let end = first.checked_add(count).and_then(|end| end.checked_mul(unit));
        if end.is_none_or(|end| end > self.disk.info().size_bytes) {
            return Err(Status::LBA_OUT_OF_RANGE);
        }
        Ok(Range { offset: first * unit, len: count * unit })
    }

    fn submit(&self, tag: Tag, operation: Operation, range: Range, buffers: Buffers) -> Result<(), Status> {
        let own = self.own.clone();
        self.disk.submit(Request {
            operation,
            offset: range.offset,
            len: range.len,
            buffers,
            done: Box::new(move |result| {
                let status = result.err().map_or(Status::SUCCESS, |error| status_of(operation, &error));
                if let Some(nvme) = own.upgrade() {
                    nvme.complete(tag, status, 0);
                }
            }),
        });
        Ok(())
    }

    fn transfer(&self, tag: Tag, command: &Command, operation: Operation) -> Result<(), Status> {
        let range = self.range(command)?;
        if range.len > size::PAGE << MDTS {
            return Err(Status::INVALID_FIELD);
        }
        let spans = command.data(&self.memory, range.len)?;
        self.submit(tag, operation, range, Buffers::Guest(spans))
    }

    /// Reads, and looks whether it is the same as in memory.
    fn compare(&self, tag: Tag, command: &Command) -> Result<(), Status> {
        let range = self.range(command)?;
        if range.len > size::PAGE << MDTS {
            return Err(Status::INVALID_FIELD);
        }
        let spans = command.data(&self.memory, range.len)?;
        let own = self.own.clone();
        let same = move |nvme: &Nvme, read: &[u8]| -> Result<(), Status> {
            let mut read = read;
            for span in &spans {
                let mut ours = vec![0; span.len];
                nvme.memory.read_slice(&mut ours, span.address).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
                let (part, rest) = read.split_at_checked(span.len).ok_or(Status::INTERNAL_ERROR)?;
                if part != ours {
                    return Err(Status::COMPARE_FAILURE);
                }
                read = rest;
            }
            Ok(())
        };
        self.disk.submit(Request {
            operation: Operation::Read,
            offset: range.offset,
            len: range.len,
            buffers: Buffers::Host(vec![0; range.len as usize]),
            done: Box::new(move |result| {
                let Some(nvme) = own.upgrade() else { return };
                let status = result
                    .map_err(|error| status_of(Operation::Read, &error))
                    .and_then(|read| same(&nvme, &read))
                    .err();
                nvme.complete(tag, status.unwrap_or(Status::SUCCESS), 0);
            }),
        });
        Ok(())
    }

    /// Dataset management: a list of ranges, of which those to be deallocated are. Other attributes are hints that nobody has to take.
    fn deallocate(&self, tag: Tag, command: &Command) -> Result<(), Status> {
        let count = usize::from(command.dword(10) as u8) + 1;
        if self.disk.info().read_only {
            return Err(Status::WRITE_PROTECTED);
        }
        let mut list = [0; nvm::RANGE_BYTES * nvm::MAX_RANGES];
        let list = &mut list[..nvm::RANGE_BYTES * count];
        let mut left = &mut list[..];
        for span in command.data(&self.memory, left.len() as u64)? {
            let (part, rest) = left.split_at_mut(span.len.min(left.len()));
            self.memory.read_slice(part, span.address).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
            left = rest;
        }
        let mut ranges = Vec::with_capacity(count);
        for bytes in list.as_chunks::<16>().0 {
            let [_, _, _, _, n0, n1, n2, n3, first @ ..] = *bytes;
            let blocks = u32::from_le_bytes([n0, n1, n2, n3]);
            if blocks > 0 {
                ranges.push(self.blocks(u64::from_le_bytes(first), blocks.into())?);
            }
        }
        if command.dword(11) & nvm::ATTRIBUTE_DEALLOCATE == 0 || ranges.is_empty() {
            self.complete(tag, Status::SUCCESS, 0);
            return Ok(());
        }
        let parts = Arc::new((AtomicUsize::new(ranges.len()), Mutex::new(Status::SUCCESS)));
        for range in ranges {
            let (own, parts) = (self.own.clone(), parts.clone());
            self.disk.submit(Request {
                operation: Operation::Discard,
                offset: range.offset,
                len: range.len,
                buffers: Buffers::NONE,
                done: Box::new(move |result| {
                    let (left, status) = &*parts;
                    if let Err(error) = result {
                        *lock(status) = status_of(Operation::Discard, &error);
                    }
                    if left.fetch_sub(1, Ordering::AcqRel) == 1
                        && let Some(nvme) = own.upgrade()
                    {
                        let status = *lock(status);
                        nvme.complete(tag, status, 0);
                    }
                }),
            });
        }
        Ok(())
    }
}
