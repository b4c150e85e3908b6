//! The registers of the whole adapter, interrupts, and the ways of commands: out of the ports and back (§3.1, §5, §10).

use std::sync::{Arc, Mutex};

use memory::GuestMemory;
use serde::{Deserialize, Serialize};

use super::bits::{self, MAX_PORTS, PORT_STRIDE, PORTS, SLOTS, cap, ghc, port};
use super::device::Device;
use super::job::{End, Job, Ticket};
use super::port::{Dma, Fetched, Port, PortState};
use crate::access::{lock, merge, store_from};
use crate::host::Clock;
use crate::pci::{PciFunction, PciFunctionState};
use crate::snapshot::SnapshotError;

/// Registers of an adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct AhciState {
    pub function: PciFunctionState,
    pub interrupts_enabled: bool,
    pub interrupt_status: u32,
    pub ports: Vec<PortState>,
}

struct Registers {
    interrupts_enabled: bool,
    interrupt_status: u32,
    /// An HBA reset was asked for, and commands of before are still on their way.
    resetting: bool,
    ports: Vec<Port>,
    /// A message is to be sent.
    message_due: bool,
    /// What the interrupt line was last told, or is about to be.
    level: bool,
}

impl Registers {
    /// The adapter wants an interrupt.
    fn asserts(&self) -> bool {
        self.interrupts_enabled && self.interrupt_status != 0
    }

    /// Collects what ports want. Bits stay until software clears them, and come back if it does so while the port still wants an
    /// interrupt: then there is also another message (§10.6.2).
    fn collect(&mut self) {
        let wants = self.ports.iter().enumerate().filter(|(_, port)| port.interrupts());
        let bits = wants.fold(0, |bits, (index, _)| bits | 1u32 << index);
        let new = bits & !self.interrupt_status;
        self.interrupt_status |= bits;
        self.message_due |= self.interrupts_enabled && new != 0;
        self.resetting &= self.ports.iter().any(Port::has_orphans);
    }
}

/// The adapter, as commands that are on their way know it.
pub(super) struct Controller {
    pub function: PciFunction,
    memory: GuestMemory,
    clock: Arc<dyn Clock>,
    registers: Mutex<Registers>,
    /// Whether INTx is asserted. Held while it is driven, so that the last level is the right one.
    intx: Mutex<bool>,
}

impl Controller {
    /// An adapter after power-up with at most [`MAX_PORTS`] ports.
    pub fn new(
        function: PciFunction,
        devices: Vec<Option<Device>>,
        memory: GuestMemory,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let ports = devices.into_iter().take(MAX_PORTS).map(Port::new).collect();
        let registers = Registers {
            interrupts_enabled: false,
            interrupt_status: 0,
            resetting: false,
            ports,
            message_due: false,
            level: false,
        };
        Controller { function, memory, clock, registers: Mutex::new(registers), intx: Mutex::new(false) }
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Guest memory, if software lets the device access it.
    fn dma(&self) -> Dma<'_> {
        self.function.bus_master().then_some(&self.memory)
    }

    /// Works on the registers, then interrupts if there is reason to.
    fn with<T>(&self, work: impl FnOnce(&mut Registers) -> T) -> T {
        let mut registers = lock(&self.registers);
        let result = work(&mut registers);
        registers.collect();
        let changed = registers.message_due || registers.level != registers.asserts();
        drop(registers);
        if changed {
            self.interrupt();
        }
        result
    }

    /// Drives the interrupt line, or sends a message. Also to be called when software has chosen the other way.
    pub fn interrupt(&self) {
        let messages = self.function.sends_messages();
        let mut intx = lock(&self.intx);
        let (level, message) = {
            let mut registers = lock(&self.registers);
            registers.level = registers.asserts();
            (registers.level, std::mem::take(&mut registers.message_due))
        };
        let line = level && !messages;
        if std::mem::replace(&mut *intx, line) != line {
            self.function.set_intx(line);
        }
        drop(intx);
        if message && messages {
            self.function.send(0);
        }
    }

    fn read_register(registers: &Registers, offset: u32) -> u32 {
        let ports = registers.ports.len() as u32;
        if let Some((index, offset)) = port_register(offset) {
            return registers.ports.get(index).map_or(0, |port| port.read(offset));
        }
        match offset {
            bits::CAP => {
                cap::S64A
                    | cap::SNCQ
                    | cap::SCLO
                    | 3 << cap::SPEED_SHIFT
                    | cap::SAM
                    | cap::PMD
                    | (u32::from(SLOTS) - 1) << cap::SLOTS_SHIFT
                    | (ports - 1)
            }
            bits::GHC => {
                let shows = |on: bool, bit| if on { bit } else { 0 };
                ghc::AE | shows(registers.interrupts_enabled, ghc::IE) | shows(registers.resetting, ghc::HR)
            }
            bits::IS => registers.interrupt_status,
            bits::PI => u32::MAX >> (MAX_PORTS as u32 - ports),
            bits::VS => bits::VERSION,
            // No hand-over from firmware, no device sleep, no automatic slumber.
            bits::CAP2 => 0,
            _ => 0,
        }
    }

    /// Software reads from the registers.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = lock(&self.registers);
        for (offset, part) in dwords(offset, data.len()) {
            let value = Self::read_register(&registers, offset as u32 & !3);
            if let Some(data) = data.get_mut(part) {
                store_from(data, value.into(), offset & 3);
            }
        }
    }

    /// Software writes to the registers.
    pub fn write(self: &Arc<Self>, offset: u64, data: &[u8]) {
        for (offset, part) in dwords(offset, data.len()) {
            let Some(data) = data.get(part) else { continue };
            let register = offset as u32 & !3;
            self.with(|registers| {
                let old = Self::read_register(registers, register);
                let value = merge(old.into(), data, offset & 3) as u32;
                let ones = merge(0, data, offset & 3) as u32;
                self.write_register(registers, register, value, ones);
            });
            if let Some((index, port::CI | port::CMD | port::SCTL)) = port_register(register) {
                self.start(index);
            }
        }
    }

    fn write_register(&self, registers: &mut Registers, offset: u32, value: u32, ones: u32) {
        if let Some((index, offset)) = port_register(offset) {
            if let Some(port) = registers.ports.get_mut(index) {
                port.write(offset, value, ones, self.dma());
            }
            return;
        }
        match offset {
            bits::GHC if value & ghc::HR != 0 => {
                registers.interrupts_enabled = false;
                registers.interrupt_status = 0;
                registers.message_due = false;
                registers.resetting = true;
                registers.ports.iter_mut().for_each(Port::reset);
            }
            bits::GHC => {
                let enabled = value & ghc::IE != 0;
                registers.message_due |=
                    enabled && !registers.interrupts_enabled && registers.interrupt_status != 0;
                registers.interrupts_enabled = enabled;
            }
            bits::IS => registers.interrupt_status &= !ones,
            _ => {}
        }
    }

    /// Software has changed the command register or how interrupts are told.
    pub fn config_written(self: &Arc<Self>) {
        self.interrupt();
        self.start_all();
    }

    /// Starts what waits in any port.
    pub fn start_all(self: &Arc<Self>) {
        self.with(|registers| {
            let dma = self.dma();
            registers.ports.iter_mut().for_each(|port| port.send_signature(dma));
        });
        let ports = lock(&self.registers).ports.len();
        (0..ports).for_each(|index| self.start(index));
    }

    /// Starts what waits in a port, one command after another. Commands that end at once come back here from below, and find
    /// that the next one is being seen to already.
    fn start(self: &Arc<Self>, index: usize) {
        let mut mine = false;
        loop {
            let now_ns = self.clock.now_ns();
            let fetched = self.with(|registers| {
                let Some(port) = registers.ports.get_mut(index) else { return Fetched::Nothing };
                if port.dispatching && !mine {
                    return Fetched::Nothing;
                }
                let fetched = port.fetch(self.dma(), now_ns);
                port.dispatching = !matches!(fetched, Fetched::Nothing);
                fetched
            });
            mine = true;
            match fetched {
                Fetched::Nothing => return,
                Fetched::Ended => {}
                Fetched::Start(start) => Job::of(self, index, *start).run(),
            }
        }
    }

    /// Whether a command belongs to the present life of its port.
    pub fn lives(&self, ticket: Ticket) -> bool {
        lock(&self.registers).ports.get(ticket.port).is_some_and(|port| port.lives(ticket.life))
    }

    /// A command has ended.
    pub fn ended(self: &Arc<Self>, job: &Job, end: End) {
        self.with(|registers| {
            let dma = self.dma();
            let Some(port) = registers.ports.get_mut(job.ticket.port) else { return };
            if port.lives(job.ticket.life) {
                port.ended(job, end, dma);
            } else {
                port.orphan_ended(dma);
            }
        });
        self.start(job.ticket.port);
    }

    /// Works on a port's device.
    pub fn with_device<T>(&self, index: usize, work: impl FnOnce(&mut Device) -> T) -> Option<T> {
        let mut registers = lock(&self.registers);
        registers.ports.get_mut(index).and_then(Port::device_mut).map(work)
    }

    pub fn save(&self) -> AhciState {
        let now_ns = self.clock.now_ns();
        let registers = lock(&self.registers);
        AhciState {
            function: self.function.save(),
            interrupts_enabled: registers.interrupts_enabled,
            interrupt_status: registers.interrupt_status,
            ports: registers.ports.iter().map(|port| port.save(now_ns)).collect(),
        }
    }

    pub fn restore(&self, state: AhciState) -> Result<(), SnapshotError> {
        let now_ns = self.clock.now_ns();
        let mut registers = lock(&self.registers);
        let ports = registers.ports.len();
        if state.ports.len() != ports {
            let found = state.ports.len();
            return Err(SnapshotError::Invalid(format!("AHCI with {found} ports, this one has {ports}")));
        }
        let problem = registers.ports.iter().zip(&state.ports).find_map(|(port, state)| port.problem(state));
        if let Some(problem) = problem {
            return Err(SnapshotError::Invalid(problem));
        }
        self.function.restore(&state.function, &[])?;
        for (port, state) in registers.ports.iter_mut().zip(state.ports) {
            port.restore(state, now_ns);
        }
        registers.interrupts_enabled = state.interrupts_enabled;
        registers.interrupt_status = state.interrupt_status;
        registers.message_due = false;
        let level = registers.asserts();
        drop(registers);
        let line = level && !self.function.sends_messages();
        *lock(&self.intx) = line;
        self.function.set_intx(line);
        Ok(())
    }
}

/// Port and offset in its registers.
fn port_register(offset: u32) -> Option<(usize, u32)> {
    let offset = offset.checked_sub(PORTS)?;
    Some(((offset / PORT_STRIDE) as usize, offset % PORT_STRIDE))
}

/// The parts of an access that lie in different registers: where each starts, and which bytes of the access it is.
fn dwords(offset: u64, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    let end = offset.saturating_add(len as u64);
    let starts = std::iter::successors(Some(offset), |at| (*at & !3).checked_add(4));
    starts.take_while(move |at| *at < end).map(move |at| {
        let next = (at & !3).saturating_add(4).min(end);
        (at, (at - offset) as usize..(next - offset) as usize)
    })
}
