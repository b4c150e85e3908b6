//! Interrupt messages: what travels between IOAPIC, devices and LAPICs, and which LAPICs a message is for
//! (SDM 3A §10.6.2 "Determining IPI Destination", §10.11 "Message Signalled Interrupts", §10.12.10 for x2APIC).

use engine::{MsiMessage, VcpuId};

/// Delivery mode field of the ICR, the LVT, the redirection table and MSI data (SDM 3A §10.5.1, §10.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    /// Deliver the vector to every addressed processor.
    Fixed,
    /// Deliver the vector to the addressed processor that runs at the lowest priority.
    LowestPriority,
    /// System management interrupt. There is no SMM here: such messages are dropped.
    Smi,
    /// Non-maskable interrupt; the vector is ignored.
    Nmi,
    /// INIT.
    Init,
    /// Start-up IPI; the vector is the page number of the entry point. Only from the ICR.
    StartUp,
    /// The vector comes from the 8259 pair.
    ExtInt,
    /// Encoding 011, which nothing defines.
    Reserved,
}

impl DeliveryMode {
    /// Decodes the three-bit field.
    pub fn from_bits(bits: u32) -> Self {
        match bits & 7 {
            0 => DeliveryMode::Fixed,
            1 => DeliveryMode::LowestPriority,
            2 => DeliveryMode::Smi,
            4 => DeliveryMode::Nmi,
            5 => DeliveryMode::Init,
            6 => DeliveryMode::StartUp,
            7 => DeliveryMode::ExtInt,
            _ => DeliveryMode::Reserved,
        }
    }
}

/// Which processors a message addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// By APIC ID; [`BROADCAST`] is everyone.
    Physical(u32),
    /// By logical destination from a source with an 8-bit field: matched against LDR under the DFR's model, or,
    /// in x2APIC mode, against the low bits of cluster 0. [`BROADCAST`] is everyone.
    Logical8(u32),
    /// By x2APIC logical destination: cluster in bits 31:16, members in bits 15:0.
    Logical32(u32),
    /// Shorthand.
    Everyone,
    /// Shorthand.
    EveryoneBut(VcpuId),
    /// Shorthand "self".
    Only(VcpuId),
}

/// The destination that stands for every processor, once widened to 32 bits.
pub const BROADCAST: u32 = u32::MAX;

impl Destination {
    /// From an 8-bit destination field (IOAPIC, MSI, xAPIC ICR).
    pub fn from_8bit(id: u8, logical: bool) -> Self {
        let id = if id == 0xff { BROADCAST } else { u32::from(id) };
        if logical { Destination::Logical8(id) } else { Destination::Physical(id) }
    }

    /// From the 32-bit destination field of the x2APIC ICR.
    pub fn from_32bit(id: u32, logical: bool) -> Self {
        if logical { Destination::Logical32(id) } else { Destination::Physical(id) }
    }
}

/// One interrupt message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Vector, or page of a start-up IPI.
    pub vector: u8,
    /// How it is delivered.
    pub mode: DeliveryMode,
    /// Level-triggered: the EOI is to be told to the IOAPIC.
    pub level: bool,
    /// For whom.
    pub destination: Destination,
}

impl Message {
    /// Decodes an MSI; `None` for a write outside the interrupt window, a level de-assertion, or a delivery mode
    /// that MSIs do not have.
    ///
    /// The redirection hint turns a fixed message to a logical group into a lowest-priority one; without the
    /// hint the destination mode is honoured all the same, which is what processors do and systems rely on.
    pub fn from_msi(msi: MsiMessage) -> Option<Self> {
        const WINDOW: u64 = 0xfee;
        const DESTINATION_LOGICAL: u64 = 1 << 2;
        const REDIRECTION_HINT: u64 = 1 << 3;
        const LEVEL_ASSERT: u32 = 1 << 14;
        const LEVEL_TRIGGERED: u32 = 1 << 15;
        if msi.address >> 20 != WINDOW {
            return None;
        }
        let logical = msi.address & DESTINATION_LOGICAL != 0;
        let level = msi.data & LEVEL_TRIGGERED != 0;
        if level && msi.data & LEVEL_ASSERT == 0 {
            return None;
        }
        let mode = match DeliveryMode::from_bits(msi.data >> 8) {
            DeliveryMode::Fixed if logical && msi.address & REDIRECTION_HINT != 0 => {
                DeliveryMode::LowestPriority
            }
            DeliveryMode::StartUp | DeliveryMode::Reserved => return None,
            mode => mode,
        };
        Some(Message {
            vector: msi.data as u8,
            mode,
            level,
            destination: Destination::from_8bit((msi.address >> 12) as u8, logical),
        })
    }
}

/// What of a LAPIC decides whether a message is for it; small enough to be read without its lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// APIC ID.
    pub id: u32,
    /// Enabled by IA32_APIC_BASE.
    pub present: bool,
    /// In x2APIC mode.
    pub x2apic: bool,
    /// Enabled by the spurious-vector register: takes fixed interrupts.
    pub accepts: bool,
    /// DFR selects the flat model (else cluster).
    pub flat: bool,
    /// Logical ID of xAPIC mode.
    pub logical_id: u8,
}

impl Address {
    /// Packs into an integer for an atomic.
    pub fn pack(self) -> u64 {
        u64::from(self.present)
            | u64::from(self.x2apic) << 1
            | u64::from(self.accepts) << 2
            | u64::from(self.flat) << 3
            | u64::from(self.logical_id) << 8
            | u64::from(self.id) << 32
    }

    /// Undoes [`Address::pack`].
    pub fn unpack(bits: u64) -> Self {
        Address {
            id: (bits >> 32) as u32,
            present: bits & 1 != 0,
            x2apic: bits & 2 != 0,
            accepts: bits & 4 != 0,
            flat: bits & 8 != 0,
            logical_id: (bits >> 8) as u8,
        }
    }

    /// Whether `destination` includes this LAPIC, which is vCPU `vcpu`'s.
    pub fn matches(self, vcpu: VcpuId, destination: Destination) -> bool {
        if !self.present {
            return false;
        }
        match destination {
            Destination::Everyone | Destination::Physical(BROADCAST) => true,
            Destination::EveryoneBut(sender) => vcpu != sender,
            Destination::Only(target) => vcpu == target,
            Destination::Physical(id) => self.id == id,
            Destination::Logical8(BROADCAST) | Destination::Logical32(BROADCAST) => true,
            Destination::Logical8(mda) | Destination::Logical32(mda) if self.x2apic => {
                let own = x2apic_logical_id(self.id);
                own >> 16 == mda >> 16 && own & mda & 0xffff != 0
            }
            Destination::Logical8(mda) if self.flat => u32::from(self.logical_id) & mda != 0,
            Destination::Logical8(mda) => {
                let own = u32::from(self.logical_id);
                (mda >> 4 == 0xf || own >> 4 == mda >> 4) && own & mda & 0xf != 0
            }
            Destination::Logical32(_) => false,
        }
    }
}

/// The logical x2APIC ID, which hardware derives from the x2APIC ID (SDM 3A §10.12.10.2).
pub fn x2apic_logical_id(id: u32) -> u32 {
    (id >> 4) << 16 | 1 << (id & 0xf)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xapic(logical_id: u8, flat: bool) -> Address {
        Address { id: 2, present: true, x2apic: false, accepts: true, flat, logical_id }
    }

    #[test]
    fn flat_cluster_and_x2apic_destinations() {
        let flat = xapic(0b0100, true);
        assert!(flat.matches(0, Destination::from_8bit(0b0110, true)));
        assert!(!flat.matches(0, Destination::from_8bit(0b0010, true)));
        assert!(flat.matches(0, Destination::from_8bit(0xff, true)));
        assert!(flat.matches(0, Destination::from_8bit(2, false)));
        assert!(!flat.matches(3, Destination::from_8bit(3, false)));
        // Shorthands go by vCPU, everything else by APIC ID.
        assert!(flat.matches(7, Destination::Only(7)) && !flat.matches(7, Destination::Only(2)));
        assert!(
            flat.matches(7, Destination::EveryoneBut(2)) && !flat.matches(7, Destination::EveryoneBut(7))
        );
        assert!(!Address { present: false, ..flat }.matches(2, Destination::from_8bit(0xff, false)));

        let cluster = xapic(0x32, false);
        assert!(cluster.matches(0, Destination::from_8bit(0x36, true)));
        assert!(!cluster.matches(0, Destination::from_8bit(0x26, true)));
        assert!(!cluster.matches(0, Destination::from_8bit(0x31, true)));
        // Cluster 15 is every cluster.
        assert!(cluster.matches(0, Destination::from_8bit(0xf2, true)));

        let wide = |id| Address { id, x2apic: true, ..xapic(0, true) };
        assert_eq!(x2apic_logical_id(0x25), 0x0002_0020);
        assert!(wide(0x25).matches(0, Destination::from_32bit(0x0002_0030, true)));
        assert!(!wide(0x25).matches(0, Destination::from_32bit(0x0003_0030, true)));
        assert!(!wide(0x25).matches(0, Destination::from_32bit(0x0002_0010, true)));
        assert!(wide(0x125).matches(0, Destination::from_32bit(0x125, false)));
        assert!(!wide(0x125).matches(0, Destination::from_8bit(0x25, false)));
        assert!(wide(0x125).matches(0, Destination::from_32bit(BROADCAST, false)));
        assert!(wide(3).matches(0, Destination::from_8bit(0b1000, true)));
    }

    #[test]
    fn address_survives_packing() {
        for bits in 0..16 {
            let address = Address {
                id: 0x8765_4321,
                present: bits & 1 != 0,
                x2apic: bits & 2 != 0,
                accepts: bits & 4 != 0,
                flat: bits & 8 != 0,
                logical_id: 0xa5,
            };
            assert_eq!(Address::unpack(address.pack()), address);
        }
    }

    #[test]
    fn msi_fields() {
        let fixed = Message::from_msi(MsiMessage { address: 0xfee0_3000, data: 0x4041 }).unwrap();
        assert_eq!(fixed.vector, 0x41);
        assert_eq!(fixed.mode, DeliveryMode::Fixed);
        assert_eq!(fixed.destination, Destination::Physical(3));
        assert!(!fixed.level);
        let hinted = Message::from_msi(MsiMessage { address: 0xfee0_300c, data: 0x41 }).unwrap();
        assert_eq!(hinted.mode, DeliveryMode::LowestPriority);
        assert_eq!(hinted.destination, Destination::Logical8(3));
        let nmi = Message::from_msi(MsiMessage { address: 0xfeef_f000, data: 0x0400 }).unwrap();
        assert_eq!((nmi.mode, nmi.destination), (DeliveryMode::Nmi, Destination::Physical(BROADCAST)));
        assert_eq!(Message::from_msi(MsiMessage { address: 0xfed0_0000, data: 0x41 }), None);
        // Level de-assert, start-up and reserved modes.
        assert_eq!(Message::from_msi(MsiMessage { address: 0xfee0_0000, data: 0x8041 }), None);
        assert_eq!(Message::from_msi(MsiMessage { address: 0xfee0_0000, data: 0x0641 }), None);
        assert_eq!(Message::from_msi(MsiMessage { address: 0xfee0_0000, data: 0x0341 }), None);
    }
}
