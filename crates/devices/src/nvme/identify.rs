//! Identify structures and log pages (NVMe 1.4 §5.14, §5.15).

use super::bits::{VERSION, cns, feature, log};
use super::{MAX_ASYNC_EVENTS, MDTS, Nvme, State, admin::ADMIN_COMMANDS};
use crate::access::lock;
use crate::nvme::bits::nvm;

/// Entries of the error log that a driver may read.
const ERROR_ENTRIES: usize = 1;
/// Kelvin. What a host's memory has does not matter to anybody.
const TEMPERATURE: u16 = 303;

/// Text, filled up with spaces.
fn text(to: &mut [u8], text: &str) {
    to.fill(b' ');
    to.iter_mut().zip(text.bytes()).for_each(|(to, byte)| *to = byte);
}

fn put<const N: usize>(page: &mut [u8], offset: usize, bytes: [u8; N]) {
    if let Some(place) = page.get_mut(offset..offset + N) {
        place.copy_from_slice(&bytes);
    }
}

impl Nvme {
    /// The structure that an identify command asks for; `None` if there is none, or not for this namespace.
    pub(super) fn identify(&self, structure: u8, namespace: u32) -> Option<[u8; 4096]> {
        let mut page = [0; 4096];
        match (structure, namespace) {
            (cns::NAMESPACE, 1 | u32::MAX) => self.namespace(&mut page),
            (cns::CONTROLLER, _) => self.controller(&mut page),
            // All greater than the one given.
            (cns::ACTIVE_NAMESPACES, 0) => put(&mut page, 0, 1u32.to_le_bytes()),
            (cns::ACTIVE_NAMESPACES, 1..0xffff_fffe) => {}
            (cns::DESCRIPTORS, 1) => {
                put(&mut page, 0, [1, 8, 0, 0]);
                put(&mut page, 4, self.config.eui64.to_be_bytes());
            }
            _ => return None,
        }
        Some(page)
    }

    fn controller(&self, page: &mut [u8]) {
        let identity = super::IDENTITY;
        put(page, 0, identity.vendor.to_le_bytes());
        put(page, 2, identity.subsystem_vendor.to_le_bytes());
        text(&mut page[4..24], &self.config.serial);
        text(&mut page[24..64], "Apiary NVMe");
        text(&mut page[64..72], env!("CARGO_PKG_VERSION"));
        page[77] = MDTS;
        put(page, 80, VERSION.to_le_bytes());
        // OAES: namespace attribute notices.
        put(page, 92, feature::NOTICE_NAMESPACE.to_le_bytes());
        page[111] = 1; // CNTRLTYPE: I/O controller
        page[258] = 3; // ACL
        page[259] = MAX_ASYNC_EVENTS as u8 - 1;
        page[260] = 0b11; // FRMW: one slot, read-only
        page[261] = 0b10; // LPA: the commands log
        page[262] = ERROR_ENTRIES as u8 - 1;
        put(page, 266, (TEMPERATURE + 40).to_le_bytes()); // WCTEMP
        put(page, 268, (TEMPERATURE + 50).to_le_bytes()); // CCTEMP
        page[512] = 0x66; // SQES
        page[513] = 0x44; // CQES
        put(page, 516, 1u32.to_le_bytes()); // NN
        let info = self.disk.info();
        // ONCS: compare, dataset management, write zeroes.
        let optional = 1 | u16::from(self.config.dataset_management) << 2 | 1 << 3;
        put(page, 520, optional.to_le_bytes());
        page[525] = u8::from(!info.writethrough); // VWC
        put(page, 536, 1u32.to_le_bytes()); // SGLS: without alignment
        text(&mut page[768..1024], "");
        let name =
            format!("nqn.2014-08.org.nvmexpress:{:04x}:apiary:{}", identity.vendor, self.config.serial);
        page[768..1024].fill(0);
        page[768..1023].iter_mut().zip(name.bytes()).for_each(|(to, byte)| *to = byte);
        put(page, 2048, 0x0900u16.to_le_bytes()); // power state 0: 23.04 W at most
    }

    fn namespace(&self, page: &mut [u8]) {
        let info = self.disk.info();
        let blocks = info.size_bytes / u64::from(self.config.block_bytes);
        for offset in [0, 8, 16] {
            put(page, offset, blocks.to_le_bytes()); // NSZE, NCAP, NUSE
        }
        // DLFEAT: what was deallocated reads as zeros here, but whether it does on every host nobody can tell: not reported.
        page[24] = u8::from(self.config.dataset_management) << 4; // NSFEAT: preferred sizes are valid
        page[99] = u8::from(info.read_only); // NSATTR: write protected
        let per_physical = (info.sectors.physical / self.config.block_bytes).max(1) as u16 - 1;
        for offset in [64, 66, 68, 70] {
            put(page, offset, per_physical.to_le_bytes()); // NPWG, NPWA, NPDG, NPDA
        }
        put(page, 120, self.config.eui64.to_be_bytes());
        page[130] = self.config.block_bytes.ilog2() as u8; // LBAF0: LBADS
    }

    /// A log page; `None` if there is none of this number.
    pub(super) fn log_page(&self, number: u8) -> Option<Vec<u8>> {
        let mut page = match number {
            log::ERRORS => vec![0; 64 * ERROR_ENTRIES],
            log::SMART | log::FIRMWARE => vec![0; 512],
            log::CHANGED_NAMESPACES | log::COMMANDS => vec![0; 4096],
            _ => return None,
        };
        match number {
            log::ERRORS => put(&mut page, 0, lock(&self.state).errors.to_le_bytes()),
            log::SMART => self.smart(&mut page),
            log::FIRMWARE => {
                page[0] = 1;
                text(&mut page[8..16], env!("CARGO_PKG_VERSION"));
            }
            log::CHANGED_NAMESPACES => {
                let mut state = lock(&self.state);
                let State { namespace_changed, namespace_told, .. } = &mut *state;
                put(&mut page, 0, u32::from(*namespace_changed).to_le_bytes());
                (*namespace_changed, *namespace_told) = (false, false);
            }
            _ => {
                const SUPPORTED: u32 = 1;
                const CHANGES_CONTENTS: u32 = 1 << 1;
                for opcode in ADMIN_COMMANDS {
                    put(&mut page, 4 * usize::from(*opcode), SUPPORTED.to_le_bytes());
                }
                let changing = [nvm::WRITE, nvm::WRITE_ZEROES, nvm::DATASET_MANAGEMENT];
                for opcode in [nvm::FLUSH, nvm::READ, nvm::COMPARE].iter().chain(&changing) {
                    let changes = if changing.contains(opcode) { CHANGES_CONTENTS } else { 0 };
                    put(&mut page, 1024 + 4 * usize::from(*opcode), (SUPPORTED | changes).to_le_bytes());
                }
            }
        }
        Some(page)
    }

    /// Health, from what the disk has counted (§5.14.1.2).
    fn smart(&self, page: &mut [u8]) {
        page[0] = u8::from(self.disk.info().read_only) << 3; // critical warning: read-only
        put(page, 1, TEMPERATURE.to_le_bytes());
        page[3] = 100; // available spare
        page[4] = 10; // its threshold
        let counters = self.disk.stats().list();
        let counter =
            |name: &str| counters.iter().find(|(own, _)| own == name).map_or(0, |(_, value)| *value);
        // Units of a thousand blocks of 512 bytes, rounded up.
        let units = |bytes: u64| bytes.div_ceil(512_000).to_le_bytes();
        put(page, 32, units(counter("read bytes")));
        put(page, 48, units(counter("write bytes")));
        put(page, 64, counter("read operations").to_le_bytes());
        put(page, 80, counter("write operations").to_le_bytes());
        let media_errors: u64 = ["read errors", "write errors"].into_iter().map(counter).sum();
        put(page, 160, media_errors.to_le_bytes());
        put(page, 176, lock(&self.state).errors.to_le_bytes());
    }
}
