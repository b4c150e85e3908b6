//! Submission and completion queues (NVMe 1.4 §4.1).

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use memory::GuestMemory;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::bits::{Status, size};
use super::command::Command;

/// A submission queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SubmissionQueue {
    pub base: u64,
    /// Entries.
    pub size: u16,
    pub head: u16,
    pub tail: u16,
    /// Where its completions go.
    pub completions: u16,
    /// Commands whose completion has not been posted.
    pub in_flight: u16,
    /// Somebody takes commands off it.
    #[serde(skip)]
    pub busy: bool,
}

impl SubmissionQueue {
    pub fn new(base: u64, size: u16, completions: u16) -> Self {
        SubmissionQueue { base, size, head: 0, tail: 0, completions, in_flight: 0, busy: false }
    }

    /// The next command, if there is one and no more than `most` are in flight.
    pub fn fetch(&mut self, memory: &GuestMemory, most: u16) -> Result<Option<Command>, Status> {
        if self.head == self.tail || self.in_flight >= most.min(self.size) {
            return Ok(None);
        }
        let mut bytes = [0; size::SQE];
        let at = self.base.wrapping_add(u64::from(self.head) * size::SQE as u64);
        memory.read_slice(&mut bytes, GuestAddress(at)).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
        self.head = if self.head + 1 == self.size { 0 } else { self.head + 1 };
        self.in_flight += 1;
        Ok(Some(Command::new(&bytes)))
    }
}

/// What is told of a command that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Completion {
    pub result: u32,
    pub queue: u16,
    pub queue_head: u16,
    pub command: u16,
    pub status: u16,
}

/// A completion queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CompletionQueue {
    pub base: u64,
    pub size: u16,
    pub head: u16,
    pub tail: u16,
    pub phase: bool,
    /// Interrupts when it has entries.
    pub interrupts: bool,
    pub vector: u16,
    /// Submission queues that use it.
    pub users: u16,
    /// What found it full.
    pub waiting: VecDeque<Completion>,
}

impl CompletionQueue {
    pub fn new(base: u64, size: u16, interrupts: bool, vector: u16) -> Self {
        CompletionQueue {
            base,
            size,
            head: 0,
            tail: 0,
            phase: true,
            interrupts,
            vector,
            users: 0,
            waiting: VecDeque::new(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.head == self.tail
    }

    fn next(&self, index: u16) -> u16 {
        if index + 1 == self.size { 0 } else { index + 1 }
    }

    /// Adds an entry, or keeps it until there is room. Says whether there is a new one for the driver.
    pub fn post(&mut self, memory: &GuestMemory, completion: Completion) -> bool {
        self.waiting.push_back(completion);
        self.write_waiting(memory)
    }

    /// The driver has taken entries: those that waited move up.
    pub fn write_waiting(&mut self, memory: &GuestMemory) -> bool {
        let mut posted = false;
        while self.next(self.tail) != self.head
            && let Some(completion) = self.waiting.pop_front()
        {
            let at = self.base.wrapping_add(u64::from(self.tail) * size::CQE);
            let mut bytes = [0; 12];
            bytes[..4].copy_from_slice(&completion.result.to_le_bytes());
            bytes[8..10].copy_from_slice(&completion.queue_head.to_le_bytes());
            bytes[10..].copy_from_slice(&completion.queue.to_le_bytes());
            let status = completion.status << 1 | u16::from(self.phase);
            let last = u32::from(completion.command) | u32::from(status) << 16;
            // A queue outside of memory is the driver's loss. The word with the phase is the last to be written.
            let _ = memory.write_slice(&bytes, GuestAddress(at));
            let _ = memory.store(last, GuestAddress(at.wrapping_add(12)), Ordering::Release);
            self.tail = self.next(self.tail);
            self.phase ^= self.tail == 0;
            posted = true;
        }
        posted
    }
}
