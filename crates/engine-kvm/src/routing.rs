//! The table that says where each global system interrupt leads (Linux `api.rst` §4.52, KVM_SET_GSI_ROUTING).
//!
//! The first [`IOAPIC_PINS`] interrupts are wired as on a PC: below 16 to the 8259s and the IOAPIC, with the 8254's
//! line 0 at IOAPIC input 2, where input 2 of the 8259 is the cascade (ACPI 6.5 §5.2.12.5). Interrupts above are
//! handed out to message-signalled interrupts that an event descriptor is to raise.

use engine::{EngineError, Gsi, IOAPIC_PINS, MsiMessage, Result};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;

use crate::error::host;

/// IOAPIC input of the 8254.
const PIT_IOAPIC_PIN: u32 = 2;
/// Input of the first 8259 that the second one occupies.
const CASCADE_LINE: u32 = 2;

/// A message that an allocated interrupt sends.
#[derive(Clone, Copy, Debug)]
struct MessageRoute {
    message: MsiMessage,
    /// Event descriptors connected to it.
    users: u32,
}

/// The routing table of a VM.
#[derive(Debug)]
pub(crate) struct Routing {
    /// By position: interrupt `IOAPIC_PINS + n`.
    messages: Vec<Option<MessageRoute>>,
    /// Interrupts that KVM can route.
    limit: usize,
}

impl Routing {
    /// The wiring without any message. `limit` is KVM_CAP_IRQ_ROUTING.
    pub(crate) fn new(limit: usize) -> Self {
        Routing { messages: Vec::new(), limit }
    }

    /// The interrupt that sends `message`, allocating it and telling KVM if it is new.
    pub(crate) fn acquire(&mut self, vm: &VmFd, message: MsiMessage) -> Result<Gsi> {
        if let Some(position) = self.find(message) {
            if let Some(route) = &mut self.messages[position] {
                route.users += 1;
            }
            return Ok(gsi_of(position));
        }
        let position = self.messages.iter().position(Option::is_none).unwrap_or(self.messages.len());
        if IOAPIC_PINS as usize + position >= self.limit {
            return Err(EngineError::Unsupported(format!(
                "KVM routes at most {} interrupts and all are in use: remove devices or reduce their queues",
                self.limit
            )));
        }
        if position == self.messages.len() {
            self.messages.push(None);
        }
        self.messages[position] = Some(MessageRoute { message, users: 1 });
        if let Err(error) = self.apply(vm) {
            self.messages[position] = None;
            return Err(error);
        }
        Ok(gsi_of(position))
    }

    /// The interrupt that sends `message`, if any does.
    pub(crate) fn lookup(&self, message: MsiMessage) -> Option<Gsi> {
        self.find(message).map(gsi_of)
    }

    /// Gives one use of an interrupt back.
    pub(crate) fn release(&mut self, vm: &VmFd, gsi: Gsi) -> Result<()> {
        let position = gsi.wrapping_sub(IOAPIC_PINS) as usize;
        let Some(slot) = self.messages.get_mut(position) else { return Ok(()) };
        if let Some(route) = slot {
            route.users -= 1;
            if route.users == 0 {
                *slot = None;
                return self.apply(vm);
            }
        }
        Ok(())
    }

    fn find(&self, message: MsiMessage) -> Option<usize> {
        self.messages.iter().position(|route| route.is_some_and(|route| route.message == message))
    }

    /// Hands the whole table to KVM.
    pub(crate) fn apply(&self, vm: &VmFd) -> Result<()> {
        let table = KvmIrqRouting::from_entries(&self.entries()).map_err(|_| {
            EngineError::Unsupported("the interrupt routing table is too large for KVM".into())
        })?;
        vm.set_gsi_routing(&table).map_err(host("setting the interrupt routing table"))
    }

    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let mut entries = Vec::new();
        // KVM maps a chip's input back to the last interrupt named for it, and the 8254 has to hear when its own
        // interrupt, 0, is acknowledged: the descending order makes 0 the last one at IOAPIC input 2.
        for gsi in (0..IOAPIC_PINS).rev() {
            let pin = if gsi == 0 { PIT_IOAPIC_PIN } else { gsi };
            entries.push(chip_entry(gsi, KVM_IRQCHIP_IOAPIC, pin));
            match gsi {
                CASCADE_LINE => {}
                0..8 => entries.push(chip_entry(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
                8..16 => entries.push(chip_entry(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
                _ => {}
            }
        }
        for (position, route) in self.messages.iter().enumerate() {
            let Some(MessageRoute { message, .. }) = route else { continue };
            let mut entry = kvm_irq_routing_entry {
                gsi: gsi_of(position),
                type_: KVM_IRQ_ROUTING_MSI,
                ..Default::default()
            };
            entry.u.msi.address_lo = message.address as u32;
            entry.u.msi.address_hi = (message.address >> 32) as u32;
            entry.u.msi.data = message.data;
            entries.push(entry);
        }
        entries
    }
}

fn gsi_of(position: usize) -> Gsi {
    IOAPIC_PINS + position as u32
}

fn chip_entry(gsi: Gsi, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}
