//! What stands behind a block's hot path: sites that call Rust code, exits, and branches that are not linked yet; and how all of
//! it becomes a unit.

use x86::paging::PAGE_SIZE;

use super::asm::{Asm, Label, Reg, Rm, Width, cond};
use super::block::{Builder, Entries};
use super::cache::NewUnit;
use super::flags::Place;
use super::recipe::Recipe;
use super::records::{Access, EntryOffsets, Link, Site, Span};
use super::registers::{T0, T1};
use super::runtime::Routines;
use crate::area::run_offset;
use crate::cpu::{gpr, seg};
use crate::interp::op::{BASE_NONE, Op};

/// What is emitted behind the hot path.
pub(super) enum Cold {
    /// Calls Rust code for a site.
    Slow { label: Label, site: u32, flags: Option<Recipe> },
    /// As [`Cold::Slow`] for the first access of a span; leads straight to a translation without spans once there is one.
    Span { label: Label, unlinked: Label, site: u32, link: u32, flags: Option<Recipe> },
    /// Leaves with RIP at an offset in the page.
    Exit { label: Label, offset: i32, flags: Option<Recipe> },
    /// Leaves likewise, asking for a link, which knows where it leads; first pushes the second half of a pair, the address
    /// that `pair` labels.
    Unlinked { label: Label, link: u32, flags: Place, pair: Option<Label> },
    /// The stack of translated code is full: it begins anew, and the push is tried again.
    FullStack { label: Label, again: Label },
    /// Where a jump leads that something else keeps from being taken.
    Never { label: Label },
}

/// A [`Link`] before addresses are known.
#[derive(Clone, Copy)]
pub(super) struct NewLink {
    unlinked: Label,
    /// Offset of the rel32 in the code.
    field: usize,
    /// Where it leads, relative to the page.
    target: i32,
    flags: Place,
    /// Offset of the number's place in the comparison before it.
    guard: Option<usize>,
    without_spans: bool,
}

/// Where the address of an access comes from.
#[derive(Clone, Copy)]
pub(super) enum AddressSource {
    /// The instruction's memory operand.
    Operand,
    /// RSP plus this.
    Stack(i8),
}

impl AddressSource {
    /// The instruction, or one like it that has the stack for its memory operand.
    fn operand(self, op: &Op) -> Op {
        match self {
            AddressSource::Operand => *op,
            AddressSource::Stack(offset) => Op {
                base: gpr::RSP as u8,
                index: BASE_NONE,
                disp: offset as u64,
                segment: seg::SS as u8,
                ..*op
            },
        }
    }
}

/// The first access of a span.
#[derive(Clone, Copy)]
pub(super) struct SpanLead {
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

/// What a site is for.
#[derive(Clone, Copy)]
pub(super) enum SitePurpose {
    /// A memory access that was not found in the TLB. The lookup begins at `retry`.
    Access { address: AddressSource, len: u8, write: bool, alignment: u8, retry: Label },
    /// The first of several accesses that share a lookup, whose span was not found in the TLB.
    Span { access: SpanLead, retry: Label },
    /// The interpreter executes the instruction.
    Interpret,
}

/// A [`Site`] before addresses are known.
#[derive(Clone, Copy)]
pub(super) struct NewSite {
    /// The instruction's offset in the page.
    offset: u16,
    access: Option<(Access, Label)>,
    span: Option<Span>,
    resume: Option<Label>,
}

impl<'a> Builder<'a> {
    /// A site for the current instruction, with a cold stub that calls Rust code for it. `resume` is where the code goes
    /// on after the instruction, if it does.
    pub fn site(&mut self, purpose: SitePurpose, resume: Option<Label>) -> Label {
        let label = self.asm.label();
        let flags = self.recipe_in_use();
        let site = self.first_site + self.sites.len() as u32;
        let mut new = NewSite { offset: self.offset as u16, access: None, span: None, resume };
        match purpose {
            SitePurpose::Access { address, len, write, alignment, retry } => {
                new.access = self.access_at(address, len, write, alignment, retry);
            }
            SitePurpose::Span { access: lead, retry } => {
                let SpanLead { address, len, write, alignment, offset, span, span_write } = lead;
                new.access = self.access_at(address, len, write, alignment, retry);
                let (link, unlinked) = (self.next_link(), self.asm.label());
                let otherwise = self.links.len() as u16;
                new.span = Some(Span { offset, len: span, write: span_write, otherwise });
                // The jump is in the cold stub.
                self.links.push(NewLink {
                    unlinked,
                    field: 0,
                    target: self.offset,
                    flags: Place::Memory,
                    guard: None,
                    without_spans: true,
                });
                self.cold.push(Cold::Span { label, unlinked, site, link, flags });
            }
            SitePurpose::Interpret => {}
        }
        if new.span.is_none() {
            self.cold.push(Cold::Slow { label, site, flags });
        }
        self.sites.push(new);
        label
    }

    /// An access of the current instruction, and where its lookup begins; `None` if it is of a form that sites do not know.
    fn access_at(
        &self,
        address: AddressSource,
        len: u8,
        write: bool,
        alignment: u8,
        retry: Label,
    ) -> Option<(Access, Label)> {
        let op = address.operand(&self.block.ops[self.current]);
        let access = Access::new(&op, self.variant.code_bits(), len, write, alignment)?;
        Some((access, retry))
    }

    /// Number of the next branch.
    fn next_link(&self) -> u32 {
        self.first_link + self.links.len() as u32
    }

    /// Pushes a register on the stack of translated code.
    pub fn push_shadow(&mut self, register: Reg) {
        self.may_fill_stack();
        self.asm.push(register);
    }

    /// The next instruction pushes: where the stack of translated code is full, it begins anew first.
    pub(super) fn may_fill_stack(&mut self) {
        let (again, full) = (self.asm.label(), self.asm.label());
        self.asm.bind(again);
        self.faults.push((self.asm.address(), full));
        self.cold.push(Cold::FullStack { label: full, again });
    }

    /// A cold stub that leaves with RIP at an offset of the page; the flags have to be in memory.
    pub fn exit(&mut self, offset: i64) -> Label {
        let label = self.asm.label();
        let flags = self.recipe_in_use();
        self.cold.push(Cold::Exit { label, offset: offset as i32, flags });
        label
    }

    /// A branch within the page: `emit` writes the jump to the label it gets.
    pub fn link(&mut self, offset: i64, emit: impl FnOnce(&mut Asm, Label)) {
        let label = self.asm.label();
        emit(&mut self.asm, label);
        let number = self.next_link();
        // The rel32 is the last field of the jump.
        let (field, flags, target) = (self.asm.size() - 4, self.flags, offset as i32);
        self.links.push(NewLink { unlinked: label, field, target, flags, guard: None, without_spans: false });
        self.cold.push(Cold::Unlinked { label, link: number, flags, pair: None });
    }

    /// A jump into another page, or to what may reach into one; the flags have to be in memory, the host's are lost.
    pub fn jump_page(&mut self, offset: i64) {
        self.link_to_page(offset, None, Asm::jmp);
    }

    /// A call likewise, with the first half of the pair pushed.
    pub fn call_page(&mut self, offset: i64) {
        let back = self.asm.label();
        self.link_to_page(offset, Some(back), Asm::call);
        self.asm.bind(back);
    }

    /// `emit` writes the jump or call to the label it gets.
    fn link_to_page(&mut self, offset: i64, pair: Option<Label>, emit: impl FnOnce(&mut Asm, Label)) {
        self.clobber_flags();
        let unlinked = self.asm.label();
        let (guard, _) = self.asm.cmp_area_wide(run_offset!(epochs), 0);
        self.asm.jcc(cond::NE, unlinked);
        let page = offset & !(PAGE_SIZE as i64 - 1);
        if page != 0 {
            self.load_rip(T0, page);
            self.asm.store(Width::W64, Rm::Area(run_offset!(page)), T0);
        }
        let label = self.asm.label();
        emit(&mut self.asm, label);
        let field = self.asm.size() - 4;
        let number = self.next_link();
        let (flags, guard, target) = (self.flags, Some(guard), offset as i32);
        self.links.push(NewLink { unlinked, field, target, flags, guard, without_spans: false });
        // The jump itself is not reached before it is linked.
        self.cold.push(Cold::Unlinked { label: unlinked, link: number, flags, pair });
        self.cold.push(Cold::Never { label });
    }

    /// Emits what stands behind the hot path.
    pub(super) fn finish(mut self, entries: Entries) -> NewUnit<'a> {
        for cold in std::mem::take(&mut self.cold) {
            self.emit_cold(cold);
        }
        let base = self.asm.address() - self.asm.size() as u64;
        let entry = |address: u64| (address - base) as u8;
        let offset = |label: Label| self.asm.offset_of(label).unwrap_or(0);
        NewUnit {
            block: self.block,
            variant: self.variant,
            entries: EntryOffsets {
                host: entry(entries.host),
                memory: entry(entries.memory),
                both: entry(entries.both),
            },
            sites: self.sites.iter().map(|new| new.place(offset)).collect(),
            links: self.links.iter().map(|new| new.place(offset)).collect(),
            faults: self.faults.iter().map(|(at, label)| (*at, base + offset(*label) as u64)).collect(),
            code: self.asm.finish(),
        }
    }

    fn emit_cold(&mut self, cold: Cold) {
        match cold {
            Cold::Slow { label, site, flags } => {
                self.asm.bind(label);
                self.repeat_and_save(flags);
                self.asm.mov_imm32(T1, site);
                self.asm.jmp_to(self.routines.slow);
            }
            Cold::Span { label, unlinked, site, link, flags } => {
                self.asm.bind(label);
                self.repeat_and_save(flags);
                self.asm.jmp(unlinked);
                self.links[(link - self.first_link) as usize].field = self.asm.size() - 4;
                self.asm.bind(unlinked);
                self.asm.mov_imm32(T1, site);
                self.asm.jmp_to(self.routines.slow);
            }
            Cold::Exit { label, offset, flags } => {
                self.asm.bind(label);
                self.repeat_and_save(flags);
                self.asm.mov_simm32(T1, offset);
                self.asm.jmp_to(self.routines.exit);
            }
            Cold::Unlinked { label, link, flags, pair } => {
                self.asm.bind(label);
                if let Some(back) = pair {
                    // The first half was pushed: there is room, or the guard's page begins lower.
                    self.asm.lea_label(T1, back);
                    self.asm.push(T1);
                }
                self.asm.mov_imm32(T1, link);
                let in_memory = flags == Place::Memory;
                let Routines { exit_link, exit_link_host_flags, .. } = self.routines;
                self.asm.jmp_to(if in_memory { exit_link } else { exit_link_host_flags });
            }
            Cold::FullStack { label, again } => {
                self.asm.bind(label);
                self.asm.load(Width::W64, Reg::RSP, Rm::Area(run_offset!(shadow_top)));
                self.asm.jmp(again);
            }
            Cold::Never { label } => {
                self.asm.bind(label);
                self.asm.ud2();
            }
        }
    }
}

impl NewSite {
    /// As it is when `offset` says where labels are.
    fn place(&self, offset: impl Fn(Label) -> usize) -> Site {
        let resume = self.resume.map_or(0, |label| offset(label) as u16);
        let access = self
            .access
            .and_then(|(access, retry)| Site::access_of(self.offset, access, offset(retry) as u16, resume));
        match (access, self.span) {
            (Some(site), Some(span)) => site.of_span(span),
            (Some(site), None) => site,
            (None, _) => Site::interpret(self.offset, resume),
        }
    }
}

impl NewLink {
    /// As [`NewSite::place`].
    fn place(&self, offset: impl Fn(Label) -> usize) -> Link {
        Link {
            field: self.field as u32,
            target: self.target,
            unlinked: (offset(self.unlinked) - self.field) as u16,
            guard: match self.guard {
                Some(guard) => (self.field - guard) as u8,
                None if self.without_spans => Link::WITHOUT_SPANS,
                None => Link::NEAR,
            },
            flags: self.flags,
        }
    }
}
