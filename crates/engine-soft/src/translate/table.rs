//! Numbered records in code memory: what is known of the code counts against the same limit as the code.

use std::marker::PhantomData;
use std::ops::{Index, IndexMut};

use crate::native::arena::{Arena, Chunk};

/// An array that grows by chunks of an [`Arena`]. Records never move.
pub struct Table<T> {
    chunks: Vec<Chunk>,
    len: usize,
    records: PhantomData<T>,
}

impl<T: Copy> Table<T> {
    const PER_CHUNK: usize = Chunk::BYTES / size_of::<T>();

    /// An empty one.
    pub fn new() -> Self {
        const { assert!(size_of::<T>() != 0 && align_of::<T>() <= 4096, "chunks are aligned to pages") };
        Table { chunks: Vec::new(), len: 0, records: PhantomData }
    }

    /// Number of records, and number that the next one gets.
    pub fn len(&self) -> u32 {
        self.len as u32
    }

    /// Adds a record; `None` if the arena has no room.
    pub fn push(&mut self, arena: &mut Arena, record: T) -> Option<()> {
        if self.len == self.chunks.len() * Self::PER_CHUNK {
            self.chunks.push(arena.chunk()?);
        }
        let place = self.place(self.len);
        // SAFETY: the place lies in a chunk that is this table's own.
        unsafe { place.write(record) };
        self.len += 1;
        Some(())
    }

    /// Lets go of all records and their memory.
    pub fn clear(&mut self) {
        self.chunks.clear();
        self.len = 0;
    }

    /// Where a record is. Its chunk has to be there already.
    fn place(&self, number: usize) -> *mut T {
        let chunk = self.chunks[number / Self::PER_CHUNK].base().cast::<T>();
        // SAFETY: the remainder is less than the number of records that the chunk holds.
        unsafe { chunk.as_ptr().add(number % Self::PER_CHUNK) }
    }
}

impl<T: Copy> Index<u32> for Table<T> {
    type Output = T;

    fn index(&self, number: u32) -> &T {
        let number = number as usize;
        assert!(number < self.len, "no such record");
        // SAFETY: it was written by `push`, and changes only through an exclusive borrow.
        unsafe { &*self.place(number) }
    }
}

impl<T: Copy> IndexMut<u32> for Table<T> {
    fn index_mut(&mut self, number: u32) -> &mut T {
        let number = number as usize;
        assert!(number < self.len, "no such record");
        // SAFETY: as above; the table is borrowed exclusively.
        unsafe { &mut *self.place(number) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_stay_what_they_are_until_there_is_no_room() {
        let mut arena = Arena::new(3 * Chunk::BYTES).unwrap();
        let mut table = Table::<[u32; 5]>::new();
        let mut count = 0;
        while table.push(&mut arena, [count; 5]).is_some() {
            count += 1;
        }
        assert_eq!(count as usize, 3 * (Chunk::BYTES / 20));
        assert_eq!(table.len(), count);
        table[1] = [7; 5];
        assert_eq!(table[1], [7; 5]);
        assert_eq!(table[count - 1], [count - 1; 5]);
        table.clear();
        arena.reclaim_chunks();
        assert_eq!(arena.occupied(), 0);
    }

    #[test]
    #[should_panic(expected = "no such record")]
    fn there_is_no_record_behind_the_last() {
        let mut arena = Arena::new(Chunk::BYTES).unwrap();
        let mut table = Table::new();
        table.push(&mut arena, 0u64).unwrap();
        let _ = table[1];
    }
}
