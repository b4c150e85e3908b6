//! Where a virtual processor sits, and the APIC ID that follows from it.
//!
//! An APIC ID is made of bit fields: thread, core, socket, from the lowest (SDM 3A §9.9.1, APM 3 appendix E.5). A
//! field is as wide as its largest value needs, so sizes that are not powers of two leave gaps in the numbering.
//! CPUID, ACPI's MADT and the MP table must all tell the same IDs: they get them here.

use serde::{Deserialize, Serialize};

/// Sockets, cores and threads of a guest, as `-c cpus=,sockets=,cores=,threads=` gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Topology {
    pub sockets: u32,
    pub cores: u32,
    pub threads: u32,
}

/// The place of one virtual processor; cores are counted within their socket, threads within their core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Position {
    pub socket: u32,
    pub core: u32,
    pub thread: u32,
}

/// The highest APIC ID that fits the eight bits of xAPIC mode; 255 means all processors.
pub const MAX_XAPIC_ID: u32 = 254;

impl Topology {
    /// Number of virtual processors.
    pub const fn vcpus(&self) -> u32 {
        self.sockets * self.cores * self.threads
    }

    /// Virtual processors in one socket.
    pub const fn per_socket(&self) -> u32 {
        self.cores * self.threads
    }

    /// Width of the thread field of an APIC ID, in bits.
    pub const fn thread_bits(&self) -> u32 {
        field_bits(self.threads)
    }

    /// Width of the thread and core fields together: how far an APIC ID is shifted to give the socket.
    pub const fn socket_shift(&self) -> u32 {
        field_bits(self.threads) + field_bits(self.cores)
    }

    /// The place of virtual processor `vcpu`: threads of a core are neighbours, then cores of a socket.
    pub const fn position(&self, vcpu: u32) -> Position {
        let (cores, threads) = (nonzero(self.cores), nonzero(self.threads));
        Position { socket: vcpu / threads / cores, core: vcpu / threads % cores, thread: vcpu % threads }
    }

    /// The APIC ID of virtual processor `vcpu`.
    pub const fn apic_id(&self, vcpu: u32) -> u32 {
        let position = self.position(vcpu);
        position.socket << self.socket_shift() | position.core << self.thread_bits() | position.thread
    }

    /// The highest APIC ID of the machine.
    pub const fn max_apic_id(&self) -> u32 {
        self.apic_id(self.vcpus().saturating_sub(1))
    }
}

/// Bits that numbers below `count` take.
const fn field_bits(count: u32) -> u32 {
    nonzero(count).next_power_of_two().trailing_zeros()
}

const fn nonzero(count: u32) -> u32 {
    if count == 0 { 1 } else { count }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(sockets: u32, cores: u32, threads: u32) -> Vec<u32> {
        let topology = Topology { sockets, cores, threads };
        (0..topology.vcpus()).map(|vcpu| topology.apic_id(vcpu)).collect()
    }

    #[test]
    fn powers_of_two_leave_no_gap() {
        assert_eq!(ids(1, 1, 1), [0]);
        assert_eq!(ids(2, 2, 1), [0, 1, 2, 3]);
        assert_eq!(ids(2, 2, 2), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(ids(4, 1, 1), [0, 1, 2, 3]);
    }

    #[test]
    fn other_sizes_do() {
        assert_eq!(ids(2, 3, 1), [0, 1, 2, 4, 5, 6]);
        assert_eq!(ids(1, 2, 3), [0, 1, 2, 4, 5, 6]);
        assert_eq!(ids(3, 1, 1), [0, 1, 2]);
        assert_eq!(Topology { sockets: 2, cores: 3, threads: 1 }.max_apic_id(), 6);
    }
}
