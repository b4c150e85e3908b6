//! Message-signalled interrupts of a function: MSI and MSI-X (PCI 3.0 §6.8).

use serde::{Deserialize, Serialize};

use super::bits::{capability, msi, msix};
use super::config::ConfigSpace;
use crate::access::{merge, store_from};
use crate::snapshot::SnapshotError;

/// A message: what is written where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Message {
    pub address: u64,
    pub data: u32,
}

/// An entry of the MSI-X table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

impl Entry {
    /// After reset: masked.
    const RESET: Entry = Entry { address: 0, data: 0, control: msix::MASKED };
}

/// The MSI-X table and its pending bits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    entries: Vec<Entry>,
    pending: Vec<bool>,
}

/// MSI-X of a function that has it.
struct Msix {
    /// Where its capability is.
    capability: usize,
    /// Where in the BAR.
    table: u64,
    pending_bits: u64,
    state: MsixState,
}

impl Msix {
    fn masked(&self, control: u16, vector: usize) -> bool {
        control & msix::FUNCTION_MASK != 0 || self.state.entries[vector].control & msix::MASKED != 0
    }

    /// Eight bytes at an aligned offset of the BAR.
    fn word(&self, offset: u64) -> Option<u64> {
        let MsixState { entries, pending } = &self.state;
        if let Some(at) = offset.checked_sub(self.table)
            && let Some(entry) = entries.get(at as usize / msix::ENTRY_BYTES)
        {
            let high = u64::from(entry.data) | u64::from(entry.control) << 32;
            return Some(if at & 8 == 0 { entry.address } else { high });
        }
        let bits =
            pending.chunks(64).nth(usize::try_from(offset.checked_sub(self.pending_bits)?).ok()? / 8)?;
        Some(bits.iter().rev().fold(0, |word, bit| word << 1 | u64::from(*bit)))
    }
}

/// The messages of a function; empty for one that has none.
pub(super) struct Messages {
    /// Where the MSI capability is.
    msi: Option<usize>,
    msix: Option<Msix>,
}

impl Messages {
    /// What the capabilities of a configuration space say.
    pub fn of(config: &ConfigSpace) -> Self {
        let msix = config.capability(capability::MSIX).map(|at| {
            let vectors = usize::from(config.u16(at + msix::CONTROL) & msix::SIZE_MASK) + 1;
            let place = |register: usize| u64::from(config.u32(at + register) & !7);
            let state = MsixState { entries: vec![Entry::RESET; vectors], pending: vec![false; vectors] };
            Msix { capability: at, table: place(msix::TABLE), pending_bits: place(msix::PENDING), state }
        });
        Messages { msi: config.capability(capability::MSI), msix }
    }

    /// MSI-X if software has enabled it, with its control word.
    fn enabled_msix(&mut self, config: &ConfigSpace) -> Option<(&mut Msix, u16)> {
        let msix = self.msix.as_mut()?;
        let control = config.u16(msix.capability + msix::CONTROL);
        (control & msix::ENABLE != 0).then_some((msix, control))
    }

    /// The MSI capability and how many vectors software allows, if it has enabled MSI.
    fn enabled_msi(&self, config: &ConfigSpace) -> Option<(usize, u16)> {
        let at = self.msi?;
        let control = config.u16(at + msi::CONTROL);
        let asked = control >> msi::CAPABLE_SHIFT & 7;
        let allowed = (control & msi::ENABLED_MASK) >> msi::ENABLED_SHIFT;
        (control & msi::ENABLE != 0).then(|| (at, 1 << allowed.min(asked)))
    }

    pub fn enabled(&self, config: &ConfigSpace) -> bool {
        self.vectors(config) != 0
    }

    pub fn vectors(&self, config: &ConfigSpace) -> u16 {
        match &self.msix {
            Some(msix) if config.u16(msix.capability + msix::CONTROL) & msix::ENABLE != 0 => {
                msix.state.entries.len() as u16
            }
            _ => self.enabled_msi(config).map_or(0, |(_, vectors)| vectors),
        }
    }

    /// The message that is to be sent for a vector now.
    pub fn message(&mut self, config: &ConfigSpace, vector: u16) -> Option<Message> {
        if let Some((msix, control)) = self.enabled_msix(config) {
            let index = usize::from(vector);
            let Entry { address, data, .. } = *msix.state.entries.get(index)?;
            if msix.masked(control, index) {
                msix.state.pending[index] = true;
                return None;
            }
            return Some(Message { address, data });
        }
        let (at, vectors) = self.enabled_msi(config)?;
        let address =
            u64::from(config.u32(at + msi::ADDRESS)) | u64::from(config.u32(at + msi::ADDRESS + 4)) << 32;
        // The function modifies the low bits of the data word (§6.8.1.6).
        let data = config.u16(at + msi::DATA) & !(vectors - 1) | vector & (vectors - 1);
        Some(Message { address, data: data.into() })
    }

    /// The messages that waited for their vector to be unmasked and need to wait no longer.
    pub fn take_unmasked(&mut self, config: &ConfigSpace) -> Vec<Message> {
        let Some((msix, control)) = self.enabled_msix(config) else { return Vec::new() };
        if !msix.state.pending.contains(&true) {
            return Vec::new();
        }
        let ready: Vec<usize> = (0..msix.state.entries.len())
            .filter(|vector| msix.state.pending[*vector] && !msix.masked(control, *vector))
            .collect();
        ready
            .into_iter()
            .map(|vector| {
                msix.state.pending[vector] = false;
                let Entry { address, data, .. } = msix.state.entries[vector];
                Message { address, data }
            })
            .collect()
    }

    /// Software reads at an offset of the BAR that holds table and pending bits.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> bool {
        let word = self.msix.as_ref().and_then(|msix| msix.word(offset & !7));
        if let Some(word) = word {
            store_from(data, word, offset & 7);
        }
        word.is_some()
    }

    /// Software writes there. Pending bits cannot be written.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> bool {
        let Some(msix) = &mut self.msix else { return false };
        let Some(old) = msix.word(offset & !7) else { return false };
        let word = merge(old, data, offset & 7);
        if let Some(at) = (offset & !7).checked_sub(msix.table)
            && let Some(entry) = msix.state.entries.get_mut(at as usize / msix::ENTRY_BYTES)
        {
            if at & 8 == 0 {
                entry.address = word & !3;
            } else {
                entry.data = word as u32;
                entry.control = (word >> 32) as u32 & msix::MASKED;
            }
        }
        true
    }

    pub fn clear_pending(&mut self) {
        if let Some(msix) = &mut self.msix {
            msix.state.pending.fill(false);
        }
    }

    pub fn save(&self) -> Option<MsixState> {
        self.msix.as_ref().map(|msix| msix.state.clone())
    }

    /// Whether a state is of this function.
    pub fn check(&self, state: Option<&MsixState>) -> Result<(), SnapshotError> {
        let vectors = |state: &MsixState| (state.entries.len(), state.pending.len());
        let own = self.msix.as_ref().map(|msix| vectors(&msix.state));
        let saved = state.map(vectors);
        if own == saved {
            Ok(())
        } else {
            Err(SnapshotError::Invalid(format!("MSI-X table of {saved:?} vectors, this device has {own:?}")))
        }
    }

    /// Puts back a state that [`Messages::check`] has found to fit.
    pub fn restore(&mut self, state: Option<&MsixState>) {
        if let (Some(msix), Some(state)) = (&mut self.msix, state) {
            msix.state = state.clone();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::bits::{self, class};
    use super::super::{ConfigSpace, PciFunction, PciIdentity};
    use super::*;
    use crate::testing::Messages as Sink;

    const TABLE: u32 = 0x40;
    const PENDING: u32 = 0x800;

    fn function(add: impl FnOnce(&mut ConfigSpace)) -> (PciFunction, Arc<Sink>) {
        let (vendor, device) = (0x1af4, 0x1001);
        let class = class::HOST_BRIDGE;
        let mut config = ConfigSpace::new(PciIdentity {
            vendor,
            device,
            revision: 0,
            class,
            subsystem_vendor: 0,
            subsystem: 0,
        });
        add(&mut config);
        let (function, sink) = (PciFunction::new(config, None), Sink::new());
        function.connect_messages(sink.clone());
        (function, sink)
    }

    /// A 32-bit read and write of the register at an offset of a capability.
    fn capability_at(function: &PciFunction, id: u8) -> u16 {
        function.with_config(|config| config.capability(id)).expect("the capability") as u16
    }

    fn get(function: &PciFunction, offset: u64) -> u64 {
        let mut data = [0; 8];
        assert!(function.msix_read(offset, &mut data));
        u64::from_le_bytes(data)
    }

    #[test]
    fn msi_messages_carry_the_vector_in_the_bits_that_software_allows() {
        let (function, sink) = function(|config| {
            config.add_capability(capability::VENDOR, &[0; 5], &[]).unwrap();
            config.add_msi_capability(8).unwrap();
        });
        let at = capability_at(&function, capability::MSI);
        function.send(1);
        assert_eq!(function.vectors(), 0);
        function.config_write(at + 4, &0xfee0_1003u32.to_le_bytes());
        function.config_write(at + 8, &1u32.to_le_bytes());
        function.config_write(at + 12, &0x4567u16.to_le_bytes());
        function.send(1);
        assert_eq!(sink.take(), [], "not enabled");
        // Four of the eight.
        function.config_write(at + 2, &(msi::ENABLE | 2 << msi::ENABLED_SHIFT).to_le_bytes());
        assert_eq!(function.vectors(), 4);
        assert!(function.sends_messages());
        function.send(2);
        function.send(5);
        assert_eq!(sink.take(), [(0x1_fee0_1000, 0x4566), (0x1_fee0_1000, 0x4565)]);
        // More than there are.
        function.config_write(at + 2, &(msi::ENABLE | 7 << msi::ENABLED_SHIFT).to_le_bytes());
        assert_eq!(function.vectors(), 8);
        let mut control = [0; 2];
        function.config_read(at + 2, &mut control);
        let fixed = msi::ADDRESS_64 | 3 << msi::CAPABLE_SHIFT;
        assert_eq!(u16::from_le_bytes(control), fixed | msi::ENABLE | 7 << msi::ENABLED_SHIFT);
    }

    #[test]
    fn msix_messages_wait_while_their_vector_is_masked() {
        let (function, sink) = function(|config| {
            config.add_msix_capability(70, 1, TABLE, PENDING).unwrap();
        });
        let at = capability_at(&function, capability::MSIX);
        let entry = |vector: u64| u64::from(TABLE) + 16 * vector;
        for vector in [0, 69] {
            function.msix_write(entry(vector), &(0xfee0_0003 + (vector << 12)).to_le_bytes());
            function.msix_write(entry(vector) + 8, &(vector as u32 + 0x30).to_le_bytes());
        }
        function.config_write(at + 2, &msix::ENABLE.to_le_bytes());
        assert_eq!(function.vectors(), 70);
        function.send(69);
        function.send(69);
        function.send(70);
        function.send(0);
        assert_eq!(sink.take(), [], "masked after reset");
        let bits = |function: &PciFunction| {
            [get(function, u64::from(PENDING)), get(function, u64::from(PENDING) + 8)]
        };
        assert_eq!(bits(&function), [1, 1 << 5]);
        function.msix_write(u64::from(PENDING), &u64::MAX.to_le_bytes());
        assert_eq!(bits(&function), [1, 1 << 5], "read only");
        function.msix_write(entry(69) + 12, &0u32.to_le_bytes());
        assert_eq!(sink.take(), [(0xfee4_5000, 0x30 + 69)], "once, though sent twice");
        function.send(69);
        assert_eq!(sink.take().len(), 1);
        // The mask of the whole function, and messages that wait for that to go.
        function.config_write(at + 2, &(msix::ENABLE | msix::FUNCTION_MASK).to_le_bytes());
        function.send(69);
        assert_eq!(sink.take(), []);
        function.config_write(at + 2, &msix::ENABLE.to_le_bytes());
        assert_eq!(sink.take(), [(0xfee4_5000, 0x30 + 69)]);
        function.clear_pending_messages();
        function.msix_write(entry(0) + 12, &0u32.to_le_bytes());
        assert_eq!(sink.take(), [], "forgotten by a reset");
        assert!(!function.msix_read(entry(70), &mut [0; 4]), "behind the table");
        let saved = function.save();
        assert_eq!(saved.msix.as_ref().unwrap().entries[69].data, 0x30 + 69);
        let (other, _) = self::function(|config| {
            config.add_msix_capability(3, 1, TABLE, PENDING).unwrap();
        });
        assert!(other.restore(&saved, &[]).is_err());
        function.restore(&saved, &[]).unwrap();
    }

    #[test]
    fn disabled_messages_leave_the_line() {
        let (function, _) = function(|config| {
            config.add_msi_capability(1).unwrap();
        });
        function.set_intx(true);
        let mut status = [0; 2];
        function.config_read(bits::STATUS as u16, &mut status);
        assert_ne!(u16::from_le_bytes(status) & bits::status::INTERRUPT, 0);
        assert!(!function.sends_messages());
    }
}
