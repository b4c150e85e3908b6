//! A command on its way: its steps, one after another, each a request to the disk or done at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use block::{Buffers, Disk, IoError, Operation, Request, Span};
use memory::GuestMemory;
use vm_memory::Bytes;

use super::ata::trim;
use super::atapi::{Packet, PacketDevice, PacketEnd, PacketError};
use super::controller::Controller;
use super::device::{Command, Failure, Outcome, Plan, Protocol, Todo, Worker};
use super::prdt::{NotMemory, Prdt};
use crate::access::lock;

/// Bytes of one request to the disk at most; the largest command of a disk with sectors of 512 bytes.
const MAX_REQUEST_BYTES: u64 = 32 << 20;
/// Bytes that are read at a time where nobody wants to have them.
const VERIFY_BYTES: u64 = 256 << 10;

/// Which command of which port, and in which of the port's lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket {
    pub port: usize,
    pub slot: u8,
    pub life: u64,
}

/// How a command ended.
pub(super) struct End {
    /// Bytes that have been transferred.
    pub moved: u64,
    /// There were more than the table has room for.
    pub overflow: bool,
    /// A region asked for an interrupt.
    pub interrupt: bool,
    pub result: Result<(), Failure>,
}

/// A command on its way.
pub(super) struct Job {
    controller: Arc<Controller>,
    pub ticket: Ticket,
    pub command: Command,
    pub protocol: Protocol,
    /// The registers at the end if all goes well.
    pub outcome: Outcome,
    /// Where the command's header is.
    pub header: u64,
    /// Whether data comes from the host, if it has data of the disk.
    pub access: Option<bool>,
    work: Mutex<Work>,
}

enum Left {
    Start(Todo),
    Access { operation: Operation, offset: u64, len: u64 },
    Verify { offset: u64, len: u64, buffer: Vec<u8> },
    Discard(std::vec::IntoIter<(u64, u64)>),
    Nothing,
}

struct Work {
    worker: Worker,
    left: Left,
    prdt: Prdt,
    moved: u64,
    overflow: bool,
    /// Of the request that is on its way: how many bytes, and where on the disk.
    underway: (u64, u64),
    failure: Option<Failure>,
}

/// What comes next.
enum Step {
    Disk { disk: Arc<Disk>, operation: Operation, offset: u64, len: u64, buffers: Buffers },
    Packet { unit: Arc<dyn PacketDevice>, packet: ([u8; 16], Vec<Span>) },
    End(End),
}

impl From<NotMemory> for Failure {
    fn from(_: NotMemory) -> Self {
        Failure::Memory
    }
}

impl Job {
    /// A command that a device has taken.
    pub fn new(
        controller: &Arc<Controller>,
        ticket: Ticket,
        command: Command,
        plan: Plan,
        worker: Worker,
        (header, prdt): (u64, Prdt),
    ) -> Arc<Self> {
        let access = if let Todo::Access { write, .. } = plan.todo { Some(write) } else { None };
        let work = Work {
            worker,
            left: Left::Start(plan.todo),
            prdt,
            moved: 0,
            overflow: false,
            underway: (0, 0),
            failure: None,
        };
        Arc::new(Job {
            controller: controller.clone(),
            ticket,
            command,
            protocol: plan.protocol,
            outcome: plan.outcome,
            header,
            access,
            work: Mutex::new(work),
        })
    }

    /// Goes on until something has to be waited for, or to the end.
    pub fn run(self: &Arc<Self>) {
        loop {
            // What a reset has ended is not gone on with.
            let lives = self.controller.lives(self.ticket);
            let step = {
                let mut work = lock(&self.work);
                if lives { work.next(self.controller.memory()) } else { work.end() }
            };
            // Whoever comes second, the request's end or the return from submitting it, goes on: so steps that end at once make
            // no recursion.
            let met = Arc::new(AtomicBool::new(false));
            let (job, meet) = (self.clone(), met.clone());
            match step {
                Step::End(end) => return self.controller.ended(self, end),
                Step::Disk { disk, operation, offset, len, buffers } => disk.submit(Request {
                    operation,
                    offset,
                    len,
                    buffers,
                    done: Box::new(move |result| {
                        lock(&job.work).disk_done(result);
                        if meet.swap(true, Ordering::AcqRel) {
                            job.run();
                        }
                    }),
                }),
                Step::Packet { unit, packet: (cdb, data) } => unit.execute(Packet {
                    cdb,
                    data,
                    done: Box::new(move |end| {
                        lock(&job.work).packet_done(end);
                        if meet.swap(true, Ordering::AcqRel) {
                            job.run();
                        }
                    }),
                }),
            }
            if !met.swap(true, Ordering::AcqRel) {
                return;
            }
        }
    }
}

impl Work {
    fn end(&mut self) -> Step {
        let result = self.failure.take().map_or(Ok(()), Err);
        Step::End(End {
            moved: self.moved,
            overflow: self.overflow,
            interrupt: self.prdt.interrupt(),
            result,
        })
    }

    fn fail(&mut self, failure: Failure) -> Step {
        self.overflow |= matches!(failure, Failure::Overflow);
        self.failure = Some(failure);
        self.end()
    }

    fn next(&mut self, memory: &GuestMemory) -> Step {
        if self.failure.is_some() {
            return self.end();
        }
        if let Left::Start(todo) = &mut self.left {
            let todo = std::mem::replace(todo, Todo::Nothing);
            self.left = Left::Nothing;
            match self.start(todo, memory) {
                Ok(Some(step)) => return step,
                Ok(None) => {}
                Err(failure) => return self.fail(failure),
            }
        }
        let Worker::Disk(disk) = &self.worker else { return self.end() };
        let disk = disk.clone();
        match &mut self.left {
            Left::Access { len: 0, .. } | Left::Verify { len: 0, .. } | Left::Nothing | Left::Start(_) => {
                self.end()
            }
            Left::Access { operation, offset, len } => {
                let (operation, at) = (*operation, *offset);
                let unit = u64::from(disk.info().sectors.logical);
                let (spans, got) = match self.prdt.take(memory, (*len).min(MAX_REQUEST_BYTES), unit) {
                    Ok((_, got)) if got == 0 || got % unit != 0 => return self.fail(Failure::Overflow),
                    Ok(taken) => taken,
                    Err(error) => return self.fail(error.into()),
                };
                *offset += got;
                *len -= got;
                self.underway = (at, got);
                Step::Disk { disk, operation, offset: at, len: got, buffers: Buffers::Guest(spans) }
            }
            Left::Verify { offset, len, buffer } => {
                let (at, got) = (*offset, (*len).min(VERIFY_BYTES));
                let mut buffer = std::mem::take(buffer);
                buffer.resize(got as usize, 0);
                *offset += got;
                *len -= got;
                self.underway = (at, 0);
                let (operation, buffers) = (Operation::Read, Buffers::Host(buffer));
                Step::Disk { disk, operation, offset: at, len: got, buffers }
            }
            Left::Discard(ranges) => match ranges.next() {
                Some((offset, len)) => {
                    self.underway = (offset, 0);
                    let (operation, buffers) = (Operation::Discard, Buffers::NONE);
                    Step::Disk { disk, operation, offset, len, buffers }
                }
                None => self.end(),
            },
        }
    }

    /// The first step.
    fn start(&mut self, todo: Todo, memory: &GuestMemory) -> Result<Option<Step>, Failure> {
        match todo {
            Todo::Nothing => {}
            Todo::Send(bytes) => {
                let mut bytes = &bytes[..];
                while !bytes.is_empty() {
                    let (spans, got) = self.prdt.take(memory, bytes.len() as u64, 1)?;
                    if got == 0 {
                        self.overflow = true;
                        break;
                    }
                    for span in spans {
                        let (part, rest) = bytes.split_at(span.len.min(bytes.len()));
                        memory.write_slice(part, span.address).map_err(|_| Failure::Memory)?;
                        bytes = rest;
                        self.moved += part.len() as u64;
                    }
                }
            }
            Todo::Access { write, fua, offset, len } => {
                let operation = if write { Operation::Write { fua } } else { Operation::Read };
                self.left = Left::Access { operation, offset, len };
            }
            Todo::Verify { offset, len } => self.left = Left::Verify { offset, len, buffer: Vec::new() },
            Todo::Trim { list_bytes } => {
                let Worker::Disk(disk) = &self.worker else { return Err(Failure::Aborted) };
                let info = disk.info();
                let list = self.receive(memory, list_bytes)?;
                self.left = Left::Discard(trim::ranges(&list, &info)?.into_iter());
            }
            Todo::Flush => {
                let Worker::Disk(disk) = &self.worker else { return Err(Failure::Aborted) };
                let (disk, operation) = (disk.clone(), Operation::Flush);
                return Ok(Some(Step::Disk { disk, operation, offset: 0, len: 0, buffers: Buffers::NONE }));
            }
            Todo::Packet { cdb } => {
                let Worker::Packet(unit) = &self.worker else { return Err(Failure::Aborted) };
                let unit = unit.clone();
                let (data, _) = self.prdt.take_all(memory)?;
                return Ok(Some(Step::Packet { unit, packet: (cdb, data) }));
            }
        }
        Ok(None)
    }

    /// Takes bytes from the host.
    fn receive(&mut self, memory: &GuestMemory, len: usize) -> Result<Vec<u8>, Failure> {
        let mut bytes = vec![0; len];
        let mut filled = 0;
        while filled < len {
            let (spans, got) = self.prdt.take(memory, (len - filled) as u64, 1)?;
            if got == 0 {
                return Err(Failure::Overflow);
            }
            for span in spans {
                let end = filled + span.len;
                let part = bytes.get_mut(filled..end).ok_or(Failure::Overflow)?;
                memory.read_slice(part, span.address).map_err(|_| Failure::Memory)?;
                filled = end;
            }
        }
        self.moved += len as u64;
        Ok(bytes)
    }

    fn disk_done(&mut self, result: Result<Vec<u8>, IoError>) {
        let (offset, len) = self.underway;
        match result {
            Ok(bytes) => {
                self.moved += len;
                if let Left::Verify { buffer, .. } = &mut self.left {
                    *buffer = bytes;
                }
            }
            Err(IoError::Buffers) => self.failure = Some(Failure::Memory),
            Err(error) => self.failure = Some(Failure::Disk { error, offset }),
        }
    }

    fn packet_done(&mut self, end: PacketEnd) {
        self.moved += end.transferred;
        self.overflow |= end.overflow;
        self.failure = end.result.err().map(|error| match error {
            PacketError::Sense(key) => Failure::Sense(key),
            PacketError::Memory => Failure::Memory,
        });
    }
}
