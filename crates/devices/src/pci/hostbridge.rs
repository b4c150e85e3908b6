//! The host bridge: identity and a PCI Express capability, by which guests know that the machine has ECAM and MSI.

use super::bits::{class, express};
use super::config::{ConfigError, ConfigSpace, PciIdentity};
use super::device::{PciDevice, PciFunction, PciFunctionState};
use crate::snapshot::{Persist, SnapshotError};

/// bhyve's `hostbridge`: vendor and device (NetApp's number).
pub const DEFAULT_IDS: (u16, u16) = (0x1275, 0x1275);
/// bhyve's `amd_hostbridge`: some guests switch on MSI only behind a vendor they know.
pub const AMD_IDS: (u16, u16) = (0x1022, 0x7432);

/// The host bridge, usually at 0:0:0.
pub struct HostBridge {
    function: PciFunction,
}

impl HostBridge {
    /// The identity of a host bridge with these vendor and device IDs.
    pub fn identity((vendor, device): (u16, u16)) -> PciIdentity {
        PciIdentity {
            vendor,
            device,
            revision: 0,
            class: class::HOST_BRIDGE,
            subsystem_vendor: 0,
            subsystem: 0,
        }
    }

    /// A bridge with this identity.
    ///
    /// # Errors
    /// None in practice: the capability fits into empty configuration space.
    pub fn new(identity: PciIdentity) -> Result<Self, ConfigError> {
        let mut config = ConfigSpace::new(identity);
        config.add_express_capability(express::ROOT_PORT)?;
        Ok(HostBridge { function: PciFunction::new(config, None) })
    }
}

impl PciDevice for HostBridge {
    fn function(&self) -> &PciFunction {
        &self.function
    }

    fn bar_read(&self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: usize, _offset: u64, _data: &[u8]) {}
}

impl Persist for HostBridge {
    type State = PciFunctionState;
    const VERSION: u32 = 1;

    fn save(&self) -> PciFunctionState {
        self.function.save()
    }

    fn restore(&self, state: PciFunctionState) -> Result<(), SnapshotError> {
        self.function.restore(&state, &[])
    }
}
