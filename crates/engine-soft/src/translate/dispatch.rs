//! When which code runs: blocks are interpreted until they have shown to be worth a translation; translated code runs until
//! something is wanted that it cannot do.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use iced_x86::{Encoder, InstructionInfoFactory};
use x86::Exception;
use x86::paging::{PAGE_MASK, PAGE_SIZE};

use super::block::{is_supported, translate};
use super::cache::{AddressSource, Cache, Purpose, Site, SpanLead, Unit, Variant, VariantParts};
use super::targets::Pages;
use crate::area::NO_LINK;
use crate::cpu::{Cpu, Mode, R, Raised, gpr, seg};
use crate::interp::block::Block;
use crate::interp::op::{Flow, Op};
use crate::mmu::{Access, Place};

/// How often a block is interpreted before it is translated.
const HOT: u32 = 1;
/// MXCSR of Rust code: everything masked, round to nearest.
const HOST_MXCSR: u32 = 0x1f80;
/// The exception masks of MXCSR.
const ALL_MASKED: u32 = 0x1f80;
/// The exception masks of the x87 control word, low byte.
const X87_ALL_MASKED: u8 = 0x3f;
/// FSW.ES, low byte.
const X87_SUMMARY: u8 = 0x80;
/// Code memory of a machine, shared out among its vCPUs.
pub const CODE_BYTES: usize = 128 << 20;

/// What is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Translate {
    /// Nothing: everything is interpreted.
    Nothing,
    /// What runs often.
    Hot,
    /// Everything, before it runs for the first time: for tests.
    Everything,
}

/// A branch that wants to be linked.
#[derive(Clone, Copy)]
struct Unlinked {
    link: u32,
    /// Where it leads.
    rip: u64,
    /// [`Cache::clears`] when it was taken.
    clears: u64,
}

/// One vCPU's translator.
pub struct Translator {
    cache: Cache,
    encoder: Encoder,
    info: InstructionInfoFactory,
    /// How often a block is interpreted before it is translated.
    hot: u32,
    /// What the jump targets of each privilege were entered for.
    variants: [Option<Variant>; 3],
    /// The branch through which translated code was left.
    unlinked: Option<Unlinked>,
    /// How much code had changed when it was last looked for.
    code_changes: u64,
    /// On which pages targets and links depend.
    pages: Pages,
    /// The interpreter raised an exception in the code that was left.
    raised: bool,
}

impl Translator {
    /// A translator with room for `code_bytes` of code; `None` if nothing is to be translated, or the host's processor is
    /// too old.
    ///
    /// # Errors
    /// The host refuses executable memory or signal handlers.
    pub fn new(translate: Translate, code_bytes: usize) -> io::Result<Option<Self>> {
        let hot = match translate {
            Translate::Nothing => return Ok(None),
            Translate::Hot => HOT,
            Translate::Everything => 0,
        };
        if !is_supported() {
            return Ok(None);
        }
        Ok(Some(Translator {
            cache: Cache::new(code_bytes, slow_path)?,
            encoder: Encoder::new(64),
            info: InstructionInfoFactory::new(),
            hot,
            variants: [None; 3],
            unlinked: None,
            code_changes: 0,
            pages: Pages::default(),
            raised: false,
        }))
    }
}

/// Sets the GS base of the calling thread, by which translated code finds its vCPU.
pub fn enter_thread(area: u64) {
    const ARCH_SET_GS: libc::c_int = 0x1001;
    // SAFETY: nothing in this process but translated code uses GS.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, area) };
}

/// The GS base of the calling thread.
fn thread_gs() -> u64 {
    const ARCH_GET_GS: libc::c_int = 0x1004;
    let mut base = 0u64;
    // SAFETY: the kernel writes one word to the address.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_GET_GS, &raw mut base) };
    base
}

impl Cpu {
    /// What a translation for the present state has to be; `None` if it has to be interpreted.
    #[inline]
    pub fn variant(&self) -> Option<Variant> {
        let segments = match self.mode {
            Mode::Long => u8::MAX,
            Mode::Compatibility | Mode::Protected if self.is_flat_32_bit() => self.unchecked_segments,
            _ => return None,
        };
        if self.alignment_check || self.watchpoints {
            return None;
        }
        // An unmasked exception needs the interpreter, which knows what to do when the host raises it.
        if self.user.mxcsr & ALL_MASKED != ALL_MASKED {
            return None;
        }
        let x87 = &self.user.x87.0;
        let quiet = x87[0] & X87_ALL_MASKED == X87_ALL_MASKED && x87[2] & X87_SUMMARY == 0;
        Some(Variant::new(VariantParts {
            privilege: self.privilege,
            code_bits: self.code_bits,
            disabled: self.disabled,
            x87: quiet,
            segments,
        }))
    }

    /// 32-bit code whose code, data and stack segments are all of the linear address space.
    fn is_flat_32_bit(&self) -> bool {
        const FLAT: u8 = 1 << seg::ES | 1 << seg::SS | 1 << seg::DS;
        let bases = &self.user.segment_base;
        self.code_bits == 32
            && self.stack_mask == 0xffff_ffff
            && self.unchecked_segments & FLAT == FLAT
            && self.segments[seg::CS].limit == u32::MAX
            && bases[seg::ES] | bases[seg::CS] | bases[seg::SS] | bases[seg::DS] == 0
    }

    /// Of an x87 instruction in translated code the host's processor knows the host's address, and some keep it: the guest sees
    /// none, as on processors that keep addresses only of instructions with exceptions.
    fn hide_x87_addresses(&mut self) {
        const OPCODE: usize = 6;
        const INSTRUCTION: std::ops::Range<usize> = 8..16;
        const OPERAND: std::ops::Range<usize> = 16..24;
        if self.user.run().x87_live == 0 {
            return;
        }
        let mut address = [0; 8];
        address.copy_from_slice(&self.user.x87.0[INSTRUCTION]);
        if self.translator.as_ref().is_some_and(|t| t.cache.holds(u64::from_le_bytes(address))) {
            let image = &mut self.user.x87.0;
            image[OPCODE..OPCODE + 2].fill(0);
            image[INSTRUCTION].fill(0);
            image[OPERAND].fill(0);
        }
    }

    /// Runs from the present RIP: translated code if there is some, else one block interpreted.
    pub fn run_translated(&mut self, variant: Variant) -> R<()> {
        let rip = self.user.rip;
        let privilege = variant.privilege();
        self.renew_epochs();
        self.notice_code_changes();
        self.prepare_tables(variant);
        let Some(translator) = &mut self.translator else { return self.interpret_block() };
        let unlinked = translator.unlinked.take().filter(|unlinked| unlinked.rip == rip);
        if unlinked.is_none()
            && let Some(code) = self.user.targets().find(privilege, rip)
        {
            return self.enter(variant, code);
        }
        self.counters.target_misses += 1;
        let wanted = match unlinked {
            Some(Unlinked { link, clears, .. })
                if clears == translator.cache.clears() && translator.cache.is_without_spans(link) =>
            {
                variant.without_spans()
            }
            _ => variant,
        };
        let unit = match self.known_unit(wanted)? {
            Some(unit) => unit,
            None => {
                let block = self.find_block()?;
                // SAFETY: the block is alive until the cache is changed, which only this thread does.
                match self.new_unit(unsafe { &*block }, wanted) {
                    Some(unit) => unit,
                    None => return self.run_block(block),
                }
            }
        };
        let Some(translator) = &self.translator else { return Ok(()) };
        let Unit { block, entries, .. } = translator.cache.unit(unit);
        let (code, spans) = (entries.memory, block.spans());
        let next_page = rip.wrapping_add(PAGE_SIZE);
        let global = self.is_global_code(rip) && (!spans || self.is_global_code(next_page));
        let epoch = self.user.epoch(global);
        let Some(translator) = &mut self.translator else { return Ok(()) };
        translator.pages.note(rip, global);
        let clears = translator.cache.clears();
        match unlinked {
            // What spans pages depends on the mapping of both: a branch has to look.
            Some(Unlinked { link, clears: then, .. })
                if then == clears && (!spans || translator.cache.is_guarded(link)) =>
            {
                self.counters.links += 1;
                translator.cache.link(link, unit, epoch);
            }
            _ => self.user.targets().insert(privilege, rip, code, global),
        }
        self.enter(variant, code)
    }

    /// Makes the privilege's jump targets and returns those of a variant.
    fn prepare_tables(&mut self, variant: Variant) {
        let privilege = variant.privilege();
        let Some(translator) = &mut self.translator else { return };
        if translator.variants[privilege as usize] != Some(variant) {
            translator.variants[privilege as usize] = Some(variant);
            self.user.targets().empty(privilege);
            self.user.forget_returns();
            self.user.prepare_returns(privilege, translator.cache.routines(variant.kind()).exit_to);
        }
    }

    /// vCPUs wrote to pages of code. `own` is how much code had changed before this vCPU wrote, and by how much more it has
    /// changed by that: then that need not be looked for.
    pub fn code_was_written(&mut self, pages: &[u64], own: Option<(u64, u64)>) {
        for gpa in pages {
            self.suspend_code(*gpa);
        }
        if let Some((before, more)) = own
            && let Some(translator) = &mut self.translator
            && translator.code_changes == before
        {
            translator.code_changes = before + more;
        }
    }

    /// Whether code in memory has changed since this vCPU last looked.
    fn code_has_changed(&self) -> bool {
        let changes = self.map.code_changes();
        self.translator.as_ref().is_some_and(|translator| translator.code_changes != changes)
    }

    /// Looks for pages of code that a device wrote. (Of what vCPUs write they tell each other.)
    fn notice_code_changes(&mut self) {
        let changes = self.map.code_changes();
        let Some(translator) = &mut self.translator else { return };
        if translator.code_changes == changes {
            return;
        }
        translator.code_changes = changes;
        for gpa in translator.cache.changed_pages() {
            self.suspend_code(gpa);
        }
    }

    /// The translation of the code at RIP, if there is one and it is still right.
    fn known_unit(&mut self, variant: Variant) -> R<Option<u32>> {
        let linear = self.linear_ip(self.user.rip);
        self.check_fetch(self.user.rip)?;
        let Some(gpa) = self.fetch_gpa(linear)? else { return Ok(None) };
        let Some(translator) = &self.translator else { return Ok(None) };
        let Some(unit) = translator.cache.find(gpa, variant) else { return Ok(None) };
        let block = translator.cache.unit(unit).block.clone();
        if !block.is_current() {
            // Its page was written, maybe by a device: nothing of it can be relied on until it has been looked at.
            self.suspend_code(gpa);
            if !self.revalidate(&block) {
                self.blocks.forget_heat(gpa, self.code_bits);
                return Ok(None);
            }
        }
        Ok(self.continues_at(&block, linear)?.then_some(unit))
    }

    /// Translates a block if it is worth it.
    fn new_unit(&mut self, block: &Block, variant: Variant) -> Option<u32> {
        if block.heat() < self.translator.as_ref()?.hot {
            return None;
        }
        let block = self.blocks.shared(block)?;
        let unit = self.translate_block(&block, variant)?;
        // It is not interpreted again; the translation keeps what it needs of it.
        self.blocks.remove(&block);
        Some(unit)
    }

    fn translate_block(&mut self, block: &Arc<Block>, variant: Variant) -> Option<u32> {
        self.counters.blocks_translated += 1;
        let translator = self.translator.as_mut()?;
        for _ in 0..2 {
            let Translator { cache, encoder, info, .. } = translator.as_mut();
            let unit = translate(cache, encoder, info, block, variant);
            if let Some(number) = cache.insert(unit) {
                return Some(number);
            }
            // No room: start over. Nothing of the old code runs now.
            cache.clear();
            self.user.targets().forget_everything();
            self.user.end_epoch(false);
        }
        None
    }

    /// As [`Cpu::step`], by a translation of the one instruction; `None` if the present state has to be interpreted. `way`
    /// chooses the entry. For tests.
    ///
    /// # Errors
    /// The exception; registers are as the instruction left them.
    pub fn step_translated(&mut self, way: usize) -> Option<Result<(), Exception>> {
        let variant = self.variant()?;
        let before = thread_gs();
        enter_thread(self.user.area().base());
        let result = self.enter_one(variant, way);
        enter_thread(before);
        Some(result.map_err(|_| self.raised_exception()))
    }

    fn enter_one(&mut self, variant: Variant, way: usize) -> R<()> {
        self.notice_code_changes();
        self.prepare_tables(variant);
        let whole = self.find_block()?;
        // SAFETY: the block is alive until the cache is changed, which only this thread does.
        let one = Arc::new(unsafe { &*whole }.first_instruction());
        let Some(unit) = self.translate_block(&one, variant) else { return Ok(()) };
        let Some(translator) = &self.translator else { return Ok(()) };
        let unit = translator.cache.unit(unit);
        let entries = [unit.entries.memory, unit.entries.host, unit.entries.both];
        self.enter(variant, entries[way % entries.len()])
    }

    /// The page at a guest-physical address was written: translations of it are looked at again before they run.
    pub fn suspend_code(&mut self, gpa: u64) {
        let Some(translator) = &mut self.translator else { return };
        if translator.cache.suspend_page(gpa) {
            self.forget_targets();
        }
    }

    /// Forgets at which addresses code is; that of global pages only if not `keep_global`.
    pub fn forget_code_addresses(&mut self, keep_global: bool) {
        self.blocks.flush_linear();
        if keep_global {
            self.user.targets().forget_local();
            self.user.end_epoch(true);
            if let Some(translator) = &mut self.translator {
                translator.pages.forget(true);
            }
        } else {
            self.forget_targets();
        }
    }

    fn forget_targets(&mut self) {
        self.user.targets().forget_everything();
        self.user.end_epoch(false);
        if let Some(translator) = &mut self.translator {
            translator.pages.forget(false);
        }
    }

    /// After so many changes of the mapping that its numbers begin anew: no link of an earlier round may be left.
    fn renew_epochs(&mut self) {
        if self.user.epochs_are_used_up() {
            self.clear_translations();
            self.user.run().epochs = [0; 2];
        }
    }

    /// Forgets the translation of one linear page.
    pub fn flush_page(&mut self, linear: u64) {
        self.counters.tlb_flushes += 1;
        self.tlb().flush_page(linear);
        self.blocks.flush_linear();
        if self.translator.as_ref().is_some_and(|translator| translator.pages.matter(linear)) {
            self.user.targets().forget_page(linear);
            self.user.end_epoch(false);
        }
    }

    /// Forgets all translations. Not to be called from within translated code.
    pub fn clear_translations(&mut self) {
        let Some(translator) = &mut self.translator else { return };
        translator.cache.clear();
        translator.unlinked = None;
        self.forget_targets();
    }

    /// Runs translated code until it is left.
    fn enter(&mut self, variant: Variant, code: u64) -> R<()> {
        let page = self.user.rip & !PAGE_MASK;
        let this: *mut Cpu = self;
        let run = self.user.run();
        run.page = page;
        run.cpu = this as u64;
        run.host_mxcsr = HOST_MXCSR;
        run.link = NO_LINK;
        run.x87_live = 0;
        run.vectors_live = 0;
        let Some(translator) = &mut self.translator else { return Ok(()) };
        translator.raised = false;
        let routines = translator.cache.routines(variant.kind());
        self.user.select_returns(variant.privilege());
        // SAFETY: the routine was generated with this signature; it keeps to the calling convention, and `code` is an entry
        // of a unit in the same code memory. Rust code that it calls has the vCPU by `this`, which is not used meanwhile.
        unsafe {
            let enter: extern "C" fn(u64) = std::mem::transmute(routines.enter);
            enter(code);
        }
        self.user.keep_returns(variant.privilege());
        self.hide_x87_addresses();
        if self.code_bits == 32 {
            self.user.rip &= 0xffff_ffff;
        }
        let (link, rip) = (self.user.run().link, self.user.rip);
        let Some(translator) = &mut self.translator else { return Ok(()) };
        let clears = translator.cache.clears();
        translator.unlinked = (link != NO_LINK).then_some(Unlinked { link, rip, clears });
        if translator.raised { Err(Raised) } else { Ok(()) }
    }

    /// Does for translated code what it cannot do itself; returns where it goes on, or 0 to leave it.
    fn serve(&mut self, site: &Site) -> u64 {
        self.hide_x87_addresses();
        // SAFETY: operations live as long as the block, which the unit keeps.
        let op = unsafe { &*site.op };
        self.user.rip = self.user.run().page.wrapping_add(u64::from(site.offset));
        self.next_ip = self.user.rip.wrapping_add(u64::from(op.len));
        match site.purpose {
            Purpose::Access { address, len, write, alignment, retry } => {
                let linear = self.address_of(op, address);
                let aligned = linear & (u64::from(alignment) - 1) == 0;
                if aligned && self.now_in_tlb(linear, u64::from(len), write) {
                    // A page that another vCPU wrote is no longer watched: before this one may write to it as to any other, it
                    // has to know that its own code there is not to be relied on. (RIP is still at the instruction.)
                    return if self.code_has_changed() { 0 } else { retry };
                }
            }
            Purpose::Span { access, retry, otherwise } => {
                if self.span_now_in_tlb(op, access) {
                    return if self.code_has_changed() { 0 } else { retry };
                }
                self.user.run().link = otherwise;
                return 0;
            }
            Purpose::Interpret => {}
        }
        self.counters.handler_calls += 1;
        self.stop_block = false;
        match (op.run)(self, op) {
            Ok(flow) => {
                self.user.rip = self.next_ip;
                let code_changed = self.code_has_changed();
                if flow == Flow::End
                    || self.stop_block
                    || code_changed
                    || self.user.are_returns_forgotten()
                    || self.variant() != Some(site.variant.of_state())
                {
                    return 0;
                }
                site.resume
            }
            Err(_) => {
                self.fault_segment = op.segment;
                if let Some(translator) = &mut self.translator {
                    translator.raised = true;
                }
                0
            }
        }
    }

    /// The linear address of an access.
    fn address_of(&self, op: &Op, source: AddressSource) -> u64 {
        let (segment, offset) = match source {
            AddressSource::Operand => (usize::from(op.segment), op.offset(&self.user)),
            AddressSource::Stack(offset) => (seg::SS, self.user.gpr[gpr::RSP].wrapping_add(offset as u64)),
        };
        self.wrap_linear(self.user.segment_base[segment].wrapping_add(offset))
    }

    /// Tries to enter an address in the TLB so that a lookup finds it.
    fn now_in_tlb(&mut self, linear: u64, len: u64, write: bool) -> bool {
        if (linear & PAGE_MASK) + len > PAGE_SIZE {
            return false;
        }
        let access = if write { Access::Write } else { Access::Read };
        matches!(self.translate(self.privilege, linear, access), Ok(Place::Host(_)))
            && self.is_in_tlb(linear, write)
    }

    fn is_in_tlb(&self, linear: u64, write: bool) -> bool {
        let entry = self.tlb().entry(self.privilege, linear);
        let tag = if write { entry.write } else { entry.read };
        tag.load(Ordering::Relaxed) == linear & !PAGE_MASK
    }

    /// As [`Cpu::now_in_tlb`] for a span, on behalf of its first access: of the others it is not known whether they will be
    /// made, so that they must not make the page dirty.
    fn span_now_in_tlb(&mut self, op: &Op, access: SpanLead) -> bool {
        let linear = self.address_of(op, access.address);
        let low = linear.wrapping_sub(u64::from(access.offset));
        let aligned = linear & (u64::from(access.alignment) - 1) == 0;
        if !aligned || (low & PAGE_MASK) + u64::from(access.span) > PAGE_SIZE {
            return false;
        }
        self.now_in_tlb(linear, u64::from(access.len), access.write)
            && self.is_in_tlb(linear, access.span_write)
    }
}

/// Called by [`super::runtime`].
extern "C" fn slow_path(cpu: *mut Cpu, site: u32) -> u64 {
    // SAFETY: `Cpu::enter` put its own pointer there and does not use the reference until the code is left.
    let cpu = unsafe { &mut *cpu };
    let Some(translator) = &cpu.translator else { return 0 };
    let site = translator.cache.sites[site as usize];
    cpu.serve(&site)
}
