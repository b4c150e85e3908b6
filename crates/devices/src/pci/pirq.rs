//! PCI interrupt routing: INTx pins to the eight PIRQ lines of the ISA bridge, PIRQ lines to interrupt inputs.
//!
//! Each PIRQ line is wired to an IOAPIC input of its own ([`PIRQ_GSI_BASE`] and up) and, if its routing register says so,
//! to an ISA interrupt (register layout as in Intel's PIIX4 data sheet §4.1.10, with four more lines at 68h). Which PIRQ a
//! pin goes to is fixed by the slot, so the ACPI `_PRT` and the MP table can be written down without asking anyone.

use std::sync::{Arc, Mutex};

use super::PciAddress;
use super::device::IntxPin;
use crate::access::lock;
use crate::host::IrqLine;
use crate::irq::SharedLine;

/// Number of PIRQ lines.
pub const PIRQS: usize = 8;
/// IOAPIC input (global system interrupt) of the first PIRQ line.
pub const PIRQ_GSI_BASE: u32 = 16;
/// ISA interrupts that a PIRQ can be routed to, one bit each: not the timer, keyboard, cascade, clock and FPU.
pub const PERMITTED_IRQS: u16 = 0xdef8;
/// ISA interrupts that [`default_irq`] spreads the lines over: those no ISA device of the board uses.
const DEFAULT_IRQS: [u8; 3] = [5, 10, 11];

/// Routing registers.
pub mod bits {
    /// The line is not routed to an ISA interrupt.
    pub const DISABLED: u8 = 1 << 7;
    /// The ISA interrupt.
    pub const IRQ: u8 = 0x0f;
    /// Bits that exist.
    pub const MASK: u8 = DISABLED | IRQ;
}

/// The PIRQ line of an INTx pin: neighbouring slots and pins get different lines.
pub fn pirq_of(address: PciAddress, pin: IntxPin) -> usize {
    (usize::from(address.slot) + usize::from(pin.register()) - 1) % PIRQS
}

/// The IOAPIC input of a PIRQ line.
pub fn gsi_of(pirq: usize) -> u32 {
    PIRQ_GSI_BASE + (pirq % PIRQS) as u32
}

/// The ISA interrupt that firmware would route a PIRQ line to.
pub fn default_irq(pirq: usize) -> u8 {
    DEFAULT_IRQS[pirq % DEFAULT_IRQS.len()]
}

/// Two outputs driven as one.
struct Pirq {
    apic: Arc<dyn IrqLine>,
    router: Arc<Mutex<Routes>>,
    index: usize,
}

impl IrqLine for Pirq {
    fn set(&self, asserted: bool) {
        self.apic.set(asserted);
        let mut routes = lock(&self.router);
        routes.level[self.index] = asserted;
        routes.drive(self.index, asserted);
    }
}

struct Routes {
    register: [u8; PIRQS],
    level: [bool; PIRQS],
    /// For each line, its own input to every ISA interrupt it may be routed to.
    isa: Vec<Vec<Option<Arc<dyn IrqLine>>>>,
}

impl Routes {
    fn drive(&self, pirq: usize, asserted: bool) {
        let register = self.register[pirq];
        if register & bits::DISABLED == 0
            && let Some(line) = &self.isa[pirq][usize::from(register & bits::IRQ)]
        {
            line.set(asserted);
        }
    }
}

/// The router inside the ISA bridge.
pub struct PirqRouter {
    routes: Arc<Mutex<Routes>>,
    lines: Vec<Arc<SharedLine>>,
}

impl PirqRouter {
    /// `apic[n]` is the IOAPIC input of PIRQ `n`; `isa[n]` is ISA interrupt `n`, which other devices may share.
    /// Missing entries are not connected, nor are ISA interrupts outside [`PERMITTED_IRQS`].
    pub fn new(apic: &[Arc<dyn IrqLine>], isa: &[Arc<SharedLine>]) -> Self {
        let inputs = || {
            (0..16u8)
                .map(|irq| {
                    let permitted = PERMITTED_IRQS & 1 << irq != 0;
                    isa.get(usize::from(irq)).filter(|_| permitted).map(SharedLine::input)
                })
                .collect()
        };
        let routes = Arc::new(Mutex::new(Routes {
            register: [bits::DISABLED; PIRQS],
            level: [false; PIRQS],
            isa: (0..PIRQS).map(|_| inputs()).collect(),
        }));
        let lines = (0..PIRQS)
            .map(|index| {
                let apic = apic.get(index).cloned().unwrap_or_else(|| Arc::new(crate::irq::Unconnected));
                SharedLine::new(Arc::new(Pirq { apic, router: routes.clone(), index }))
            })
            .collect();
        PirqRouter { routes, lines }
    }

    /// A new input to PIRQ line `pirq`.
    pub fn input(&self, pirq: usize) -> Arc<dyn IrqLine> {
        self.lines[pirq % PIRQS].input()
    }

    /// A routing register.
    pub fn route(&self, pirq: usize) -> u8 {
        lock(&self.routes).register[pirq % PIRQS]
    }

    /// Writes a routing register; a line that is asserted moves from the old interrupt to the new one.
    pub fn set_route(&self, pirq: usize, value: u8) {
        let pirq = pirq % PIRQS;
        let mut routes = lock(&self.routes);
        routes.drive(pirq, false);
        routes.register[pirq] = value & bits::MASK;
        routes.drive(pirq, routes.level[pirq]);
    }

    /// The ISA interrupt a line is routed to.
    pub fn irq(&self, pirq: usize) -> Option<u8> {
        let register = self.route(pirq);
        let irq = register & bits::IRQ;
        (register & bits::DISABLED == 0 && PERMITTED_IRQS & 1 << irq != 0).then_some(irq)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Line;

    #[test]
    fn lines_follow_their_routing_register() {
        let apic: Vec<Arc<Line>> = (0..PIRQS).map(|_| Line::new()).collect();
        let isa: Vec<Arc<Line>> = (0..16).map(|_| Line::new()).collect();
        let apic_lines: Vec<Arc<dyn IrqLine>> = apic.iter().map(|l| l.clone() as _).collect();
        let isa_lines: Vec<_> = isa.iter().map(|l| SharedLine::new(l.clone())).collect();
        let router = PirqRouter::new(&apic_lines, &isa_lines);

        let device = router.input(2);
        device.set(true);
        assert!(apic[2].level());
        assert!(isa.iter().all(|l| !l.level()), "not routed after power-up");

        router.set_route(2, 10);
        assert!(isa[10].level());
        let neighbour = isa_lines[10].input();
        neighbour.set(true);
        router.set_route(2, 11);
        assert!(isa[11].level() && isa[10].level(), "the neighbour on 10 still pulls");
        neighbour.set(false);
        assert!(!isa[10].level());

        router.set_route(2, 0x78);
        assert_eq!(router.route(2), 0x08, "bits that do not exist");
        assert_eq!(router.irq(2), None);
        assert!(!isa[8].level(), "the clock's interrupt cannot be taken");
        device.set(false);
        assert!(!apic[2].level());
    }
}
