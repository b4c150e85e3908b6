//! Small helpers of register access: little-endian operands, byte-wide chips behind wider accesses, locking.

use std::sync::{Mutex, MutexGuard};

use crate::host::Alarm;

/// Locks a device's registers. A panic elsewhere does not take the device away from the guest.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// What a device last asked of its alarm: most register accesses change nothing about it.
#[derive(Default)]
pub(crate) struct AlarmSetting(Option<u64>);

impl AlarmSetting {
    /// Sets the alarm if the deadline is a new one.
    pub(crate) fn set(&mut self, alarm: &dyn Alarm, deadline_ns: Option<u64>) {
        if std::mem::replace(&mut self.0, deadline_ns) != deadline_ns {
            alarm.set(deadline_ns);
        }
    }

    /// The alarm has rung and is not set any more.
    pub(crate) fn rang(&mut self) {
        self.0 = None;
    }
}

/// Fills the operand of a read from a number; bytes past the eighth are zero.
pub(crate) fn store(data: &mut [u8], value: u64) {
    let bytes = value.to_le_bytes();
    for (i, byte) in data.iter_mut().enumerate() {
        *byte = bytes.get(i).copied().unwrap_or(0);
    }
}

/// Part of a little-endian register as a read from `skip` bytes into it sees it.
pub(crate) fn store_from(data: &mut [u8], value: u64, skip: u64) {
    store(data, if skip < 8 { value >> (8 * skip) } else { 0 });
}

/// A register after a write of `data` from `skip` bytes into it.
pub(crate) fn merge(old: u64, data: &[u8], skip: u64) -> u64 {
    let mut bytes = old.to_le_bytes();
    for (target, byte) in bytes.iter_mut().skip(usize::try_from(skip).unwrap_or(usize::MAX)).zip(data) {
        *target = *byte;
    }
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_are_little_endian() {
        let mut two = [0; 2];
        store_from(&mut two, 0x1122_3344_5566_7788, 4);
        assert_eq!(two, [0x44, 0x33]);
        assert_eq!(merge(0x1122_3344, &[0xaa, 0xbb], 1), 0x11bb_aa44);
        assert_eq!(merge(0x1122, &[0xff; 8], 9), 0x1122);
    }
}
