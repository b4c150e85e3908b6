//! What [`Chips`] keeps for one vCPU: its LAPIC under a lock, and beside it, in atomics, what others want to know
//! without the lock. [`LapicGuard`] brings the atomics up to date when the lock is let go.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use engine::VcpuId;

use super::lapic::Lapic;
use super::message::Address;
use super::{Chips, Wakes, lock};

/// Bits of a vCPU's pending word.
pub(super) mod word {
    /// The LAPIC has a vector above the processor priority.
    pub const INTERRUPT: u32 = 1 << 0;
    /// An ExtINT message came: the 8259 pair is to be asked.
    pub const EXT_INT: u32 = 1 << 1;
    /// An NMI is pending.
    pub const NMI: u32 = 1 << 2;
    /// INIT is pending.
    pub const INIT: u32 = 1 << 3;
    /// A start-up IPI is pending; came after INIT if that is pending too.
    pub const STARTUP: u32 = 1 << 4;
    /// The output of the 8259 pair goes straight to this vCPU.
    pub const ACCEPTS_PIC: u32 = 1 << 5;
    /// LINT0 is an interrupt of the LAPIC's own.
    pub const WATCHES_LINT0: u32 = 1 << 6;
    /// Position of the start-up vector.
    pub const STARTUP_VECTOR_SHIFT: u32 = 8;
    /// The start-up vector.
    pub const STARTUP_VECTOR: u32 = 0xff << STARTUP_VECTOR_SHIFT;
    /// What [`super::Chips::take_signals`] takes.
    pub const SIGNALS: u32 = NMI | INIT | STARTUP;
    /// Bits that follow from the LAPIC's registers.
    pub const FROM_LAPIC: u32 = INTERRUPT | ACCEPTS_PIC | WATCHES_LINT0;
}

/// A deadline that will not come.
pub(super) const NEVER: u64 = u64::MAX;

/// One vCPU's part of the chips. Aligned so that two vCPUs do not share a cache line.
#[repr(align(128))]
pub(super) struct VcpuCell {
    pub(super) lapic: Mutex<Lapic>,
    /// See [`word`].
    pub(super) word: AtomicU32,
    /// [`Address`], packed.
    address: AtomicU64,
    /// Processor priority, for arbitration.
    pub(super) priority: AtomicU8,
    /// When the LAPIC timer fires, or [`NEVER`].
    deadline_ns: AtomicU64,
    /// IA32_APIC_BASE.
    pub(super) base: AtomicU64,
}

impl VcpuCell {
    pub(super) fn new(lapic: Lapic) -> Self {
        VcpuCell {
            word: AtomicU32::new(from_lapic(&lapic)),
            address: AtomicU64::new(lapic.address().pack()),
            priority: AtomicU8::new(lapic.ppr()),
            deadline_ns: AtomicU64::new(NEVER),
            base: AtomicU64::new(lapic.base()),
            lapic: Mutex::new(lapic),
        }
    }

    pub(super) fn address(&self) -> Address {
        Address::unpack(self.address.load(Ordering::Acquire))
    }

    pub(super) fn deadline_ns(&self) -> u64 {
        self.deadline_ns.load(Ordering::SeqCst)
    }

    /// Whether the 8259 pair is to be asked for a vector.
    pub(super) fn takes_pic(&self) -> bool {
        self.word.load(Ordering::SeqCst) & (word::ACCEPTS_PIC | word::EXT_INT) != 0
    }

    pub(super) fn raise(&self, bit: u32) {
        self.word.fetch_or(bit, Ordering::SeqCst);
    }

    /// INIT makes a start-up IPI that came before it void.
    pub(super) fn raise_init(&self) {
        self.update(|word| Some((word | word::INIT) & !(word::STARTUP | word::STARTUP_VECTOR)));
    }

    /// Of two start-up IPIs the first one starts the processor.
    pub(super) fn raise_startup(&self, vector: u8) {
        self.update(|word| {
            (word & word::STARTUP == 0).then_some(
                word & !word::STARTUP_VECTOR
                    | word::STARTUP
                    | u32::from(vector) << word::STARTUP_VECTOR_SHIFT,
            )
        });
    }

    fn update(&self, change: impl FnMut(u32) -> Option<u32>) {
        // The error says that `change` declined, which is fine.
        let _ = self.word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change);
    }
}

/// The bits of the pending word that follow from a LAPIC's registers.
fn from_lapic(lapic: &Lapic) -> u32 {
    let mut bits = 0;
    if lapic.deliverable().is_some() {
        bits |= word::INTERRUPT;
    }
    if lapic.accepts_pic() {
        bits |= word::ACCEPTS_PIC;
    }
    if lapic.watches_lint0() {
        bits |= word::WATCHES_LINT0;
    }
    bits
}

/// A locked LAPIC.
pub(super) struct LapicGuard<'a> {
    lapic: MutexGuard<'a, Lapic>,
    chips: &'a Chips,
    cell: &'a VcpuCell,
    vcpu: VcpuId,
    wakes: &'a mut Wakes,
}

impl<'a> LapicGuard<'a> {
    pub(super) fn new(chips: &'a Chips, cell: &'a VcpuCell, vcpu: VcpuId, wakes: &'a mut Wakes) -> Self {
        LapicGuard { lapic: lock(&cell.lapic), chips, cell, vcpu, wakes }
    }
}

impl Deref for LapicGuard<'_> {
    type Target = Lapic;

    fn deref(&self) -> &Lapic {
        &self.lapic
    }
}

impl DerefMut for LapicGuard<'_> {
    fn deref_mut(&mut self) -> &mut Lapic {
        &mut self.lapic
    }
}

impl Drop for LapicGuard<'_> {
    fn drop(&mut self) {
        let cell = self.cell;
        // Only this lock's holder changes these, so a plain comparison saves the atomic operations.
        let bits = from_lapic(&self.lapic);
        let old = cell.word.load(Ordering::Relaxed) & word::FROM_LAPIC;
        let gained = bits & !old;
        if old & !bits != 0 {
            cell.word.fetch_and(!(old & !bits), Ordering::SeqCst);
        }
        if gained != 0 {
            cell.word.fetch_or(gained, Ordering::SeqCst);
        }
        if gained & word::INTERRUPT != 0
            || gained & word::ACCEPTS_PIC != 0 && self.chips.pic_output.load(Ordering::SeqCst)
        {
            self.wakes.add(self.vcpu);
        }
        if gained & word::WATCHES_LINT0 != 0 {
            // It missed the changes so far.
            self.lapic.begin_lint0(self.chips.pic_output.load(Ordering::SeqCst));
            if self.lapic.deliverable().is_some() {
                cell.raise(word::INTERRUPT);
                self.wakes.add(self.vcpu);
            }
        }
        let raised = self.lapic.take_raised();
        if raised.nmi {
            cell.raise(word::NMI);
            self.wakes.add(self.vcpu);
        }
        if raised.init {
            cell.raise_init();
            self.wakes.add(self.vcpu);
        }
        cell.address.store(self.lapic.address().pack(), Ordering::Release);
        cell.priority.store(self.lapic.ppr(), Ordering::Relaxed);
        cell.base.store(self.lapic.base(), Ordering::Relaxed);
        let deadline_ns = self.lapic.deadline_ns().unwrap_or(NEVER);
        if deadline_ns != cell.deadline_ns.load(Ordering::Relaxed) {
            cell.deadline_ns.store(deadline_ns, Ordering::SeqCst);
            self.chips.timers.note(deadline_ns, &*self.chips.time);
        }
    }
}
