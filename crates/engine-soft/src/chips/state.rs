//! The chips' registers as data.

use engine::{ChipState, LapicState, VcpuId};

use super::{Chips, Wakes, lock};

impl Chips {
    /// Registers of the chips outside the vCPUs.
    pub fn chips(&self) -> ChipState {
        let now_ns = self.time.now_ns();
        let mut wakes = Wakes::default();
        let pit = {
            let mut pit = lock(&self.pit);
            // What is due has to be in the other chips, whose state follows.
            self.after_pit(&mut pit, now_ns, &mut wakes);
            pit.state(now_ns)
        };
        self.tell(wakes);
        let (pic_master, pic_slave) = lock(&self.pic).state();
        ChipState { pic_master, pic_slave, ioapic: lock(&self.ioapic).state(), pit }
    }

    /// Loads what [`Chips::chips`] gave.
    pub fn set_chips(&self, state: &ChipState) {
        let now_ns = self.time.now_ns();
        let mut wakes = Wakes::default();
        lock(&self.ioapic).set_state(&state.ioapic);
        {
            let mut pic = lock(&self.pic);
            pic.set_state(&state.pic_master, &state.pic_slave);
            self.publish_pic(&pic, &mut wakes);
        }
        {
            let mut pit = lock(&self.pit);
            pit.set_state(&state.pit, now_ns);
            self.after_pit(&mut pit, now_ns, &mut wakes);
        }
        self.tell(wakes);
    }

    /// Registers of a vCPU's LAPIC. IA32_APIC_BASE and IA32_TSC_DEADLINE are read as MSRs.
    pub fn lapic_state(&self, vcpu: VcpuId) -> LapicState {
        let now_ns = self.time.now_ns();
        let time = self.vcpu_time(vcpu);
        let mut wakes = Wakes::default();
        let state = {
            let mut lapic = self.lapic(self.cell(vcpu), vcpu, &mut wakes);
            lapic.run_timer(now_ns, &time);
            lapic.state(now_ns)
        };
        self.tell(wakes);
        state
    }

    /// Loads IA32_APIC_BASE, by whatever transition, and a LAPIC's registers. A TSC deadline is disarmed; write
    /// its MSR afterwards.
    ///
    /// # Errors
    ///
    /// [`engine::EngineError::InvalidState`] if the values are not possible; nothing is changed then.
    pub fn set_lapic_state(&self, vcpu: VcpuId, apic_base: u64, state: &LapicState) -> engine::Result<()> {
        let now_ns = self.time.now_ns();
        let mut wakes = Wakes::default();
        let result = self.lapic(self.cell(vcpu), vcpu, &mut wakes).set_state(apic_base, state, now_ns);
        self.tell(wakes);
        result.map_err(engine::EngineError::InvalidState)
    }
}
