//! Linear to physical translation and every access to guest memory (SDM 3A chapter 4).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use engine::memory::CODE;
use x86::Exception;
use x86::bits::{cr0, cr4, efer};
use x86::paging::{PAGE_MASK, PAGE_SIZE, fault, pte};

use crate::cpu::{Cpu, R};
use crate::interp::alu::Int;
use crate::memory::MemoryMap;
use crate::tlb::Privilege;
use crate::translate::check::Journal;

/// Kinds of access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Access {
    Read,
    Write,
    Execute,
}

/// Outcome of a page walk.
struct Walk {
    gpa: u64,
    writable: bool,
    global: bool,
}

/// A piece of RAM that is about to be changed in place.
#[derive(Clone, Copy)]
pub struct Update {
    /// Where it is.
    pub host: *mut u8,
    /// The page's record has to be told.
    note: bool,
}

/// Where a linear address leads.
#[derive(Clone, Copy)]
pub enum Place {
    /// RAM or ROM at this host address (of the access, not the page).
    Host(*mut u8),
    /// A device, or a store to ROM.
    Io(u64),
}

impl Cpu {
    // ---- the fast path ----------------------------------------------------------------------------------------

    /// Loads a value with the current rights.
    #[inline(always)]
    pub fn read<T: Int>(&mut self, gva: u64) -> R<T> {
        self.read_as(self.privilege, gva)
    }

    /// Loads a value with given rights.
    #[inline(always)]
    pub fn read_as<T: Int>(&mut self, privilege: Privilege, gva: u64) -> R<T> {
        let entry = self.tlb().entry(privilege, gva);
        let crosses = (gva & PAGE_MASK) > PAGE_SIZE - u64::from(T::BYTES);
        if entry.read.load(Ordering::Relaxed) == gva & !PAGE_MASK && !crosses {
            let host = (entry.host.load(Ordering::Relaxed) + (gva & PAGE_MASK)) as *const T;
            // SAFETY: the TLB maps the whole page to host memory that lives as long as the map.
            return Ok(unsafe { host.read_unaligned() });
        }
        self.read_slow(privilege, gva)
    }

    /// Stores a value with the current rights.
    #[inline(always)]
    pub fn write<T: Int>(&mut self, gva: u64, value: T) -> R<()> {
        self.write_as(self.privilege, gva, value)
    }

    /// Stores a value with given rights.
    #[inline(always)]
    pub fn write_as<T: Int>(&mut self, privilege: Privilege, gva: u64, value: T) -> R<()> {
        let entry = self.tlb().entry(privilege, gva);
        let crosses = (gva & PAGE_MASK) > PAGE_SIZE - u64::from(T::BYTES);
        if entry.write.load(Ordering::Relaxed) == gva & !PAGE_MASK && !crosses {
            let host = (entry.host.load(Ordering::Relaxed) + (gva & PAGE_MASK)) as *mut T;
            // SAFETY: as for loads; the page is writable.
            unsafe { host.write_unaligned(value) };
            return Ok(());
        }
        let bytes = value.zext().to_le_bytes();
        self.write_bytes_as(privilege, gva, &bytes[..T::BYTES as usize])
    }

    /// A host pointer through which `len` bytes can be read and written in place, if the access stays in one page
    /// of RAM; `None` if the caller has to use [`Cpu::read_bytes`] and [`Cpu::write_bytes`]. Faults as a store does.
    /// After the update the caller calls [`Cpu::updated`].
    #[inline(always)]
    pub fn host_for_update(&mut self, gva: u64, len: u64) -> R<Option<Update>> {
        if (gva & PAGE_MASK) + len > PAGE_SIZE {
            return Ok(None);
        }
        let entry = self.tlb().entry(self.privilege, gva);
        if entry.write.load(Ordering::Relaxed) == gva & !PAGE_MASK {
            let host = (entry.host.load(Ordering::Relaxed) + (gva & PAGE_MASK)) as *mut u8;
            return Ok(Some(Update { host, note: false }));
        }
        self.host_for_update_slow(gva, len)
    }

    #[cold]
    fn host_for_update_slow(&mut self, gva: u64, len: u64) -> R<Option<Update>> {
        self.watch(gva, len, Access::Write);
        match self.translate(self.privilege, gva, Access::Write)? {
            Place::Host(host) => {
                self.journal.before_store(host, len as usize);
                Ok(Some(Update { host, note: true }))
            }
            Place::Io(_) => Ok(None),
        }
    }

    /// Ends what [`Cpu::host_for_update`] began: tells the page's record of the store, where the fast path does not.
    #[inline(always)]
    pub fn updated(&mut self, update: Update) {
        if update.note {
            self.note_store(update.host);
        }
    }

    /// Replaces a value atomically, as LOCKed instructions do; returns the old one.
    pub fn locked_update<T: Int>(&mut self, gva: u64, apply: impl Fn(u64) -> u64) -> R<u64> {
        let len = u64::from(T::BYTES);
        let update = if gva & (len - 1) == 0 { self.host_for_update(gva, len)? } else { None };
        let Some(update) = update else {
            self.probe_write(gva, len)?;
            let shared = self.shared.clone();
            let _guard = crate::shared::lock(&shared.split_lock);
            let old = self.read::<T>(gva)?.zext();
            self.write(gva, T::from_u64(apply(old)))?;
            return Ok(old);
        };
        // SAFETY: the pointer is good for an aligned value of this size.
        let old = unsafe { fetch_update::<T>(update.host, apply) };
        self.updated(update);
        Ok(old)
    }

    /// A host pointer through which `len` bytes can be read in place, if they are in one page of RAM or ROM.
    #[inline(always)]
    pub fn host_for_read(&mut self, gva: u64, len: u64) -> R<Option<*mut u8>> {
        if (gva & PAGE_MASK) + len > PAGE_SIZE {
            return Ok(None);
        }
        let entry = self.tlb().entry(self.privilege, gva);
        if entry.read.load(Ordering::Relaxed) == gva & !PAGE_MASK {
            return Ok(Some((entry.host.load(Ordering::Relaxed) + (gva & PAGE_MASK)) as *mut u8));
        }
        self.watch(gva, len, Access::Read);
        match self.translate(self.privilege, gva, Access::Read)? {
            Place::Host(host) => Ok(Some(host)),
            Place::Io(_) => Ok(None),
        }
    }

    // ---- the slow path ----------------------------------------------------------------------------------------

    #[cold]
    fn read_slow<T: Int>(&mut self, privilege: Privilege, gva: u64) -> R<T> {
        let mut bytes = [0u8; 8];
        self.read_bytes_as(privilege, gva, &mut bytes[..T::BYTES as usize])?;
        Ok(T::from_u64(u64::from_le_bytes(bytes)))
    }

    /// Loads any number of bytes, which may span pages; faults before anything is read from a device.
    pub fn read_bytes(&mut self, gva: u64, data: &mut [u8]) -> R<()> {
        self.read_bytes_as(self.privilege, gva, data)
    }

    /// As [`Cpu::read_bytes`] with given rights.
    pub fn read_bytes_as(&mut self, privilege: Privilege, gva: u64, data: &mut [u8]) -> R<()> {
        self.watch(gva, data.len() as u64, Access::Read);
        self.check_span(gva, data.len() as u64)?;
        let in_first = (PAGE_SIZE - (gva & PAGE_MASK)) as usize;
        let first = self.translate(privilege, gva, Access::Read)?;
        if data.len() <= in_first {
            self.load_from(first, data);
            return Ok(());
        }
        // Look at all pages before loading from any.
        let mut offset = in_first;
        while offset < data.len() {
            self.translate(privilege, self.wrap_linear(gva + offset as u64), Access::Read)?;
            offset += PAGE_SIZE as usize;
        }
        let (head, mut rest) = data.split_at_mut(in_first);
        self.load_from(first, head);
        let mut address = gva.wrapping_add(in_first as u64);
        while !rest.is_empty() {
            let (chunk, tail) = rest.split_at_mut(rest.len().min(PAGE_SIZE as usize));
            let place = self.translate(privilege, self.wrap_linear(address), Access::Read)?;
            self.load_from(place, chunk);
            address = address.wrapping_add(PAGE_SIZE);
            rest = tail;
        }
        Ok(())
    }

    /// Stores any number of bytes, which may span pages; faults before anything is written.
    pub fn write_bytes(&mut self, gva: u64, data: &[u8]) -> R<()> {
        self.write_bytes_as(self.privilege, gva, data)
    }

    /// As [`Cpu::write_bytes`] with given rights.
    pub fn write_bytes_as(&mut self, privilege: Privilege, gva: u64, data: &[u8]) -> R<()> {
        self.watch(gva, data.len() as u64, Access::Write);
        self.check_span(gva, data.len() as u64)?;
        let in_first = (PAGE_SIZE - (gva & PAGE_MASK)) as usize;
        let first = self.translate(privilege, gva, Access::Write)?;
        if data.len() <= in_first {
            self.store_to(first, data);
            return Ok(());
        }
        let mut offset = in_first;
        while offset < data.len() {
            self.translate(privilege, self.wrap_linear(gva + offset as u64), Access::Write)?;
            offset += PAGE_SIZE as usize;
        }
        let (head, mut rest) = data.split_at(in_first);
        self.store_to(first, head);
        let mut address = gva.wrapping_add(in_first as u64);
        while !rest.is_empty() {
            let (chunk, tail) = rest.split_at(rest.len().min(PAGE_SIZE as usize));
            let place = self.translate(privilege, self.wrap_linear(address), Access::Write)?;
            self.store_to(place, chunk);
            address = address.wrapping_add(PAGE_SIZE);
            rest = tail;
        }
        Ok(())
    }

    /// Checks that a store of `len` bytes would not fault.
    pub fn probe_write(&mut self, gva: u64, len: u64) -> R<()> {
        self.check_span(gva, len)?;
        self.translate(self.privilege, gva, Access::Write)?;
        if (gva & PAGE_MASK) + len > PAGE_SIZE {
            let second_page = (gva & !PAGE_MASK).wrapping_add(PAGE_SIZE);
            self.translate(self.privilege, self.wrap_linear(second_page), Access::Write)?;
        }
        Ok(())
    }

    /// #GP, or #SS through SS, for a non-canonical address in 64-bit mode.
    #[inline]
    pub fn check_canonical(&mut self, gva: u64) -> R<()> {
        if self.is_64bit() && !Self::is_canonical(gva) {
            let raised = self.raise(Exception::gp(0));
            self.fault_noncanonical = true;
            return Err(raised);
        }
        Ok(())
    }

    /// For an operand that spans pages: canonical at both ends, before any page is looked at.
    fn check_span(&mut self, gva: u64, len: u64) -> R<()> {
        if (gva & PAGE_MASK) + len > PAGE_SIZE {
            self.check_canonical(gva)?;
            self.check_canonical(gva.wrapping_add(len - 1))?;
        }
        Ok(())
    }

    /// Whether a writable operand of at most a page lies in RAM only.
    pub fn is_ram(&mut self, gva: u64, len: u64) -> R<bool> {
        let mut last = self.wrap_linear(gva.wrapping_add(len - 1));
        if (gva & PAGE_MASK) + len <= PAGE_SIZE {
            last = gva;
        }
        let first = self.translate(self.privilege, gva, Access::Write)?;
        let last = self.translate(self.privilege, last, Access::Write)?;
        Ok(matches!((first, last), (Place::Host(_), Place::Host(_))))
    }

    /// Linear addresses are 32 bits wide outside 64-bit mode.
    #[inline(always)]
    pub fn wrap_linear(&self, gva: u64) -> u64 {
        if self.is_64bit() { gva } else { gva & 0xffff_ffff }
    }

    /// Loads bytes that lie in one page.
    pub fn load_from(&mut self, place: Place, data: &mut [u8]) {
        match place {
            Place::Host(host) => {
                // SAFETY: `translate` vouches for the page and the caller for staying inside it. Other vCPUs may write
                // at the same time; sizes up to eight bytes are copied by single loads.
                unsafe { copy_in(host, data) }
            }
            Place::Io(gpa) => {
                let mut gpa = gpa;
                for chunk in data.chunks_mut(8) {
                    self.io_read(gpa, chunk);
                    gpa += chunk.len() as u64;
                }
            }
        }
    }

    fn store_to(&mut self, place: Place, data: &[u8]) {
        match place {
            Place::Host(host) => {
                self.journal.before_store(host, data.len());
                // SAFETY: as in `load_from`; the page is writable.
                unsafe { copy_out(data, host) };
                self.note_store(host);
            }
            Place::Io(gpa) => {
                let mut gpa = gpa;
                for chunk in data.chunks(8) {
                    self.io_write(gpa, chunk);
                    gpa += chunk.len() as u64;
                }
            }
        }
    }

    /// After a store that did not go through a write tag: tells the page's record.
    pub fn note_store(&mut self, host: *mut u8) {
        let map = self.map.clone();
        if let Some((slot, gpa)) = map.find_host(host) {
            let code = slot.holds_code(gpa);
            let changes = map.code_changes();
            let more = slot.tracker().note_write(slot.page(gpa));
            if code {
                self.journal.note_code(gpa);
                self.stop_block = true;
                self.counters.code_writes += 1;
                self.code_was_written(&[gpa], Some((changes, more)));
                self.shared.tell_code_changed(self.id, gpa);
            }
        }
    }

    fn io_read(&mut self, gpa: u64, data: &mut [u8]) {
        if self.journal.keeps_from_device() {
            return;
        }
        self.counters.mmio += 1;
        if self.shared.chips.mmio_read(self.id, gpa, data) {
            return;
        }
        let io = self.shared.io.clone();
        io.mmio_read(self.id, gpa, data);
    }

    fn io_write(&mut self, gpa: u64, data: &[u8]) {
        if self.journal.keeps_from_device() {
            return;
        }
        self.counters.mmio += 1;
        if self.shared.chips.mmio_write(self.id, gpa, data) {
            return;
        }
        let io = self.shared.io.clone();
        io.mmio_write(self.id, gpa, data);
    }

    /// Records a data breakpoint hit (SDM 3B §18.2.5): the trap comes after the instruction.
    #[inline]
    fn watch(&mut self, gva: u64, len: u64, access: Access) {
        if self.watchpoints {
            self.match_watchpoints(gva, len, access);
        }
    }

    // ---- translation ------------------------------------------------------------------------------------------

    /// Translates one linear address for an access and enters it in the TLB.
    ///
    /// # Errors
    /// #PF, or #GP for a non-canonical address.
    pub fn translate(&mut self, privilege: Privilege, gva: u64, access: Access) -> R<Place> {
        self.check_canonical(gva)?;
        let walk = self.walk(privilege, gva, access)?;
        let map = self.map.clone();
        let Some(slot) = map.find(walk.gpa) else {
            return Ok(Place::Io(walk.gpa));
        };
        if access == Access::Write && !slot.writable {
            return Ok(Place::Io(walk.gpa));
        }
        let page = gva & !PAGE_MASK;
        let host = slot.host(walk.gpa);
        if access == Access::Execute {
            self.tlb().fill_code(privilege, page, host as u64 & !PAGE_MASK, walk.global);
            return Ok(Place::Host(host));
        }
        let watched = self.watchpoints && self.watchpoint_in_page(page);
        let mut write = walk.writable && slot.writable && !watched;
        let record = slot.page(walk.gpa);
        let tracker = slot.tracker();
        if write && tracker.flags(record) & CODE != 0 {
            write = false;
        }
        if write && access == Access::Write {
            tracker.note_write(record);
        } else if write && !slot.is_dirty(record) {
            // Give store permission with the first store, so that it is recorded.
            write = false;
        }
        let page_host = host as u64 & !PAGE_MASK;
        write = self.journal.permits_stores(privilege, page, page_host, write);
        self.tlb().fill(privilege, page, page_host, !watched, write, walk.global);
        if write {
            // A vCPU that decodes code sets CODE before it takes store permissions away; look again now that ours can be seen.
            std::sync::atomic::fence(Ordering::SeqCst);
            if tracker.flags(record) & CODE != 0 {
                self.tlb().drop_writes_to(page_host);
            }
        }
        Ok(Place::Host(host))
    }

    fn page_fault<T>(&mut self, privilege: Privilege, gva: u64, access: Access, bits: u32) -> R<T> {
        let mut code = bits;
        if access == Access::Write {
            code |= fault::W;
        }
        if privilege == Privilege::User {
            code |= fault::U;
        }
        let reports_fetch = self.control.efer & efer::NXE != 0 && self.control.cr4 & cr4::PAE != 0
            || self.control.cr4 & cr4::SMEP != 0;
        if access == Access::Execute && reports_fetch {
            code |= fault::I;
        }
        Err(self.raise(Exception::page_fault(gva, code)))
    }

    fn walk(&mut self, privilege: Privilege, gva: u64, access: Access) -> R<Walk> {
        if self.control.cr0 & cr0::PG == 0 {
            return Ok(Walk { gpa: gva & 0xffff_ffff, writable: true, global: false });
        }
        loop {
            let walk = if self.control.cr4 & cr4::PAE == 0 {
                self.walk_32(privilege, gva, access)?
            } else {
                self.walk_64(privilege, gva, access)?
            };
            // None: another vCPU changed an entry meanwhile.
            if let Some(walk) = walk {
                return Ok(walk);
            }
        }
    }

    /// 4-level and PAE paging: 64-bit entries (SDM 3A §4.4, §4.5).
    fn walk_64(&mut self, privilege: Privilege, gva: u64, access: Access) -> R<Option<Walk>> {
        let map = self.map.clone();
        let long = self.long_mode();
        let nxe = self.control.efer & efer::NXE != 0;
        let reserved = self.reserved_physical | if nxe { 0 } else { pte::NX };
        let mut rights = Rights::all();
        let mut table = self.control.cr3 & pte::ADDRESS;
        let mut level = 4;
        if !long {
            // The page-directory-pointer table: four entries without rights, 32-byte aligned.
            let address = (self.control.cr3 & 0xffff_ffe0) + (gva >> 30 & 3) * 8;
            let entry = map.read_u64(address).unwrap_or(u64::MAX);
            if entry & pte::P == 0 {
                return self.page_fault(privilege, gva, access, 0);
            }
            if entry & (self.reserved_physical | 0x7ff0_0000_0000_01e6 | pte::NX) != 0 {
                return self.page_fault(privilege, gva, access, fault::P | fault::RSVD);
            }
            table = entry & pte::ADDRESS;
            level = 2;
        }
        let mut visited = [(0u64, 0u64); 4];
        let mut depth = 0;
        loop {
            let shift = 12 + 9 * (level - 1);
            let address = table + (gva >> shift & 0x1ff) * 8;
            let entry = map.read_u64(address).unwrap_or(u64::MAX);
            if entry & pte::P == 0 {
                return self.page_fault(privilege, gva, access, 0);
            }
            let large = entry & pte::PS != 0 && level > 1;
            let mut bad = reserved;
            if large {
                bad |= match level {
                    2 => 0x1f_e000,
                    3 if self.has_1g_pages && long => 0x3fff_e000,
                    _ => pte::PS,
                };
            }
            if entry & bad != 0 {
                return self.page_fault(privilege, gva, access, fault::P | fault::RSVD);
            }
            rights.meet(entry);
            visited[depth] = (address, entry);
            depth += 1;
            if level == 1 || large {
                let offset = (1u64 << shift) - 1;
                let gpa = entry & pte::ADDRESS & !offset | gva & offset;
                self.check_rights(privilege, gva, access, rights)?;
                let Some(dirty) =
                    mark_used_64(&map, &mut self.journal, &visited[..depth], access == Access::Write)
                else {
                    return Ok(None);
                };
                let writable = dirty && self.may_write(privilege, rights);
                let global = entry & pte::G != 0 && self.control.cr4 & cr4::PGE != 0;
                return Ok(Some(Walk { gpa, writable, global }));
            }
            table = entry & pte::ADDRESS;
            level -= 1;
        }
    }

    /// 2-level paging: 32-bit entries (SDM 3A §4.3).
    fn walk_32(&mut self, privilege: Privilege, gva: u64, access: Access) -> R<Option<Walk>> {
        let map = self.map.clone();
        let pde_address = (self.control.cr3 & 0xffff_f000) + (gva >> 22 & 0x3ff) * 4;
        let pde = u64::from(map.read_u32(pde_address).unwrap_or(u32::MAX));
        if pde & pte::P == 0 {
            return self.page_fault(privilege, gva, access, 0);
        }
        let mut rights = Rights::all();
        rights.meet(pde);
        let mut visited = [(pde_address, pde), (0, 0)];
        let mut depth = 1;
        let (leaf, gpa) = if pde & pte::PS != 0 && self.control.cr4 & cr4::PSE != 0 {
            // PSE-36: bits 13–20 give physical bits 32–39, bit 21 is reserved.
            if pde & 1 << 21 != 0 || (pde >> 13 & 0xff) << 32 & self.reserved_physical != 0 {
                return self.page_fault(privilege, gva, access, fault::P | fault::RSVD);
            }
            (pde, (pde & 0xffc0_0000) | (pde >> 13 & 0xff) << 32 | gva & 0x3f_ffff)
        } else {
            let pte_address = (pde & 0xffff_f000) + (gva >> 12 & 0x3ff) * 4;
            let entry = u64::from(map.read_u32(pte_address).unwrap_or(u32::MAX));
            if entry & pte::P == 0 {
                return self.page_fault(privilege, gva, access, 0);
            }
            rights.meet(entry);
            visited[1] = (pte_address, entry);
            depth = 2;
            (entry, entry & 0xffff_f000 | gva & PAGE_MASK)
        };
        rights.executable = true;
        self.check_rights(privilege, gva, access, rights)?;
        let Some(dirty) = mark_used_32(&map, &mut self.journal, &visited[..depth], access == Access::Write)
        else {
            return Ok(None);
        };
        let writable = dirty && self.may_write(privilege, rights);
        let global = leaf & pte::G != 0 && self.control.cr4 & cr4::PGE != 0;
        Ok(Some(Walk { gpa, writable, global }))
    }

    fn may_write(&self, privilege: Privilege, rights: Rights) -> bool {
        rights.writable || (privilege != Privilege::User && self.control.cr0 & cr0::WP == 0)
    }

    /// Access rights (SDM 3A §4.6.1).
    fn check_rights(&mut self, privilege: Privilege, gva: u64, access: Access, rights: Rights) -> R<()> {
        let allowed = if privilege == Privilege::User {
            rights.user
                && match access {
                    Access::Read => true,
                    Access::Write => rights.writable,
                    Access::Execute => rights.executable,
                }
        } else {
            let smap = self.control.cr4 & cr4::SMAP != 0 && privilege == Privilege::Supervisor;
            let smep = self.control.cr4 & cr4::SMEP != 0;
            match access {
                Access::Execute => rights.executable && !(rights.user && smep),
                Access::Read => !(rights.user && smap),
                Access::Write => self.may_write(privilege, rights) && !(rights.user && smap),
            }
        };
        if allowed { Ok(()) } else { self.page_fault(privilege, gva, access, fault::P) }
    }
}

/// Rights accumulated over the levels of a walk.
#[derive(Clone, Copy)]
struct Rights {
    user: bool,
    writable: bool,
    executable: bool,
}

impl Rights {
    fn all() -> Self {
        Rights { user: true, writable: true, executable: true }
    }

    fn meet(&mut self, entry: u64) {
        self.user &= entry & pte::US != 0;
        self.writable &= entry & pte::RW != 0;
        self.executable &= entry & pte::NX == 0;
    }
}

/// Sets the accessed bits, and the dirty bit of the leaf for a store. Returns whether the leaf is dirty, or `None` if
/// an entry is no longer what the walk saw.
fn mark_used_64(map: &MemoryMap, journal: &mut Journal, visited: &[(u64, u64)], write: bool) -> Option<bool> {
    let last = visited.len() - 1;
    let mut dirty = false;
    for (index, &(address, entry)) in visited.iter().enumerate() {
        let mut wanted = entry | pte::A;
        if index == last {
            if write {
                wanted |= pte::D;
            }
            dirty = wanted & pte::D != 0;
        }
        if wanted != entry {
            let slot = map.find(address)?;
            // SAFETY: an aligned word inside the slot.
            let cell = unsafe { AtomicU64::from_ptr(slot.host(address).cast()) };
            journal.before_mark(slot.host(address), size_of::<u64>());
            cell.compare_exchange(entry, wanted, Ordering::SeqCst, Ordering::SeqCst).ok()?;
            slot.tracker().note_write(slot.page(address));
        }
    }
    Some(dirty)
}

/// As [`mark_used_64`] for 32-bit entries.
fn mark_used_32(map: &MemoryMap, journal: &mut Journal, visited: &[(u64, u64)], write: bool) -> Option<bool> {
    let last = visited.len() - 1;
    let mut dirty = false;
    for (index, &(address, entry)) in visited.iter().enumerate() {
        let mut wanted = entry | pte::A;
        if index == last {
            if write {
                wanted |= pte::D;
            }
            dirty = wanted & pte::D != 0;
        }
        if wanted != entry {
            let slot = map.find(address)?;
            // SAFETY: an aligned word inside the slot.
            let cell = unsafe { AtomicU32::from_ptr(slot.host(address).cast()) };
            journal.before_mark(slot.host(address), size_of::<u32>());
            cell.compare_exchange(entry as u32, wanted as u32, Ordering::SeqCst, Ordering::SeqCst).ok()?;
            slot.tracker().note_write(slot.page(address));
        }
    }
    Some(dirty)
}

/// Copies guest bytes out, by one load where the size allows.
///
/// # Safety
/// `host` must be readable for `data.len()` bytes.
unsafe fn copy_in(host: *const u8, data: &mut [u8]) {
    // SAFETY: the caller's promise.
    unsafe {
        match data.len() {
            2 => data.copy_from_slice(&host.cast::<u16>().read_unaligned().to_le_bytes()),
            4 => data.copy_from_slice(&host.cast::<u32>().read_unaligned().to_le_bytes()),
            8 => data.copy_from_slice(&host.cast::<u64>().read_unaligned().to_le_bytes()),
            len => std::ptr::copy_nonoverlapping(host, data.as_mut_ptr(), len),
        }
    }
}

/// Copies bytes into the guest, by one store where the size allows.
///
/// # Safety
/// `host` must be writable for `data.len()` bytes.
unsafe fn copy_out(data: &[u8], host: *mut u8) {
    // SAFETY: the caller's promise; the source slices have the matched length.
    unsafe {
        match data.len() {
            2 => host.cast::<u16>().write_unaligned(data.as_ptr().cast::<u16>().read_unaligned()),
            4 => host.cast::<u32>().write_unaligned(data.as_ptr().cast::<u32>().read_unaligned()),
            8 => host.cast::<u64>().write_unaligned(data.as_ptr().cast::<u64>().read_unaligned()),
            len => std::ptr::copy_nonoverlapping(data.as_ptr(), host, len),
        }
    }
}

/// Atomic read-modify-write of an aligned value; returns the old value.
///
/// # Safety
/// `host` must be aligned and good for reads and writes of `T`.
unsafe fn fetch_update<T: Int>(host: *mut u8, apply: impl Fn(u64) -> u64) -> u64 {
    use std::sync::atomic::{AtomicU8, AtomicU16};
    const ORDER: Ordering = Ordering::SeqCst;
    // The closures always return Some, so both arms of the result are the old value.
    macro_rules! update {
        ($atomic:ty, $int:ty) => {{
            // SAFETY: the caller's promise.
            let cell = unsafe { <$atomic>::from_ptr(host.cast()) };
            let result = cell.fetch_update(ORDER, ORDER, |old| Some(apply(u64::from(old)) as $int));
            u64::from(result.unwrap_or_else(|old| old))
        }};
    }
    match T::BYTES {
        1 => update!(AtomicU8, u8),
        2 => update!(AtomicU16, u16),
        4 => update!(AtomicU32, u32),
        _ => update!(AtomicU64, u64),
    }
}
