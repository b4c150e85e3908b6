//! The machine as a whole: memory map, interrupt lines, vCPUs.

use std::io;
use std::sync::{Arc, Mutex};

use engine::{
    ChipState, Doorbell, EngineError, Gsi, GuestRegion, IrqTarget, MsiMessage, Result, Vcpu, VcpuId, Vm,
    VmConfig,
};
use vmm_sys_util::eventfd::EventFd;
use x86::cpuid::CpuidTable;

use crate::chips::timers::AlarmThread;
use crate::chips::{Chips, ChipsConfig};
use crate::memory::RamSlot;
use crate::shared::{Doorbells, MachineTime, Shared, VcpuShared, lock};
use crate::translate::dispatch::{CODE_BYTES, Translate};
use crate::vcpu::SoftVcpu;

/// A machine of the software engine.
pub struct SoftVm {
    shared: Arc<Shared>,
    /// Rings while the machine exists.
    _alarm: AlarmThread,
    created: Mutex<Vec<bool>>,
    /// What is translated.
    translate: Translate,
}

impl SoftVm {
    /// A machine without memory and vCPUs.
    ///
    /// # Errors
    /// An unknown option; the host has no timer or thread to give.
    pub fn new(config: VmConfig) -> Result<Self> {
        let translate = Self::options(&config.options)?;
        let vcpus: Vec<VcpuShared> = (0..config.vcpus)
            .map(|_| VcpuShared::new())
            .collect::<io::Result<_>>()
            .map_err(|source| EngineError::Host { what: "mapping memory for a vCPU", source })?;
        let vcpus = Arc::new(vcpus);
        let time = Arc::new(MachineTime::new(vcpus.clone()));
        let attention = Arc::new(Doorbells { vcpus: vcpus.clone() });
        let chips = Arc::new(Chips::new(ChipsConfig::new(config.vcpus), time, attention));
        let alarm = AlarmThread::start(chips.clone())
            .map_err(|source| EngineError::Host { what: "starting the timer thread", source })?;
        let shared = Arc::new(Shared::new(config.io, chips, vcpus, config.strict_msr));
        let created = Mutex::new(vec![false; config.vcpus as usize]);
        Ok(SoftVm { shared, _alarm: alarm, created, translate })
    }

    /// Reads the engine's own options: what is translated.
    fn options(options: &[(String, String)]) -> Result<Translate> {
        let mut translate = Translate::Hot;
        for (name, value) in options {
            translate = match (name.as_str(), value.as_str()) {
                ("translate", "on" | "yes" | "true" | "1") => Translate::Hot,
                ("translate", "off" | "no" | "false" | "0") => Translate::Nothing,
                ("translate", "always") => Translate::Everything,
                ("translate", "check") => Translate::Checked,
                ("translate", _) => {
                    return Err(EngineError::Unsupported(format!(
                        "soft.translate={value}: give on (the default), off (everything is interpreted), always (no \
                         block is interpreted first) or check (every block runs both ways, and the end states are \
                         compared)"
                    )));
                }
                _ => {
                    return Err(EngineError::Unsupported(format!(
                        "soft.{name}: no such option of the soft engine; it has soft.translate"
                    )));
                }
            };
        }
        Ok(translate)
    }

    /// [`Vm::create_vcpu`] with the type kept.
    ///
    /// # Errors
    /// As there.
    pub fn soft_vcpu(&self, id: VcpuId, cpuid: &CpuidTable) -> Result<SoftVcpu> {
        let mut created = lock(&self.created);
        match created.get_mut(id as usize) {
            Some(done) if !*done => *done = true,
            Some(_) => return Err(EngineError::InvalidState(format!("vCPU {id} exists already"))),
            None => {
                return Err(EngineError::InvalidState(format!("vCPU {id} is beyond the number announced")));
            }
        }
        let code_bytes = CODE_BYTES / created.len();
        SoftVcpu::new(self.shared.clone(), id, cpuid, self.translate, code_bytes)
    }

    fn no_slot<T>(slot: u32) -> Result<T> {
        Err(EngineError::InvalidState(format!("no memory mapping has number {slot}")))
    }
}

impl Vm for SoftVm {
    fn map_memory(&self, slot: u32, region: Arc<GuestRegion>, writable: bool) -> Result<()> {
        let new = RamSlot::new(slot, &region, writable);
        let (gpa, len) = (new.gpa, new.len);
        if self.shared.change_map(|map| map.insert(new)) {
            return Ok(());
        }
        Err(EngineError::InvalidState(format!(
            "mapping {slot} at {gpa:#x}+{len:#x} overlaps another or its number is taken"
        )))
    }

    fn unmap_memory(&self, slot: u32) -> Result<()> {
        if self.shared.change_map(|map| map.remove(slot)) { Ok(()) } else { Self::no_slot(slot) }
    }

    fn create_vcpu(&self, id: VcpuId, cpuid: &CpuidTable) -> Result<Box<dyn Vcpu>> {
        Ok(Box::new(self.soft_vcpu(id, cpuid)?))
    }

    fn set_irq_line(&self, gsi: Gsi, asserted: bool) -> Result<()> {
        if gsi >= engine::IOAPIC_PINS {
            return Err(EngineError::InvalidState(format!("GSI {gsi} is beyond the IOAPIC's inputs")));
        }
        self.shared.chips.set_irq_line(gsi, asserted);
        Ok(())
    }

    fn send_msi(&self, message: MsiMessage) -> Result<()> {
        // A message that no LAPIC accepts is lost, as on a bus.
        self.shared.chips.send_msi(message);
        Ok(())
    }

    fn connect_doorbell(&self, _: Doorbell, _: &EventFd) -> Result<bool> {
        Ok(false)
    }

    fn disconnect_doorbell(&self, _: Doorbell, _: &EventFd) -> Result<()> {
        Ok(())
    }

    fn connect_irq_event(&self, _: &EventFd, _: IrqTarget) -> Result<bool> {
        Ok(false)
    }

    fn disconnect_irq_event(&self, _: &EventFd, _: IrqTarget) -> Result<()> {
        Ok(())
    }

    fn set_dirty_log(&self, slot: u32, enabled: bool) -> Result<()> {
        if enabled {
            self.take_dirty_log(slot)?;
        } else if self.shared.map().slot(slot).is_none() {
            return Self::no_slot(slot);
        }
        Ok(())
    }

    fn take_dirty_log(&self, slot: u32) -> Result<Vec<u64>> {
        let map = self.shared.map();
        let Some(slot) = map.slot(slot) else { return Self::no_slot(slot) };
        // A store between the two steps is in what the caller reads next; one after them is recorded again.
        let dirty = slot.tracker().take_dirty();
        for vcpu in self.shared.vcpus.iter() {
            vcpu.area.tlb().drop_all_writes();
        }
        Ok(dirty)
    }

    fn chips(&self) -> Result<ChipState> {
        Ok(self.shared.chips.chips())
    }

    fn set_chips(&self, state: &ChipState) -> Result<()> {
        self.shared.chips.set_chips(state);
        Ok(())
    }

    fn stats(&self) -> Vec<(String, u64)> {
        Vec::new()
    }
}
