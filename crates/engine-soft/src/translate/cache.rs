//! Translated blocks of one vCPU: the memory they are in, how they are found, and how they refer to each other.

use std::io;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::interp::block::Block;
use crate::interp::op::Op;
use crate::native::arena::Arena;
use crate::native::faults::FaultTable;
use crate::tlb::{PRIVILEGES, Privilege};
use crate::translate::asm::Asm;
use crate::translate::block::Entries;
use crate::translate::flags::Place;
use crate::translate::runtime::{self, Kind, Routines, SlowPath};

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

/// Code that is entered from elsewhere.
pub struct Unit {
    /// What it was made from; its operations are what sites refer to.
    pub block: Arc<Block>,
    /// Its variant.
    pub variant: Variant,
    /// Where it is entered.
    pub entries: Entries,
    /// Branches of other units, and its own, that lead here.
    incoming: Vec<u32>,
}

/// What a site is for.
#[derive(Clone, Copy, Debug)]
pub enum Purpose {
    /// A memory access that was not found in the TLB.
    Access {
        /// Where the address comes from.
        address: AddressSource,
        /// Bytes accessed.
        len: u8,
        /// It is a store, or a load of what is stored to.
        write: bool,
        /// What the address has to be a multiple of, else the instruction faults before it accesses anything.
        alignment: u8,
        /// Where the lookup begins.
        retry: u64,
    },
    /// The first of several accesses that share a lookup, whose span was not found in the TLB.
    Span {
        /// The access itself.
        access: SpanLead,
        /// Where the lookup begins.
        retry: u64,
        /// The branch to the same instruction in a translation without spans.
        otherwise: u32,
    },
    /// The interpreter executes the instruction.
    Interpret,
}

/// The first access of a span.
#[derive(Clone, Copy, Debug)]
pub struct SpanLead {
    /// Where its own address comes from.
    pub address: AddressSource,
    /// Bytes that it accesses itself.
    pub len: u8,
    /// It is a store itself.
    pub write: bool,
    /// What its address has to be a multiple of.
    pub alignment: u8,
    /// Offset of its own first byte in the span.
    pub offset: u16,
    /// Bytes of the span.
    pub span: u16,
    /// One of the span's accesses is a store.
    pub span_write: bool,
}

/// How a site's linear address is computed again.
#[derive(Clone, Copy, Debug)]
pub enum AddressSource {
    /// The instruction's memory operand.
    Operand,
    /// RSP plus this.
    Stack(i8),
}

/// A place in translated code from which Rust code is called.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// The instruction.
    pub op: *const Op,
    /// Its offset in the page.
    pub offset: u16,
    /// The variant it was translated for.
    pub variant: Variant,
    /// Why Rust code is called.
    pub purpose: Purpose,
    /// Where the code after the instruction begins; 0 if the block has to be left there.
    pub resume: u64,
}

/// A direct branch that can lead straight to another unit.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Address of its rel32.
    pub field: u64,
    /// Where it leads while it is not linked.
    pub unlinked: u64,
    /// Where the flags are when it is taken.
    pub flags: Place,
    /// For a branch into another page, the comparison before it, which says whether the link still holds.
    pub guard: Option<Guard>,
    /// It leads to a translation without spans.
    pub without_spans: bool,
}

/// The fields of a comparison of a mapping's number (`RunState::epochs`) with the one that a branch was linked for.
#[derive(Clone, Copy, Debug)]
pub struct Guard {
    /// Address of the offset of the number.
    pub offset: u64,
    /// Address of the immediate.
    pub number: u64,
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
    units: Vec<Unit>,
    by_address: FxHashMap<(u64, Variant), u32>,
    by_page: FxHashMap<u64, Vec<u32>>,
    /// See [`Site`].
    pub sites: Vec<Site>,
    links: Vec<Link>,
    /// Where [`Cache::clear`] goes back to.
    first_free: usize,
    /// How often everything was forgotten: numbers of units, sites and links mean something only in between.
    clears: u64,
}

// SAFETY: the pointers in sites lead into blocks that the units keep alive.
unsafe impl Send for Cache {}

impl Cache {
    /// Room for `capacity_bytes` of code.
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
            units: Vec::new(),
            by_address: FxHashMap::default(),
            by_page: FxHashMap::default(),
            sites: Vec::new(),
            links: Vec::new(),
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
        self.sites.len() as u32
    }

    /// Number that the next link gets.
    pub fn next_link(&self) -> u32 {
        self.links.len() as u32
    }

    /// A value that changes when all numbers lose their meaning.
    pub fn clears(&self) -> u64 {
        self.clears
    }

    /// A unit by its number.
    pub fn unit(&self, number: u32) -> &Unit {
        &self.units[number as usize]
    }

    /// The unit for a guest-physical address. Whether its page changed since is not looked at.
    pub fn find(&self, gpa: u64, variant: Variant) -> Option<u32> {
        self.by_address.get(&(gpa, variant)).copied()
    }

    /// Places a unit's code. `None` if there is no room; then [`Cache::clear`] has to be called.
    pub fn insert(&mut self, new: NewUnit) -> Option<u32> {
        if self.faults.room() < new.faults.len() {
            return None;
        }
        self.arena.place(&new.code)?;
        for (instruction, stub) in new.faults {
            self.faults.push(instruction, stub);
        }
        let number = self.units.len() as u32;
        self.sites.extend(new.sites);
        self.links.extend(new.links);
        let (gpa, variant) = (new.block.gpa(), new.variant);
        let second_page = new.block.second.as_ref().map(|second| second.gpa >> 12);
        self.units.push(Unit { block: new.block, variant, entries: new.entries, incoming: Vec::new() });
        if let Some(old) = self.by_address.insert((gpa, variant), number) {
            // Its code was not right any more.
            self.forget(old);
        }
        for page in std::iter::once(gpa >> 12).chain(second_page) {
            self.by_page.entry(page).or_default().push(number);
        }
        Some(number)
    }

    /// A unit that will not be entered again.
    fn forget(&mut self, number: u32) {
        let block = &self.units[number as usize].block;
        for page in std::iter::once(block.gpa() >> 12).chain(block.second.as_ref().map(|s| s.gpa >> 12)) {
            if let Some(numbers) = self.by_page.get_mut(&page) {
                numbers.retain(|other| *other != number);
            }
        }
    }

    /// Makes a branch lead straight to a unit, as long as `epoch` lasts if it is one into another page.
    pub fn link(&mut self, link: u32, unit: u32, epoch: Epoch) {
        let record = self.links[link as usize];
        let target = &mut self.units[unit as usize];
        let entry = match record.flags {
            Place::Host => target.entries.host,
            Place::Memory => target.entries.memory,
            Place::Both | Place::Repeat => target.entries.both,
        };
        target.incoming.push(link);
        if let Some(guard) = record.guard {
            self.arena.patch(guard.offset, epoch.offset.to_le_bytes());
            self.arena.patch(guard.number, epoch.number.to_le_bytes());
        }
        self.lead(record.field, entry);
    }

    /// Whether a branch leads to a translation without spans.
    pub fn is_without_spans(&self, link: u32) -> bool {
        self.links[link as usize].without_spans
    }

    /// Whether a branch looks before it whether its target is still where it was.
    pub fn is_guarded(&self, link: u32) -> bool {
        self.links[link as usize].guard.is_some()
    }

    /// Makes the branch whose rel32 is at `field` go to `target`.
    fn lead(&mut self, field: u64, target: u64) {
        self.arena.patch(field, (target.wrapping_sub(field + 4) as u32).to_le_bytes());
    }

    /// The page may have changed: no branch leads straight to a unit of it any more. Returns whether there is one.
    pub fn suspend_page(&mut self, gpa: u64) -> bool {
        let Some(numbers) = self.by_page.get(&(gpa >> 12)) else { return false };
        let units = &mut self.units;
        let links: Vec<u32> =
            numbers.iter().flat_map(|number| std::mem::take(&mut units[*number as usize].incoming)).collect();
        for link in links {
            let Link { field, unlinked, .. } = self.links[link as usize];
            self.lead(field, unlinked);
        }
        true
    }

    /// Guest-physical addresses of the pages that were written since a unit of them was last looked at.
    pub fn changed_pages(&self) -> Vec<u64> {
        let changed =
            |numbers: &Vec<u32>| numbers.iter().any(|n| !self.units[*n as usize].block.is_current());
        self.by_page.iter().filter(|(_, numbers)| changed(numbers)).map(|(page, _)| page << 12).collect()
    }

    /// Forgets every unit. None may be running, and no address of one may be used afterwards.
    pub fn clear(&mut self) {
        self.units.clear();
        self.by_address.clear();
        self.by_page.clear();
        self.sites.clear();
        self.links.clear();
        self.faults.clear();
        self.arena.truncate(self.first_free);
        self.clears += 1;
    }
}

/// A unit that has been assembled for [`Cache::asm`]'s place.
pub struct NewUnit {
    /// What it was made from.
    pub block: Arc<Block>,
    /// Its variant.
    pub variant: Variant,
    /// Its code.
    pub code: Vec<u8>,
    /// See [`Unit::entries`].
    pub entries: Entries,
    /// Its sites, numbered from [`Cache::next_site`].
    pub sites: Vec<Site>,
    /// Its branches, numbered from [`Cache::next_link`].
    pub links: Vec<Link>,
    /// Instructions that the host may fault on, ascending, and where to go on then.
    pub faults: Vec<(u64, u64)>,
}
