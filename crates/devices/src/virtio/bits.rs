//! Registers and bits of virtio devices (Virtual I/O Device (VIRTIO) Version 1.2; sections in brackets).

/// PCI vendor of every virtio device (§4.1.2).
pub const VENDOR: u16 = 0x1af4;
/// Device IDs of transitional devices start here (§4.1.2.1), in an order of their own.
pub const TRANSITIONAL_DEVICE_BASE: u16 = 0x1000;

/// Device types (§5).
pub mod device_type {
    /// Network card.
    pub const NET: u16 = 1;
    /// Block device.
    pub const BLOCK: u16 = 2;
    /// Console.
    pub const CONSOLE: u16 = 3;
    /// Entropy source.
    pub const ENTROPY: u16 = 4;
    /// SCSI host.
    pub const SCSI: u16 = 8;
    /// 9P transport.
    pub const NINE_P: u16 = 9;
    /// Input device.
    pub const INPUT: u16 = 18;
}

/// Device status (§2.1).
pub mod status {
    /// The driver has found the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver can drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Features are negotiated.
    pub const FEATURES_OK: u8 = 8;
    /// The device cannot go on.
    pub const DEVICE_NEEDS_RESET: u8 = 64;
    /// The driver has given up.
    pub const FAILED: u8 = 128;
}

/// Features that are not of one device type (§6).
pub mod feature {
    /// Legacy: any arrangement of buffers into descriptors.
    pub const ANY_LAYOUT: u64 = 1 << 27;
    /// Tables of descriptors.
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// Each side says from which entry on it wants to be notified.
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// Not a legacy driver.
    pub const VERSION_1: u64 = 1 << 32;
    /// Packed rings.
    pub const RING_PACKED: u64 = 1 << 34;
    /// Queues can be reset one by one.
    pub const RING_RESET: u64 = 1 << 40;
    /// What a legacy driver can see.
    pub const LEGACY: u64 = u32::MAX as u64;
}

/// Descriptors of both rings (§2.7.5, §2.8.1).
pub mod descriptor {
    /// Bytes.
    pub const BYTES: u64 = 16;
    /// Another descriptor belongs to the buffer.
    pub const NEXT: u16 = 1;
    /// The device writes.
    pub const WRITE: u16 = 2;
    /// A table of descriptors.
    pub const INDIRECT: u16 = 4;
    /// Packed: made available, if it is as the driver's wrap counter.
    pub const AVAIL: u16 = 1 << 7;
    /// Packed: used, if it is as the device's wrap counter.
    pub const USED: u16 = 1 << 15;
}

/// Split rings (§2.7).
pub mod split {
    /// Available ring: flags, index, entries; then `used_event`.
    pub const AVAIL_INDEX: u64 = 2;
    /// First entry of the available ring.
    pub const AVAIL_RING: u64 = 4;
    /// Flag of the available ring: no interrupts, please.
    pub const AVAIL_NO_INTERRUPT: u16 = 1;
    /// Used ring: flags, index, entries; then `avail_event`.
    pub const USED_INDEX: u64 = 2;
    /// First entry of the used ring.
    pub const USED_RING: u64 = 4;
    /// Flag of the used ring: no notifications, please.
    pub const USED_NO_NOTIFY: u16 = 1;
}

/// Event suppression structures of packed rings (§2.8.14): position and wrap counter, then flags.
pub mod suppression {
    /// Offset of the flags.
    pub const FLAGS: u64 = 2;
    /// Notify of everything.
    pub const ENABLE: u16 = 0;
    /// Notify of nothing.
    pub const DISABLE: u16 = 1;
    /// Notify of one position.
    pub const POSITION: u16 = 2;
    /// The wrap counter in the position.
    pub const WRAP: u16 = 1 << 15;
}

/// Vendor capabilities that say where a structure is (§4.1.4).
pub mod capability {
    /// Common configuration.
    pub const COMMON: u8 = 1;
    /// Notifications.
    pub const NOTIFY: u8 = 2;
    /// Interrupt status.
    pub const ISR: u8 = 3;
    /// The device's configuration.
    pub const DEVICE: u8 = 4;
    /// Access through configuration space.
    pub const PCI: u8 = 5;
    /// Bytes of `virtio_pci_cap`; offset of what follows it.
    pub const BYTES: usize = 16;
}

/// Common configuration (§4.1.4.3): offsets.
#[allow(missing_docs)]
pub mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURE: u64 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0c;
    pub const CONFIG_MSIX_VECTOR: u64 = 0x10;
    pub const NUM_QUEUES: u64 = 0x12;
    pub const DEVICE_STATUS: u64 = 0x14;
    pub const CONFIG_GENERATION: u64 = 0x15;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
    pub const QUEUE_NOTIFY_DATA: u64 = 0x38;
    pub const QUEUE_RESET: u64 = 0x3a;
    pub const BYTES: u64 = 0x40;
}

/// Registers of the legacy interface (§4.1.4.10): offsets.
#[allow(missing_docs)]
pub mod legacy {
    pub const DEVICE_FEATURES: u64 = 0x00;
    pub const DRIVER_FEATURES: u64 = 0x04;
    pub const QUEUE_ADDRESS: u64 = 0x08;
    pub const QUEUE_SIZE: u64 = 0x0c;
    pub const QUEUE_SELECT: u64 = 0x0e;
    pub const QUEUE_NOTIFY: u64 = 0x10;
    pub const DEVICE_STATUS: u64 = 0x12;
    pub const ISR: u64 = 0x13;
    /// Only there while MSI-X is enabled.
    pub const CONFIG_MSIX_VECTOR: u64 = 0x14;
    /// Only there while MSI-X is enabled.
    pub const QUEUE_MSIX_VECTOR: u64 = 0x16;
    /// Alignment of the used ring, and unit of the queue address.
    pub const PAGE: u64 = 4096;
}

/// Interrupt status (§4.1.4.5).
pub mod isr {
    /// A queue has used buffers.
    pub const QUEUE: u8 = 1;
    /// The device's configuration has changed.
    pub const CONFIG: u8 = 2;
}

/// Not a vector.
pub const NO_VECTOR: u16 = 0xffff;
