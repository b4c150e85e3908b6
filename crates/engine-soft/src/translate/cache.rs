//! Translated blocks of one vCPU: the memory they are in, how they are found, and how they refer to each other.

use std::ops::Range;
use std::{fmt, io};

use rustc_hash::FxHashMap;
use x86::paging::{PAGE_MASK, PAGE_SIZE};

use super::asm::Asm;
use super::flags::Place;
use super::index::{Index, Second};
use super::records::{EntryOffsets, Link, NONE, Site, Unit};
use super::registers::T1;
use super::runtime::{self, Kind, Routines, SlowPath};
use super::table::Table;
use crate::interp::block::Block;
use crate::native::arena::Arena;
use crate::native::faults::FaultTable;
use crate::tlb::{PRIVILEGES, Privilege};

/// What besides the guest-physical address decides about a block's translation, packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Variant(u32);

/// Bit of [`Variant`].
const WITHOUT_SPANS: u32 = 1 << 4;

/// The parts of a [`Variant`].
#[derive(Clone, Copy, Debug)]
pub struct VariantParts {
    /// With which rights data are accessed.
    pub privilege: Privilege,
    /// 32 or 64.
    pub code_bits: u8,
    /// Bits of [`crate::cpu::class`] that are disabled.
    pub disabled: u8,
    /// No x87 exception is unmasked or pending.
    pub x87: bool,
    /// Segments (a bit each) through which memory is accessed without a check.
    pub segments: u8,
}

impl Variant {
    /// Packs the parts.
    pub fn new(parts: VariantParts) -> Self {
        Variant(
            parts.privilege as u32
                | u32::from(parts.code_bits == 32) << 2
                | u32::from(parts.x87) << 3
                | u32::from(parts.disabled) << 8
                | u32::from(parts.segments) << 16,
        )
    }

    /// As a number.
    pub fn packed(self) -> u32 {
        self.0
    }

    /// With which rights data are accessed.
    pub fn privilege(self) -> Privilege {
        PRIVILEGES[(self.0 & 3) as usize]
    }

    /// The same, but each access looks its address up by itself.
    pub fn without_spans(self) -> Self {
        Variant(self.0 | WITHOUT_SPANS)
    }

    /// Whether each access looks its address up by itself.
    pub fn is_without_spans(self) -> bool {
        self.0 & WITHOUT_SPANS != 0
    }

    /// What depends on the state of the vCPU alone.
    pub fn of_state(self) -> Self {
        Variant(self.0 & !WITHOUT_SPANS)
    }

    /// Which of the shared routines it uses.
    pub fn kind(self) -> Kind {
        if self.privilege() == Privilege::User { Kind::User } else { Kind::System }
    }

    /// 32 or 64.
    pub fn code_bits(self) -> u32 {
        if self.0 & 4 != 0 { 32 } else { 64 }
    }

    /// No x87 exception is unmasked or pending.
    pub fn has_x87(self) -> bool {
        self.0 & 8 != 0
    }

    /// Bits of [`crate::cpu::class`] that are disabled.
    pub fn disabled(self) -> u8 {
        (self.0 >> 8 & 0xff) as u8
    }

    /// Whether memory is accessed through a segment without a check.
    pub fn is_unchecked(self, segment: u8) -> bool {
        self.0 >> (16 + segment) & 1 != 0
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let segments = (0..6u8).filter(|segment| self.is_unchecked(*segment)).count();
        write!(
            f,
            "{:?}, {}-bit code, disabled classes {:#x}, x87 {}, {segments} segments unchecked",
            self.privilege(),
            self.code_bits(),
            self.disabled(),
            if self.has_x87() { "quiet" } else { "not quiet" },
        )
    }
}

/// The mapping that a link holds for.
#[derive(Clone, Copy, Debug)]
pub struct Epoch {
    /// Where its number is, relative to GS.
    pub offset: i32,
    /// The number.
    pub number: u32,
}

/// All of one vCPU's translations.
pub struct Cache {
    arena: Arena,
    faults: FaultTable,
    routines: [Routines; 2],
    units: Table<Unit>,
    sites: Table<Site>,
    links: Table<Link>,
    index: Index,
    /// Of [`Cache::exit_at`].
    exits: FxHashMap<(u8, u16), u64>,
    /// Where [`Cache::clear`] goes back to.
    first_free: usize,
    /// How often everything was forgotten: numbers of units, sites and links mean something only in between.
    clears: u64,
}

/// A part of a unit's bytes that lies in one page.
pub struct Part<'a> {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Generation of the page when the bytes were last known to be right.
    pub generation: u32,
    /// The bytes that the unit was made from.
    pub bytes: &'a [u8],
}

impl Cache {
    /// Room for `capacity_bytes` of code and what is known of it.
    ///
    /// # Errors
    /// The host refuses executable memory or signal handlers.
    pub fn new(capacity_bytes: usize, slow_path: SlowPath) -> io::Result<Self> {
        let mut arena = Arena::new(capacity_bytes)?;
        let mut asm = Asm::new(arena.next_address());
        let routines = [Kind::System, Kind::User].map(|kind| runtime::generate(&mut asm, kind, slow_path));
        arena.place(&asm.finish()).ok_or(io::ErrorKind::OutOfMemory)?;
        let faults = FaultTable::new(arena.range())?;
        let first_free = arena.used();
        Ok(Cache {
            arena,
            faults,
            routines,
            units: Table::new(),
            sites: Table::new(),
            links: Table::new(),
            index: Index::new(capacity_bytes),
            exits: FxHashMap::default(),
            first_free,
            clears: 0,
        })
    }

    /// Whether an address is one of translated code.
    pub fn holds(&self, address: u64) -> bool {
        self.arena.range().contains(&(address as usize))
    }

    /// The shared routines.
    pub fn routines(&self, kind: Kind) -> Routines {
        self.routines[kind as usize]
    }

    /// An assembler at the place where the next unit will be.
    pub fn asm(&self) -> Asm {
        Asm::new(self.arena.next_address())
    }

    /// Number that the next site gets.
    pub fn next_site(&self) -> u32 {
        self.sites.len()
    }

    /// Number that the next link gets.
    pub fn next_link(&self) -> u32 {
        self.links.len()
    }

    /// A value that changes when all numbers lose their meaning.
    pub fn clears(&self) -> u64 {
        self.clears
    }

    /// Code that leaves with RIP at an offset in the page, for jumps whose target is known. `None` if there is no room.
    pub fn exit_at(&mut self, kind: Kind, offset: u16) -> Option<u64> {
        if let Some(code) = self.exits.get(&(kind as u8, offset)) {
            return Some(*code);
        }
        let mut asm = self.asm();
        asm.mov_simm32(T1, offset.into());
        asm.jmp_to(self.routines(kind).exit);
        let code = self.arena.place(&asm.finish())? as u64;
        self.exits.insert((kind as u8, offset), code);
        Some(code)
    }

    /// A unit by its number.
    pub fn unit(&self, number: u32) -> &Unit {
        &self.units[number]
    }

    /// A site by its number.
    pub fn site(&self, number: u32) -> &Site {
        &self.sites[number]
    }

    /// A link by its number.
    pub fn link(&self, number: u32) -> &Link {
        &self.links[number]
    }

    /// The host address of an offset in a unit's code.
    pub fn address(&self, unit: &Unit, offset: u16) -> u64 {
        self.arena.range().start as u64 + u64::from(unit.code) + u64::from(offset)
    }

    /// Where a unit is entered with the flags at a place.
    pub fn entry(&self, unit: u32, flags: Place) -> u64 {
        let unit = &self.units[unit];
        self.address(unit, u16::from(unit.entries.of(flags)))
    }

    /// Guest-physical address of the second page of a unit that spans pages.
    pub fn second_page(&self, number: u32) -> Option<u64> {
        self.units[number].spans.then(|| self.index.second(number)).flatten().map(|second| second.gpa)
    }

    /// The bytes that a unit was made from.
    fn guest_bytes(&self, unit: &Unit) -> &[u8] {
        let start = unit.code as usize + usize::from(unit.code_len);
        self.arena.bytes(start..start + usize::from(unit.guest_len))
    }

    /// The same, by the pages that they are in.
    pub fn parts(&self, number: u32) -> impl Iterator<Item = Part<'_>> {
        let unit = &self.units[number];
        let bytes = self.guest_bytes(unit);
        let second = unit.spans.then(|| self.index.second(number)).flatten();
        let in_first = match second {
            Some(_) => (PAGE_SIZE - (unit.gpa & PAGE_MASK)) as usize,
            None => bytes.len(),
        };
        let (head, tail) = bytes.split_at(in_first.min(bytes.len()));
        let first = Part { gpa: unit.gpa, generation: unit.generation, bytes: head };
        let rest = second.map(|second| Part { gpa: second.gpa, generation: second.generation, bytes: tail });
        std::iter::once(first).chain(rest)
    }

    /// The bytes of a site's instruction, and of what follows in its unit.
    pub fn instruction_bytes(&self, site: &Site) -> &[u8] {
        let unit = &self.units[site.unit];
        let start = usize::from(site.offset()).wrapping_sub((unit.gpa & PAGE_MASK) as usize);
        self.guest_bytes(unit).get(start..).unwrap_or_default()
    }

    /// The bytes of a unit were compared with memory, in which the pages of its parts have these generations.
    pub fn set_generations(&mut self, number: u32, generations: [u32; 2]) {
        self.units[number].generation = generations[0];
        if let Some(second) = self.index.second_mut(number) {
            second.generation = generations[1];
        }
    }

    /// The unit for a guest-physical address. Whether its page changed since is not looked at.
    pub fn find(&self, gpa: u64, variant: Variant) -> Option<u32> {
        self.index.find(&self.units, gpa, variant)
    }

    /// Forgets the unit for a guest-physical address, if there is one. If so, no jump may lead to it any more.
    pub fn forget(&mut self, gpa: u64, variant: Variant) -> bool {
        let Some(number) = self.find(gpa, variant) else { return false };
        self.index.remove(&mut self.units, number);
        true
    }

    /// Places a unit's code, which is not there yet. `None` if there is no room; then [`Cache::clear`] has to be called.
    pub fn insert(&mut self, new: NewUnit<'_>) -> Option<u32> {
        if self.faults.room() < new.faults.len() {
            return None;
        }
        let (code, number) = (self.arena.used() as u32, self.units.len());
        // (No block comes near that length.)
        let code_len = u16::try_from(new.code.len()).ok()?;
        self.arena.place(&[&new.code, &*new.block.bytes].concat())?;
        for (instruction, stub) in new.faults {
            self.faults.push(instruction, stub);
        }
        for mut site in new.sites {
            site.unit = number;
            self.sites.push(&mut self.arena, site)?;
        }
        let first_link = self.links.len();
        for link in new.links {
            self.links.push(&mut self.arena, Link { field: code + link.field, ..link })?;
        }
        let Block { first, second, bytes, .. } = new.block;
        let unit = Unit {
            gpa: first.gpa,
            variant: new.variant,
            generation: first.generation(),
            code,
            first_link,
            next_of_bucket: NONE,
            next_of_page: NONE,
            code_len,
            guest_len: bytes.len() as u16,
            entries: new.entries,
            spans: second.is_some(),
        };
        self.units.push(&mut self.arena, unit)?;
        let second =
            second.as_ref().map(|second| Second { gpa: second.gpa, generation: second.generation() });
        self.index.insert(&mut self.units, number, second);
        Some(number)
    }

    /// Makes a branch lead straight to a unit: for good if both lie in the same page, else as long as `epoch` lasts.
    pub fn connect(&mut self, link: u32, unit: u32, epoch: Epoch) {
        let record = self.links[link];
        let Link { field, flags, .. } = record;
        if record.is_guarded() {
            let guard = field - u32::from(record.guard);
            self.arena.patch(guard, epoch.offset.to_le_bytes());
            self.arena.patch(guard + 4, epoch.number.to_le_bytes());
        }
        let unit = &self.units[unit];
        self.lead(field, unit.code + u32::from(unit.entries.of(flags)));
    }

    /// Makes the branch whose rel32 is at `field` go to `target`.
    fn lead(&mut self, field: u32, target: u32) {
        self.arena.patch(field, target.wrapping_sub(field + 4).to_le_bytes());
    }

    /// The page may have changed: no branch of it leads straight to a unit of it any more. `generation` is the one that it has
    /// now. Returns whether there is a unit of it; then branches from other pages have to be told by the end of their
    /// epochs.
    pub fn suspend_page(&mut self, gpa: u64, generation: Option<u32>) -> bool {
        let units = self.index.suspend(&self.units, gpa, generation);
        for unit in &units {
            self.disconnect(*unit);
        }
        !units.is_empty()
    }

    /// The numbers of a unit's links.
    fn links_of(&self, number: u32) -> Range<u32> {
        let is_last = number + 1 == self.units.len();
        let end = if is_last { self.links.len() } else { self.units[number + 1].first_link };
        self.units[number].first_link..end
    }

    /// No branch of a unit leads straight to another of its page.
    fn disconnect(&mut self, number: u32) {
        for link in self.links_of(number) {
            let link = self.links[link];
            if !link.is_guarded() {
                self.lead(link.field, link.field + u32::from(link.unlinked));
            }
        }
    }

    /// Whether a branch of a unit leads, through a link, to where it begins itself.
    pub fn is_linked_to_itself(&self, number: u32) -> bool {
        let begin = (self.units[number].gpa & PAGE_MASK) as i32;
        let mut links = self.links_of(number).map(|link| self.links[link]);
        links.any(|link| link.target == begin && !link.is_without_spans())
    }

    /// See [`Index::changed_pages`].
    pub fn changed_pages(&self, generation: impl Fn(u64) -> Option<u32>) -> Vec<u64> {
        self.index.changed_pages(generation)
    }

    /// Overwrites a word of translated code.
    #[cfg(test)]
    pub fn patch(&mut self, address: u64, word: u32) {
        let offset = address - self.arena.range().start as u64;
        self.arena.patch(offset as u32, word.to_le_bytes());
    }

    /// Forgets every unit. None may be running, and no address of one may be used afterwards.
    pub fn clear(&mut self) {
        self.units.clear();
        self.sites.clear();
        self.links.clear();
        self.index.clear();
        self.exits.clear();
        self.faults.clear();
        self.arena.truncate(self.first_free);
        self.arena.reclaim_chunks();
        self.clears += 1;
    }
}

/// A unit that has been assembled for [`Cache::asm`]'s place.
pub struct NewUnit<'a> {
    /// What it was made from.
    pub block: &'a Block,
    /// Its variant.
    pub variant: Variant,
    /// Its code.
    pub code: Vec<u8>,
    /// Where it is entered.
    pub entries: EntryOffsets,
    /// Its sites, numbered from [`Cache::next_site`]. The unit's number is not known yet.
    pub sites: Vec<Site>,
    /// Its branches, numbered from [`Cache::next_link`]. Their fields are relative to the code.
    pub links: Vec<Link>,
    /// Instructions that the host may fault on, ascending, and where to go on then.
    pub faults: Vec<(u64, u64)>,
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use iced_x86::{Encoder, InstructionInfoFactory};

    use super::*;
    use crate::cpu::Cpu;
    use crate::interp::block::Extent;
    use crate::interp::decode::decode;
    use crate::native::Thunks;
    use crate::translate::block::translate;

    const CAPACITY: usize = 4 << 20;
    /// ADD [RBX], 1; MOV RAX, [RBX+8]; JNZ forward.
    const CODE: [u8; 10] = [0x48, 0x83, 0x03, 0x01, 0x48, 0x8b, 0x43, 0x08, 0x75, 0x20];
    static GENERATION: AtomicU32 = AtomicU32::new(0);

    extern "C" fn no_slow_path(_: *mut Cpu, _: u32) -> u64 {
        0
    }

    fn block(thunks: &mut Thunks, gpa: u64) -> Block {
        let decoded = decode(&CODE, 64, gpa, 8, thunks).unwrap();
        Block {
            ops: decoded.ops.into(),
            instructions: decoded.instructions,
            thunks: decoded.thunks,
            bytes: CODE.into(),
            first: Extent { gpa, cell: &GENERATION, generation: AtomicU32::new(0) },
            second: None,
            heat: AtomicU32::new(0),
        }
    }

    fn variant() -> Variant {
        Variant::new(VariantParts {
            privilege: Privilege::User,
            code_bits: 64,
            disabled: 0,
            x87: true,
            segments: u8::MAX,
        })
    }

    /// Fills a cache with the same code at many addresses; returns the number of units.
    fn fill(cache: &mut Cache) -> u64 {
        let (mut encoder, mut info) = (Encoder::new(64), InstructionInfoFactory::new());
        let mut thunks = Thunks::new().unwrap();
        for count in 0.. {
            let block = block(&mut thunks, count << 6);
            let unit = translate(cache, &mut encoder, &mut info, &block, variant());
            if cache.insert(unit).is_none() {
                return count;
            }
            assert!(cache.arena.occupied() <= CAPACITY, "more in use than was granted");
        }
        unreachable!("the cache has no end")
    }

    #[test]
    fn units_are_small_and_together_keep_to_the_limit() {
        let mut cache = Cache::new(CAPACITY, no_slow_path).unwrap();
        let empty = cache.arena.occupied();
        let count = fill(&mut cache);
        let code: u64 = (0..count).map(|number| u64::from(cache.units[number as u32].code_len)).sum();
        let records = ((CAPACITY - empty) as u64 - code) / count;
        assert!(records <= 150, "{records} bytes for a unit of three instructions besides its code");
        cache.clear();
        assert_eq!(cache.arena.occupied(), empty);
        assert!(cache.find(0, variant()).is_none());
        assert_eq!(fill(&mut cache), count, "a cache that was cleared holds as much as a new one");
    }

    #[test]
    fn units_are_found_until_they_are_forgotten() {
        let mut cache = Cache::new(CAPACITY, no_slow_path).unwrap();
        let count = fill(&mut cache);
        for number in 0..count {
            assert_eq!(cache.find(number << 6, variant()), Some(number as u32));
        }
        assert!(cache.forget(0x1040, variant()));
        assert!(!cache.forget(0x1040, variant()));
        assert_eq!(cache.find(0x1040, variant()), None);
        assert_eq!(cache.find(0x1080, variant()), Some(0x1080 >> 6));
        assert_eq!(cache.parts(0x41).next().map(|part| part.bytes.to_vec()), Some(CODE.to_vec()));
    }

    #[test]
    fn only_changed_pages_are_told_and_only_until_they_are_suspended() {
        let mut cache = Cache::new(CAPACITY, no_slow_path).unwrap();
        fill(&mut cache);
        let now = |gpa: u64| Some(u32::from(gpa == 0x2000));
        assert_eq!(cache.changed_pages(now), [0x2000]);
        assert!(cache.suspend_page(0x2345, now(0x2000)));
        assert!(cache.changed_pages(now).is_empty());
        assert!(!cache.suspend_page(1 << 40, None), "there is nothing in that page");
    }

    #[test]
    fn branches_of_a_suspended_page_lead_back_to_their_stubs() {
        let mut cache = Cache::new(CAPACITY, no_slow_path).unwrap();
        fill(&mut cache);
        let link = cache.units[3].first_link;
        let field = |cache: &Cache| {
            let field = cache.links[link].field as usize;
            cache.arena.bytes(field..field + 4).to_vec()
        };
        assert!(!cache.link(link).is_guarded(), "it leads into its own page");
        let unlinked = field(&cache);
        cache.connect(link, 4, Epoch { offset: 0, number: 0 });
        assert_ne!(field(&cache), unlinked);
        cache.suspend_page(0x1000, Some(1));
        assert_ne!(field(&cache), unlinked, "another page has nothing to do with it");
        cache.suspend_page(0, Some(1));
        assert_eq!(field(&cache), unlinked);
    }
}
