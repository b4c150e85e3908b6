//! The local APIC (SDM 3A chapter 10): xAPIC page and x2APIC registers, priorities, local vector table, timer,
//! interrupt command register.
//!
//! A plain struct: it knows nothing of threads or of other LAPICs. What concerns them comes back as an
//! [`Action`]; what concerns its own processor beyond the IRR (a local NMI or INIT) waits in
//! [`Lapic::take_raised`].
//!
//! Choices where the manual leaves one: the APIC ID cannot be changed, as on current processors; there are six
//! LVT entries (no CMCI); local interrupts are wires without polarity.

pub mod bits;
pub mod timer;

use engine::{LapicState, VcpuId};
use x86::msr::apic_base;

use super::message::{Address, DeliveryMode, Destination, Message, x2apic_logical_id};
use super::{GeneralProtection, VcpuTime};
use bits::{FIRST_VECTOR, esr, icr, lvt, register, svr};
use timer::{Mode, Timer};

/// What the processor model says of its LAPIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LapicModel {
    /// CPUID.01H:ECX.x2APIC: x2APIC mode may be entered.
    pub x2apic: bool,
    /// EOI broadcasts can be suppressed; the IOAPIC must then have an EOI register.
    pub eoi_suppression: bool,
    /// Width of a physical address (CPUID.80000008H:EAX), which bounds IA32_APIC_BASE.
    pub physical_address_bits: u32,
}

/// What a register write asks of the world outside the LAPIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    None,
    /// Send an interprocessor interrupt.
    Send(Message),
    /// An interrupt is finished; if a vector is given it was a level-triggered one, and the IOAPIC is to be told.
    Finished(Option<u8>),
}

/// Local interrupt sources other than the timer and the error register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalInterrupt {
    /// The LINT1 pin (NMI on a PC).
    Lint1,
    /// Thermal sensor.
    Thermal,
    /// Performance counter overflow.
    Performance,
}

/// What the LAPIC raised for its processor without going through the IRR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Raised {
    /// A local NMI.
    pub nmi: bool,
    /// A local INIT.
    pub init: bool,
}

/// A 256-bit register: ISR, TMR or IRR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct VectorSet([u64; 4]);

impl VectorSet {
    fn set(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] |= 1 << (vector & 63);
    }

    fn clear(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] &= !(1 << (vector & 63));
    }

    fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 6)] >> (vector & 63) & 1 != 0
    }

    fn highest(&self) -> Option<u8> {
        let word = self.0.iter().rposition(|bits| *bits != 0)?;
        Some((word * 64) as u8 + 63 - self.0[word].leading_zeros() as u8)
    }

    /// The 32-bit register `index` of eight.
    fn word(&self, index: u32) -> u32 {
        (self.0[(index >> 1) as usize & 3] >> (32 * (index & 1))) as u32
    }

    fn set_word(&mut self, index: u32, value: u32) {
        let shift = 32 * (index & 1);
        let word = &mut self.0[(index >> 1) as usize & 3];
        *word = *word & !(0xffff_ffff << shift) | u64::from(value) << shift;
    }
}

/// Priority class of a vector or of TPR/PPR.
fn class(priority: u8) -> u8 {
    priority >> 4
}

/// Index into [`Lapic::lvt`].
fn lvt_index(entry: u32) -> usize {
    (entry - register::LVT_TIMER) as usize
}

/// One local APIC.
#[derive(Clone, Debug)]
pub struct Lapic {
    vcpu: VcpuId,
    /// APIC ID.
    id: u32,
    model: LapicModel,
    base: u64,
    tpr: u8,
    ldr: u32,
    dfr: u32,
    svr: u32,
    isr: VectorSet,
    tmr: VectorSet,
    irr: VectorSet,
    /// What the register shows.
    esr: u32,
    /// Errors since the last write to the register.
    errors: u32,
    icr: [u32; 2],
    lvt: [u32; 6],
    timer: Timer,
    /// Level of LINT0, which the 8259 pair drives.
    lint0: bool,
    raised: Raised,
}

impl Lapic {
    /// A LAPIC after power-up. vCPU 0 is the bootstrap processor.
    pub fn new(vcpu: VcpuId, id: u32, model: LapicModel) -> Self {
        let bootstrap = if vcpu == 0 { apic_base::BSP } else { 0 };
        let mut lapic = Lapic {
            vcpu,
            id,
            model,
            base: apic_base::DEFAULT_ADDRESS | apic_base::EN | bootstrap,
            tpr: 0,
            ldr: 0,
            dfr: 0,
            svr: 0,
            isr: VectorSet::default(),
            tmr: VectorSet::default(),
            irr: VectorSet::default(),
            esr: 0,
            errors: 0,
            icr: [0; 2],
            lvt: [0; 6],
            timer: Timer::default(),
            lint0: false,
            raised: Raised::default(),
        };
        lapic.init();
        lapic
    }

    /// Returns to the state after power-up; the LINT0 wire keeps its level.
    pub fn power_up(&mut self) {
        *self = Lapic { lint0: self.lint0, ..Lapic::new(self.vcpu, self.id, self.model) };
    }

    /// Gives the LAPIC another APIC ID.
    pub fn set_id(&mut self, id: u32) {
        self.id = id;
    }

    /// Changes what the processor model says.
    pub fn set_model(&mut self, model: LapicModel) {
        self.model = model;
    }

    /// INIT: every register but the APIC ID and IA32_APIC_BASE returns to its reset value (SDM 3A §10.4.7.3).
    pub fn init(&mut self) {
        self.tpr = 0;
        self.ldr = 0;
        self.dfr = bits::DFR_MODEL | bits::DFR_FIXED;
        self.svr = svr::RESET;
        self.isr = VectorSet::default();
        self.tmr = VectorSet::default();
        self.irr = VectorSet::default();
        self.esr = 0;
        self.errors = 0;
        self.icr = [0; 2];
        self.lvt = [lvt::MASKED; 6];
        self.timer = Timer::default();
        self.raised = Raised::default();
    }

    // ---- enabling

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Enabled by IA32_APIC_BASE.
    pub fn present(&self) -> bool {
        self.base & apic_base::EN != 0
    }

    /// In x2APIC mode.
    pub fn x2apic(&self) -> bool {
        self.base & (apic_base::EN | apic_base::EXTD) == apic_base::EN | apic_base::EXTD
    }

    fn enabled(&self) -> bool {
        self.present() && self.svr & svr::ENABLE != 0
    }

    /// Writes IA32_APIC_BASE (SDM 3A §10.4.4, §10.12.5 and figure 10-27).
    ///
    /// # Errors
    ///
    /// #GP for reserved bits, for x2APIC mode where the model has none, and for the transitions that the state
    /// diagram lacks: to the invalid mode, from x2APIC to xAPIC, from disabled to x2APIC.
    pub fn set_base(&mut self, value: u64) -> Result<(), GeneralProtection> {
        let address = apic_base::ADDRESS & ((1u64 << self.model.physical_address_bits.clamp(32, 52)) - 1);
        let mut allowed = address | apic_base::BSP | apic_base::EN;
        if self.model.x2apic {
            allowed |= apic_base::EXTD;
        }
        if value & !allowed != 0 {
            return Err(GeneralProtection);
        }
        let modes = |base: u64| (base & apic_base::EN != 0, base & apic_base::EXTD != 0);
        match (modes(self.base), modes(value)) {
            (_, (false, true)) | ((true, true), (true, false)) | ((false, _), (true, true)) => {
                return Err(GeneralProtection);
            }
            ((true, _), (false, false)) => self.init(),
            ((true, false), (true, true)) => self.icr = [0; 2],
            _ => {}
        }
        self.base = value;
        Ok(())
    }

    /// What decides whether messages are for this LAPIC.
    pub fn address(&self) -> Address {
        Address {
            id: self.id,
            present: self.present(),
            x2apic: self.x2apic(),
            accepts: self.svr & svr::ENABLE != 0,
            flat: self.dfr & bits::DFR_MODEL == bits::DFR_MODEL,
            logical_id: (self.ldr >> 24) as u8,
        }
    }

    // ---- interrupts in

    /// Takes a fixed (or already arbitrated lowest-priority) interrupt message. False if the LAPIC is disabled
    /// or the vector is illegal.
    pub fn accept(&mut self, vector: u8, level: bool) -> bool {
        if !self.enabled() {
            return false;
        }
        if vector < FIRST_VECTOR {
            self.error(esr::RECEIVE_ILLEGAL_VECTOR);
            return false;
        }
        self.irr.set(vector);
        if level {
            self.tmr.set(vector);
        } else {
            self.tmr.clear(vector);
        }
        true
    }

    /// Drives LINT0.
    pub fn set_lint0(&mut self, level: bool) {
        let rising = level && !self.lint0;
        self.lint0 = level;
        if self.lvt[lvt_index(register::LVT_LINT0)] & lvt::LEVEL != 0 {
            self.sample_lint0();
        } else if rising {
            self.fire(register::LVT_LINT0);
        }
    }

    /// Tells the level of LINT0 when [`Lapic::watches_lint0`] has become true. That is no edge.
    pub fn begin_lint0(&mut self, level: bool) {
        self.lint0 = level;
        self.sample_lint0();
    }

    /// Lets a level-triggered LINT0 in, if it is asserted and the previous one is finished.
    fn sample_lint0(&mut self) {
        let entry = self.lvt[lvt_index(register::LVT_LINT0)];
        if self.lint0 && entry & (lvt::LEVEL | lvt::MASKED | lvt::REMOTE_IRR) == lvt::LEVEL {
            self.fire(register::LVT_LINT0);
        }
    }

    /// A pulse on another local interrupt source.
    pub fn pulse(&mut self, source: LocalInterrupt) {
        self.fire(match source {
            LocalInterrupt::Lint1 => register::LVT_LINT1,
            LocalInterrupt::Thermal => register::LVT_THERMAL,
            LocalInterrupt::Performance => register::LVT_PERFORMANCE,
        });
    }

    /// Delivers the interrupt of an LVT entry.
    fn fire(&mut self, entry: u32) {
        let value = self.lvt[lvt_index(entry)];
        if value & lvt::MASKED != 0 || !self.present() {
            return;
        }
        let vector = (value & lvt::VECTOR) as u8;
        let mode = match entry {
            register::LVT_TIMER | register::LVT_ERROR => DeliveryMode::Fixed,
            _ => DeliveryMode::from_bits(value >> lvt::MODE_SHIFT),
        };
        match mode {
            DeliveryMode::Fixed if vector < FIRST_VECTOR => {
                // The error entry itself may be the illegal one: note it without firing again.
                self.errors |= esr::RECEIVE_ILLEGAL_VECTOR;
                if entry != register::LVT_ERROR {
                    self.fire(register::LVT_ERROR);
                }
            }
            DeliveryMode::Fixed => {
                let level = entry == register::LVT_LINT0 && value & lvt::LEVEL != 0;
                if self.accept(vector, level) && level {
                    self.lvt[lvt_index(entry)] |= lvt::REMOTE_IRR;
                }
            }
            DeliveryMode::Nmi => self.raised.nmi = true,
            DeliveryMode::Init => self.raised.init = true,
            // ExtINT of LINT0 is the virtual wire, a level that `accepts_pic` speaks of. There is no SMM.
            _ => {}
        }
    }

    fn error(&mut self, bit: u32) {
        self.errors |= bit;
        self.fire(register::LVT_ERROR);
    }

    /// The 8259 pair's output goes straight to the processor: through the virtual wire (LINT0 as ExtINT), or
    /// because the LAPIC is off and LINT0 is the INTR pin (SDM 3A §10.4.3).
    pub fn accepts_pic(&self) -> bool {
        let entry = self.lvt[lvt_index(register::LVT_LINT0)];
        !self.present()
            || entry & lvt::MASKED == 0
                && DeliveryMode::from_bits(entry >> lvt::MODE_SHIFT) == DeliveryMode::ExtInt
    }

    /// LINT0 is an interrupt of the LAPIC's own, so [`Lapic::set_lint0`] has to be told of every change.
    pub fn watches_lint0(&self) -> bool {
        self.present() && self.lvt[lvt_index(register::LVT_LINT0)] & lvt::MASKED == 0 && !self.accepts_pic()
    }

    /// What was raised for the processor since the last call.
    pub fn take_raised(&mut self) -> Raised {
        std::mem::take(&mut self.raised)
    }

    // ---- interrupts out

    /// Processor priority.
    pub fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0);
        if class(self.tpr) >= class(in_service) { self.tpr } else { in_service & 0xf0 }
    }

    /// The vector that the processor would be given now: the highest requested one, if its class is above the
    /// processor priority. Software-disabling the LAPIC keeps new ones out but leaves those that are in
    /// (SDM 3A §10.4.7.2).
    pub fn deliverable(&self) -> Option<u8> {
        self.irr.highest().filter(|vector| self.present() && class(*vector) > class(self.ppr()))
    }

    /// Whether an interrupt with this vector waits to be taken; a further one would be lost.
    pub fn requests(&self, vector: u8) -> bool {
        self.irr.contains(vector)
    }

    /// The processor takes the vector: from request to in service.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.deliverable()?;
        self.irr.clear(vector);
        self.isr.set(vector);
        Some(vector)
    }

    fn end_of_interrupt(&mut self) -> Action {
        let Some(vector) = self.isr.highest() else { return Action::None };
        self.isr.clear(vector);
        if !self.tmr.contains(vector) {
            return Action::Finished(None);
        }
        let lint0 = &mut self.lvt[lvt_index(register::LVT_LINT0)];
        if *lint0 & lvt::REMOTE_IRR != 0 && (*lint0 & lvt::VECTOR) as u8 == vector {
            *lint0 &= !lvt::REMOTE_IRR;
            self.sample_lint0();
        }
        Action::Finished((self.svr & svr::SUPPRESS_EOI_BROADCAST == 0).then_some(vector))
    }

    /// TPR bits 7:4, as CR8 shows them.
    pub fn cr8(&self) -> u8 {
        class(self.tpr)
    }

    /// Writes TPR through CR8.
    pub fn set_cr8(&mut self, value: u8) {
        self.tpr = value << 4;
    }

    // ---- timer

    /// When the timer will want [`Lapic::run_timer`]; nothing while its interrupt is masked.
    pub fn deadline_ns(&self) -> Option<u64> {
        let masked = self.lvt[lvt_index(register::LVT_TIMER)] & lvt::MASKED != 0;
        self.timer.next_ns().filter(|_| !masked && self.present())
    }

    /// Delivers the timer interrupt if its time has come.
    pub fn run_timer(&mut self, now_ns: u64, time: &VcpuTime) {
        if self.timer.expire(now_ns, time) {
            self.fire(register::LVT_TIMER);
        }
    }

    /// IA32_TSC_DEADLINE.
    pub fn tsc_deadline(&mut self, time: &VcpuTime) -> u64 {
        if self.timer.tsc_deadline() != 0 {
            self.run_timer(time.now_ns(), time);
        }
        self.timer.tsc_deadline()
    }

    /// Writes IA32_TSC_DEADLINE; a deadline in the past fires at once.
    pub fn set_tsc_deadline(&mut self, value: u64, time: &VcpuTime) {
        if self.timer.set_tsc_deadline(value, time) {
            self.fire(register::LVT_TIMER);
        }
    }

    /// The guest has changed its TSC.
    pub fn tsc_changed(&mut self, time: &VcpuTime) {
        if self.timer.set_tsc_deadline(self.timer.tsc_deadline(), time) {
            self.fire(register::LVT_TIMER);
        }
    }

    // ---- registers

    /// Reads a register of the xAPIC page. Registers that do not exist read as zero and note an error.
    pub fn read_xapic(&mut self, number: u32, time: &VcpuTime) -> u32 {
        match number {
            register::ID => self.id << 24,
            register::APR => u32::from(self.tpr.max(self.ppr())),
            register::DFR => self.dfr,
            register::LDR => self.ldr,
            register::ICR_HIGH => self.icr[1],
            register::EOI | register::RRD => 0,
            _ => self.read_common(number, time).unwrap_or_else(|| {
                self.error(esr::ILLEGAL_REGISTER);
                0
            }),
        }
    }

    /// Writes a register of the xAPIC page. Read-only registers ignore it; those that do not exist note an error.
    pub fn write_xapic(&mut self, number: u32, value: u32, time: &VcpuTime) -> Action {
        match number {
            register::ID | register::VERSION | register::APR | register::PPR | register::RRD => {}
            register::ISR..register::ESR | register::CURRENT_COUNT => {}
            register::EOI => return self.end_of_interrupt(),
            register::LDR => self.ldr = value & bits::LDR_MASK,
            register::DFR => self.dfr = value | bits::DFR_FIXED,
            register::ICR_HIGH => self.icr[1] = value & 0xff00_0000,
            register::ICR_LOW => {
                self.icr[0] = value & icr::WRITABLE;
                let logical = value & icr::LOGICAL != 0;
                return self.send(Destination::from_8bit((self.icr[1] >> 24) as u8, logical));
            }
            _ => {
                if !self.write_common(number, value, time) {
                    self.error(esr::ILLEGAL_REGISTER);
                }
            }
        }
        Action::None
    }

    /// Reads MSR 800h + `number`.
    ///
    /// # Errors
    ///
    /// #GP outside x2APIC mode and for registers that do not exist or are write-only (SDM 3A table 10-6).
    pub fn read_x2apic(&mut self, number: u32, time: &VcpuTime) -> Result<u64, GeneralProtection> {
        if !self.x2apic() {
            return Err(GeneralProtection);
        }
        match number {
            register::ID => Ok(u64::from(self.id)),
            register::LDR => Ok(u64::from(x2apic_logical_id(self.id))),
            register::ICR_LOW => Ok(u64::from(self.icr[1]) << 32 | u64::from(self.icr[0])),
            _ => self.read_common(number, time).map(u64::from).ok_or(GeneralProtection),
        }
    }

    /// Writes MSR 800h + `number`.
    ///
    /// # Errors
    ///
    /// #GP outside x2APIC mode, for registers that do not exist or are read-only, and for reserved bits
    /// (SDM 3A table 10-6 and §10.12.1.3).
    pub fn write_x2apic(
        &mut self,
        number: u32,
        value: u64,
        time: &VcpuTime,
    ) -> Result<Action, GeneralProtection> {
        if !self.x2apic() {
            return Err(GeneralProtection);
        }
        if number == register::ICR_LOW {
            let low = value as u32;
            if low & !(icr::WRITABLE | icr::STATUS) != 0 {
                return Err(GeneralProtection);
            }
            self.icr = [low & icr::WRITABLE, (value >> 32) as u32];
            return Ok(self.send(Destination::from_32bit(self.icr[1], low & icr::LOGICAL != 0)));
        }
        let value = u32::try_from(value).map_err(|_| GeneralProtection)?;
        let writable = match number {
            register::TPR | register::SELF_IPI => 0xff,
            register::EOI | register::ESR => 0,
            register::SVR => self.svr_writable(),
            register::LVT_TIMER..=register::LVT_ERROR => lvt_fields(number),
            register::INITIAL_COUNT => u32::MAX,
            register::DIVIDE => bits::DIVIDE_MASK,
            _ => return Err(GeneralProtection),
        };
        if value & !writable != 0 || number == register::LVT_TIMER && Mode::from_lvt(value) == Mode::Reserved
        {
            return Err(GeneralProtection);
        }
        match number {
            register::EOI => return Ok(self.end_of_interrupt()),
            register::SELF_IPI => {
                let vector = value as u8;
                if vector < FIRST_VECTOR {
                    self.error(esr::SEND_ILLEGAL_VECTOR);
                } else {
                    self.accept(vector, false);
                }
            }
            _ => {
                self.write_common(number, value, time);
            }
        }
        Ok(Action::None)
    }

    fn svr_writable(&self) -> u32 {
        let suppression = if self.model.eoi_suppression { svr::SUPPRESS_EOI_BROADCAST } else { 0 };
        svr::VECTOR | svr::ENABLE | svr::NO_FOCUS | suppression
    }

    /// Registers that read alike in both modes.
    fn read_common(&mut self, number: u32, time: &VcpuTime) -> Option<u32> {
        Some(match number {
            register::VERSION if self.model.eoi_suppression => bits::VERSION | bits::VERSION_EOI_SUPPRESSION,
            register::VERSION => bits::VERSION,
            register::TPR => self.tpr.into(),
            register::PPR => self.ppr().into(),
            register::SVR => self.svr,
            register::ISR..register::TMR => self.isr.word(number - register::ISR),
            register::TMR..register::IRR => self.tmr.word(number - register::TMR),
            register::IRR..register::ESR => self.irr.word(number - register::IRR),
            register::ESR => self.esr,
            register::ICR_LOW => self.icr[0],
            register::LVT_TIMER..=register::LVT_ERROR => self.lvt[lvt_index(number)],
            register::INITIAL_COUNT => self.timer.initial(),
            register::CURRENT_COUNT => self.timer.current(time.now_ns()),
            register::DIVIDE => self.timer.divide(),
            _ => return None,
        })
    }

    /// Registers that are written alike in both modes; false if there is no such register.
    fn write_common(&mut self, number: u32, value: u32, time: &VcpuTime) -> bool {
        match number {
            register::TPR => self.tpr = value as u8,
            register::SVR => {
                self.svr = value & self.svr_writable();
                if self.svr & svr::ENABLE == 0 {
                    self.lvt.iter_mut().for_each(|entry| *entry |= lvt::MASKED);
                }
            }
            register::ESR => self.esr = std::mem::take(&mut self.errors),
            register::LVT_TIMER..=register::LVT_ERROR => self.write_lvt(number, value, time),
            register::INITIAL_COUNT => self.timer.set_initial(value, time.now_ns()),
            register::DIVIDE => self.timer.set_divide(value, time.now_ns()),
            _ => return false,
        }
        true
    }

    fn write_lvt(&mut self, number: u32, value: u32, time: &VcpuTime) {
        if number == register::LVT_TIMER {
            // What came due under the old entry is settled under it: a masked expiry is lost.
            let now_ns = time.now_ns();
            self.run_timer(now_ns, time);
            self.timer.set_mode(Mode::from_lvt(value), now_ns);
        }
        let watched_lint0 = self.watches_lint0();
        let entry = &mut self.lvt[lvt_index(number)];
        let mut read_only = *entry & (lvt_fields(number) & (lvt::STATUS | lvt::REMOTE_IRR));
        if value & lvt::LEVEL == 0 {
            read_only &= !lvt::REMOTE_IRR;
        }
        *entry = value & lvt_fields(number) & !(lvt::STATUS | lvt::REMOTE_IRR) | read_only;
        if self.svr & svr::ENABLE == 0 {
            *entry |= lvt::MASKED;
        }
        if number == register::LVT_LINT0 && watched_lint0 {
            self.sample_lint0();
        }
    }

    /// Sends what the ICR holds.
    fn send(&mut self, addressed: Destination) -> Action {
        let low = self.icr[0];
        let vector = (low & icr::VECTOR) as u8;
        let mode = DeliveryMode::from_bits(low >> icr::MODE_SHIFT);
        let destination = match (low & icr::SHORTHAND) >> icr::SHORTHAND_SHIFT {
            0 => addressed,
            1 => Destination::Only(self.vcpu),
            2 => Destination::Everyone,
            _ => Destination::EveryoneBut(self.vcpu),
        };
        match mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority if vector < FIRST_VECTOR => {
                self.error(esr::SEND_ILLEGAL_VECTOR);
                Action::None
            }
            // INIT level de-assert only synchronised arbitration IDs, on processors that had them.
            DeliveryMode::Init if low & (icr::LEVEL | icr::ASSERT) == icr::LEVEL => Action::None,
            DeliveryMode::ExtInt | DeliveryMode::Reserved => Action::None,
            _ => Action::Send(Message { vector, mode, level: false, destination }),
        }
    }

    // ---- state

    /// The registers as data. TSC deadline and IA32_APIC_BASE are MSRs and not part of it.
    pub fn state(&self, now_ns: u64) -> LapicState {
        let mut state = LapicState::default();
        let mut put = |number: u32, value: u32| state.registers[number as usize] = value;
        put(register::ID, if self.x2apic() { self.id } else { self.id << 24 });
        let suppression = if self.model.eoi_suppression { bits::VERSION_EOI_SUPPRESSION } else { 0 };
        put(register::VERSION, bits::VERSION | suppression);
        put(register::TPR, self.tpr.into());
        put(register::PPR, self.ppr().into());
        put(register::LDR, if self.x2apic() { x2apic_logical_id(self.id) } else { self.ldr });
        put(register::DFR, self.dfr);
        put(register::SVR, self.svr);
        for index in 0..8 {
            put(register::ISR + index, self.isr.word(index));
            put(register::TMR + index, self.tmr.word(index));
            put(register::IRR + index, self.irr.word(index));
        }
        put(register::ESR, self.esr);
        put(register::ICR_LOW, self.icr[0]);
        put(register::ICR_HIGH, self.icr[1]);
        for (number, value) in (register::LVT_TIMER..).zip(self.lvt) {
            put(number, value);
        }
        put(register::INITIAL_COUNT, self.timer.initial());
        put(register::CURRENT_COUNT, self.timer.current(now_ns));
        put(register::DIVIDE, self.timer.divide());
        state
    }

    /// Loads IA32_APIC_BASE, whatever the present mode, and the registers. The TSC deadline is disarmed.
    ///
    /// # Errors
    ///
    /// What is wrong with the values, in words.
    pub fn set_state(&mut self, base: u64, state: &LapicState, now_ns: u64) -> Result<(), String> {
        let registers: &[u32; register::COUNT as usize] =
            state.registers.as_slice().try_into().map_err(|_| {
                format!(
                    "LAPIC {} has {} registers instead of {}",
                    self.id,
                    state.registers.len(),
                    register::COUNT
                )
            })?;
        let mut fresh = Lapic::new(self.vcpu, self.id, self.model);
        // By way of the modes that lead there, so that the same rules hold.
        if base & apic_base::EXTD == 0 && base & apic_base::EN == 0 {
            fresh.set_base(base)
        } else {
            fresh.set_base(base & !apic_base::EXTD).and_then(|()| fresh.set_base(base))
        }
        .map_err(|_| {
            format!("IA32_APIC_BASE {base:#x} of vCPU {} is not valid in this CPU model", self.vcpu)
        })?;
        let get = |number: u32| registers[number as usize];
        fresh.tpr = get(register::TPR) as u8;
        if !fresh.x2apic() {
            fresh.ldr = get(register::LDR) & bits::LDR_MASK;
        }
        fresh.dfr = get(register::DFR) | bits::DFR_FIXED;
        fresh.svr = get(register::SVR) & fresh.svr_writable();
        for index in 0..8 {
            fresh.isr.set_word(index, get(register::ISR + index));
            fresh.tmr.set_word(index, get(register::TMR + index));
            fresh.irr.set_word(index, get(register::IRR + index));
        }
        fresh.esr = get(register::ESR);
        fresh.icr = [get(register::ICR_LOW) & icr::WRITABLE, get(register::ICR_HIGH)];
        for number in register::LVT_TIMER..=register::LVT_ERROR {
            fresh.lvt[lvt_index(number)] = get(number) & lvt_fields(number);
        }
        fresh.timer.restore(
            Mode::from_lvt(get(register::LVT_TIMER)),
            get(register::INITIAL_COUNT),
            get(register::CURRENT_COUNT),
            get(register::DIVIDE),
            now_ns,
        );
        fresh.lint0 = self.lint0;
        *self = fresh;
        Ok(())
    }
}

/// The fields that an LVT register has (SDM 3A figure 10-8).
fn lvt_fields(number: u32) -> u32 {
    let common = lvt::VECTOR | lvt::STATUS | lvt::MASKED;
    match number {
        register::LVT_TIMER => common | lvt::TIMER_MODE,
        register::LVT_ERROR => common,
        register::LVT_LINT0 | register::LVT_LINT1 => {
            common | lvt::MODE | lvt::POLARITY | lvt::REMOTE_IRR | lvt::LEVEL
        }
        _ => common | lvt::MODE,
    }
}
