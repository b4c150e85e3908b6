//! A command as it stands in a submission queue (NVMe 1.4 §4.2), and where its data is.

use block::Span;
use memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::bits::{Status, sgl, size};

/// The 64 bytes of a command.
#[derive(Clone, Copy, Debug)]
pub(super) struct Command {
    dwords: [u32; 16],
}

impl Command {
    pub fn new(bytes: &[u8; size::SQE]) -> Self {
        let mut dwords = [0; 16];
        for (dword, bytes) in dwords.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *dword = u32::from_le_bytes(*bytes);
        }
        Command { dwords }
    }

    pub fn opcode(&self) -> u8 {
        self.dwords[0] as u8
    }

    /// Command identifier.
    pub fn id(&self) -> u16 {
        (self.dwords[0] >> 16) as u16
    }

    pub fn namespace(&self) -> u32 {
        self.dwords[1]
    }

    /// Command dword 10 and the following.
    pub fn dword(&self, number: usize) -> u32 {
        self.dwords[number]
    }

    /// Two command dwords as one number, the low one first.
    pub fn qword(&self, number: usize) -> u64 {
        u64::from(self.dwords[number]) | u64::from(self.dwords[number + 1]) << 32
    }

    fn fused(&self) -> bool {
        self.dwords[0] >> 8 & 3 != 0
    }

    fn uses_sgl(&self) -> bool {
        self.dwords[0] >> 14 & 3 != 0
    }

    /// Where `len` bytes of data are. Neighbouring pieces are made one.
    pub fn data(&self, memory: &GuestMemory, len: u64) -> Result<Vec<Span>, Status> {
        if self.fused() {
            return Err(Status::INVALID_FIELD);
        }
        let mut pieces = Pieces { spans: Vec::new(), left: len };
        if self.uses_sgl() {
            pieces.by_sgl(memory, &self.dwords)?;
        } else {
            pieces.by_prp(memory, self.qword(6), self.qword(8))?;
        }
        Ok(pieces.spans)
    }
}

/// The pieces found so far, and how many bytes are still to be found.
struct Pieces {
    spans: Vec<Span>,
    left: u64,
}

impl Pieces {
    fn add(&mut self, address: u64, len: u64) {
        let len = len.min(self.left);
        self.left -= len;
        match self.spans.last_mut() {
            Some(last) if last.address.0.checked_add(last.len as u64) == Some(address) => {
                last.len += len as usize;
            }
            _ if len == 0 => {}
            _ => self.spans.push(Span { address: GuestAddress(address), len: len as usize }),
        }
    }

    /// Physical region pages (§4.3): the first may begin within a page; the second is a page, or if more are needed, a list of
    /// pages, whose last entry in a page is another list's.
    fn by_prp(&mut self, memory: &GuestMemory, first: u64, second: u64) -> Result<(), Status> {
        if !first.is_multiple_of(4) {
            return Err(Status::PRP_OFFSET);
        }
        self.add(first, size::PAGE - first % size::PAGE);
        if self.left == 0 {
            return Ok(());
        }
        if self.left <= size::PAGE {
            return self.add_page(second);
        }
        if !second.is_multiple_of(8) {
            return Err(Status::PRP_OFFSET);
        }
        let mut at = second;
        while self.left > 0 {
            // Each list but the last brings at least one page nearer to the end, so this ends.
            let entries = (size::PAGE - at % size::PAGE) / 8;
            let pages = self.left.div_ceil(size::PAGE);
            let chained = pages > entries;
            let mut list = vec![0; 8 * entries.min(pages) as usize];
            memory.read_slice(&mut list, GuestAddress(at)).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
            let entry = |bytes: &[u8; 8]| u64::from_le_bytes(*bytes);
            let (list, _) = list.as_chunks::<8>();
            let (pages, next) = if chained { list.split_at(list.len() - 1) } else { (list, &[][..]) };
            for page in pages {
                self.add_page(entry(page))?;
            }
            match next.first().map(entry) {
                Some(next) if !next.is_multiple_of(size::PAGE) => return Err(Status::PRP_OFFSET),
                Some(next) => at = next,
                None => {}
            }
        }
        Ok(())
    }

    fn add_page(&mut self, page: u64) -> Result<(), Status> {
        if !page.is_multiple_of(size::PAGE) {
            return Err(Status::PRP_OFFSET);
        }
        self.add(page, size::PAGE);
        Ok(())
    }

    /// Scatter gather lists (§4.4): a data block, or a segment of descriptors, the last of which may be another segment's.
    fn by_sgl(&mut self, memory: &GuestMemory, command: &[u32; 16]) -> Result<(), Status> {
        /// Descriptors of a segment and segments of a list at most.
        const MOST: u32 = 4096;
        let [.., d6, d7, d8, d9, _, _, _, _, _, _] = *command;
        let mut next = (u64::from(d6) | u64::from(d7) << 32, d8, (d9 >> 24) as u8);
        for _ in 0..MOST {
            let (address, len, kind) = next;
            match kind >> 4 {
                sgl::DATA_BLOCK => {
                    self.add(address, len.into());
                    break;
                }
                sgl::SEGMENT | sgl::LAST_SEGMENT => {}
                _ => return Err(Status::SGL_TYPE),
            }
            let count = len / sgl::BYTES as u32;
            if count == 0 || count > MOST || !u64::from(len).is_multiple_of(sgl::BYTES) {
                return Err(Status::SGL_SEGMENT);
            }
            let mut segment = vec![0; len as usize];
            memory
                .read_slice(&mut segment, GuestAddress(address))
                .map_err(|_| Status::DATA_TRANSFER_ERROR)?;
            let mut chained = None;
            let (descriptors, _) = segment.as_chunks::<16>();
            for (index, bytes) in descriptors.iter().enumerate() {
                let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, _, _, _, inner] = *bytes;
                let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
                let len = u32::from_le_bytes([l0, l1, l2, l3]);
                match inner >> 4 {
                    sgl::DATA_BLOCK => self.add(address, len.into()),
                    sgl::SEGMENT | sgl::LAST_SEGMENT
                        if kind >> 4 == sgl::SEGMENT && index + 1 == descriptors.len() =>
                    {
                        chained = Some((address, len, inner));
                    }
                    sgl::SEGMENT | sgl::LAST_SEGMENT => return Err(Status::SGL_SEGMENT),
                    _ => return Err(Status::SGL_TYPE),
                }
            }
            match chained {
                Some(segment) => next = segment,
                None => break,
            }
        }
        if self.left > 0 { Err(Status::SGL_LENGTH) } else { Ok(()) }
    }
}
