//! Counters of a disk.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::Operation;

/// Latencies: how many operations took less than 1, 2, 4 … microseconds; the last bucket takes all that are slower.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; Histogram::BUCKETS],
}

impl Histogram {
    /// Up to 2^23 µs, which is eight seconds.
    pub const BUCKETS: usize = 25;

    fn add(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - micros.leading_zeros()) as usize;
        self.buckets[bucket.min(Self::BUCKETS - 1)].fetch_add(1, Ordering::Relaxed);
    }

    /// Each bucket: the latency in microseconds that its operations stayed below (`None` for the last), and their number.
    pub fn read(&self) -> impl Iterator<Item = (Option<u64>, u64)> + '_ {
        self.buckets.iter().enumerate().map(|(index, count)| {
            ((index + 1 < Self::BUCKETS).then(|| 1 << index), count.load(Ordering::Relaxed))
        })
    }
}

/// Counters of one kind of operation.
#[derive(Debug, Default)]
pub struct OperationStats {
    count: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    nanoseconds: AtomicU64,
    /// Latencies.
    pub latency: Histogram,
}

/// Counters of a disk.
#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct DiskStats {
    pub read: OperationStats,
    pub write: OperationStats,
    pub flush: OperationStats,
    pub discard: OperationStats,
}

impl DiskStats {
    pub(crate) fn count(&self, operation: Operation, len: u64, took: Duration, failed: bool) {
        let stats = match operation {
            Operation::Read => &self.read,
            Operation::Write { .. } => &self.write,
            Operation::Flush => &self.flush,
            Operation::Discard | Operation::WriteZeroes { .. } => &self.discard,
        };
        if failed {
            stats.errors.fetch_add(1, Ordering::Relaxed);
            return;
        }
        stats.count.fetch_add(1, Ordering::Relaxed);
        stats.bytes.fetch_add(len, Ordering::Relaxed);
        stats.nanoseconds.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        stats.latency.add(took);
    }

    /// The counters by name: operations, bytes, errors and nanoseconds of each kind, and the latency buckets that are not empty.
    pub fn list(&self) -> Vec<(String, u64)> {
        let kinds = [
            ("read", &self.read),
            ("write", &self.write),
            ("flush", &self.flush),
            ("discard", &self.discard),
        ];
        let mut list = Vec::new();
        for (kind, stats) in kinds {
            let counters = [
                ("operations", &stats.count),
                ("bytes", &stats.bytes),
                ("errors", &stats.errors),
                ("nanoseconds", &stats.nanoseconds),
            ];
            let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            list.extend(counters.map(|(name, counter)| (format!("{kind} {name}"), value(counter))));
            for (below, count) in stats.latency.read().filter(|(_, count)| *count > 0) {
                let name = match below {
                    Some(below) => format!("{kind} latency below {below} us"),
                    None => format!("{kind} latency above"),
                };
                list.push((name, count));
            }
        }
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_powers_of_two_of_a_microsecond() {
        let histogram = Histogram::default();
        for nanos in [0, 999, 1000, 1999, 2000, 1_000_000, u64::MAX] {
            histogram.add(Duration::from_nanos(nanos));
        }
        let filled: Vec<_> = histogram.read().filter(|(_, count)| *count > 0).collect();
        assert_eq!(filled, [(Some(1), 2), (Some(2), 2), (Some(4), 1), (Some(1024), 1), (None, 1)]);
    }
}
