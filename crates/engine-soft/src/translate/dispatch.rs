//! When which code runs: blocks are interpreted until they have shown to be worth a translation; translated code runs until
//! something is wanted that it cannot do.

use std::io;
use std::sync::atomic::Ordering;

use iced_x86::{Encoder, InstructionInfoFactory};
use x86::Exception;
use x86::paging::{PAGE_MASK, PAGE_SIZE};

use super::block::{is_supported, translate};
use super::cache::{Cache, Variant, VariantParts};
use super::flags;
use super::handled::{HandlerCall, HandlerCalls};
use super::records::{self, Site, Span};
use super::targets::Pages;
use crate::area::{NO_LINK, SOME_RIP};
use crate::cpu::{Cpu, Mode, R, Raised, seg};
use crate::interp::block::Block;
use crate::interp::op::Flow;
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
/// Longest instruction in bytes.
const MAX_INSTRUCTION: usize = 15;
/// Memory for translated code and what is known of it, of a whole machine: shared out among its vCPUs.
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
    /// Everything, and it is interpreted as well, to see that both come to the same.
    Checked,
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
    pub(super) cache: Cache,
    handler_calls: HandlerCalls,
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
    /// A translator with room for `code_bytes` of code and what is known of it; `None` if nothing is to be translated, or the host's processor is
    /// too old.
    ///
    /// # Errors
    /// The host refuses executable memory or signal handlers.
    pub fn new(translate: Translate, code_bytes: usize) -> io::Result<Option<Self>> {
        let hot = match translate {
            Translate::Nothing => return Ok(None),
            Translate::Hot => HOT,
            Translate::Everything | Translate::Checked => 0,
        };
        if !is_supported() {
            return Ok(None);
        }
        Ok(Some(Translator {
            cache: Cache::new(code_bytes, slow_path)?,
            handler_calls: HandlerCalls::new(),
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
                if clears == translator.cache.clears() && translator.cache.link(link).is_without_spans() =>
            {
                variant.without_spans()
            }
            _ => variant,
        };
        let unit = match self.known_unit(wanted)? {
            Some(unit) => unit,
            None => {
                let block = self.find_block()?;
                match self.new_unit(block, wanted) {
                    Some(unit) => unit,
                    None => return self.run_block(block),
                }
            }
        };
        let Some(translator) = &self.translator else { return Ok(()) };
        let code = translator.cache.entry(unit, flags::Place::Memory);
        let spans = translator.cache.unit(unit).spans;
        let next_page = rip.wrapping_add(PAGE_SIZE);
        let global = self.is_global_code(rip) && (!spans || self.is_global_code(next_page));
        let epoch = self.user.epoch(global);
        let Some(translator) = &mut self.translator else { return Ok(()) };
        translator.pages.note(rip, global);
        let clears = translator.cache.clears();
        match unlinked {
            // What spans pages depends on the mapping of both: a branch has to look.
            Some(Unlinked { link, clears: then, .. })
                if then == clears && (!spans || translator.cache.link(link).is_guarded()) =>
            {
                self.counters.links += 1;
                translator.cache.connect(link, unit, epoch);
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
            let leave = translator.cache.routines(variant.kind()).exit_to;
            self.user.prepare_returns(privilege, leave, [SOME_RIP; 2]);
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
    pub(super) fn notice_code_changes(&mut self) {
        let changes = self.map.code_changes();
        let Some(translator) = &mut self.translator else { return };
        if translator.code_changes == changes {
            return;
        }
        translator.code_changes = changes;
        let Some(translator) = &self.translator else { return };
        let changed = translator.cache.changed_pages(|gpa| self.code_generation(gpa));
        for gpa in changed {
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
        let second_page = translator.cache.second_page(unit);
        let is_current =
            translator.cache.parts(unit).all(|part| self.code_generation(part.gpa) == Some(part.generation));
        if !is_current {
            // Its page was written, maybe by a device: nothing of it can be relied on until it has been looked at.
            self.suspend_code(gpa);
            if self.revalidate_unit(unit).is_none() {
                self.blocks.forget_heat(gpa, self.code_bits);
                return Ok(None);
            }
        }
        Ok(self.continues_at(second_page, linear)?.then_some(unit))
    }

    /// Compares the bytes that a unit was made from with memory; `None` if they are others now.
    fn revalidate_unit(&mut self, unit: u32) -> Option<()> {
        let mut generations = [0; 2];
        for (part, generation) in self.translator.as_ref()?.cache.parts(unit).zip(&mut generations) {
            *generation = self.generation_with(part.gpa, part.bytes)?;
        }
        self.translator.as_mut()?.cache.set_generations(unit, generations);
        Some(())
    }

    /// Translates a block if it is worth it; then it is dropped.
    fn new_unit(&mut self, block: *const Block, variant: Variant) -> Option<u32> {
        // SAFETY: the block is alive until the cache is changed, which only this thread does.
        let (heat, gpa) = unsafe { ((*block).heat(), (*block).gpa()) };
        if heat < self.translator.as_ref()?.hot {
            return None;
        }
        // (What does not lie in RAM is not in the cache, and is not translated.)
        let block = self.blocks.take(gpa, self.code_bits)?;
        let unit = self.translate_block(&block, variant);
        if unit.is_none() {
            self.blocks.put_back(self.code_bits, block);
        }
        unit
    }

    pub(super) fn translate_block(&mut self, block: &Block, variant: Variant) -> Option<u32> {
        self.counters.blocks_translated += 1;
        if self.translator.as_mut()?.cache.forget(block.gpa(), variant) {
            // Its code was not right any more, or not here.
            self.forget_targets();
        }
        for _ in 0..2 {
            let Translator { cache, encoder, info, .. } = self.translator.as_mut()?.as_mut();
            let unit = translate(cache, encoder, info, block, variant);
            if let Some(number) = cache.insert(unit) {
                return Some(number);
            }
            // No room: start over. Nothing of the old code runs now.
            self.clear_translations();
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
        let one = unsafe { &*whole }.part(0..1);
        let Some(unit) = self.translate_block(&one, variant) else { return Ok(()) };
        let Some(translator) = &self.translator else { return Ok(()) };
        let ways = [flags::Place::Memory, flags::Place::Host, flags::Place::Both];
        let entry = translator.cache.entry(unit, ways[way % ways.len()]);
        self.enter(variant, entry)
    }

    /// The page at a guest-physical address was written: translations of it are looked at again before they run.
    pub fn suspend_code(&mut self, gpa: u64) {
        let generation = self.code_generation(gpa);
        let Some(translator) = &mut self.translator else { return };
        if translator.cache.suspend_page(gpa, generation) {
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
            // Branches that are not linked compare with zero.
            self.user.run().epochs = [1; 2];
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
        translator.handler_calls.clear();
        translator.unlinked = None;
        self.forget_targets();
    }

    /// Forgets which instructions were decoded for handlers.
    pub(crate) fn forget_handler_calls(&mut self) {
        if let Some(translator) = &mut self.translator {
            translator.handler_calls.clear();
        }
    }

    /// Runs translated code until it is left.
    pub(super) fn enter(&mut self, variant: Variant, code: u64) -> R<()> {
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
        let link = self.user.run().link;
        let Some(translator) = &mut self.translator else { return Ok(()) };
        if link != NO_LINK {
            let target = translator.cache.link(link).target;
            self.user.rip = self.user.run().page.wrapping_add(target as u64);
        }
        if self.code_bits == 32 {
            self.user.rip &= 0xffff_ffff;
        }
        let (rip, clears) = (self.user.rip, translator.cache.clears());
        translator.unlinked = (link != NO_LINK).then_some(Unlinked { link, rip, clears });
        if translator.raised { Err(Raised) } else { Ok(()) }
    }

    /// Whether translated code was left because it has to go on without spans.
    pub(super) fn has_left_spans(&self) -> bool {
        self.translator.as_ref().is_some_and(|translator| {
            translator.unlinked.is_some_and(|Unlinked { link, clears, .. }| {
                clears == translator.cache.clears() && translator.cache.link(link).is_without_spans()
            })
        })
    }

    /// Does for translated code what it cannot do itself; returns where it goes on, or 0 to leave it.
    fn serve(&mut self, number: u32) -> u64 {
        self.hide_x87_addresses();
        let Some(translator) = &self.translator else { return 0 };
        let site = *translator.cache.site(number);
        self.user.rip = self.user.run().page.wrapping_add(u64::from(site.offset()));
        if let Some((access, retry)) = site.access() {
            let span = site.span();
            let is_found = match span {
                Some(span) => self.span_now_in_tlb(&access, span),
                None => self.now_in_tlb(&access),
            };
            if is_found {
                // A page that another vCPU wrote is no longer watched: before this one may write to it as to any other, it
                // has to know that its own code there is not to be relied on. (RIP is still at the instruction.)
                return if self.code_has_changed() { 0 } else { self.address_in_unit(&site, retry) };
            }
            if let Some(span) = span {
                self.leave_spans(&site, span);
                return 0;
            }
        }
        match self.handle(number, &site) {
            Ok(resume) => resume,
            Err(_) => {
                if let Some(translator) = &mut self.translator {
                    translator.raised = true;
                }
                0
            }
        }
    }

    /// The host address of an offset in the code of a site's unit.
    fn address_in_unit(&self, site: &Site, offset: u16) -> u64 {
        let Some(translator) = &self.translator else { return 0 };
        translator.cache.address(translator.cache.unit(site.unit), offset)
    }

    /// Asks for the link to a site's instruction in a translation without spans.
    fn leave_spans(&mut self, site: &Site, span: Span) {
        let Some(translator) = &self.translator else { return };
        let first_link = translator.cache.unit(site.unit).first_link;
        self.user.run().link = first_link + u32::from(span.otherwise);
    }

    /// Executes a site's instruction by its handler; returns where translated code goes on, or 0 to leave it.
    fn handle(&mut self, number: u32, site: &Site) -> R<u64> {
        let HandlerCall { op, variant, resume } = self.handler_call(number, site)?;
        self.counters.handler_calls += 1;
        self.next_ip = self.user.rip.wrapping_add(u64::from(op.len));
        self.stop_block = false;
        let result = (op.run)(self, &op);
        if result.is_err() {
            self.fault_segment = op.segment;
        }
        let flow = result?;
        self.user.rip = self.next_ip;
        let has_to_leave = flow == Flow::End
            || self.stop_block
            || self.code_has_changed()
            || self.user.are_returns_forgotten()
            || self.variant() != Some(variant);
        Ok(if has_to_leave { 0 } else { resume })
    }

    /// What executing a site's instruction takes.
    fn handler_call(&mut self, number: u32, site: &Site) -> R<HandlerCall> {
        match self.translator.as_ref().and_then(|translator| translator.handler_calls.find(number)) {
            Some(call) => Ok(call),
            None => match self.decode_site(number, site) {
                Some(call) => Ok(call),
                None => self.ud(),
            },
        }
    }

    #[cold]
    fn decode_site(&mut self, number: u32, site: &Site) -> Option<HandlerCall> {
        self.counters.sites_decoded += 1;
        let cache = &self.translator.as_ref()?.cache;
        let variant = cache.unit(site.unit).variant.of_state();
        let resume = match site.resume() {
            0 => 0,
            offset => self.address_in_unit(site, offset),
        };
        let mut bytes = [0; MAX_INSTRUCTION];
        let stored = cache.instruction_bytes(site);
        let len = stored.len().min(bytes.len());
        bytes[..len].copy_from_slice(&stored[..len]);
        let decoded = self.decode(&bytes[..len], 1).ok()?;
        self.translator.as_mut()?.handler_calls.insert(number, decoded, variant, resume)
    }

    /// The linear address of an access.
    fn address_of(&self, access: &records::Access) -> u64 {
        let base = self.user.segment_base[usize::from(access.segment)];
        self.wrap_linear(base.wrapping_add(access.offset(&self.user)))
    }

    /// Tries to enter the address of an access in the TLB so that a lookup finds it.
    fn now_in_tlb(&mut self, access: &records::Access) -> bool {
        let linear = self.address_of(access);
        let is_aligned = linear & (u64::from(access.alignment) - 1) == 0;
        if !is_aligned || (linear & PAGE_MASK) + u64::from(access.len) > PAGE_SIZE {
            return false;
        }
        let kind = if access.write { Access::Write } else { Access::Read };
        matches!(self.translate(self.privilege, linear, kind), Ok(Place::Host(_)))
            && self.is_in_tlb(linear, access.write)
    }

    fn is_in_tlb(&self, linear: u64, write: bool) -> bool {
        let entry = self.tlb().entry(self.privilege, linear);
        let tag = if write { entry.write } else { entry.read };
        tag.load(Ordering::Relaxed) == linear & !PAGE_MASK
    }

    /// As [`Cpu::now_in_tlb`] for a span, on behalf of its first access: of the others it is not known whether they will be
    /// made, so that they must not make the page dirty.
    fn span_now_in_tlb(&mut self, access: &records::Access, span: Span) -> bool {
        let linear = self.address_of(access);
        let low = linear.wrapping_sub(u64::from(span.offset));
        (low & PAGE_MASK) + u64::from(span.len) <= PAGE_SIZE
            && self.now_in_tlb(access)
            && self.is_in_tlb(linear, span.write)
    }
}

/// Called by [`super::runtime`].
extern "C" fn slow_path(cpu: *mut Cpu, site: u32) -> u64 {
    // SAFETY: `Cpu::enter` put its own pointer there and does not use the reference until the code is left.
    let cpu = unsafe { &mut *cpu };
    cpu.serve(site)
}
