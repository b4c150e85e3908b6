//! One vCPU as the machine sees it: the run loop around [`Cpu`], and its state in architectural form.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use engine::state::{MpState, PendingEvents, Segments};
use engine::{EngineError, Exit, Kick, Vcpu, VcpuId, VcpuState};
use x86::bits::{cr0, dr6, dr7, rflags};
use x86::cpuid::CpuidTable;
use x86::regs::Gpr;
use x86::{ControlRegisters, DebugRegisters, DescriptorTable, Exception, Registers, Segment, Vector, msr};

use crate::area::Owner;
use crate::cpu::{Cpu, Mode, host_tsc, seg};
use crate::interp::block::{BlockCache, COLD_BLOCKS, INTERPRETED_BLOCKS};
use crate::msr::Msrs;
use crate::native::Thunks;
use crate::shared::{Counters, Shared, Turns, attention, lock};
use crate::system::interrupt::TripleFault;
use crate::tlb::Privilege;
use crate::translate::check::{Check, Journal};
use crate::translate::dispatch::{Translate, Translator, enter_thread};

/// CPUID leaf with the physical address width.
const ADDRESS_SIZES: u32 = 0x8000_0008;
/// Blocks between two publications of the counters.
const PUBLISH_EVERY: u32 = 1 << 16;

/// A vCPU of the software engine.
pub struct SoftVcpu {
    cpu: Box<Cpu>,
}

/// The cross-thread handle.
struct SoftKick {
    shared: Arc<Shared>,
    id: VcpuId,
}

impl Kick for SoftKick {
    fn kick(&self) {
        self.shared.vcpus[self.id as usize].notify(attention::KICK);
    }

    fn stats(&self) -> Vec<(String, u64)> {
        lock(&self.shared.vcpus[self.id as usize].counters).list()
    }
}

impl SoftVcpu {
    /// A vCPU in its reset state. `code_bytes` is the room for translated code.
    ///
    /// # Errors
    /// The host has no memory for generated code.
    pub fn new(
        shared: Arc<Shared>,
        id: VcpuId,
        cpuid: &CpuidTable,
        translate: Translate,
        code_bytes: usize,
    ) -> engine::Result<Self> {
        let thunks = Thunks::new().map_err(|error| EngineError::Unsupported(error.to_string()))?;
        let translator = Translator::new(translate, code_bytes)
            .map_err(|source| EngineError::Host { what: "mapping memory for translated code", source })?
            .map(Box::new);
        let checked = translate == Translate::Checked;
        if checked && translator.is_none() {
            let what =
                "soft.translate=check: the host's processor has no AVX or no BMI2, so nothing is translated";
            return Err(EngineError::Unsupported(what.to_owned()));
        }
        // SAFETY: a vCPU is made once (see `SoftVm::soft_vcpu`).
        let user = unsafe { Owner::new(shared.vcpus[id as usize].area.clone()) };
        let bits = cpuid.lookup(ADDRESS_SIZES, 0).eax & 0xff;
        let bits = if bits == 0 { 36 } else { bits.min(52) };
        let has_1g_pages = cpuid.lookup(0x8000_0001, 0).edx >> 26 & 1 != 0;
        shared.chips.set_cpuid(id, cpuid);
        let mut cpu = Box::new(Cpu {
            user,
            next_ip: 0,
            privilege: Privilege::Supervisor,
            cpl: 0,
            mode: Mode::Real,
            code_bits: 16,
            disabled: 0,
            unchecked_segments: 0,
            alignment_check: false,
            stack_mask: 0xffff,
            fault: Exception::plain(Vector::InvalidOpcode),
            fault_noncanonical: false,
            fault_segment: 0,
            interrupt_shadow: false,
            nmi_masked: false,
            nmi_pending: false,
            halted: false,
            wait_for_sipi: id != 0,
            pending_debug: 0,
            stop_block: false,
            system_flags: 0,
            segments: [Segment::default(); 6],
            ldt: Segment::default(),
            tr: Segment::default(),
            gdt: DescriptorTable::default(),
            idt: DescriptorTable::default(),
            control: ControlRegisters::default(),
            debug: DebugRegisters::default(),
            msrs: Msrs::default(),
            cpuid: cpuid.clone(),
            reserved_physical: !((1u64 << bits) - 1) & x86::paging::pte::ADDRESS,
            has_1g_pages,
            blocks: BlockCache::new(if translator.is_some() && !checked {
                COLD_BLOCKS
            } else {
                INTERPRETED_BLOCKS
            }),
            thunks,
            translator,
            check: None,
            journal: if checked { Journal::kept() } else { Journal::default() },
            fatal: None,
            map: shared.map(),
            shared,
            id,
            tsc_offset: 0,
            counters: Counters::default(),
            watchpoints: false,
            single_step: false,
            scratch: None,
            reported_halt: false,
        });
        let apic_id = cpuid.apic_id().unwrap_or(id);
        let mut reset = VcpuState::reset(apic_id);
        reset.mp_state = if id == 0 { MpState::Running } else { MpState::WaitForSipi };
        cpu.load_registers(&reset)?;
        let offset = cpu.shared.common_tsc_offset(host_tsc().wrapping_neg());
        cpu.set_tsc_offset(offset);
        cpu.publish_waiting();
        cpu.check = checked.then(|| Box::new(Check::new(&mut cpu)));
        Ok(SoftVcpu { cpu })
    }

    /// The processor itself, for tests and for comparing engines in lockstep.
    pub fn cpu(&mut self) -> &mut Cpu {
        &mut self.cpu
    }
}

impl Vcpu for SoftVcpu {
    fn id(&self) -> VcpuId {
        self.cpu.id
    }

    fn run(&mut self) -> engine::Result<Exit> {
        let result = self.cpu.run();
        self.cpu.publish_counters();
        result
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(SoftKick { shared: self.cpu.shared.clone(), id: self.cpu.id })
    }

    fn state(&mut self) -> engine::Result<VcpuState> {
        Ok(self.cpu.save_state())
    }

    fn set_state(&mut self, state: &VcpuState) -> engine::Result<()> {
        self.cpu.load_state(state)
    }

    fn inject_nmi(&mut self) -> engine::Result<()> {
        self.cpu.shared.chips.inject_nmi(self.cpu.id);
        Ok(())
    }
}

/// What the run loop does after it has looked at everything that waits.
enum Next {
    Execute,
    Leave(Exit),
}

/// This vCPU's turn, where they run one at a time.
struct Turn<'a> {
    /// `None` if they run as they like.
    turns: Option<&'a Turns>,
    is_on: bool,
    /// Blocks that may still be run.
    left: u32,
}

impl<'a> Turn<'a> {
    /// Blocks in a turn.
    const BLOCKS: u32 = 128;

    fn new(turns: Option<&'a Turns>) -> Self {
        Turn { turns, is_on: false, left: 0 }
    }

    /// A block is about to be run.
    #[inline(always)]
    fn go_on(&mut self) {
        if let Some(turns) = self.turns {
            self.next_block(turns);
        }
    }

    fn next_block(&mut self, turns: &Turns) {
        if self.left == 0 {
            self.end();
        }
        if !self.is_on {
            turns.begin();
            self.is_on = true;
            self.left = Self::BLOCKS;
        }
        self.left -= 1;
    }

    /// Lets others run.
    fn end(&mut self) {
        if let Some(turns) = self.turns.filter(|_| self.is_on) {
            turns.end();
            self.is_on = false;
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

impl Cpu {
    fn run(&mut self) -> engine::Result<Exit> {
        let shared = self.shared.clone();
        let own = &shared.vcpus[self.id as usize];
        enter_thread(own.area.base());
        let mut until_publish = PUBLISH_EVERY;
        let mut turn = Turn::new(self.check.is_some().then_some(&shared.turns));
        loop {
            if own.attention().load(Ordering::Relaxed) != 0 {
                turn.end();
                match self.attend() {
                    Ok(Next::Execute) => {}
                    Ok(Next::Leave(exit)) => return Ok(exit),
                    Err(TripleFault) => return Ok(Exit::TripleFault),
                }
            } else if self.halted || self.wait_for_sipi {
                // Entered run() in a waiting state.
                self.note_attention();
                continue;
            }
            turn.go_on();
            if let Err(TripleFault) = self.execute() {
                return Ok(Exit::TripleFault);
            }
            if let Some(what) = self.fatal.take() {
                return Err(EngineError::Guest { vcpu: self.id, rip: self.user.rip, what });
            }
            until_publish -= 1;
            if until_publish == 0 {
                until_publish = PUBLISH_EVERY;
                self.publish_counters();
            }
        }
    }

    fn publish_counters(&self) {
        *lock(&self.shared.vcpus[self.id as usize].counters) = self.counters;
    }

    /// Tells the other vCPUs whether this one waits for SIPI, and whether only an NMI could wake it.
    fn publish_waiting(&self) {
        let own = &self.shared.vcpus[self.id as usize];
        own.waits_for_sipi.store(self.wait_for_sipi, Ordering::SeqCst);
        let dead = self.halted && self.system_flags & rflags::IF == 0 && !self.nmi_pending;
        own.dead_halt.store(dead, Ordering::SeqCst);
    }

    /// Looks at everything that may wait for this vCPU, and sleeps while it has nothing to execute.
    fn attend(&mut self) -> Result<Next, TripleFault> {
        let shared = self.shared.clone();
        let own = &shared.vcpus[self.id as usize];
        loop {
            let bits = own.attention().swap(0, Ordering::SeqCst);
            if bits & attention::MAP != 0 {
                self.refresh_map();
            }
            if bits & attention::CODE != 0 {
                self.code_was_written(&own.take_changed_code(), None);
            }
            if bits & attention::KICK != 0 {
                // What else was asked for is looked at when the vCPU runs again.
                own.attention().fetch_or(attention::EVENT, Ordering::SeqCst);
                return Ok(Next::Leave(Exit::Kicked));
            }
            if shared.chips.has_signals(self.id) {
                self.take_signals();
            }
            if !self.wait_for_sipi {
                if self.interrupt_shadow {
                    // The next instruction comes first; execute() asks for attention again.
                    return Ok(Next::Execute);
                }
                if self.nmi_pending && !self.nmi_masked {
                    self.nmi_pending = false;
                    self.nmi_masked = true;
                    self.wake();
                    self.counters.nmis += 1;
                    self.deliver_interrupt(Vector::Nmi as u8)?;
                    own.attention().fetch_or(attention::EVENT, Ordering::SeqCst);
                    return Ok(Next::Execute);
                }
                if self.system_flags & rflags::IF != 0
                    && shared.chips.has_interrupt(self.id)
                    && let Some(vector) = shared.chips.acknowledge(self.id)
                {
                    self.wake();
                    self.counters.interrupts += 1;
                    self.deliver_interrupt(vector)?;
                    own.attention().fetch_or(attention::EVENT, Ordering::SeqCst);
                    return Ok(Next::Execute);
                }
                if !self.halted {
                    return Ok(Next::Execute);
                }
            }
            self.publish_waiting();
            if !self.reported_halt && shared.all_halted() {
                self.reported_halt = true;
                own.attention().fetch_or(attention::EVENT, Ordering::SeqCst);
                return Ok(Next::Leave(Exit::AllHalted));
            }
            self.publish_counters();
            own.sleep();
            // Until it has looked at what woke it, it counts as running.
            own.dead_halt.store(false, Ordering::SeqCst);
            own.waits_for_sipi.store(false, Ordering::SeqCst);
        }
    }

    fn wake(&mut self) {
        if self.halted {
            self.halted = false;
            self.reported_halt = false;
            self.publish_waiting();
        }
    }

    fn take_signals(&mut self) {
        let signals = self.shared.chips.take_signals(self.id);
        if signals.init {
            self.init_processor();
        }
        if let Some(page) = signals.startup
            && self.wait_for_sipi
        {
            let code = Segment {
                selector: u16::from(page) << 8,
                base: u64::from(page) << 12,
                ..Segment::real_mode(0, true)
            };
            self.user.rip = 0;
            self.wait_for_sipi = false;
            self.reported_halt = false;
            self.set_segment(seg::CS, code);
            self.publish_waiting();
        }
        if signals.nmi {
            self.nmi_pending = true;
        }
    }

    /// INIT (SDM 3A table 9-1): everything as after power-up but the FPU, the MSRs, the TSC and the caching bits of CR0.
    fn init_processor(&mut self) {
        let mut state = VcpuState::reset(self.id);
        state.regs.gpr[Gpr::Rdx as usize] = u64::from(self.cpuid.lookup(1, 0).eax);
        let caching = self.control.cr0 & (cr0::CD | cr0::NW);
        let xcr0 = self.control.xcr0;
        self.user.gpr = state.regs.gpr;
        self.user.rip = state.regs.rip;
        self.put_segments(&state.segments);
        self.control = ControlRegisters { xcr0, ..state.control };
        self.control.cr0 = cr0::ET | caching;
        self.debug = state.debug;
        self.set_rflags(rflags::RESERVED_ONE);
        self.cpl = 0;
        self.halted = false;
        self.nmi_masked = false;
        self.nmi_pending = false;
        self.interrupt_shadow = false;
        self.pending_debug = 0;
        self.shared.chips.init_lapic(self.id);
        // The bootstrap processor starts over; the others wait.
        self.wait_for_sipi = self.id != 0;
        self.update_watchpoints();
        self.update_mode();
        self.publish_waiting();
    }

    fn put_segments(&mut self, s: &Segments) {
        self.segments = [s.es, s.cs, s.ss, s.ds, s.fs, s.gs];
        self.ldt = s.ldt;
        self.tr = s.tr;
        self.gdt = s.gdt;
        self.idt = s.idt;
    }

    fn save_state(&mut self) -> VcpuState {
        // Signals that arrived but were not looked at belong to the state.
        if self.shared.chips.has_signals(self.id) {
            self.take_signals();
        }
        let [es, cs, ss, ds, fs, gs] = self.segments;
        let mut control = self.control;
        control.cr8 = u64::from(self.shared.chips.tpr(self.id) >> 4);
        VcpuState {
            regs: Registers { gpr: self.user.gpr, rip: self.user.rip, rflags: self.rflags() },
            segments: Segments {
                es,
                cs,
                ss,
                ds,
                fs,
                gs,
                ldt: self.ldt,
                tr: self.tr,
                gdt: self.gdt,
                idt: self.idt,
            },
            control,
            debug: self.debug,
            msrs: self.saved_msrs(),
            xsave: self.xsave_image(),
            lapic: self.shared.chips.lapic_state(self.id),
            mp_state: if self.wait_for_sipi {
                MpState::WaitForSipi
            } else if self.halted {
                MpState::Halted
            } else {
                MpState::Running
            },
            events: PendingEvents {
                exception: None,
                interrupt: None,
                nmi_pending: self.nmi_pending,
                nmi_masked: self.nmi_masked,
                interrupt_shadow: self.interrupt_shadow,
            },
        }
    }

    /// Everything but MSRs and the LAPIC.
    fn load_registers(&mut self, state: &VcpuState) -> engine::Result<()> {
        self.load_xsave_image(&state.xsave).map_err(EngineError::InvalidState)?;
        let cr4_bad = state.control.cr4 & !self.cr4_allowed();
        if cr4_bad != 0 {
            return Err(EngineError::InvalidState(format!("CR4 bits {cr4_bad:#x} that this CPU lacks")));
        }
        self.user.gpr = state.regs.gpr;
        self.user.rip = state.regs.rip;
        self.put_segments(&state.segments);
        self.control = state.control;
        self.control.cr0 |= cr0::ET;
        self.debug = state.debug;
        self.debug.dr6 |= dr6::FIXED;
        self.debug.dr7 |= dr7::FIXED;
        // In protected mode the privilege level is SS's.
        self.cpl = if state.control.cr0 & cr0::PE == 0 { 0 } else { self.segments[seg::SS].dpl() };
        self.set_rflags(state.regs.rflags);
        self.halted = state.mp_state == MpState::Halted;
        self.wait_for_sipi = state.mp_state == MpState::WaitForSipi;
        self.nmi_pending = state.events.nmi_pending;
        self.nmi_masked = state.events.nmi_masked;
        self.interrupt_shadow = state.events.interrupt_shadow;
        self.pending_debug = 0;
        self.reported_halt = false;
        self.update_watchpoints();
        self.update_mode();
        Ok(())
    }

    fn load_state(&mut self, state: &VcpuState) -> engine::Result<()> {
        self.load_registers(state)?;
        for &(index, value) in &state.msrs {
            if matches!(index, msr::APIC_BASE | msr::TSC_DEADLINE) {
                continue;
            }
            if index == msr::TSC {
                let offset = self.shared.common_tsc_offset(value.wrapping_sub(host_tsc()));
                self.set_tsc_offset(offset);
                continue;
            }
            if index == msr::TSC_ADJUST && self.load_tsc_adjust(value).is_ok() {
                continue;
            }
            // EFER.LMA and the segment bases have fields of their own; a register that only describes the processor may be
            // loaded with what it already holds.
            if self.write_msr(index, value).is_err() && self.read_msr(index) != Ok(value) {
                return Err(EngineError::InvalidState(format!("MSR {index:#x} cannot hold {value:#x} here")));
            }
        }
        let apic_base = state.msr(msr::APIC_BASE).unwrap_or_else(|| self.shared.chips.apic_base(self.id));
        self.shared.chips.set_lapic_state(self.id, apic_base, &state.lapic)?;
        if let Some(deadline) = state.msr(msr::TSC_DEADLINE) {
            // Refused unless the timer is in that mode, and then there is nothing to load.
            let _ = self.shared.chips.write_msr(self.id, msr::TSC_DEADLINE, deadline);
        }
        self.deliver_loaded(&state.events);
        self.tlb().flush(false);
        self.forget_code_addresses(false);
        self.publish_waiting();
        self.note_attention();
        Ok(())
    }

    /// Events that another engine had taken but not delivered.
    fn deliver_loaded(&mut self, events: &PendingEvents) {
        if let Some(exception) = events.exception {
            let _ = self.deliver_exception(exception);
        } else if let Some(vector) = events.interrupt {
            let _ = self.deliver_interrupt(vector);
        }
    }
}
