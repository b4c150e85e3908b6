//! What a PCI function is to the root: configuration space, BARs, interrupts.

use std::sync::{Arc, Mutex, MutexGuard};

use super::bits::{self, command, status};
use super::config::{ConfigSpace, ConfigState};
use super::messages::{Message, Messages, MsixState};
use crate::access::lock;
use crate::host::{IrqLine, MsiSink};
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
    messages: Messages,
    sink: Option<Arc<dyn MsiSink>>,
}

/// Configuration space behind its lock, and how the function interrupts: by INTx, MSI or MSI-X, whichever software has chosen.
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
    /// The MSI-X table, if there is one.
    #[serde(default)]
    pub msix: Option<MsixState>,
}

impl PciFunction {
    /// A function with this configuration space. `pin` is the INTx pin it uses, if any. If the space has a capability for MSI or MSI-X,
    /// the function can send messages.
    pub fn new(mut config: ConfigSpace, pin: Option<IntxPin>) -> Self {
        config.set_u8(bits::INTERRUPT_PIN, pin.map_or(0, IntxPin::register));
        let messages = Messages::of(&config);
        PciFunction {
            inner: Mutex::new(Inner { config, intx_pending: false, intx: None, messages, sink: None }),
        }
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
        let Inner { config, messages, .. } = &mut *inner;
        let unmasked = messages.take_unmasked(config);
        send(inner, unmasked);
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

    /// Connects the function to what carries its messages.
    pub fn connect_messages(&self, sink: Arc<dyn MsiSink>) {
        lock(&self.inner).sink = Some(sink);
    }

    /// Whether software has chosen messages: then the function does not assert INTx, it calls [`PciFunction::send`].
    pub fn sends_messages(&self) -> bool {
        let inner = lock(&self.inner);
        inner.messages.enabled(&inner.config)
    }

    /// How many different vectors the function may send at present: 0 if software has not chosen messages.
    pub fn vectors(&self) -> u16 {
        let inner = lock(&self.inner);
        inner.messages.vectors(&inner.config)
    }

    /// Sends the message of a vector, if software has chosen messages. MSI-X remembers what is sent to a masked vector, and sends
    /// it later; with MSI, vectors beyond those that software allows share the allowed ones.
    pub fn send(&self, vector: u16) {
        let mut inner = lock(&self.inner);
        let Inner { config, messages, .. } = &mut *inner;
        let message = messages.message(config, vector);
        send(inner, message);
    }

    /// A load from the BAR that holds the MSI-X table and pending bits, at `offset` into it. False if neither is there.
    pub fn msix_read(&self, offset: u64, data: &mut [u8]) -> bool {
        lock(&self.inner).messages.read(offset, data)
    }

    /// A store to that BAR.
    pub fn msix_write(&self, offset: u64, data: &[u8]) -> bool {
        let mut inner = lock(&self.inner);
        let Inner { config, messages, .. } = &mut *inner;
        let known = messages.write(offset, data);
        let unmasked = messages.take_unmasked(config);
        send(inner, unmasked);
        known
    }

    /// Forgets messages that wait for their vector to be unmasked, as a reset of the device does.
    pub fn clear_pending_messages(&self) {
        lock(&self.inner).messages.clear_pending();
    }

    /// Whether software lets the device access memory.
    pub fn bus_master(&self) -> bool {
        lock(&self.inner).config.command() & command::BUS_MASTER != 0
    }

    /// Registers for a snapshot.
    pub fn save(&self) -> PciFunctionState {
        let inner = lock(&self.inner);
        PciFunctionState {
            config: inner.config.save(),
            intx_pending: inner.intx_pending,
            msix: inner.messages.save(),
        }
    }

    /// Puts saved registers back; see [`ConfigSpace::restore`]. The root must be told afterwards
    /// ([`super::PciRoot::refresh_decoding`]).
    ///
    /// # Errors
    /// The state is of another device.
    pub fn restore(&self, state: &PciFunctionState, volatile: &[usize]) -> Result<(), SnapshotError> {
        let mut inner = lock(&self.inner);
        inner.messages.check(state.msix.as_ref())?;
        inner.config.restore(&state.config, volatile)?;
        inner.messages.restore(state.msix.as_ref());
        inner.intx_pending = state.intx_pending;
        inner.drive_intx();
        Ok(())
    }
}

/// Sends messages once the function's lock is released.
fn send(inner: MutexGuard<'_, Inner>, messages: impl IntoIterator<Item = Message>) {
    let sink = inner.sink.clone();
    drop(inner);
    if let Some(sink) = sink {
        messages.into_iter().for_each(|message| sink.send(message.address, message.data));
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
