//! What stands behind a block's hot path: sites that call Rust code, exits, and branches that are not linked yet; and how all of
//! it becomes a unit.

use std::sync::Arc;

use x86::paging::PAGE_SIZE;

use super::asm::{Asm, Label, Reg, Rm, Width, cond};
use super::block::{Builder, Entries};
use super::cache::{AddressSource, Guard, Link, NewUnit, Purpose, Site, SpanLead};
use super::flags::Place;
use super::recipe::Recipe;
use super::registers::{T0, T1};
use crate::area::run_offset;
use crate::interp::block::Block;

/// What is emitted behind the hot path.
pub(super) enum Cold {
    /// Calls Rust code for a site.
    Slow { label: Label, site: u32, flags: Option<Recipe> },
    /// As [`Cold::Slow`] for the first access of a span; leads straight to a translation without spans once there is one.
    Span { label: Label, unlinked: Label, site: u32, link: u32, flags: Option<Recipe> },
    /// Leaves with RIP at an offset in the page.
    Exit { label: Label, offset: i32, flags: Option<Recipe> },
    /// Leaves likewise, asking for a link; first pushes the second half of a pair, the address that `pair` labels.
    Unlinked { label: Label, link: u32, offset: i32, flags: Place, pair: Option<Label> },
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
    flags: Place,
    /// Offsets of the fields of its [`Guard`].
    guard: Option<(usize, usize)>,
    without_spans: bool,
}

/// [`Purpose`] before addresses are known.
#[derive(Clone, Copy)]
pub(super) enum SitePurpose {
    Access { address: AddressSource, len: u8, write: bool, alignment: u8, retry: Label },
    Span { access: SpanLead, retry: Label },
    Interpret,
}

impl Builder<'_> {
    /// A site for the current instruction, with a cold stub that calls Rust code for it. `resume` is where the code goes
    /// on after the instruction, if it does.
    pub fn site(&mut self, purpose: SitePurpose, resume: Option<Label>) -> Label {
        let label = self.asm.label();
        let flags = self.recipe_in_use();
        let site = self.first_site + self.sites.len() as u32;
        let (purpose, retry) = match purpose {
            SitePurpose::Access { address, len, write, alignment, retry } => {
                (Purpose::Access { address, len, write, alignment, retry: 0 }, Some(retry))
            }
            SitePurpose::Span { access, retry } => {
                let (otherwise, unlinked) = (self.next_link(), self.asm.label());
                // The jump is in the cold stub.
                let flags_then = Place::Memory;
                self.links.push(NewLink {
                    unlinked,
                    field: 0,
                    flags: flags_then,
                    guard: None,
                    without_spans: true,
                });
                self.cold.push(Cold::Span { label, unlinked, site, link: otherwise, flags });
                (Purpose::Span { access, retry: 0, otherwise }, Some(retry))
            }
            SitePurpose::Interpret => (Purpose::Interpret, None),
        };
        let op = &raw const self.block.ops[self.current];
        if !matches!(purpose, Purpose::Span { .. }) {
            self.cold.push(Cold::Slow { label, site, flags });
        }
        let site = Site { op, offset: self.offset as u16, variant: self.variant, purpose, resume: 0 };
        self.sites.push((site, retry, resume));
        label
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
        let (field, flags) = (self.asm.size() - 4, self.flags);
        self.links.push(NewLink { unlinked: label, field, flags, guard: None, without_spans: false });
        let (offset, flags) = (offset as i32, self.flags);
        self.cold.push(Cold::Unlinked { label, link: number, offset, flags, pair: None });
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
        let guard = self.asm.cmp_area_wide(run_offset!(epochs), 0);
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
        let (flags, guard) = (self.flags, Some(guard));
        self.links.push(NewLink { unlinked, field, flags, guard, without_spans: false });
        // The jump itself is not reached before it is linked.
        self.cold.push(Cold::Unlinked {
            label: unlinked,
            link: number,
            offset: offset as i32,
            flags: self.flags,
            pair,
        });
        self.cold.push(Cold::Never { label });
    }

    pub(super) fn finish(mut self, block: Arc<Block>, entries: Entries) -> NewUnit {
        let base = self.asm.address() - self.asm.size() as u64;
        for cold in std::mem::take(&mut self.cold) {
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
                Cold::Unlinked { label, link, offset, flags, pair } => {
                    self.asm.bind(label);
                    if let Some(back) = pair {
                        // The first half was pushed: there is room, or the guard's page begins lower.
                        self.asm.lea_label(T1, back);
                        self.asm.push(T1);
                    }
                    self.asm.store_imm(Width::W32, Rm::Area(run_offset!(link)), link as i32);
                    self.asm.mov_simm32(T1, offset);
                    let host = flags != Place::Memory;
                    self.asm.jmp_to(if host { self.routines.exit_host_flags } else { self.routines.exit });
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
        let place = |label: Label| self.asm.offset_of(label).map_or(0, |offset| base + offset as u64);
        let sites = self
            .sites
            .iter()
            .map(|(site, retry_label, resume)| {
                let mut site = *site;
                if let (Purpose::Access { retry, .. } | Purpose::Span { retry, .. }, Some(label)) =
                    (&mut site.purpose, retry_label)
                {
                    *retry = place(*label);
                }
                site.resume = resume.map_or(0, place);
                site
            })
            .collect();
        let links = self
            .links
            .iter()
            .map(|new| Link {
                field: base + new.field as u64,
                unlinked: place(new.unlinked),
                flags: new.flags,
                guard: new.guard.map(|(offset, number)| Guard {
                    offset: base + offset as u64,
                    number: base + number as u64,
                }),
                without_spans: new.without_spans,
            })
            .collect();
        let faults = self.faults.iter().map(|(at, label)| (*at, place(*label))).collect();
        NewUnit { block, variant: self.variant, code: self.asm.finish(), entries, sites, links, faults }
    }
}
