//! Registers and memory structures of an AHCI host bus adapter (Serial ATA AHCI 1.3.1 §3, §4) and the frames it exchanges with
//! devices (Serial ATA 3.1 §10.5). Offsets are in bytes.

/// Host capabilities (§3.1.1).
pub const CAP: u32 = 0x00;
/// Global host control (§3.1.2).
pub const GHC: u32 = 0x04;
/// Interrupt status, one bit a port (§3.1.3).
pub const IS: u32 = 0x08;
/// Ports implemented, one bit a port (§3.1.4).
pub const PI: u32 = 0x0c;
/// Version (§3.1.5).
pub const VS: u32 = 0x10;
/// Host capabilities extended (§3.1.10).
pub const CAP2: u32 = 0x24;
/// First port's registers (§3.3).
pub const PORTS: u32 = 0x100;
/// Distance between ports.
pub const PORT_STRIDE: u32 = 0x80;
/// The most ports.
pub const MAX_PORTS: usize = 32;
/// Command slots of a port.
pub const SLOTS: u8 = 32;
/// Version 1.3.1.
pub const VERSION: u32 = 0x0001_0301;

/// Host capabilities.
pub mod cap {
    /// Position of the number of command slots less one.
    pub const SLOTS_SHIFT: u32 = 8;
    /// PIO commands may transfer several blocks in one data phase.
    pub const PMD: u32 = 1 << 15;
    /// There is no interface but AHCI.
    pub const SAM: u32 = 1 << 18;
    /// Position of the highest link speed.
    pub const SPEED_SHIFT: u32 = 20;
    /// Command list override.
    pub const SCLO: u32 = 1 << 24;
    /// Native command queueing.
    pub const SNCQ: u32 = 1 << 30;
    /// 64-bit addresses.
    pub const S64A: u32 = 1 << 31;
}

/// Global host control.
pub mod ghc {
    /// Reset; reads as set until it has been done.
    pub const HR: u32 = 1 << 0;
    /// Interrupts.
    pub const IE: u32 = 1 << 1;
    /// AHCI mode; always, since [`super::cap::SAM`].
    pub const AE: u32 = 1 << 31;
}

/// Registers of a port: offsets in its range (§3.3).
pub mod port {
    /// Command list base, low and high half.
    pub const CLB: u32 = 0x00;
    pub const CLBU: u32 = 0x04;
    /// Received frames base, low and high half.
    pub const FB: u32 = 0x08;
    pub const FBU: u32 = 0x0c;
    /// Interrupt status.
    pub const IS: u32 = 0x10;
    /// Interrupt enable.
    pub const IE: u32 = 0x14;
    /// Command and status.
    pub const CMD: u32 = 0x18;
    /// Task file data: status in bits 7:0, error in bits 15:8.
    pub const TFD: u32 = 0x20;
    /// Signature.
    pub const SIG: u32 = 0x24;
    /// SATA status (SCR0).
    pub const SSTS: u32 = 0x28;
    /// SATA control (SCR2).
    pub const SCTL: u32 = 0x2c;
    /// SATA error (SCR1).
    pub const SERR: u32 = 0x30;
    /// SATA active (SCR3): queued commands.
    pub const SACT: u32 = 0x34;
    /// Command issue.
    pub const CI: u32 = 0x38;

    /// Bits of the command list base that are address: it is aligned to 1 KiB.
    pub const CLB_MASK: u32 = !0x3ff;
    /// Bits of the received frames base that are address: it is aligned to 256 bytes.
    pub const FB_MASK: u32 = !0xff;
}

/// Port interrupt status and enable (§3.3.5, §3.3.6).
pub mod interrupt {
    /// A device to host register frame with its interrupt bit.
    pub const DHRS: u32 = 1 << 0;
    /// A PIO setup frame with its interrupt bit, and its data is there.
    pub const PSS: u32 = 1 << 1;
    /// A set device bits frame with its interrupt bit.
    pub const SDBS: u32 = 1 << 3;
    /// A region of the PRD table with its interrupt bit has been transferred.
    pub const DPS: u32 = 1 << 5;
    /// The link came up; shows [`super::serr::X`].
    pub const PCS: u32 = 1 << 6;
    /// The link's readiness changed; shows [`super::serr::N`].
    pub const PRCS: u32 = 1 << 22;
    /// More data than the PRD table has room for.
    pub const OFS: u32 = 1 << 24;
    /// A frame could not be exchanged; the port has stopped.
    pub const IFS: u32 = 1 << 27;
    /// Memory could not be accessed; the port has stopped.
    pub const HBFS: u32 = 1 << 29;
    /// The device reported an error; the port has stopped.
    pub const TFES: u32 = 1 << 30;
    /// Bits that a port can ever set by itself.
    pub const LATCHED: u32 = DHRS | PSS | SDBS | DPS | OFS | IFS | HBFS | TFES;
    /// Bits that can be enabled (§3.3.6).
    pub const ENABLES: u32 = 0xfdc0_00ff;
}

/// Port command and status (§3.3.7).
pub mod cmd {
    /// Commands are processed.
    pub const ST: u32 = 1 << 0;
    /// The device is spun up; always, without staggered spin-up.
    pub const SUD: u32 = 1 << 1;
    /// The device has power; always.
    pub const POD: u32 = 1 << 2;
    /// Clears BSY and DRQ of the task file.
    pub const CLO: u32 = 1 << 3;
    /// Received frames go to memory.
    pub const FRE: u32 = 1 << 4;
    /// Position of the current command slot.
    pub const CCS_SHIFT: u32 = 8;
    /// Frames are being received.
    pub const FR: u32 = 1 << 14;
    /// The command list is running.
    pub const CR: u32 = 1 << 15;
    /// The device is ATAPI: only for the activity light.
    pub const ATAPI: u32 = 1 << 24;
    /// The activity light shows ATAPI commands too.
    pub const DLAE: u32 = 1 << 25;
    /// What stays as software writes it.
    pub const WRITABLE: u32 = ST | FRE | ATAPI | DLAE;
}

/// SATA control (§3.3.11).
pub mod sctl {
    /// Device detection.
    pub const DET: u32 = 0xf;
    /// Detection: COMRESET is sent for as long as this is set.
    pub const DET_RESET: u32 = 1;
    /// Detection: the link is off.
    pub const DET_OFF: u32 = 4;
    /// Position of the highest speed allowed; 0 for any.
    pub const SPEED_SHIFT: u32 = 4;
    /// Bits that exist: DET, SPD, IPM.
    pub const WRITABLE: u32 = 0xfff;
}

/// SATA status (§3.3.10).
pub mod ssts {
    /// Detection: a device is there and can be talked to.
    pub const DET_READY: u32 = 3;
    /// Detection: the link is off.
    pub const DET_OFF: u32 = 4;
    /// Position of the speed.
    pub const SPEED_SHIFT: u32 = 4;
    /// 6 Gbit/s.
    pub const SPEED_GEN3: u32 = 3;
    /// The link is active.
    pub const IPM_ACTIVE: u32 = 1 << 8;
}

/// SATA error (§3.3.12).
pub mod serr {
    /// The link's readiness changed.
    pub const N: u32 = 1 << 16;
    /// A device was connected.
    pub const X: u32 = 1 << 26;
}

/// Command header (§4.2.2).
pub mod header {
    /// Bytes of a header.
    pub const BYTES: u64 = 32;
    /// Length of the command frame in dwords.
    pub const CFL: u32 = 0x1f;
    /// BSY is cleared as soon as the frame has been sent.
    pub const CLEAR_BUSY: u32 = 1 << 10;
    /// Position of the number of PRD entries.
    pub const PRDTL_SHIFT: u32 = 16;
    /// Offset of the count of bytes transferred.
    pub const PRDBC: u64 = 4;
    /// Bits of the command table base that are address: it is aligned to 128 bytes.
    pub const CTBA_MASK: u64 = !0x7f;
}

/// Command table (§4.2.3).
pub mod table {
    /// Command frame.
    pub const CFIS_BYTES: usize = 64;
    /// ATAPI packet.
    pub const ACMD: u64 = 0x40;
    pub const ACMD_BYTES: usize = 16;
    /// First PRD entry.
    pub const PRDT: u64 = 0x80;
    /// Bytes of a PRD entry: address (8), reserved (4), count less one and interrupt bit (4).
    pub const PRD_BYTES: usize = 16;
    /// Bits of a PRD entry's last dword that are its byte count less one.
    pub const PRD_COUNT: u32 = 0x3f_ffff;
    /// An interrupt is wanted when the region has been transferred.
    pub const PRD_INTERRUPT: u32 = 1 << 31;
}

/// Received frames: offsets in the area at [`port::FB`] (§4.2.1).
pub mod received {
    pub const DMA_SETUP: u64 = 0x00;
    pub const PIO_SETUP: u64 = 0x20;
    pub const D2H: u64 = 0x40;
    pub const SET_DEVICE_BITS: u64 = 0x58;
}

/// Frames (SATA 3.1 §10.5).
pub mod fis {
    /// Register, host to device.
    pub const H2D: u8 = 0x27;
    /// Register, device to host.
    pub const D2H: u8 = 0x34;
    pub const DMA_SETUP: u8 = 0x41;
    pub const PIO_SETUP: u8 = 0x5f;
    pub const SET_DEVICE_BITS: u8 = 0xa1;
    /// Second byte of a host to device frame: it carries a command, not device control.
    pub const COMMAND: u8 = 1 << 7;
    /// Second byte of a device to host frame: it asks for an interrupt.
    pub const INTERRUPT: u8 = 1 << 6;
    /// Second byte of a setup frame: data goes to the host.
    pub const TO_HOST: u8 = 1 << 5;
    /// Dwords of a register frame.
    pub const REGISTER_DWORDS: u32 = 5;
}
