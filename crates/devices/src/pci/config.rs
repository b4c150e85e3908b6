//! Configuration space with a type 0 header: which bits exist, which can be written, what the BARs decode.

use serde::{Deserialize, Serialize};

use super::bits::{self, bar, capability, command, status};
use crate::snapshot::SnapshotError;

/// Number of base address registers of a type 0 header.
pub const BARS: usize = 6;
/// Index that stands for the expansion ROM where BARs are numbered.
pub const ROM_BAR: usize = BARS;

/// What a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct PciIdentity {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Base class, subclass, programming interface ([`bits::class`]).
    pub class: (u8, u8, u8),
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

/// The address space and width of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Ports.
    Io,
    /// Memory below 4 GiB.
    Memory32 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
    /// Memory anywhere; takes two registers.
    Memory64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
    /// The expansion ROM.
    Rom,
}

impl BarKind {
    /// Whether the BAR decodes ports.
    pub fn is_io(self) -> bool {
        self == BarKind::Io
    }
}

/// A BAR as the device declares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarSpec {
    /// Register number, or [`ROM_BAR`].
    pub index: usize,
    /// Address space.
    pub kind: BarKind,
    /// Addresses it decodes: a power of two.
    pub size: u64,
}

/// A BAR that the guest has given an address and enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodedBar {
    /// What the device declared.
    pub spec: BarSpec,
    /// First address.
    pub base: u64,
}

/// Why a device's configuration space cannot be laid out as asked.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// No such BAR, or one that is taken already.
    #[error("BAR {0} does not exist or is in use")]
    BarIndex(usize),
    /// Not a power of two, or outside what the kind allows.
    #[error("BAR {index} of {size:#x} bytes: the size must be a power of two that its kind can hold")]
    BarSize {
        /// Which.
        index: usize,
        /// Size asked for.
        size: u64,
    },
    /// No room for another capability.
    #[error("capability {id:#x} of {len} bytes does not fit into configuration space")]
    CapabilitySpace {
        /// Capability ID.
        id: u8,
        /// Its length.
        len: usize,
    },
}

/// Contents of a [`ConfigSpace`]; what is writable follows from the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    /// All 256 bytes.
    pub bytes: Vec<u8>,
}

/// The 256 bytes of a function.
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: [u8; bits::CONFIG_BYTES],
    writable: [u8; bits::CONFIG_BYTES],
    write_one_clears: [u8; bits::CONFIG_BYTES],
    bars: [Option<BarSpec>; BARS + 1],
    /// Where the next capability goes, and where the pointer to it is.
    next_capability: usize,
    last_pointer: usize,
}

impl ConfigSpace {
    /// A function without BARs, capabilities or interrupt pin.
    pub fn new(identity: PciIdentity) -> Self {
        let mut space = ConfigSpace {
            bytes: [0; bits::CONFIG_BYTES],
            writable: [0; bits::CONFIG_BYTES],
            write_one_clears: [0; bits::CONFIG_BYTES],
            bars: [None; BARS + 1],
            next_capability: bits::CAPABILITIES_START,
            last_pointer: bits::CAPABILITIES_POINTER,
        };
        space.set_u16(bits::VENDOR_ID, identity.vendor);
        space.set_u16(bits::DEVICE_ID, identity.device);
        space.set_u8(bits::REVISION_ID, identity.revision);
        let (base, sub, interface) = identity.class;
        space.set_u8(bits::BASE_CLASS, base);
        space.set_u8(bits::SUBCLASS, sub);
        space.set_u8(bits::PROGRAMMING_INTERFACE, interface);
        space.set_u16(bits::SUBSYSTEM_VENDOR_ID, identity.subsystem_vendor);
        space.set_u16(bits::SUBSYSTEM_ID, identity.subsystem);
        space.set_writable(bits::COMMAND, &command::WRITABLE.to_le_bytes());
        space.set_writable(bits::CACHE_LINE_SIZE, &[0xff]);
        space.set_writable(bits::INTERRUPT_LINE, &[0xff]);
        space.write_one_clears[bits::STATUS..][..2].copy_from_slice(&status::WRITE_ONE_CLEARS.to_le_bytes());
        space.set_u8(bits::INTERRUPT_LINE, 0xff);
        space
    }

    /// Declares which bits from `offset` on software can write.
    pub fn set_writable(&mut self, offset: usize, mask: &[u8]) {
        for (target, bits) in self.writable.iter_mut().skip(offset).zip(mask) {
            *target = *bits;
        }
    }

    /// A byte, as the device sees it.
    pub fn u8(&self, offset: usize) -> u8 {
        self.bytes.get(offset).copied().unwrap_or(0xff)
    }

    /// Two bytes.
    pub fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.u8(offset), self.u8(offset + 1)])
    }

    /// Four bytes.
    pub fn u32(&self, offset: usize) -> u32 {
        u32::from(self.u16(offset)) | u32::from(self.u16(offset + 2)) << 16
    }

    /// Sets a byte, writable by software or not.
    pub fn set_u8(&mut self, offset: usize, value: u8) {
        if let Some(byte) = self.bytes.get_mut(offset) {
            *byte = value;
        }
    }

    /// Sets two bytes.
    pub fn set_u16(&mut self, offset: usize, value: u16) {
        for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
            self.set_u8(offset + i, byte);
        }
    }

    /// Sets four bytes.
    pub fn set_u32(&mut self, offset: usize, value: u32) {
        for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
            self.set_u8(offset + i, byte);
        }
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.u16(bits::COMMAND)
    }

    /// Declares a BAR (or, with [`ROM_BAR`] and [`BarKind::Rom`], the expansion ROM).
    ///
    /// # Errors
    /// The register is taken or does not exist; the size is not one the kind can have.
    pub fn add_bar(&mut self, spec: BarSpec) -> Result<(), ConfigError> {
        let BarSpec { index, kind, size } = spec;
        let wide = matches!(kind, BarKind::Memory64 { .. });
        let rom = kind == BarKind::Rom;
        let last = index.saturating_add(usize::from(wide));
        let exists = if rom { index == ROM_BAR } else { last < BARS };
        let taken = |i: usize| {
            self.bars[i].is_some()
                || i > 0
                    && i < BARS
                    && matches!(self.bars[i - 1], Some(BarSpec { kind: BarKind::Memory64 { .. }, .. }))
        };
        if !exists || taken(index) || taken(last) {
            return Err(ConfigError::BarIndex(index));
        }
        let range = match kind {
            BarKind::Io => 4..=0x8000,
            BarKind::Memory32 { .. } => 16..=1 << 31,
            BarKind::Memory64 { .. } => 16..=1 << 63,
            BarKind::Rom => 2048..=1 << 24,
        };
        if !size.is_power_of_two() || !range.contains(&size) {
            return Err(ConfigError::BarSize { index, size });
        }
        let (flags, flag_mask) = match kind {
            BarKind::Io => (bar::IO, bar::IO_FLAGS),
            BarKind::Memory32 { prefetchable } => {
                (if prefetchable { bar::PREFETCHABLE } else { 0 }, bar::MEMORY_FLAGS)
            }
            BarKind::Memory64 { prefetchable } => {
                (bar::MEMORY_64 | if prefetchable { bar::PREFETCHABLE } else { 0 }, bar::MEMORY_FLAGS)
            }
            BarKind::Rom => (0, bar::ROM_FLAGS),
        };
        let offset = Self::bar_offset(index);
        // Address bits below the size read as zero: that is how software learns the size (PCI 3.0 §6.2.5.1).
        let address = !(size - 1);
        let low = (address as u32) & !flag_mask | if rom { bar::ROM_ENABLE } else { 0 };
        self.set_u32(offset, flags);
        self.set_writable(offset, &low.to_le_bytes());
        if wide {
            self.set_writable(offset + 4, &((address >> 32) as u32).to_le_bytes());
        }
        self.bars[index] = Some(spec);
        Ok(())
    }

    fn bar_offset(index: usize) -> usize {
        if index == ROM_BAR { bits::EXPANSION_ROM } else { bits::BAR0 + 4 * index }
    }

    /// The declared BARs.
    pub fn bars(&self) -> impl Iterator<Item = BarSpec> + '_ {
        self.bars.iter().flatten().copied()
    }

    /// Gives a BAR an address, as firmware would.
    pub fn set_bar_base(&mut self, index: usize, base: u64) {
        if let Some(Some(spec)) = self.bars.get(index).copied() {
            let base = base & !(spec.size - 1);
            let offset = Self::bar_offset(index);
            let flags = self.u32(offset) & if spec.kind.is_io() { bar::IO_FLAGS } else { bar::MEMORY_FLAGS };
            self.set_u32(offset, base as u32 | flags);
            if matches!(spec.kind, BarKind::Memory64 { .. }) {
                self.set_u32(offset + 4, (base >> 32) as u32);
            }
        }
    }

    /// The address in a BAR, whether or not it is enabled.
    pub fn bar_base(&self, index: usize) -> Option<u64> {
        let spec = (*self.bars.get(index)?)?;
        let offset = Self::bar_offset(index);
        let low = u64::from(self.u32(offset));
        let value = match spec.kind {
            BarKind::Memory64 { .. } => low | u64::from(self.u32(offset + 4)) << 32,
            _ => low,
        };
        Some(value & !(spec.size - 1))
    }

    /// The BARs that answer at present: their space is enabled and their address lies inside it.
    pub fn decoded(&self) -> Vec<DecodedBar> {
        let enabled = self.command();
        self.bars()
            .filter_map(|spec| {
                let (space, limit) = match spec.kind {
                    BarKind::Io => (command::IO_SPACE, 1 << 16),
                    BarKind::Memory64 { .. } => (command::MEMORY_SPACE, u64::MAX),
                    _ => (command::MEMORY_SPACE, 1 << 32),
                };
                let rom_off =
                    spec.kind == BarKind::Rom && self.u32(bits::EXPANSION_ROM) & bar::ROM_ENABLE == 0;
                let base = self.bar_base(spec.index)?;
                let fits = base.checked_add(spec.size).is_some_and(|end| end <= limit);
                // Address zero means "not assigned": a PC has its interrupt vectors and DMA chip there.
                (enabled & space != 0 && !rom_off && fits && base != 0).then_some(DecodedBar { spec, base })
            })
            .collect()
    }

    /// Appends a capability: `body` follows the two header bytes, `writable` says which of its bits software can
    /// change. Returns where the capability starts.
    ///
    /// # Errors
    /// Configuration space is full.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<usize, ConfigError> {
        let offset = self.next_capability;
        let end = offset + 2 + body.len();
        if end > bits::CONFIG_BYTES {
            return Err(ConfigError::CapabilitySpace { id, len: 2 + body.len() });
        }
        self.set_u8(self.last_pointer, offset as u8);
        self.set_u8(offset, id);
        self.set_u8(offset + 1, 0);
        self.bytes[offset + 2..end].copy_from_slice(body);
        self.set_writable(offset + 2, &writable[..writable.len().min(body.len())]);
        self.last_pointer = offset + 1;
        self.next_capability = end.next_multiple_of(4);
        self.set_u16(bits::STATUS, self.u16(bits::STATUS) | status::CAPABILITIES);
        Ok(offset)
    }

    /// Where the first capability with this ID starts.
    pub fn capability(&self, id: u8) -> Option<usize> {
        let next =
            |at: usize| Some(usize::from(self.u8(at))).filter(|next| *next >= bits::CAPABILITIES_START);
        // The list is of our own making: it goes forward and ends.
        std::iter::successors(next(bits::CAPABILITIES_POINTER), |at| next(at + 1))
            .find(|at| self.u8(*at) == id)
    }

    /// Appends the MSI capability, for messages with up to `vectors` vectors.
    ///
    /// # Errors
    /// Configuration space is full.
    ///
    /// # Panics
    /// If that is no power of two up to [`bits::msi::MAX_VECTORS`].
    pub fn add_msi_capability(&mut self, vectors: u16) -> Result<usize, ConfigError> {
        use bits::msi;
        assert!(vectors.is_power_of_two() && vectors <= msi::MAX_VECTORS, "{vectors} MSI vectors");
        let mut body = [0; msi::BYTES - 2];
        let control = msi::ADDRESS_64 | (vectors.ilog2() as u16) << msi::CAPABLE_SHIFT;
        body[..2].copy_from_slice(&control.to_le_bytes());
        let mut writable = [0xff; msi::BYTES - 2];
        writable[..2].copy_from_slice(&(msi::ENABLE | msi::ENABLED_MASK).to_le_bytes());
        // Messages are double words.
        writable[msi::ADDRESS - 2] = 0xfc;
        self.add_capability(capability::MSI, &body, &writable)
    }

    /// Appends the MSI-X capability, with its table and pending bits at offsets (multiples of 8) of a BAR.
    ///
    /// # Errors
    /// Configuration space is full.
    ///
    /// # Panics
    /// If there are no vectors or more than [`bits::msix::MAX_VECTORS`].
    pub fn add_msix_capability(
        &mut self,
        vectors: u16,
        bar: usize,
        table: u32,
        pending: u32,
    ) -> Result<usize, ConfigError> {
        use bits::msix;
        assert!((1..=msix::MAX_VECTORS).contains(&vectors), "{vectors} MSI-X vectors");
        let mut body = [0; msix::BYTES - 2];
        body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
        body[msix::TABLE - 2..][..4].copy_from_slice(&(table | bar as u32).to_le_bytes());
        body[msix::PENDING - 2..][..4].copy_from_slice(&(pending | bar as u32).to_le_bytes());
        let writable = (msix::ENABLE | msix::FUNCTION_MASK).to_le_bytes();
        self.add_capability(capability::MSIX, &body, &writable)
    }

    /// Appends the PCI Express capability, by which software knows that the function has extended configuration space.
    ///
    /// # Errors
    /// Configuration space is full.
    pub fn add_express_capability(&mut self, port_type: u16) -> Result<usize, ConfigError> {
        let mut body = [0; bits::express::BYTES - 2];
        let capabilities = bits::express::VERSION | port_type << bits::express::PORT_TYPE_SHIFT;
        body[..2].copy_from_slice(&capabilities.to_le_bytes());
        if port_type != bits::express::ROOT_COMPLEX_ENDPOINT {
            // Link capabilities and status: 2.5 GT/s, one lane.
            body[0x0a..0x0c].copy_from_slice(&0x0011u16.to_le_bytes());
            body[0x10..0x12].copy_from_slice(&0x0011u16.to_le_bytes());
        }
        self.add_capability(capability::EXPRESS, &body, &[])
    }

    /// Software reads. Bytes past the standard space are zero: no extended capability.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset.saturating_add(i)).copied().unwrap_or(0);
        }
    }

    /// Software writes: only writable bits change.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (i, value) in data.iter().enumerate() {
            let at = offset.saturating_add(i);
            let Some(old) = self.bytes.get(at).copied() else { break };
            let kept = old & !self.writable[at] & !(value & self.write_one_clears[at]);
            self.bytes[at] = kept | value & self.writable[at];
        }
    }

    /// The contents, for a snapshot.
    pub fn save(&self) -> ConfigState {
        ConfigState { bytes: self.bytes.to_vec() }
    }

    /// Puts saved contents back. Bits that neither software nor the device changes must be the same as here: they say
    /// whether this is the same device. `volatile` lists bytes the device itself changes.
    ///
    /// # Errors
    /// The state is of another device.
    pub fn restore(&mut self, state: &ConfigState, volatile: &[usize]) -> Result<(), SnapshotError> {
        let bytes: [u8; bits::CONFIG_BYTES] = state.bytes.as_slice().try_into().map_err(|_| {
            SnapshotError::Invalid(format!("configuration space of {} bytes", state.bytes.len()))
        })?;
        for (at, (new, old)) in bytes.iter().zip(self.bytes).enumerate() {
            let free = self.writable[at] | self.write_one_clears[at];
            let driven = volatile.contains(&at) || at == bits::STATUS || at == bits::INTERRUPT_LINE;
            if (new ^ old) & !free != 0 && !driven {
                return Err(SnapshotError::Invalid(format!(
                    "configuration byte {at:#x} is {new:#x}, this device has {old:#x}"
                )));
            }
        }
        self.bytes = bytes;
        Ok(())
    }
}
