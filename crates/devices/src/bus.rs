//! The two address spaces of a PC: which device answers at which address.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};

/// A device on the port I/O bus. Offsets count from the start of the range it was registered with; `data` is 1, 2 or
/// 4 bytes, little-endian, and lies inside the range.
pub trait PioDevice: Send + Sync {
    /// IN.
    fn pio_read(&self, offset: u16, data: &mut [u8]);
    /// OUT.
    fn pio_write(&self, offset: u16, data: &[u8]);
}

/// A device on the memory bus. Offsets count from the start of the range it was registered with; `data` is 1 to 8
/// bytes, little-endian, and lies inside the range.
pub trait MmioDevice: Send + Sync {
    /// Load.
    fn mmio_read(&self, offset: u64, data: &mut [u8]);
    /// Store.
    fn mmio_write(&self, offset: u64, data: &[u8]);
}

/// The port I/O space.
pub type PioBus = Bus<dyn PioDevice>;
/// The memory space outside RAM.
pub type MmioBus = Bus<dyn MmioDevice>;

/// A part of a port device that is registered on its own because the ports between its parts belong to others: adds
/// `shift` to every offset.
pub struct PioPart<D: ?Sized> {
    /// The whole device.
    pub device: Arc<D>,
    /// Offset in the device of this part's first port.
    pub shift: u16,
}

impl<D: PioDevice + ?Sized> PioDevice for PioPart<D> {
    fn pio_read(&self, offset: u16, data: &mut [u8]) {
        self.device.pio_read(self.shift.wrapping_add(offset), data);
    }

    fn pio_write(&self, offset: u16, data: &[u8]) {
        self.device.pio_write(self.shift.wrapping_add(offset), data);
    }
}

/// Why a range could not be registered.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// Another device answers there.
    #[error("{wanted} at {base:#x}+{len:#x} overlaps {present}")]
    Overlap {
        /// Who asked.
        wanted: String,
        /// Start of the range asked for.
        base: u64,
        /// Its length in addresses.
        len: u64,
        /// Who is there already.
        present: String,
    },
    /// The range is empty or wraps around.
    #[error("{0}: empty or impossible address range")]
    BadRange(String),
}

struct Entry<D: ?Sized> {
    len: u64,
    name: String,
    device: Arc<D>,
}

/// An address space: ranges that do not overlap, each answered by one device. Ranges can be added, moved and
/// removed while vCPUs run.
pub struct Bus<D: ?Sized> {
    ranges: RwLock<BTreeMap<u64, Entry<D>>>,
}

impl<D: ?Sized> Default for Bus<D> {
    fn default() -> Self {
        Bus { ranges: RwLock::new(BTreeMap::new()) }
    }
}

impl<D: ?Sized> Bus<D> {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Registers `device` for `len` addresses from `base`.
    ///
    /// # Errors
    /// The range is empty, wraps, or overlaps another.
    pub fn insert(&self, base: u64, len: u64, name: &str, device: Arc<D>) -> Result<(), BusError> {
        let end =
            base.checked_add(len).filter(|_| len > 0).ok_or_else(|| BusError::BadRange(name.to_owned()))?;
        let mut ranges = self.ranges.write().unwrap_or_else(|e| e.into_inner());
        if let Some((_, present)) = ranges.range(..end).next_back().filter(|(b, e)| *b + e.len > base) {
            return Err(BusError::Overlap {
                wanted: name.to_owned(),
                base,
                len,
                present: present.name.clone(),
            });
        }
        ranges.insert(base, Entry { len, name: name.to_owned(), device });
        Ok(())
    }

    /// Removes the range that starts at `base`; returns whether there was one.
    pub fn remove(&self, base: u64) -> bool {
        self.ranges.write().unwrap_or_else(|e| e.into_inner()).remove(&base).is_some()
    }

    /// The device that answers `len` addresses from `address`, and the offset in its range.
    pub fn find(&self, address: u64, len: u64) -> Option<(Arc<D>, u64)> {
        let ranges = self.ranges.read().unwrap_or_else(|e| e.into_inner());
        let (base, entry) = ranges.range(..=address).next_back()?;
        let offset = address - base;
        (offset.checked_add(len)? <= entry.len).then(|| (entry.device.clone(), offset))
    }

    /// Every range: base, length, name.
    pub fn ranges(&self) -> Vec<(u64, u64, String)> {
        let ranges = self.ranges.read().unwrap_or_else(|e| e.into_inner());
        ranges.iter().map(|(base, e)| (*base, e.len, e.name.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_do_not_overlap_and_bound_accesses() {
        let bus: Bus<str> = Bus::new();
        bus.insert(0x3f8, 8, "com1", Arc::from("com1")).unwrap();
        bus.insert(0x400, 1, "x", Arc::from("x")).unwrap();
        assert!(matches!(bus.insert(0x3ff, 2, "y", Arc::from("y")), Err(BusError::Overlap { .. })));
        assert!(matches!(bus.insert(0x3f0, 9, "y", Arc::from("y")), Err(BusError::Overlap { .. })));
        assert!(matches!(bus.insert(u64::MAX, 2, "y", Arc::from("y")), Err(BusError::BadRange(_))));
        assert_eq!(bus.find(0x3fb, 1).map(|(d, o)| (d.to_string(), o)), Some(("com1".into(), 3)));
        assert!(bus.find(0x3ff, 2).is_none(), "an access may not leave its device");
        assert!(bus.find(0x3f7, 1).is_none());
        assert!(bus.remove(0x3f8));
        assert!(bus.find(0x3fb, 1).is_none());
    }
}
