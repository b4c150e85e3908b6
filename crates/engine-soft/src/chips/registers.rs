//! Accesses to the chips' registers: ports, the two register pages, MSRs.

use std::sync::atomic::Ordering;

use engine::{IOAPIC_BASE, VcpuId};
use x86::msr;

use super::ioapic::{self, AwaitsEoi};
use super::lapic::{Action, bits::register};
use super::message::DeliveryMode;
use super::pit::Pit;
use super::vcpu::word;
use super::{Chips, GeneralProtection, PIC_GSI, TIMER_GSI, TIMER_IRQ, Wakes, lock};

/// Bytes of a LAPIC's register page.
const LAPIC_BYTES: u64 = 0x1000;

impl Chips {
    /// Whether a port belongs to these chips.
    pub const fn handles_port(port: u16) -> bool {
        matches!(port, 0x20 | 0x21 | 0xa0 | 0xa1 | 0x40..=0x43 | 0x61 | 0x4d0 | 0x4d1)
    }

    /// Reads consecutive ports, a byte each; those that are not these chips' read as ones.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        let mut wakes = Wakes::default();
        for (port, byte) in (port..=u16::MAX).zip(data) {
            *byte = match port {
                0x40..=0x43 | 0x61 => {
                    let now_ns = self.time.now_ns();
                    let mut pit = lock(&self.pit);
                    let value = pit.read(port, now_ns);
                    self.after_pit(&mut pit, now_ns, &mut wakes);
                    value
                }
                _ if Self::handles_port(port) => {
                    let value = {
                        let mut pic = lock(&self.pic);
                        let value = pic.read(port);
                        self.publish_pic(&pic, &mut wakes);
                        value
                    };
                    self.resume_ticks(&mut wakes);
                    value
                }
                _ => 0xff,
            };
        }
        self.tell(wakes);
    }

    /// Writes consecutive ports, a byte each; those that are not these chips' ignore it.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        let mut wakes = Wakes::default();
        for (port, byte) in (port..=u16::MAX).zip(data) {
            match port {
                0x40..=0x43 | 0x61 => {
                    let now_ns = self.time.now_ns();
                    let mut pit = lock(&self.pit);
                    // What came before the write is not given up, so far as the controllers can take it.
                    self.after_pit(&mut pit, now_ns, &mut wakes);
                    pit.write(port, *byte, now_ns);
                    self.after_pit(&mut pit, now_ns, &mut wakes);
                }
                _ if Self::handles_port(port) => {
                    {
                        let mut pic = lock(&self.pic);
                        pic.write(port, *byte);
                        self.publish_pic(&pic, &mut wakes);
                    }
                    self.resume_ticks(&mut wakes);
                }
                _ => {}
            }
        }
        self.tell(wakes);
    }

    /// Connects the 8254 to IRQ 0 or takes it off, as the HPET's legacy replacement route does.
    pub fn set_pit_wired(&self, wired: bool) {
        self.pit_wired.store(wired, Ordering::SeqCst);
    }

    /// Carries channel 0's requests on, as many as the interrupt controllers can hold, and arms the alarm for the next.
    /// Call with the lock held after every access.
    pub(super) fn after_pit(&self, pit: &mut Pit, now_ns: u64, wakes: &mut Wakes) {
        while pit.has_interrupt(now_ns) {
            if pit.can_wait() {
                // Before the look: who takes the earlier tick after it, sees this and comes back for the next.
                self.tick_waits.store(true, Ordering::SeqCst);
                if self.tick_would_be_lost() {
                    break;
                }
            }
            pit.take_interrupt(now_ns);
            if self.pit_wired.load(Ordering::SeqCst) {
                self.drive_line(TIMER_GSI, true, wakes);
                self.drive_line(TIMER_GSI, false, wakes);
            }
        }
        self.tick_waits.store(pit.has_interrupt(now_ns), Ordering::SeqCst);
        self.timers.set_pit_deadline(pit.deadline_ns(), &*self.time);
    }

    /// Whether an edge on the timer's line would be lost because the one before still waits for a processor. An edge
    /// that nobody listens to is not lost in this sense: no processor will ever make room for it.
    ///
    /// The IOAPIC's entry decides if it is open, else the 8259s.
    fn tick_would_be_lost(&self) -> bool {
        if !self.pit_wired.load(Ordering::SeqCst) {
            return false;
        }
        let (to_timer, to_pic) = {
            let ioapic = lock(&self.ioapic);
            match ioapic.would_send(TIMER_GSI) {
                Err(AwaitsEoi) => return true,
                Ok(message) => (message, ioapic.would_send(PIC_GSI) != Ok(None)),
            }
        };
        let Some(message) = to_timer else {
            let to_pic = to_pic
                || self.vcpus.iter().any(|cell| {
                    let word = cell.word.load(Ordering::SeqCst);
                    word & (word::ACCEPTS_PIC | word::WATCHES_LINT0 | word::EXT_INT) != 0
                });
            return to_pic && lock(&self.pic).requests(TIMER_IRQ);
        };
        if !matches!(message.mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority) {
            return false;
        }
        let mut addressed = (0..).zip(&self.vcpus).filter(|(id, cell)| {
            let address = cell.address();
            address.accepts && address.matches(*id, message.destination)
        });
        let first = addressed.next();
        first.is_some()
            && first.into_iter().chain(addressed).all(|(_, cell)| lock(&cell.lapic).requests(message.vector))
    }

    /// A processor has taken or finished an interrupt: if that made room for a tick that waits, or that the alarm is late
    /// for, the tick comes now. Call with no lock held.
    pub(super) fn resume_ticks(&self, wakes: &mut Wakes) {
        let due = self.tick_waits.load(Ordering::SeqCst)
            || self.timers.pit_deadline_ns().is_some_and(|deadline| deadline <= self.time.now_ns());
        if due {
            let now_ns = self.time.now_ns();
            let mut pit = lock(&self.pit);
            self.after_pit(&mut pit, now_ns, wakes);
        }
    }

    /// Where this vCPU's LAPIC page is, if it has one now.
    pub fn lapic_page(&self, vcpu: VcpuId) -> Option<u64> {
        let base = self.apic_base(vcpu);
        (base & (msr::apic_base::EN | msr::apic_base::EXTD) == msr::apic_base::EN)
            .then_some(base & msr::apic_base::ADDRESS)
    }

    /// A load by this vCPU. False, with `data` untouched, if the address is none of these chips'.
    pub fn mmio_read(&self, vcpu: VcpuId, gpa: u64, data: &mut [u8]) -> bool {
        if let Some(offset) = self.lapic_offset(vcpu, gpa) {
            let mut wakes = Wakes::default();
            let number = (offset >> 4) as u32;
            let value = if number < register::COUNT {
                self.lapic(self.cell(vcpu), vcpu, &mut wakes).read_xapic(number, &self.vcpu_time(vcpu))
            } else {
                0
            };
            read_register(value, offset, data);
            self.tell(wakes);
            return true;
        }
        let Some(offset) = ioapic_offset(gpa) else { return false };
        read_register(lock(&self.ioapic).read(offset & !0xf), offset, data);
        true
    }

    /// A store by this vCPU. False if the address is none of these chips'.
    pub fn mmio_write(&self, vcpu: VcpuId, gpa: u64, data: &[u8]) -> bool {
        if let Some(offset) = self.lapic_offset(vcpu, gpa) {
            let number = (offset >> 4) as u32;
            if number < register::COUNT
                && let Some(value) = written_register(offset, data)
            {
                let mut wakes = Wakes::default();
                let time = self.vcpu_time(vcpu);
                let action = self.lapic(self.cell(vcpu), vcpu, &mut wakes).write_xapic(number, value, &time);
                self.act(action, &mut wakes);
                self.tell(wakes);
            }
            return true;
        }
        let Some(offset) = ioapic_offset(gpa) else { return false };
        if let Some(value) = written_register(offset, data) {
            let mut wakes = Wakes::default();
            lock(&self.ioapic).write(offset, value, &mut |message| self.deliver(message, &mut wakes));
            self.tell(wakes);
        }
        true
    }

    fn lapic_offset(&self, vcpu: VcpuId, gpa: u64) -> Option<u64> {
        let page = self.lapic_page(vcpu)?;
        gpa.checked_sub(page).filter(|offset| *offset < LAPIC_BYTES)
    }

    /// Carries out what a LAPIC asked for, its lock being free again.
    fn act(&self, action: Action, wakes: &mut Wakes) {
        match action {
            Action::None => {}
            Action::Send(message) => {
                self.deliver(&message, wakes);
            }
            Action::Finished(broadcast) => {
                if let Some(vector) = broadcast {
                    lock(&self.ioapic).end_of_interrupt(vector, &mut |message| self.deliver(message, wakes));
                }
                self.resume_ticks(wakes);
            }
        }
    }

    /// Whether an MSR belongs to the LAPIC.
    pub const fn handles_msr(index: u32) -> bool {
        matches!(index, msr::APIC_BASE | msr::TSC_DEADLINE | msr::X2APIC_BASE..=msr::X2APIC_END)
    }

    /// RDMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    ///
    /// # Errors
    ///
    /// #GP as the SDM has it, and for MSRs that are not the LAPIC's.
    pub fn read_msr(&self, vcpu: VcpuId, index: u32) -> Result<u64, GeneralProtection> {
        let time = self.vcpu_time(vcpu);
        let mut wakes = Wakes::default();
        let result = match index {
            msr::APIC_BASE => Ok(self.apic_base(vcpu)),
            msr::TSC_DEADLINE => Ok(self.lapic(self.cell(vcpu), vcpu, &mut wakes).tsc_deadline(&time)),
            msr::X2APIC_BASE..=msr::X2APIC_END => {
                self.lapic(self.cell(vcpu), vcpu, &mut wakes).read_x2apic(index - msr::X2APIC_BASE, &time)
            }
            _ => Err(GeneralProtection),
        };
        self.tell(wakes);
        result
    }

    /// WRMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    ///
    /// # Errors
    ///
    /// #GP as the SDM has it, and for MSRs that are not the LAPIC's.
    pub fn write_msr(&self, vcpu: VcpuId, index: u32, value: u64) -> Result<(), GeneralProtection> {
        let time = self.vcpu_time(vcpu);
        let mut wakes = Wakes::default();
        let result = match index {
            msr::APIC_BASE => {
                self.lapic(self.cell(vcpu), vcpu, &mut wakes).set_base(value).map(|()| Action::None)
            }
            msr::TSC_DEADLINE => {
                self.lapic(self.cell(vcpu), vcpu, &mut wakes).set_tsc_deadline(value, &time);
                Ok(Action::None)
            }
            msr::X2APIC_BASE..=msr::X2APIC_END => {
                let number = index - msr::X2APIC_BASE;
                self.lapic(self.cell(vcpu), vcpu, &mut wakes).write_x2apic(number, value, &time)
            }
            _ => Err(GeneralProtection),
        };
        let result = result.map(|action| self.act(action, &mut wakes));
        self.tell(wakes);
        result
    }

    /// IA32_APIC_BASE; an atomic load.
    pub fn apic_base(&self, vcpu: VcpuId) -> u64 {
        self.cell(vcpu).base.load(Ordering::Relaxed)
    }

    /// The vCPU's TSC was written or its offset changed: aims a TSC deadline anew.
    pub fn tsc_changed(&self, vcpu: VcpuId) {
        let mut wakes = Wakes::default();
        let time = self.vcpu_time(vcpu);
        self.lapic(self.cell(vcpu), vcpu, &mut wakes).tsc_changed(&time);
        self.tell(wakes);
    }
}

fn ioapic_offset(gpa: u64) -> Option<u64> {
    gpa.checked_sub(IOAPIC_BASE).filter(|offset| *offset < ioapic::WINDOW_BYTES)
}

/// Gives the bytes of a 32-bit register, which stands at a multiple of 16; what lies between registers is zero.
fn read_register(value: u32, offset: u64, data: &mut [u8]) {
    let bytes = value.to_le_bytes();
    for (position, byte) in (offset as usize & 0xf..).zip(data) {
        *byte = bytes.get(position).copied().unwrap_or(0);
    }
}

/// The value of a store that covers a whole register; others are ignored (SDM 3A §10.4.1).
fn written_register(offset: u64, data: &[u8]) -> Option<u32> {
    let bytes = data.first_chunk()?;
    (offset & 0xf == 0).then_some(u32::from_le_bytes(*bytes))
}
