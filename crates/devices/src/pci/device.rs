//! What a PCI function is to the root: configuration space, BARs, an interrupt pin.

use std::sync::{Arc, Mutex};

use super::bits::{self, command, status};
use super::config::{ConfigSpace, ConfigState};
use crate::access::lock;
use crate::host::IrqLine;
use crate::snapshot::SnapshotError;

/// An INTx pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum IntxPin {
    A = 1,
    B = 2,
    C = 3,
    D = 4,
}

impl IntxPin {
    /// Value of the interrupt pin register.
    pub fn register(self) -> u8 {
        self as u8
    }

    fn from_register(value: u8) -> Option<Self> {
        [IntxPin::A, IntxPin::B, IntxPin::C, IntxPin::D].into_iter().find(|pin| pin.register() == value)
    }
}

/// A function on the PCI bus. Most devices implement [`PciDevice::function`] and the BAR accesses; those with registers of
/// their own in configuration space also override [`PciDevice::config_written`] or the configuration accesses.
///
/// Offsets in configuration space go up to 4095; `data` is 1, 2 or 4 bytes and naturally aligned.
pub trait PciDevice: Send + Sync {
    /// The part that every function has.
    fn function(&self) -> &PciFunction;

    /// Software reads configuration space.
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.function().config_read(offset, data);
    }

    /// Software writes configuration space.
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.function().config_write(offset, data);
        self.config_written(offset, data.len());
    }

    /// Software has written `len` bytes at `offset`; [`PciFunction`] already shows the new contents.
    fn config_written(&self, _offset: u16, _len: usize) {}

    /// A load from a BAR, at `offset` into it.
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]);

    /// A store to a BAR.
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]);

    /// A BAR now answers at `base` (`None`: nowhere). Called in order, before the configuration write that moved it has
    /// completed; must not access configuration space through the root.
    fn bar_mapped(&self, _bar: usize, _base: Option<u64>) {}
}

struct Inner {
    config: ConfigSpace,
    /// The device wants service, whether or not the line may show it.
    intx_pending: bool,
    intx: Option<Arc<dyn IrqLine>>,
}

/// Configuration space behind its lock, and the INTx pin.
pub struct PciFunction {
    inner: Mutex<Inner>,
}

/// Registers of a [`PciFunction`].
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PciFunctionState {
    /// Configuration space.
    pub config: ConfigState,
    /// The device wants service.
    pub intx_pending: bool,
}

impl PciFunction {
    /// A function with this configuration space. `pin` is the INTx pin it uses, if any.
    pub fn new(mut config: ConfigSpace, pin: Option<IntxPin>) -> Self {
        config.set_u8(bits::INTERRUPT_PIN, pin.map_or(0, IntxPin::register));
        PciFunction { inner: Mutex::new(Inner { config, intx_pending: false, intx: None }) }
    }

    /// Runs `look` on the configuration space.
    pub fn with_config<T>(&self, look: impl FnOnce(&mut ConfigSpace) -> T) -> T {
        look(&mut lock(&self.inner).config)
    }

    /// Software reads.
    pub fn config_read(&self, offset: u16, data: &mut [u8]) {
        lock(&self.inner).config.read(usize::from(offset), data);
    }

    /// Software writes.
    pub fn config_write(&self, offset: u16, data: &[u8]) {
        let mut inner = lock(&self.inner);
        inner.config.write(usize::from(offset), data);
        inner.drive_intx();
    }

    /// The pin in the interrupt pin register.
    pub fn intx_pin(&self) -> Option<IntxPin> {
        IntxPin::from_register(lock(&self.inner).config.u8(bits::INTERRUPT_PIN))
    }

    /// Connects the pin to the board.
    pub fn connect_intx(&self, line: Arc<dyn IrqLine>) {
        let mut inner = lock(&self.inner);
        inner.intx = Some(line);
        inner.drive_intx();
    }

    /// Asserts or releases INTx. The line follows unless software has disabled it; the status register always shows it.
    pub fn set_intx(&self, asserted: bool) {
        let mut inner = lock(&self.inner);
        inner.intx_pending = asserted;
        inner.drive_intx();
    }

    /// Whether software lets the device access memory.
    pub fn bus_master(&self) -> bool {
        lock(&self.inner).config.command() & command::BUS_MASTER != 0
    }

    /// Registers for a snapshot.
    pub fn save(&self) -> PciFunctionState {
        let inner = lock(&self.inner);
        PciFunctionState { config: inner.config.save(), intx_pending: inner.intx_pending }
    }

    /// Puts saved registers back; see [`ConfigSpace::restore`]. The root must be told afterwards
    /// ([`super::PciRoot::refresh_decoding`]).
    ///
    /// # Errors
    /// The state is of another device.
    pub fn restore(&self, state: &PciFunctionState, volatile: &[usize]) -> Result<(), SnapshotError> {
        let mut inner = lock(&self.inner);
        inner.config.restore(&state.config, volatile)?;
        inner.intx_pending = state.intx_pending;
        inner.drive_intx();
        Ok(())
    }
}

impl Inner {
    fn drive_intx(&mut self) {
        let pending = if self.intx_pending { status::INTERRUPT } else { 0 };
        let register = self.config.u16(bits::STATUS) & !status::INTERRUPT | pending;
        self.config.set_u16(bits::STATUS, register);
        if let Some(line) = &self.intx {
            line.set(self.intx_pending && self.config.command() & command::INTX_DISABLE == 0);
        }
    }
}
