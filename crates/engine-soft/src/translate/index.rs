//! Units by guest-physical address, and by page.

use rustc_hash::FxHashMap;
use x86::paging::PAGE_SHIFT;

use super::cache::Variant;
use super::records::{NONE, Unit};
use super::table::Table;

/// Bytes of code memory for which there is one bucket: about what a unit takes.
const BYTES_PER_BUCKET: usize = 512;

/// Finds units. What it holds of each is in the unit's own record.
pub struct Index {
    /// First units of the chains, by hash of address and variant.
    buckets: Box<[u32]>,
    pages: FxHashMap<u64, Page>,
    /// The second parts of units that span pages.
    second: FxHashMap<u32, Second>,
}

/// A page of guest code.
struct Page {
    /// Its generation when it was last declared that nothing of it can be relied on.
    generation: Option<u32>,
    /// First of the units that begin here.
    first: u32,
    /// Units that reach into it from the page before.
    reaching: Vec<u32>,
}

/// Where the rest of a unit is that spans pages.
#[derive(Clone, Copy, Debug)]
pub struct Second {
    /// Guest-physical address of the page.
    pub gpa: u64,
    /// As [`Unit::generation`].
    pub generation: u32,
}

impl Index {
    /// An empty one for units in so many bytes of code memory.
    pub fn new(capacity_bytes: usize) -> Self {
        let buckets = (capacity_bytes / BYTES_PER_BUCKET).next_power_of_two();
        Index {
            buckets: vec![NONE; buckets].into(),
            pages: FxHashMap::default(),
            second: FxHashMap::default(),
        }
    }

    fn bucket(&mut self, gpa: u64, variant: Variant) -> &mut u32 {
        let bucket = self.bucket_number(gpa, variant);
        &mut self.buckets[bucket]
    }

    fn bucket_number(&self, gpa: u64, variant: Variant) -> usize {
        const MIX: u64 = 0x9e37_79b9_7f4a_7c15;
        let hash = (gpa ^ u64::from(variant.packed()) << 32).wrapping_mul(MIX);
        (hash >> 32) as usize & (self.buckets.len() - 1)
    }

    /// The unit for a guest-physical address.
    pub fn find(&self, units: &Table<Unit>, gpa: u64, variant: Variant) -> Option<u32> {
        let first = self.buckets[self.bucket_number(gpa, variant)];
        chain(units, first, |unit| unit.next_of_bucket)
            .find(|number| units[*number].gpa == gpa && units[*number].variant == variant)
    }

    /// Where the second part of a unit is.
    pub fn second(&self, number: u32) -> Option<&Second> {
        self.second.get(&number)
    }

    /// The same, to be changed.
    pub fn second_mut(&mut self, number: u32) -> Option<&mut Second> {
        self.second.get_mut(&number)
    }

    /// Adds a unit whose record is in the table already.
    pub fn insert(&mut self, units: &mut Table<Unit>, number: u32, second: Option<Second>) {
        let unit = &mut units[number];
        unit.next_of_bucket = std::mem::replace(self.bucket(unit.gpa, unit.variant), number);
        let page = self.page(unit.gpa, unit.generation);
        unit.next_of_page = std::mem::replace(&mut page.first, number);
        if let Some(second) = second {
            self.page(second.gpa, second.generation).reaching.push(number);
            self.second.insert(number, second);
        }
    }

    /// Removes a unit that will not be entered again.
    pub fn remove(&mut self, units: &mut Table<Unit>, number: u32) {
        let Unit { gpa, variant, .. } = units[number];
        unchain(units, self.bucket(gpa, variant), number, |unit| &mut unit.next_of_bucket);
        if let Some(page) = self.pages.get_mut(&(gpa >> PAGE_SHIFT)) {
            unchain(units, &mut page.first, number, |unit| &mut unit.next_of_page);
        }
        if let Some(second) = self.second.remove(&number)
            && let Some(page) = self.pages.get_mut(&(second.gpa >> PAGE_SHIFT))
        {
            page.reaching.retain(|other| *other != number);
        }
    }

    fn page(&mut self, gpa: u64, generation: u32) -> &mut Page {
        self.pages.entry(gpa >> PAGE_SHIFT).or_insert(Page {
            generation: Some(generation),
            first: NONE,
            reaching: Vec::new(),
        })
    }

    /// Nothing of a page can be relied on, which has this generation now. Returns the units that have to do with it.
    pub fn suspend(&mut self, units: &Table<Unit>, gpa: u64, generation: Option<u32>) -> Vec<u32> {
        let Some(page) = self.pages.get_mut(&(gpa >> PAGE_SHIFT)) else { return Vec::new() };
        page.generation = generation;
        let beginning = chain(units, page.first, |unit| unit.next_of_page);
        beginning.chain(page.reaching.iter().copied()).collect()
    }

    /// Guest-physical addresses of the pages that were written since they were suspended, or since the first unit of them was
    /// made. `generation` says which generation a page has now.
    pub fn changed_pages(&self, generation: impl Fn(u64) -> Option<u32>) -> Vec<u64> {
        let addresses = self.pages.iter().map(|(number, page)| (number << PAGE_SHIFT, page));
        addresses.filter(|(gpa, page)| generation(*gpa) != page.generation).map(|(gpa, _)| gpa).collect()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.buckets.fill(NONE);
        self.pages.clear();
        self.second.clear();
    }
}

/// The units of a chain.
fn chain(units: &Table<Unit>, first: u32, next: fn(&Unit) -> u32) -> impl Iterator<Item = u32> {
    let some = |number: u32| (number != NONE).then_some(number);
    std::iter::successors(some(first), move |number| some(next(&units[*number])))
}

/// Takes a unit out of the chain that begins at `first`.
fn unchain(units: &mut Table<Unit>, first: &mut u32, number: u32, next: fn(&mut Unit) -> &mut u32) {
    let after = *next(&mut units[number]);
    if *first == number {
        *first = after;
        return;
    }
    let mut at = *first;
    while at != NONE {
        let link = next(&mut units[at]);
        if *link == number {
            *link = after;
            return;
        }
        at = *link;
    }
}
