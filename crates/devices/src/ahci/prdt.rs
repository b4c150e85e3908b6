//! The table of physical region descriptors: where in guest memory a command's data is (§4.2.3.3).

use std::vec::IntoIter;

use block::Span;
use memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::bits::table::{PRD_BYTES, PRD_COUNT, PRD_INTERRUPT};

/// Pieces that are handed out at a time at most, so that a table of tiny regions is no way to the host's memory.
const MAX_SPANS: usize = 4096;
/// Descriptors that are read at a time.
const BATCH: usize = 32;

/// The table, or a descriptor of it, is not in guest memory.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NotMemory;

struct Region {
    address: u64,
    len: u64,
    interrupt: bool,
}

/// A table that is used up from front to back.
pub(super) struct Prdt {
    /// Where the next descriptors are.
    table: u64,
    /// How many are left there.
    left: usize,
    batch: IntoIter<Region>,
    /// The region that is being used.
    current: Region,
    interrupt: bool,
}

impl Prdt {
    /// A table of `entries` descriptors at a guest address.
    pub fn new(table: u64, entries: u16) -> Self {
        let current = Region { address: 0, len: 0, interrupt: false };
        Prdt { table, left: entries.into(), batch: Vec::new().into_iter(), current, interrupt: false }
    }

    /// Whether a region that has been used up asks for an interrupt.
    pub fn interrupt(&self) -> bool {
        self.interrupt
    }

    /// The next `want` bytes: their pieces and how many there are. Fewer if the table ends, or would make too many pieces: then a
    /// multiple of `unit`, and not nothing.
    pub fn take(
        &mut self,
        memory: &GuestMemory,
        want: u64,
        unit: u64,
    ) -> Result<(Vec<Span>, u64), NotMemory> {
        self.take_pieces(memory, want, unit, MAX_SPANS)
    }

    /// The rest of the table, in as many pieces as that takes: 65,535 at most.
    pub fn take_all(&mut self, memory: &GuestMemory) -> Result<(Vec<Span>, u64), NotMemory> {
        self.take_pieces(memory, u64::MAX, 1, usize::MAX)
    }

    fn take_pieces(
        &mut self,
        memory: &GuestMemory,
        want: u64,
        unit: u64,
        most: usize,
    ) -> Result<(Vec<Span>, u64), NotMemory> {
        let mut spans: Vec<Span> = Vec::new();
        let mut got = 0;
        while got < want {
            if self.current.len == 0 && !self.advance(memory)? {
                break;
            }
            let mut wanted = want - got;
            if spans.len() >= most {
                match got % unit {
                    0 => break,
                    part => wanted = wanted.min(unit - part),
                }
            }
            let len = self.current.len.min(wanted);
            let address = self.current.address;
            match spans.last_mut() {
                Some(last) if last.address.0.checked_add(last.len as u64) == Some(address) => {
                    last.len += len as usize;
                }
                _ => spans.push(Span { address: GuestAddress(address), len: len as usize }),
            }
            got += len;
            self.current.len -= len;
            self.current.address = address.checked_add(len).ok_or(NotMemory)?;
            self.interrupt |= self.current.len == 0 && self.current.interrupt;
        }
        Ok((spans, got))
    }

    /// Goes on to the next region; false at the end of the table.
    fn advance(&mut self, memory: &GuestMemory) -> Result<bool, NotMemory> {
        if self.batch.len() == 0 && self.left > 0 {
            let count = self.left.min(BATCH);
            let mut bytes = [0; BATCH * PRD_BYTES];
            let bytes = &mut bytes[..count * PRD_BYTES];
            memory.read_slice(bytes, GuestAddress(self.table)).map_err(|_| NotMemory)?;
            self.table = self.table.checked_add(bytes.len() as u64).ok_or(NotMemory)?;
            self.left -= count;
            self.batch = bytes.chunks_exact(PRD_BYTES).map(region).collect::<Vec<_>>().into_iter();
        }
        let next = self.batch.next();
        let there = next.is_some();
        if let Some(next) = next {
            self.current = next;
        }
        Ok(there)
    }
}

/// A descriptor. Regions are to be words; odd ones are taken as they are, since rounding them up would overwrite a byte that is not
/// the command's.
fn region(bytes: &[u8]) -> Region {
    let mut low = [0; 8];
    let mut high = [0; 8];
    low.copy_from_slice(&bytes[..8]);
    high.copy_from_slice(&bytes[8..PRD_BYTES]);
    let last = (u64::from_le_bytes(high) >> 32) as u32;
    Region {
        address: u64::from_le_bytes(low),
        len: u64::from(last & PRD_COUNT) + 1,
        interrupt: last & PRD_INTERRUPT != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: u64 = 0x1000;

    fn memory(regions: &[(u64, u32)]) -> GuestMemory {
        let memory = memory::join_regions(vec![memory::create_region("test", 0, 4 << 20).unwrap()]).unwrap();
        for (i, (address, last)) in regions.iter().enumerate() {
            let at = TABLE + (i * PRD_BYTES) as u64;
            memory.write_obj(*address, GuestAddress(at)).unwrap();
            memory.write_obj(u64::from(*last) << 32, GuestAddress(at + 8)).unwrap();
        }
        memory
    }

    fn pieces(spans: &[Span]) -> Vec<(u64, usize)> {
        spans.iter().map(|span| (span.address.0, span.len)).collect()
    }

    #[test]
    fn regions_are_used_up_in_order_and_neighbours_are_joined() {
        let memory = memory(&[(0x8000, 0xfff), (0x9000, 0xfff), (0x2_0000, 0x1ff | PRD_INTERRUPT), (3, 6)]);
        let mut prdt = Prdt::new(TABLE, 4);
        let (spans, got) = prdt.take(&memory, 0x1800, 512).unwrap();
        assert_eq!((pieces(&spans), got), (vec![(0x8000, 0x1800)], 0x1800));
        let (spans, got) = prdt.take(&memory, 0x900, 512).unwrap();
        assert_eq!((pieces(&spans), got), (vec![(0x9800, 0x800), (0x2_0000, 0x100)], 0x900));
        assert!(!prdt.interrupt(), "the region that asks is not used up");
        let (spans, got) = prdt.take(&memory, 0x1000, 512).unwrap();
        assert_eq!((pieces(&spans), got), (vec![(0x2_0100, 0x100), (3, 7)], 0x107), "the table ends");
        assert!(prdt.interrupt());
        assert_eq!(prdt.take(&memory, 1, 1).unwrap().1, 0);
    }

    #[test]
    fn a_table_of_crumbs_is_handed_out_in_whole_sectors() {
        // Regions of 7 bytes that do not touch: 512 is no multiple of it.
        let regions: Vec<_> = (0..60_000).map(|i| (0x20_0000 + i * 8, 6)).collect();
        let memory = memory(&regions);
        let mut prdt = Prdt::new(TABLE, 60_000);
        let mut total = 0;
        while total < 409_600 {
            let (spans, got) = prdt.take(&memory, 409_600 - total, 512).unwrap();
            assert!(spans.len() <= MAX_SPANS + 512 && got > 0 && got % 512 == 0, "{} {got}", spans.len());
            assert_eq!(spans.iter().map(|span| span.len as u64).sum::<u64>(), got);
            total += got;
        }
        assert_eq!(total, 409_600);
    }

    #[test]
    fn tables_and_regions_outside_of_memory_are_errors() {
        let memory = memory(&[(u64::MAX - 1, 0xfff)]);
        assert_eq!(Prdt::new(4 << 20, 1).take(&memory, 512, 512), Err(NotMemory));
        assert_eq!(Prdt::new(u64::MAX - 15, 2).take(&memory, 512, 512), Err(NotMemory));
        assert_eq!(Prdt::new(TABLE, 1).take(&memory, 4096, 512), Err(NotMemory), "wraps around");
    }
}
