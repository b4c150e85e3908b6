//! When which code runs: blocks are interpreted until they have shown to be worth a translation; translated code runs until
//! something is wanted that it cannot do.

use std::io;
use std::sync::Arc;

use iced_x86::{Encoder, InstructionInfoFactory};
use x86::Exception;

use super::block::{is_supported, translate};
use super::cache::{AddressSource, Cache, Purpose, Site, Variant};
use super::runtime::Kind;
use crate::area::NO_LINK;
use crate::cpu::{Cpu, Mode, R, Raised, gpr};
use crate::interp::block::Block;
use crate::interp::op::Flow;
use crate::mmu::{Access, Place};
use crate::tlb::{PRIVILEGES, Privilege};

/// How often a block is interpreted before it is translated.
const HOT: u32 = 8;
/// MXCSR of Rust code: everything masked, round to nearest.
const HOST_MXCSR: u32 = 0x1f80;
/// The exception masks of MXCSR.
const ALL_MASKED: u32 = 0x1f80;
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

/// One vCPU's translator.
pub struct Translator {
    cache: Cache,
    encoder: Encoder,
    info: InstructionInfoFactory,
    /// How often a block is interpreted before it is translated.
    hot: u32,
    /// What the jump targets of each privilege were entered for.
    variants: [Option<Variant>; 3],
    /// The branch through which translated code was left and where it leads.
    unlinked: Option<(u32, u64)>,
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
        if self.mode != Mode::Long || self.alignment_check || self.watchpoints {
            return None;
        }
        // An unmasked exception needs the interpreter, which knows what to do when the host raises it.
        if self.privilege == Privilege::User && self.user.mxcsr & ALL_MASKED != ALL_MASKED {
            return None;
        }
        Some(Variant::new(self.privilege, self.code_bits, self.disabled))
    }

    /// Runs from the present RIP: translated code if there is some, else one block interpreted.
    pub fn run_translated(&mut self, variant: Variant) -> R<()> {
        let rip = self.user.rip;
        let privilege = variant.privilege();
        let Some(translator) = &mut self.translator else { return self.interpret_block() };
        if translator.variants[privilege as usize] != Some(variant) {
            translator.variants[privilege as usize] = Some(variant);
            self.user.targets().empty(privilege);
        }
        let unlinked = translator.unlinked.take().filter(|(_, target)| *target == rip);
        if unlinked.is_none()
            && let Some(code) = self.user.targets().find(privilege, rip)
        {
            return self.enter(variant.kind(), code);
        }
        self.counters.target_misses += 1;
        let block = self.find_block()?;
        // SAFETY: the block is alive until the cache is changed, which only this thread does.
        let found = unsafe { &*block };
        let Some(unit) = self.unit_for(found, variant) else { return self.run_block(block) };
        let spans = found.spans();
        let Some(translator) = &mut self.translator else { return Ok(()) };
        let code = translator.cache.unit(unit).entry_memory;
        match unlinked {
            // What spans pages depends on the mapping of both, so it is only entered by its linear address.
            Some((link, _)) if !spans => {
                self.counters.links += 1;
                translator.cache.link(link, unit);
            }
            _ => {
                let global = self.is_global_code(rip);
                self.user.targets().insert(privilege, rip, code, global);
            }
        }
        self.enter(variant.kind(), code)
    }

    /// The translation of a block, if it has one or is worth one.
    fn unit_for(&mut self, block: &Block, variant: Variant) -> Option<u32> {
        let translator = self.translator.as_mut()?;
        if let Some(unit) = translator.cache.find(block.gpa(), variant) {
            let translated = translator.cache.unit(unit).block.clone();
            if translated.is_current() {
                return Some(unit);
            }
            // Its page was written, maybe by a device: nothing of it can be relied on until it has been looked at.
            self.suspend_code(block.gpa());
            if translated.confirm_by(block) {
                return Some(unit);
            }
        }
        if block.heat() < self.translator.as_ref()?.hot {
            return None;
        }
        let block = self.blocks.shared(block)?;
        self.translate_block(&block, variant)
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
            PRIVILEGES.into_iter().for_each(|privilege| self.user.targets().empty(privilege));
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
        let whole = self.find_block()?;
        // SAFETY: the block is alive until the cache is changed, which only this thread does.
        let one = Arc::new(unsafe { &*whole }.first_instruction());
        let Some(unit) = self.translate_block(&one, variant) else { return Ok(()) };
        let Some(translator) = &self.translator else { return Ok(()) };
        let unit = translator.cache.unit(unit);
        let entries = [unit.entry_memory, unit.entry_host, unit.entry_both];
        self.enter(variant.kind(), entries[way % entries.len()])
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
        } else {
            self.forget_targets();
        }
    }

    fn forget_targets(&mut self) {
        for privilege in PRIVILEGES {
            self.user.targets().empty(privilege);
        }
    }

    /// Forgets the translation of one linear page.
    pub fn flush_page(&mut self, linear: u64) {
        self.counters.tlb_flushes += 1;
        self.tlb().flush_page(linear);
        self.blocks.flush_linear();
        self.user.targets().forget_page(linear);
    }

    /// Forgets all translations. Not to be called from within translated code.
    pub fn clear_translations(&mut self) {
        let Some(translator) = &mut self.translator else { return };
        translator.cache.clear();
        translator.unlinked = None;
        self.forget_targets();
    }

    /// Runs translated code until it is left.
    fn enter(&mut self, kind: Kind, code: u64) -> R<()> {
        let page = self.user.rip & !x86::paging::PAGE_MASK;
        let this: *mut Cpu = self;
        let run = self.user.run();
        run.page = page;
        run.cpu = this as u64;
        run.host_mxcsr = HOST_MXCSR;
        run.link = NO_LINK;
        let Some(translator) = &mut self.translator else { return Ok(()) };
        translator.raised = false;
        let routine = translator.cache.routines(kind).enter;
        // SAFETY: the routine was generated with this signature; it keeps to the calling convention, and `code` is an entry
        // of a unit in the same code memory. Rust code that it calls has the vCPU by `this`, which is not used meanwhile.
        unsafe {
            let enter: extern "C" fn(u64) = std::mem::transmute(routine);
            enter(code);
        }
        let (link, rip) = (self.user.run().link, self.user.rip);
        let Some(translator) = &mut self.translator else { return Ok(()) };
        translator.unlinked = (link != NO_LINK).then_some((link, rip));
        if translator.raised { Err(Raised) } else { Ok(()) }
    }

    /// Does for translated code what it cannot do itself; returns where it goes on, or 0 to leave it.
    fn serve(&mut self, site: &Site) -> u64 {
        // SAFETY: operations live as long as the block, which the unit keeps.
        let op = unsafe { &*site.op };
        self.user.rip = self.user.run().page.wrapping_add(u64::from(site.offset));
        self.next_ip = self.user.rip.wrapping_add(u64::from(op.len));
        if let Purpose::Access { address, len, write, retry } = site.purpose {
            let offset = match address {
                AddressSource::Operand => op.offset(&self.user),
                AddressSource::Stack(offset) => self.user.gpr[gpr::RSP].wrapping_add(offset as u64),
            };
            let segment = match address {
                AddressSource::Operand => usize::from(op.segment),
                AddressSource::Stack(_) => crate::cpu::seg::SS,
            };
            let linear = self.user.segment_base[segment].wrapping_add(offset);
            if self.now_in_tlb(linear, len, write) {
                return retry;
            }
        }
        self.counters.handler_calls += 1;
        self.stop_block = false;
        match (op.run)(self, op) {
            Ok(flow) => {
                self.user.rip = self.next_ip;
                if flow == Flow::End || self.stop_block || self.variant() != Some(site.variant) {
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

    /// Tries to enter an address in the TLB so that a lookup finds it.
    fn now_in_tlb(&mut self, linear: u64, len: u8, write: bool) -> bool {
        use x86::paging::{PAGE_MASK, PAGE_SIZE};
        if (linear & PAGE_MASK) + u64::from(len) > PAGE_SIZE {
            return false;
        }
        let access = if write { Access::Write } else { Access::Read };
        if !matches!(self.translate(self.privilege, linear, access), Ok(Place::Host(_))) {
            return false;
        }
        let entry = self.tlb().entry(self.privilege, linear);
        let tag = if write { entry.write } else { entry.read };
        tag.load(std::sync::atomic::Ordering::Relaxed) == linear & !PAGE_MASK
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
