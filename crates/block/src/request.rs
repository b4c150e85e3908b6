//! What a controller asks of a disk.

use std::fmt;

use vm_memory::GuestAddress;

use crate::IoError;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// From the disk into the buffers.
    Read,
    /// From the buffers to the disk.
    Write {
        /// Only done when stable (force unit access).
        fua: bool,
    },
    /// Makes every write stable that was done before this was submitted.
    Flush,
    /// The contents are no longer needed; what is read there afterwards is unspecified, but the same each time.
    Discard,
    /// Makes the range read as zeros.
    WriteZeroes {
        /// Space may be given back.
        unmap: bool,
        /// Only done when stable.
        fua: bool,
    },
}

impl Operation {
    /// Whether the disk may be different afterwards.
    pub fn changes_disk(self) -> bool {
        matches!(self, Operation::Write { .. } | Operation::Discard | Operation::WriteZeroes { .. })
    }
}

/// A contiguous piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Guest-physical address.
    pub address: GuestAddress,
    /// Bytes.
    pub len: usize,
}

/// Where the data of a request is.
#[derive(Clone, PartialEq, Eq)]
pub enum Buffers {
    /// In guest memory, in this order. Empty for operations without data.
    Guest(Vec<Span>),
    /// In memory of the host, for what a controller works on itself; `done` gets it back.
    Host(Vec<u8>),
}

impl Buffers {
    /// For operations without data.
    pub const NONE: Buffers = Buffers::Guest(Vec::new());

    /// Bytes in all; `None` if that overflows.
    pub fn len(&self) -> Option<u64> {
        match self {
            Buffers::Guest(spans) => {
                spans.iter().try_fold(0u64, |sum, span| sum.checked_add(span.len as u64))
            }
            Buffers::Host(bytes) => Some(bytes.len() as u64),
        }
    }

    /// Whether there is nothing in them.
    pub fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Buffers::Guest(spans) => f.debug_list().entries(spans).finish(),
            Buffers::Host(bytes) => write!(f, "{} bytes of the host", bytes.len()),
        }
    }
}

/// Called once when a request has ended, on whatever thread ended it, possibly before [`crate::Disk::submit`] returns: no lock may be
/// held there that it takes. Gets the buffer back if it was the host's, otherwise an empty one.
pub type Done = Box<dyn FnOnce(Result<Vec<u8>, IoError>) + Send>;

/// One request.
pub struct Request {
    /// What.
    pub operation: Operation,
    /// Where on the disk, in bytes; a multiple of the logical sector size. Nothing for a flush.
    pub offset: u64,
    /// How much, in bytes; a multiple of the logical sector size. Nothing for a flush.
    pub len: u64,
    /// The data of reads and writes: `len` bytes.
    pub buffers: Buffers,
    /// Called at the end.
    pub done: Done,
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("operation", &self.operation)
            .field("offset", &self.offset)
            .field("len", &self.len)
            .field("buffers", &self.buffers)
            .finish_non_exhaustive()
    }
}
