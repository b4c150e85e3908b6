//! What the control socket's commands, and signals, do to the machine.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock, Weak};

use control::{Command, ErrorCode, Failure, Handler, Stats, Status, VcpuStats};
use devices::chipset::acpi_pm::AcpiPm;
use devices::host::Clock;
use engine::Vm;
use serde_json::{Value, json};

use crate::Board;
use crate::clock::Timers;
use crate::disks::Disks;
use crate::lifecycle::{Ending, Lifecycle, WrongState};
use crate::vcpu::VcpuRemote;

/// The machine as those outside it see it. Made before the machine is complete, so that it can be ended at any time.
pub(crate) struct Controls {
    pub name: String,
    pub engine: String,
    pub vcpus: u32,
    pub memory_bytes: u64,
    pub lifecycle: Arc<Lifecycle>,
    pub timers: Arc<Timers>,
    /// Set once the machine is complete.
    pub parts: OnceLock<Parts>,
}

/// What commands act on. Weak where the machine's own end would otherwise be kept waiting by a slow client.
pub(crate) struct Parts {
    pub vm: Weak<dyn Vm>,
    pub pm: Weak<AcpiPm>,
    pub board: Weak<Board>,
    pub disks: Weak<Disks>,
    pub vcpus: Vec<VcpuRemote>,
}

impl Controls {
    /// The first signal presses the power button, the next turns the power off (bhyve(8), "SIGNAL HANDLING").
    /// A machine that is not complete yet has no button and goes off at once.
    pub fn on_signal(&self, nth: u32) {
        match self.pm() {
            Some(pm) if nth == 1 => {
                pm.press_power_button();
            }
            _ => self.lifecycle.end(Ending::PowerOff),
        }
    }

    fn pm(&self) -> Option<Arc<AcpiPm>> {
        self.parts.get()?.pm.upgrade()
    }

    /// The parts of a complete machine.
    fn complete(&self) -> Result<&Parts, Failure> {
        let now = self.lifecycle.now();
        self.parts.get().ok_or_else(|| {
            Failure::new(ErrorCode::WrongState, format!("the machine is {now}, not running yet"))
        })
    }

    fn status(&self) -> Status {
        Status {
            name: self.name.clone(),
            pid: std::process::id(),
            engine: self.engine.clone(),
            state: self.lifecycle.now(),
            vcpus: self.vcpus,
            memory_bytes: self.memory_bytes,
            guest_ns: self.timers.clock().now_ns(),
        }
    }

    fn stats(&self) -> Stats {
        let mut vm = BTreeMap::new();
        if let Some(parts) = self.parts.get() {
            vm.extend(parts.vm.upgrade().map(|vm| vm.stats()).unwrap_or_default());
            vm.extend(parts.board.upgrade().map(|board| board.stats()).unwrap_or_default());
            vm.extend(parts.disks.upgrade().map(|disks| disks.stats()).unwrap_or_default());
        }
        let vcpus = self.lifecycle.vcpu_stats().into_iter().zip(0..);
        Stats { vm, vcpus: vcpus.map(|(c, id)| VcpuStats { id, counters: BTreeMap::from_iter(c) }).collect() }
    }
}

impl Handler for Controls {
    fn handle(&self, command: Command) -> Result<Value, Failure> {
        let refused = |e: WrongState| Failure::new(ErrorCode::WrongState, e.to_string());
        let unreadable = |e: serde_json::Error| Failure::new(ErrorCode::Failed, e.to_string());
        match command {
            Command::Status => return serde_json::to_value(self.status()).map_err(unreadable),
            Command::Stats => return serde_json::to_value(self.stats()).map_err(unreadable),
            Command::Destroy => self.lifecycle.end(Ending::Destroyed),
            Command::ForcePoweroff => self.lifecycle.end(Ending::PowerOff),
            Command::ForceReset => self.lifecycle.end(Ending::Reset),
            Command::PowerButton => {
                if let Some(pm) = self.complete()?.pm.upgrade() {
                    pm.press_power_button();
                }
            }
            Command::Pause => self.lifecycle.pause(|| self.timers.stop()).map_err(refused)?,
            Command::Resume => {
                self.lifecycle.resume(|| self.timers.start()).map_err(refused)?;
                // After that, so that a disk that fails again can stop the machine again.
                if let Some(disks) = self.complete()?.disks.upgrade() {
                    disks.retry();
                }
            }
            Command::InjectNmi => self.complete()?.vcpus.iter().for_each(VcpuRemote::inject_nmi),
        }
        Ok(json!({}))
    }
}
