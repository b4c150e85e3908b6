//! Configuration space of a PCI function (PCI Local Bus 3.0 §6.1, §6.2; PCI Code and ID Assignment 1.11).

/// Bytes of configuration space that mechanism #1 reaches.
pub const CONFIG_BYTES: usize = 256;
/// Bytes of configuration space that ECAM reaches (PCI Express 4.0 §7.2.2).
pub const EXTENDED_CONFIG_BYTES: u64 = 4096;

/// Vendor ID, 2 bytes.
pub const VENDOR_ID: usize = 0x00;
/// Device ID, 2 bytes.
pub const DEVICE_ID: usize = 0x02;
/// Command, 2 bytes.
pub const COMMAND: usize = 0x04;
/// Status, 2 bytes.
pub const STATUS: usize = 0x06;
/// Revision.
pub const REVISION_ID: usize = 0x08;
/// Programming interface, subclass, class: 3 bytes from here.
pub const PROGRAMMING_INTERFACE: usize = 0x09;
/// Subclass.
pub const SUBCLASS: usize = 0x0a;
/// Base class.
pub const BASE_CLASS: usize = 0x0b;
/// Cache line size.
pub const CACHE_LINE_SIZE: usize = 0x0c;
/// Latency timer.
pub const LATENCY_TIMER: usize = 0x0d;
/// Header type.
pub const HEADER_TYPE: usize = 0x0e;
/// Built-in self test.
pub const BIST: usize = 0x0f;
/// First of six base address registers, 4 bytes each.
pub const BAR0: usize = 0x10;
/// Subsystem vendor ID, 2 bytes.
pub const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
/// Subsystem ID, 2 bytes.
pub const SUBSYSTEM_ID: usize = 0x2e;
/// Expansion ROM base address, 4 bytes.
pub const EXPANSION_ROM: usize = 0x30;
/// Offset of the first capability.
pub const CAPABILITIES_POINTER: usize = 0x34;
/// Scratch byte in which firmware leaves the interrupt number.
pub const INTERRUPT_LINE: usize = 0x3c;
/// INTx pin: 0 none, 1 to 4 for A to D.
pub const INTERRUPT_PIN: usize = 0x3d;
/// First byte after the standard header, where capabilities may live.
pub const CAPABILITIES_START: usize = 0x40;

/// Command register.
pub mod command {
    /// Answers port accesses.
    pub const IO_SPACE: u16 = 1 << 0;
    /// Answers memory accesses.
    pub const MEMORY_SPACE: u16 = 1 << 1;
    /// May access memory on its own.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// Reports parity errors.
    pub const PARITY_ERROR: u16 = 1 << 6;
    /// Drives SERR#.
    pub const SERR: u16 = 1 << 8;
    /// Must not assert INTx.
    pub const INTX_DISABLE: u16 = 1 << 10;
    /// Bits software can change.
    pub const WRITABLE: u16 = IO_SPACE | MEMORY_SPACE | BUS_MASTER | PARITY_ERROR | SERR | INTX_DISABLE;
}

/// Status register.
pub mod status {
    /// INTx is pending inside the function, whether or not it is enabled.
    pub const INTERRUPT: u16 = 1 << 3;
    /// There is a list of capabilities.
    pub const CAPABILITIES: u16 = 1 << 4;
    /// Error bits that are cleared by writing ones.
    pub const WRITE_ONE_CLEARS: u16 = 0xf900;
}

/// Header type register.
pub mod header_type {
    /// The device has several functions.
    pub const MULTI_FUNCTION: u8 = 1 << 7;
}

/// Base address registers.
pub mod bar {
    /// Set in an I/O BAR.
    pub const IO: u32 = 1 << 0;
    /// Type bits of a 64-bit memory BAR.
    pub const MEMORY_64: u32 = 1 << 2;
    /// Reads have no side effects.
    pub const PREFETCHABLE: u32 = 1 << 3;
    /// Bits of an I/O BAR that are not address.
    pub const IO_FLAGS: u32 = 0x3;
    /// Bits of a memory BAR that are not address.
    pub const MEMORY_FLAGS: u32 = 0xf;
    /// Decode enable of the expansion ROM register.
    pub const ROM_ENABLE: u32 = 1 << 0;
    /// Bits of the expansion ROM register that are not address.
    pub const ROM_FLAGS: u32 = 0x7ff;
}

/// Capability IDs.
pub mod capability {
    /// Message signalled interrupts.
    pub const MSI: u8 = 0x05;
    /// Vendor specific.
    pub const VENDOR: u8 = 0x09;
    /// PCI Express.
    pub const EXPRESS: u8 = 0x10;
    /// MSI-X.
    pub const MSIX: u8 = 0x11;
}

/// Class codes: base class, subclass, programming interface.
pub mod class {
    /// AHCI host bus adapter.
    pub const SATA_AHCI: (u8, u8, u8) = (0x01, 0x06, 0x01);
    /// Mass storage of no particular kind.
    pub const STORAGE: (u8, u8, u8) = (0x01, 0x00, 0x00);
    /// NVM Express I/O controller.
    pub const NVME: (u8, u8, u8) = (0x01, 0x08, 0x02);
    /// Host bridge.
    pub const HOST_BRIDGE: (u8, u8, u8) = (0x06, 0x00, 0x00);
    /// ISA bridge.
    pub const ISA_BRIDGE: (u8, u8, u8) = (0x06, 0x01, 0x00);
}

/// Mechanism #1 (PCI 3.0 §3.2.2.3.2).
pub mod mechanism1 {
    /// CONFIG_ADDRESS; CONFIG_DATA is four ports further.
    pub const BASE: u16 = 0xcf8;
    /// Ports of the mechanism.
    pub const PORTS: u16 = 8;
    /// Offset of CONFIG_DATA.
    pub const DATA: u16 = 4;
    /// Accesses to CONFIG_DATA are configuration cycles.
    pub const ENABLE: u32 = 1 << 31;
    /// Bits of CONFIG_ADDRESS that exist.
    pub const ADDRESS_MASK: u32 = 0x80ff_fffc;
}

/// Capability structure for PCI Express (PCI Express 4.0 §7.5.3), body after the two-byte header.
pub mod express {
    /// Version 2 of the structure.
    pub const VERSION: u16 = 2;
    /// Position of the port type in the capabilities register.
    pub const PORT_TYPE_SHIFT: u16 = 4;
    /// Root port of a root complex.
    pub const ROOT_PORT: u16 = 4;
    /// Endpoint integrated in a root complex.
    pub const ROOT_COMPLEX_ENDPOINT: u16 = 9;
    /// Bytes of the structure, header included.
    pub const BYTES: usize = 0x3c;
}

/// Capability structure for MSI (PCI 3.0 §6.8.1): offsets from its start, 64-bit form.
pub mod msi {
    /// Message control, 2 bytes.
    pub const CONTROL: usize = 0x02;
    /// Message address, 8 bytes.
    pub const ADDRESS: usize = 0x04;
    /// Message data, 2 bytes.
    pub const DATA: usize = 0x0c;
    /// Bytes of the structure.
    pub const BYTES: usize = 0x0e;
    /// Control: messages are sent instead of INTx.
    pub const ENABLE: u16 = 1 << 0;
    /// Control: position of the logarithm of the number of vectors the function asks for.
    pub const CAPABLE_SHIFT: u16 = 1;
    /// Control: position of the logarithm of the number software allows.
    pub const ENABLED_SHIFT: u16 = 4;
    /// Control: the bits of that number.
    pub const ENABLED_MASK: u16 = 7 << ENABLED_SHIFT;
    /// Control: the address has 64 bits.
    pub const ADDRESS_64: u16 = 1 << 7;
    /// The most vectors.
    pub const MAX_VECTORS: u16 = 32;
}

/// Capability structure for MSI-X and its table (PCI 3.0 §6.8.2).
pub mod msix {
    /// Message control, 2 bytes.
    pub const CONTROL: usize = 0x02;
    /// Table offset and BAR number, 4 bytes.
    pub const TABLE: usize = 0x04;
    /// Offset and BAR number of the pending bits, 4 bytes.
    pub const PENDING: usize = 0x08;
    /// Bytes of the structure.
    pub const BYTES: usize = 0x0c;
    /// Control: messages are sent instead of INTx.
    pub const ENABLE: u16 = 1 << 15;
    /// Control: every vector is masked.
    pub const FUNCTION_MASK: u16 = 1 << 14;
    /// Control: bits that hold the number of vectors less one.
    pub const SIZE_MASK: u16 = 0x7ff;
    /// Bytes of a table entry: address (8), data (4), vector control (4).
    pub const ENTRY_BYTES: usize = 16;
    /// Vector control: masked.
    pub const MASKED: u32 = 1 << 0;
    /// The most vectors.
    pub const MAX_VECTORS: u16 = 2048;
}
