//! The block device (virtio 1.2 §5.2).

mod bits;
mod request;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use block::Disk;
use memory::GuestMemory;
use serde_json::Value;

use super::queue::MAX_DESCRIPTORS;
use super::{Driver, VirtioDevice};
use crate::pci::bits::class;
use crate::snapshot::SnapshotError;
use crate::virtio::bits::device_type;
use bits::{CONFIG_BYTES, CONFIG_WRITEBACK, SECTOR, feature};

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
/// Ranges of one discard or write zeroes request at most.
const MAX_RANGES: u32 = 256;
/// Sectors of one such range at most, so that none takes forever.
const MAX_RANGE_SECTORS: u32 = (2 << 30) / SECTOR as u32;

/// How a block device is made.
#[derive(Clone, Debug)]
pub struct BlkConfig {
    /// Queues, at least one.
    pub queues: u16,
    /// What the driver reads as the disk's ID: up to 20 bytes.
    pub serial: String,
}

/// A block device on a disk.
pub struct Blk {
    disk: Arc<Disk>,
    memory: GuestMemory,
    config: BlkConfig,
    driver: RwLock<Option<Arc<Driver>>>,
    /// The driver wants the write cache on, as it is after reset.
    writeback: AtomicBool,
}

impl Blk {
    /// A block device.
    pub fn new(disk: Arc<Disk>, memory: GuestMemory, config: BlkConfig) -> Self {
        let writeback = AtomicBool::new(true);
        Blk { disk, memory, config, driver: RwLock::new(None), writeback }
    }

    /// Its disk.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    fn driver(&self) -> Option<Arc<Driver>> {
        self.driver.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_driver(&self, driver: Option<Arc<Driver>>) {
        *self.driver.write().unwrap_or_else(PoisonError::into_inner) = driver;
    }

    /// The disk has another size: tells the driver.
    pub fn resized(&self) {
        if let Some(driver) = self.driver() {
            driver.config_changed();
        }
    }

    /// Whether each write has to be stable when it is done: the driver has no way to flush, or wants no write cache.
    fn writes_through(&self, driver: &Driver) -> bool {
        !driver.has(feature::FLUSH) || !self.writeback.load(Ordering::Relaxed)
    }

    /// The configuration as it is now.
    fn image(&self) -> [u8; CONFIG_BYTES] {
        let info = self.disk.info();
        let mut image = [0; CONFIG_BYTES];
        let mut put =
            |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &(info.size_bytes / SECTOR).to_le_bytes());
        // Descriptors of a request less header and status.
        let most = (u32::from(QUEUE_SIZE)).min(MAX_DESCRIPTORS as u32) - 2;
        put(12, &most.to_le_bytes());
        put(20, &info.sectors.logical.to_le_bytes());
        let blocks = info.sectors.physical / info.sectors.logical;
        put(24, &[blocks.ilog2() as u8, 0]);
        put(26, &(blocks as u16).to_le_bytes());
        put(CONFIG_WRITEBACK as usize, &[u8::from(self.writeback.load(Ordering::Relaxed))]);
        put(34, &self.config.queues.to_le_bytes());
        let unit = info.sectors.logical / SECTOR as u32;
        let whole = MAX_RANGE_SECTORS / unit * unit;
        if info.discard {
            put(36, &whole.to_le_bytes());
            put(40, &MAX_RANGES.to_le_bytes());
            put(44, &(info.sectors.physical / SECTOR as u32).to_le_bytes());
        }
        put(48, &whole.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[u8::from(info.discard)]);
        image
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u16 {
        device_type::BLOCK
    }

    fn class(&self) -> (u8, u8, u8) {
        class::STORAGE
    }

    fn features(&self) -> u64 {
        let info = self.disk.info();
        let mut features = feature::SEG_MAX | feature::BLK_SIZE | feature::TOPOLOGY;
        let mut offer = |wanted: bool, bits: u64| features |= if wanted { bits } else { 0 };
        offer(info.read_only, feature::RO);
        offer(!info.writethrough, feature::FLUSH | feature::CONFIG_WCE);
        offer(self.config.queues > 1, feature::MQ);
        offer(info.discard, feature::DISCARD);
        offer(!info.read_only, feature::WRITE_ZEROES);
        features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.config.queues)]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let image = self.image();
        let from = usize::try_from(offset).ok().and_then(|offset| image.get(offset..)).unwrap_or_default();
        data.fill(0);
        data.iter_mut().zip(from).for_each(|(to, byte)| *to = *byte);
    }

    fn config_write(&self, offset: u64, data: &[u8]) {
        let may = self.driver().is_none_or(|driver| driver.has(feature::CONFIG_WCE));
        if offset == CONFIG_WRITEBACK && may && !self.disk.info().writethrough {
            self.writeback.store(data[0] & 1 != 0, Ordering::Relaxed);
        }
    }

    fn activate(&self, driver: Driver) {
        self.set_driver(Some(Arc::new(driver)));
    }

    fn notify(&self, queue: u16) {
        let Some(driver) = self.driver() else { return };
        let Some(queue) = driver.queues.get(usize::from(queue)).cloned() else { return };
        let writes_through = self.writes_through(&driver);
        queue.take_all(|buffer| request::start(self, &driver, &queue, buffer, writes_through));
    }

    fn drain(&self) {
        self.disk.abort();
    }

    fn reset(&self) {
        self.set_driver(None);
        self.writeback.store(true, Ordering::Relaxed);
    }

    fn save(&self) -> Value {
        Value::Bool(self.writeback.load(Ordering::Relaxed))
    }

    fn restore(&self, state: &Value) -> Result<(), SnapshotError> {
        let Value::Bool(writeback) = state else {
            return Err(SnapshotError::Invalid("virtio-blk: whether the write cache is on".into()));
        };
        self.writeback.store(*writeback, Ordering::Relaxed);
        Ok(())
    }
}
