//! The ISA (LPC) bridge: in configuration space, the PIRQ routing registers (Intel 82371SB data sheet §2.2.6, with four
//! more lines as bhyve has them). The ISA devices behind it are on the buses by themselves.

use std::sync::Arc;

use super::bits::class;
use super::config::{ConfigSpace, PciIdentity};
use super::device::{PciDevice, PciFunction, PciFunctionState};
use super::pirq::{self, PIRQS, PirqRouter};
use crate::snapshot::{Persist, SnapshotError};

/// Routing registers of PIRQ A to D.
const PIRQ_A_TO_D: usize = 0x60;
/// Routing registers of PIRQ E to H.
const PIRQ_E_TO_H: usize = 0x68;

/// Identity of bhyve's bridge: Intel's 82371SB ISA function.
pub const DEFAULT_IDENTITY: PciIdentity = PciIdentity {
    vendor: 0x8086,
    device: 0x7000,
    revision: 0,
    class: class::ISA_BRIDGE,
    subsystem_vendor: 0,
    subsystem: 0,
};

/// Configuration offset of a PIRQ's routing register, for ACPI's routing methods.
pub fn routing_register(pirq: usize) -> usize {
    if pirq < 4 { PIRQ_A_TO_D + pirq } else { PIRQ_E_TO_H + pirq - 4 }
}

/// The bridge.
pub struct LpcBridge {
    function: PciFunction,
    router: Arc<PirqRouter>,
}

impl LpcBridge {
    /// A bridge with this identity in front of `router`.
    pub fn new(identity: PciIdentity, router: Arc<PirqRouter>) -> Self {
        let mut config = ConfigSpace::new(identity);
        for line in 0..PIRQS {
            config.set_writable(routing_register(line), &[pirq::bits::MASK]);
        }
        LpcBridge { function: PciFunction::new(config, None), router }
    }

    /// The router's registers, which firmware code may have set without going through configuration space.
    fn show_routes(&self) {
        self.function.with_config(|config| {
            for line in 0..PIRQS {
                config.set_u8(routing_register(line), self.router.route(line));
            }
        });
    }

    fn apply_routes(&self) {
        for line in 0..PIRQS {
            let route = self.function.with_config(|config| config.u8(routing_register(line)));
            if route != self.router.route(line) {
                self.router.set_route(line, route);
            }
        }
    }
}

impl PciDevice for LpcBridge {
    fn function(&self) -> &PciFunction {
        &self.function
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.show_routes();
        self.function.config_read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.show_routes();
        self.function.config_write(offset, data);
        self.apply_routes();
    }

    fn bar_read(&self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: usize, _offset: u64, _data: &[u8]) {}
}

impl Persist for LpcBridge {
    type State = PciFunctionState;
    const VERSION: u32 = 1;

    fn save(&self) -> PciFunctionState {
        self.show_routes();
        self.function.save()
    }

    fn restore(&self, state: PciFunctionState) -> Result<(), SnapshotError> {
        self.function.restore(&state, &[])?;
        self.apply_routes();
        Ok(())
    }
}
