//! Moving XSAVE components between the host's places and [`x86::xsave`]'s (SDM 1 §13.4).

use x86::cpuid::CpuidTable;
use x86::xsave::{
    CPUID_LEAF, Component, EXTENDED, LEGACY_BYTES, MAX_BYTES, MIN_BYTES, XCOMP_BV, XSTATE_BV, component,
};

/// Bytes of `struct kvm_xsave`.
pub(crate) const KVM_BYTES: usize = 4096;

/// Where this host puts the extended components.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostLayout {
    /// Components of [`EXTENDED`] that the host has: the fixed place and the host's offset.
    moves: Vec<(Component, usize)>,
}

impl HostLayout {
    /// Reads the layout from a table of host leaves.
    pub(crate) fn from_cpuid(table: &CpuidTable) -> HostLayout {
        let moves = EXTENDED
            .iter()
            .filter_map(|component| {
                let answer = table.get(CPUID_LEAF, component.bit)?;
                let (len, offset) = (answer.eax as usize, answer.ebx as usize);
                let fits = len == component.len && offset >= MIN_BYTES && offset + len <= KVM_BYTES;
                fits.then_some((*component, offset))
            })
            .collect();
        HostLayout { moves }
    }

    /// Components that can be saved, as XCR0 bits.
    pub(crate) fn known(&self) -> u64 {
        self.moves
            .iter()
            .fold(component::X87 | component::SSE, |bits, (component, _)| bits | 1 << component.bit)
    }

    /// The architectural image of a host image.
    pub(crate) fn to_fixed(&self, host: &[u8]) -> Vec<u8> {
        let mut fixed = vec![0; MAX_BYTES];
        fixed[..MIN_BYTES].copy_from_slice(&host[..MIN_BYTES]);
        // KVM leaves its own layout description in the bytes that software may use.
        fixed[SOFTWARE_RESERVED..LEGACY_BYTES].fill(0);
        let present = u64_at(host, XSTATE_BV) & self.known();
        fixed[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&present.to_le_bytes());
        fixed[XCOMP_BV..XCOMP_BV + 8].fill(0);
        for (component, offset) in &self.moves {
            if present & (1 << component.bit) != 0 {
                fixed[component.offset..component.offset + component.len]
                    .copy_from_slice(&host[*offset..offset + component.len]);
            }
        }
        fixed
    }

    /// The host image of an architectural one of any length; `Err` names the components the host lacks.
    pub(crate) fn to_host(&self, fixed: &[u8]) -> Result<Vec<u8>, u64> {
        let mut host = vec![0; KVM_BYTES];
        let mut image = fixed.to_vec();
        image.resize(MAX_BYTES.max(fixed.len()), 0);
        host[..MIN_BYTES].copy_from_slice(&image[..MIN_BYTES]);
        host[XCOMP_BV..XCOMP_BV + 8].fill(0);
        let present = u64_at(&image, XSTATE_BV);
        if present & !self.known() != 0 {
            return Err(present & !self.known());
        }
        for (component, offset) in &self.moves {
            if present & (1 << component.bit) != 0 {
                host[*offset..offset + component.len]
                    .copy_from_slice(&image[component.offset..component.offset + component.len]);
            }
        }
        Ok(host)
    }
}

/// Bytes 464 to 511 of the legacy region are for software (SDM 1 §13.4.1).
const SOFTWARE_RESERVED: usize = 464;

fn u64_at(image: &[u8], offset: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&image[offset..offset + 8]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86::cpuid::CpuidResult;

    /// A host like Zen 4, which leaves no hole after AVX.
    fn zen4() -> HostLayout {
        let mut table = CpuidTable::new();
        for (bit, len, offset) in
            [(2, 256, 0x240), (5, 64, 0x340), (6, 512, 0x380), (7, 1024, 0x580), (9, 8, 0x980)]
        {
            table.set(CPUID_LEAF, Some(bit), CpuidResult { eax: len, ebx: offset, ecx: 0, edx: 0 });
        }
        HostLayout::from_cpuid(&table)
    }

    #[test]
    fn components_move_both_ways() {
        let layout = zen4();
        let mut host = vec![0; KVM_BYTES];
        host[0x340..0x380].fill(0xaa);
        host[0x980..0x988].copy_from_slice(&7u64.to_le_bytes());
        host[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&(0x220u64 | 3).to_le_bytes());
        let fixed = layout.to_fixed(&host);
        assert_eq!(fixed[1088..1152], [0xaa; 64]);
        assert_eq!(fixed[2688], 7);
        assert_eq!(fixed[1152..1664], [0; 512], "an absent component stays clear");
        assert_eq!(layout.to_host(&fixed).unwrap(), host);
    }

    #[test]
    fn a_component_the_host_lacks_is_named() {
        let mut fixed = vec![0; MAX_BYTES];
        fixed[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&(component::AVX | component::X87).to_le_bytes());
        let bare = HostLayout::from_cpuid(&CpuidTable::new());
        assert_eq!(bare.to_host(&fixed), Err(component::AVX));
        assert!(zen4().to_host(&fixed).is_ok());
    }
}
