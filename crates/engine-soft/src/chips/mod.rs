//! The interrupt chips of a PC for the software CPU: a local APIC per vCPU, the IOAPIC, the two 8259s and the
//! 8254, wired as on a PC board and safe to call from any thread.
//!
//! The chips themselves ([`lapic`], [`ioapic`], [`pic`], [`pit`]) are plain structs with registers. [`Chips`] is
//! the board: it owns the locks, carries messages from chip to chip, and keeps for each vCPU a word of pending
//! events that the vCPU's thread reads without any lock.
//!
//! # Wiring
//!
//! - GSI *n* is IOAPIC input *n* and, below 16, input *n* of the 8259 pair; except that the timer's IRQ 0 is
//!   IOAPIC input 2, as the ACPI interrupt source override says. GSI 0 and GSI 2 both name that line.
//! - The 8259 pair's output goes to LINT0 of every LAPIC and to IOAPIC input 0.
//! - The 8254's channel 0 pulses IRQ 0. A tick that finds the one before still waiting in the controller is kept, and
//!   pulses when a processor has taken that one: at the acknowledge of the 8259s, at the EOI of a LAPIC.
//!
//! # Locks
//!
//! One mutex per chip. Whoever needs several takes them in this order and never the other way:
//!
//! > 8254 → 8259 pair → IOAPIC → one LAPIC (never two) → alarm clock
//!
//! A LAPIC's EOI for the IOAPIC and its IPIs are carried out after its lock is dropped. [`Attention`] is called
//! with no lock held; the vCPUs to be told are gathered in a [`Wakes`] meanwhile.
//!
//! # No lost wakeups
//!
//! A vCPU's pending word is changed (under its LAPIC's lock, or by a single atomic operation for NMI, INIT and
//! start-up) before [`Attention::attention`] is called for it. A vCPU that is about to sleep therefore has to
//! announce that to its `Attention` first and look at [`Chips::has_interrupt`] and [`Chips::has_signals`] after.
//! The output of the 8259 pair is an atomic of its own next to the words: the pair sets it and then looks at
//! which vCPUs listen; a LAPIC that begins to listen says so in its word and then looks at the output. Sequential
//! consistency makes one of them see the other.

pub mod ioapic;
pub mod lapic;
pub mod message;
pub mod pic;
pub mod pit;
mod registers;
mod state;
#[cfg(test)]
mod tests;
pub mod timers;
mod vcpu;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use engine::{Gsi, IOAPIC_PINS, MsiMessage, VcpuId};
use x86::cpuid::CpuidTable;

use ioapic::IoApic;
use lapic::{Lapic, LapicModel, LocalInterrupt};
use message::{BROADCAST, DeliveryMode, Destination, Message};
use pic::Pic;
use pit::Pit;
use timers::Timers;
use vcpu::{LapicGuard, VcpuCell, word};

/// The guest's clocks.
pub trait Time: Send + Sync {
    /// Nanoseconds of VM time; monotonic, stands still while the VM is paused.
    fn now_ns(&self) -> u64;
    /// The TSC as this vCPU's guest reads it.
    fn tsc(&self, vcpu: VcpuId) -> u64;
    /// Frequency of the TSC in hertz.
    fn tsc_hz(&self) -> u64;
}

/// Told whenever a vCPU gains something that it may have to act on: a deliverable interrupt, an NMI, INIT or
/// start-up IPI. May be called when there turns out to be nothing, from any thread, that vCPU's own included.
pub trait Attention: Send + Sync {
    /// Makes the vCPU look at [`Chips::has_interrupt`] and [`Chips::has_signals`] soon, if it runs or sleeps.
    fn attention(&self, vcpu: VcpuId);
}

/// The access faults with #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("general protection fault")]
pub struct GeneralProtection;

/// One vCPU's view of [`Time`].
#[derive(Clone, Copy)]
pub struct VcpuTime<'a> {
    time: &'a dyn Time,
    vcpu: VcpuId,
}

impl VcpuTime<'_> {
    /// VM time.
    pub fn now_ns(&self) -> u64 {
        self.time.now_ns()
    }

    /// This vCPU's TSC.
    pub fn tsc(&self) -> u64 {
        self.time.tsc(self.vcpu)
    }

    /// TSC frequency.
    pub fn tsc_hz(&self) -> u64 {
        self.time.tsc_hz()
    }
}

/// What can differ from board to board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChipsConfig {
    /// Number of vCPUs. Their APIC IDs are their numbers until [`Chips::set_cpuid`] says otherwise.
    pub vcpus: u32,
    /// x2APIC mode may be entered (CPUID.01H:ECX bit 21), until [`Chips::set_cpuid`] says otherwise.
    pub x2apic: bool,
    /// LAPICs can suppress EOI broadcasts and the IOAPIC has an EOI register (version 20h). Off gives what KVM's
    /// in-kernel chips have, so that a snapshot loads there too.
    pub directed_eoi: bool,
    /// Width of physical addresses (CPUID.80000008H:EAX bits 7:0), until [`Chips::set_cpuid`] says otherwise.
    pub physical_address_bits: u32,
}

impl ChipsConfig {
    /// The usual board.
    pub fn new(vcpus: u32) -> Self {
        ChipsConfig { vcpus, x2apic: true, directed_eoi: false, physical_address_bits: 48 }
    }
}

/// What a vCPU has to do before its next instruction, besides interrupts. Act on INIT first, then start-up, then
/// NMI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signals {
    /// A non-maskable interrupt.
    pub nmi: bool,
    /// INIT: reset the vCPU, call [`Chips::init_lapic`], wait for start-up.
    pub init: bool,
    /// Start-up IPI with the page number of the entry point; to be ignored unless the vCPU waits for one.
    pub startup: Option<u8>,
}

/// vCPUs to be told, gathered while locks are held.
#[derive(Default)]
pub struct Wakes {
    list: [VcpuId; 8],
    len: usize,
    /// The list was too short: tell everyone.
    everyone: bool,
}

impl Wakes {
    fn add(&mut self, vcpu: VcpuId) {
        if self.everyone || self.list[..self.len].contains(&vcpu) {
            return;
        }
        match self.list.get_mut(self.len) {
            Some(slot) => {
                *slot = vcpu;
                self.len += 1;
            }
            None => self.everyone = true,
        }
    }
}

/// Line of the timer on the IOAPIC.
const TIMER_GSI: Gsi = 2;
/// Line of the timer on the 8259 pair.
const TIMER_IRQ: u8 = 0;
/// IOAPIC input that the 8259 pair drives.
const PIC_GSI: Gsi = 0;

/// All interrupt chips of one VM.
///
/// # Panics
///
/// Methods that take a vCPU number panic if there is no such vCPU.
pub struct Chips {
    config: ChipsConfig,
    time: Arc<dyn Time>,
    attention: Arc<dyn Attention>,
    pit: Mutex<Pit>,
    pit_wired: AtomicBool,
    /// The 8254 keeps a tick until the one before has been taken. Written under its lock.
    tick_waits: AtomicBool,
    pic: Mutex<Pic>,
    /// INT output of the pair; written under its lock.
    pic_output: AtomicBool,
    ioapic: Mutex<IoApic>,
    vcpus: Box<[VcpuCell]>,
    /// Where the search for the lowest priority starts, so that equals take turns.
    arbitration: AtomicU32,
    timers: Timers,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic in a chip leaves registers, not broken invariants.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Chips {
    /// The chips after power-up.
    pub fn new(config: ChipsConfig, time: Arc<dyn Time>, attention: Arc<dyn Attention>) -> Self {
        let model = LapicModel {
            x2apic: config.x2apic,
            eoi_suppression: config.directed_eoi,
            physical_address_bits: config.physical_address_bits,
        };
        Chips {
            config,
            time,
            attention,
            pit: Mutex::new(Pit::default()),
            pit_wired: AtomicBool::new(true),
            tick_waits: AtomicBool::new(false),
            pic: Mutex::new(Pic::default()),
            pic_output: AtomicBool::new(false),
            ioapic: Mutex::new(IoApic::new(config.directed_eoi)),
            vcpus: (0..config.vcpus).map(|id| VcpuCell::new(Lapic::new(id, id, model))).collect(),
            arbitration: AtomicU32::new(0),
            timers: Timers::default(),
        }
    }

    /// Number of vCPUs.
    pub fn vcpu_count(&self) -> u32 {
        self.config.vcpus
    }

    /// Gives a vCPU's LAPIC its APIC ID. Call before any vCPU runs.
    pub fn set_apic_id(&self, vcpu: VcpuId, id: u32) {
        let mut wakes = Wakes::default();
        self.lapic(self.cell(vcpu), vcpu, &mut wakes).set_id(id);
        self.tell(wakes);
    }

    /// Fits a vCPU's LAPIC to the processor model: APIC ID, whether there is an x2APIC mode, width of physical
    /// addresses. Call before any vCPU runs.
    pub fn set_cpuid(&self, vcpu: VcpuId, cpuid: &CpuidTable) {
        const X2APIC: u32 = 1 << 21;
        let mut wakes = Wakes::default();
        {
            let mut lapic = self.lapic(self.cell(vcpu), vcpu, &mut wakes);
            lapic.set_id(cpuid.apic_id().unwrap_or(vcpu));
            lapic.set_model(LapicModel {
                x2apic: cpuid.lookup(1, 0).ecx & X2APIC != 0,
                physical_address_bits: match cpuid.lookup(0x8000_0008, 0).eax & 0xff {
                    0 => self.config.physical_address_bits,
                    bits => bits,
                },
                eoi_suppression: self.config.directed_eoi,
            });
        }
        self.tell(wakes);
    }

    /// Returns every chip to its power-up state, LAPICs included. Call with every vCPU stopped. Input lines keep
    /// the level that devices drive.
    pub fn reset(&self) {
        let mut wakes = Wakes::default();
        {
            let mut pit = lock(&self.pit);
            *pit = Pit::default();
            self.tick_waits.store(false, Ordering::SeqCst);
            self.timers.set_pit_deadline(None, &*self.time);
        }
        let lines = lock(&self.ioapic).reset();
        {
            let mut pic = lock(&self.pic);
            *pic = Pic::default();
            pic.set_line(0, lines >> TIMER_GSI & 1 != 0);
            (3..16).chain([1]).for_each(|irq| pic.set_line(irq, lines >> irq & 1 != 0));
            self.publish_pic(&pic, &mut wakes);
        }
        for (id, cell) in self.vcpus.iter().enumerate() {
            cell.word.fetch_and(!(word::SIGNALS | word::EXT_INT), Ordering::SeqCst);
            let mut lapic = self.lapic(cell, id as u32, &mut wakes);
            lapic.power_up();
        }
        self.tell(wakes);
    }

    fn tell(&self, wakes: Wakes) {
        if wakes.everyone {
            (0..self.config.vcpus).for_each(|vcpu| self.attention.attention(vcpu));
        } else {
            wakes.list[..wakes.len].iter().for_each(|vcpu| self.attention.attention(*vcpu));
        }
    }

    fn vcpu_time(&self, vcpu: VcpuId) -> VcpuTime<'_> {
        VcpuTime { time: &*self.time, vcpu }
    }

    fn cell(&self, vcpu: VcpuId) -> &VcpuCell {
        &self.vcpus[vcpu as usize]
    }

    /// Locks a LAPIC; what changed is published when the guard goes.
    fn lapic<'a>(&'a self, cell: &'a VcpuCell, vcpu: VcpuId, wakes: &'a mut Wakes) -> LapicGuard<'a> {
        LapicGuard::new(self, cell, vcpu, wakes)
    }

    // ---- interrupts in

    /// Drives an interrupt line: IOAPIC input `gsi` and, below 16, the same input of the 8259 pair. GSIs that the
    /// IOAPIC lacks are ignored.
    pub fn set_irq_line(&self, gsi: Gsi, asserted: bool) {
        let mut wakes = Wakes::default();
        self.drive_line(gsi, asserted, &mut wakes);
        self.tell(wakes);
    }

    fn drive_line(&self, gsi: Gsi, asserted: bool, wakes: &mut Wakes) {
        let (irq, pin) = match gsi {
            PIC_GSI | TIMER_GSI => (0, TIMER_GSI),
            gsi => (gsi, gsi),
        };
        if irq < 16 {
            let mut pic = lock(&self.pic);
            pic.set_line(irq as u8, asserted);
            self.publish_pic(&pic, wakes);
        }
        if pin < IOAPIC_PINS {
            lock(&self.ioapic).set_line(pin, asserted, &mut |message| self.deliver(message, wakes));
        }
    }

    /// Sends a message-signalled interrupt. False if no LAPIC took it.
    pub fn send_msi(&self, msi: MsiMessage) -> bool {
        let mut wakes = Wakes::default();
        let taken = Message::from_msi(msi).is_some_and(|message| self.deliver(&message, &mut wakes));
        self.tell(wakes);
        taken
    }

    /// Makes an NMI pending, whatever the LAPIC's state.
    pub fn inject_nmi(&self, vcpu: VcpuId) {
        self.cell(vcpu).word.fetch_or(word::NMI, Ordering::SeqCst);
        self.attention.attention(vcpu);
    }

    /// A pulse on a local interrupt source, subject to the vCPU's LVT.
    pub fn pulse_local(&self, vcpu: VcpuId, source: LocalInterrupt) {
        let mut wakes = Wakes::default();
        self.lapic(self.cell(vcpu), vcpu, &mut wakes).pulse(source);
        self.tell(wakes);
    }

    /// Carries a message to every LAPIC it is for. True if one took it.
    fn deliver(&self, message: &Message, wakes: &mut Wakes) -> bool {
        if message.mode == DeliveryMode::LowestPriority {
            return self.deliver_lowest(message, wakes);
        }
        // One processor, usually numbered like its APIC ID: no need to ask the others.
        let likely = match message.destination {
            Destination::Only(vcpu) => Some(vcpu),
            Destination::Physical(id) if id != BROADCAST => Some(id),
            _ => None,
        };
        if let Some(vcpu) = likely
            && let Some(cell) = self.vcpus.get(vcpu as usize)
            && cell.address().matches(vcpu, message.destination)
        {
            return self.deliver_to(vcpu, message, wakes);
        }
        let mut taken = false;
        for (id, cell) in (0..).zip(&self.vcpus) {
            if cell.address().matches(id, message.destination) {
                taken |= self.deliver_to(id, message, wakes);
            }
        }
        taken
    }

    /// Arbitration (SDM 3A §10.6.2.4): among the addressed LAPICs that take interrupts, one whose processor
    /// priority is lowest.
    fn deliver_lowest(&self, message: &Message, wakes: &mut Wakes) -> bool {
        let count = self.config.vcpus;
        let start = self.arbitration.fetch_add(1, Ordering::Relaxed) % count.max(1);
        let winner = (0..count)
            .map(|step| (start + step) % count)
            .filter(|id| {
                let address = self.cell(*id).address();
                address.accepts && address.matches(*id, message.destination)
            })
            .min_by_key(|id| self.cell(*id).priority.load(Ordering::Relaxed));
        winner.is_some_and(|id| self.deliver_to(id, message, wakes))
    }

    fn deliver_to(&self, vcpu: VcpuId, message: &Message, wakes: &mut Wakes) -> bool {
        let cell = self.cell(vcpu);
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                return self.lapic(cell, vcpu, wakes).accept(message.vector, message.level);
            }
            DeliveryMode::Nmi => cell.raise(word::NMI),
            DeliveryMode::Init => cell.raise_init(),
            DeliveryMode::StartUp => cell.raise_startup(message.vector),
            DeliveryMode::ExtInt => cell.raise(word::EXT_INT),
            DeliveryMode::Smi | DeliveryMode::Reserved => return false,
        }
        wakes.add(vcpu);
        true
    }

    /// Makes the pair's output known. Call after every change to the pair, with its lock held.
    fn publish_pic(&self, pic: &Pic, wakes: &mut Wakes) {
        let output = pic.output();
        if self.pic_output.swap(output, Ordering::SeqCst) == output {
            return;
        }
        {
            let mut ioapic = lock(&self.ioapic);
            ioapic.set_line(PIC_GSI, output, &mut |message| self.deliver(message, wakes));
        }
        for (id, cell) in (0..).zip(&self.vcpus) {
            let listens = cell.word.load(Ordering::SeqCst);
            if listens & word::WATCHES_LINT0 != 0 {
                self.lapic(cell, id, wakes).set_lint0(output);
            }
            if output && listens & word::ACCEPTS_PIC != 0 {
                wakes.add(id);
            }
        }
    }

    // ---- interrupts out: for the vCPU's thread

    /// Whether an interrupt would be delivered if the vCPU had interrupts enabled: priorities and enables are
    /// accounted for. One or two atomic loads.
    #[inline]
    pub fn has_interrupt(&self, vcpu: VcpuId) -> bool {
        let word = self.cell(vcpu).word.load(Ordering::SeqCst);
        word & word::INTERRUPT != 0
            || word & (word::ACCEPTS_PIC | word::EXT_INT) != 0 && self.pic_output.load(Ordering::SeqCst)
    }

    /// Whether [`Chips::take_signals`] has something. One atomic load.
    #[inline]
    pub fn has_signals(&self, vcpu: VcpuId) -> bool {
        self.cell(vcpu).word.load(Ordering::SeqCst) & word::SIGNALS != 0
    }

    /// The vector that [`Chips::acknowledge`] would give now.
    pub fn peek(&self, vcpu: VcpuId) -> Option<u8> {
        let cell = self.cell(vcpu);
        if cell.takes_pic()
            && let Some(vector) = lock(&self.pic).peek()
        {
            return Some(vector);
        }
        lock(&cell.lapic).deliverable()
    }

    /// The vCPU takes an interrupt: its vector, from the 8259 pair if the vCPU listens to it and it has one, else
    /// from the LAPIC. `None` if [`Chips::has_interrupt`] is no longer true.
    pub fn acknowledge(&self, vcpu: VcpuId) -> Option<u8> {
        let cell = self.cell(vcpu);
        let mut wakes = Wakes::default();
        let mut vector = self.acknowledge_pic(cell, &mut wakes);
        if vector.is_some() {
            self.resume_ticks(&mut wakes);
        } else if cell.word.load(Ordering::SeqCst) & word::INTERRUPT != 0 {
            // A tick that waits for this one comes with the EOI.
            vector = self.lapic(cell, vcpu, &mut wakes).acknowledge();
        }
        self.tell(wakes);
        vector
    }

    fn acknowledge_pic(&self, cell: &VcpuCell, wakes: &mut Wakes) -> Option<u8> {
        if !cell.takes_pic() || !self.pic_output.load(Ordering::SeqCst) {
            return None;
        }
        let mut pic = lock(&self.pic);
        if !pic.output() {
            return None;
        }
        cell.word.fetch_and(!word::EXT_INT, Ordering::SeqCst);
        let vector = pic.acknowledge();
        // The acknowledge cycle takes INT down; if more waits, it rises again.
        if self.pic_output.swap(false, Ordering::SeqCst) {
            let mut ioapic = lock(&self.ioapic);
            ioapic.set_line(PIC_GSI, false, &mut |_| false);
        }
        for (id, cell) in (0..).zip(&self.vcpus) {
            if cell.word.load(Ordering::SeqCst) & word::WATCHES_LINT0 != 0 {
                self.lapic(cell, id, wakes).set_lint0(false);
            }
        }
        self.publish_pic(&pic, wakes);
        Some(vector)
    }

    /// NMI, INIT and start-up that arrived since the last call.
    pub fn take_signals(&self, vcpu: VcpuId) -> Signals {
        let cell = self.cell(vcpu);
        if cell.word.load(Ordering::SeqCst) & word::SIGNALS == 0 {
            return Signals::default();
        }
        let word = cell.word.fetch_and(!word::SIGNALS, Ordering::SeqCst);
        Signals {
            nmi: word & word::NMI != 0,
            init: word & word::INIT != 0,
            startup: (word & word::STARTUP != 0).then_some((word >> word::STARTUP_VECTOR_SHIFT) as u8),
        }
    }

    /// What INIT does to the LAPIC. Interrupts that were pending are gone; a start-up IPI that came after the INIT
    /// stays.
    pub fn init_lapic(&self, vcpu: VcpuId) {
        let mut wakes = Wakes::default();
        let cell = self.cell(vcpu);
        cell.word.fetch_and(!word::EXT_INT, Ordering::SeqCst);
        self.lapic(cell, vcpu, &mut wakes).init();
        self.tell(wakes);
    }

    /// CR8.
    pub fn tpr(&self, vcpu: VcpuId) -> u8 {
        lock(&self.cell(vcpu).lapic).cr8()
    }

    /// Writes CR8; the caller has checked that it is below 16.
    pub fn set_tpr(&self, vcpu: VcpuId, value: u8) {
        let mut wakes = Wakes::default();
        self.lapic(self.cell(vcpu), vcpu, &mut wakes).set_cr8(value);
        self.tell(wakes);
    }

    // ---- time

    /// Fires every timer that is due at `now_ns` and says when the next will be. The alarm thread
    /// ([`timers::AlarmThread`]) calls it; tests may instead.
    pub fn run_timers(&self, now_ns: u64) -> Option<u64> {
        let mut wakes = Wakes::default();
        if self.timers.pit_deadline_ns().is_some_and(|deadline| deadline <= now_ns) {
            let mut pit = lock(&self.pit);
            self.after_pit(&mut pit, now_ns, &mut wakes);
        }
        for (id, cell) in (0..).zip(&self.vcpus) {
            if cell.deadline_ns() <= now_ns {
                let time = self.vcpu_time(id);
                self.lapic(cell, id, &mut wakes).run_timer(now_ns, &time);
            }
        }
        self.tell(wakes);
        self.next_deadline_ns()
    }

    /// The earliest deadline of any timer.
    fn next_deadline_ns(&self) -> Option<u64> {
        let lapics = self.vcpus.iter().map(VcpuCell::deadline_ns);
        lapics.chain(self.timers.pit_deadline_ns()).min().filter(|deadline| *deadline != vcpu::NEVER)
    }
}
