//! An NVM Express controller with one namespace (NVM Express Base Specification 1.4), bhyve's `nvme`.
//!
//! A doorbell write takes the new commands off their queue, under the lock, and carries them out, without it. Commands on the disk end
//! whenever they end, on any thread; their completions are posted under the lock again.

mod admin;
pub mod bits;
mod command;
mod identify;
mod io;
mod queues;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};

use block::{Buffers, Disk, Operation, Request};
use memory::GuestMemory;
use serde::{Deserialize, Serialize};

use crate::access::{lock, merge, store_from};
use crate::pci::bits::class;
use crate::pci::config::ConfigError;
use crate::pci::{
    BarKind, BarSpec, ConfigSpace, IntxPin, PciDevice, PciFunction, PciFunctionState, PciIdentity,
};
use crate::snapshot::{Persist, SnapshotError};
use bits::{Status, cap, cc, csts, register, size};
use command::Command;
use queues::{Completion, CompletionQueue, SubmissionQueue};

/// bhyve's identity of the device.
pub const IDENTITY: PciIdentity = PciIdentity {
    vendor: 0xfb5d,
    device: 0x0a0a,
    revision: 0,
    class: class::NVME,
    subsystem_vendor: 0xfb5d,
    subsystem: 0x0a0a,
};

const REGISTER_BAR: usize = 0;
const MSIX_BAR: usize = 4;
/// The most queues beside the admin queue: what fits into BAR 0.
pub const MAX_QUEUES: u16 = 64;
/// The logarithm of the pages of one transfer: 1 MiB.
const MDTS: u8 = 8;
/// Asynchronous event requests that may wait.
const MAX_ASYNC_EVENTS: usize = 4;

/// How a controller is made.
#[derive(Clone, Debug)]
pub struct NvmeConfig {
    /// I/O queues: submission and completion each (`maxq`), 1 to [`MAX_QUEUES`].
    pub max_queues: u16,
    /// Entries of a queue at most (`qsz`), at least 2.
    pub queue_size: u16,
    /// Commands of a queue that are carried out at a time (`ioslots`).
    pub io_slots: u16,
    /// Bytes of a logical block (`sectsz`): 512, 4096 or 8192.
    pub block_bytes: u32,
    /// Serial number: up to 20 ASCII characters (`ser`).
    pub serial: String,
    /// IEEE Extended Unique Identifier of the namespace (`eui64`).
    pub eui64: u64,
    /// Dataset management is offered (`dsm`).
    pub dataset_management: bool,
}

/// Registers, queues and what the driver has set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    /// Counts the controller's lives: what ends after a reset is not posted.
    #[serde(skip)]
    life: u64,
    interrupt_mask: u32,
    configuration: u32,
    status: u32,
    admin_queue_sizes: u32,
    admin_submission: u64,
    admin_completion: u64,
    submission: BTreeMap<u16, SubmissionQueue>,
    completion: BTreeMap<u16, CompletionQueue>,
    features: BTreeMap<u8, u32>,
    async_events: Vec<u16>,
    namespace_changed: bool,
    /// The driver has been told and has not looked.
    namespace_told: bool,
    errors: u64,
}

/// The controller.
pub struct Nvme {
    function: PciFunction,
    disk: Arc<Disk>,
    memory: GuestMemory,
    config: NvmeConfig,
    state: Mutex<State>,
    own: Weak<Nvme>,
}

/// Registers of an [`Nvme`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NvmeState {
    function: PciFunctionState,
    controller: State,
}

/// A command on its way, and what finds its way back.
#[derive(Clone, Copy, Debug)]
struct Tag {
    life: u64,
    queue: u16,
    command: u16,
}

impl Nvme {
    /// A controller.
    ///
    /// # Errors
    /// None in practice: BARs and capabilities fit.
    pub fn new(
        disk: Arc<Disk>,
        memory: GuestMemory,
        identity: PciIdentity,
        config: NvmeConfig,
    ) -> Result<Arc<Self>, ConfigError> {
        let vectors = config.max_queues + 1;
        let mut space = ConfigSpace::new(identity);
        let bytes = register::DOORBELLS + 8 * u64::from(MAX_QUEUES + 1);
        let kind = BarKind::Memory64 { prefetchable: false };
        space.add_bar(BarSpec { index: REGISTER_BAR, kind, size: bytes.next_power_of_two() })?;
        space.add_bar(BarSpec {
            index: MSIX_BAR,
            kind: BarKind::Memory32 { prefetchable: false },
            size: 4096,
        })?;
        space.add_express_capability(crate::pci::bits::express::ROOT_COMPLEX_ENDPOINT)?;
        space.add_msi_capability(1)?;
        space.add_msix_capability(vectors, MSIX_BAR, 0, 2048)?;
        let function = PciFunction::new(space, Some(IntxPin::A));
        let state = Mutex::default();
        Ok(Arc::new_cyclic(|own| Nvme { function, disk, memory, config, state, own: own.clone() }))
    }

    /// Its disk.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// The disk has another size: tells a driver that wants to know.
    pub fn resized(&self) {
        let mut state = lock(&self.state);
        state.namespace_changed = true;
        self.tell_namespace(&mut state);
        drop(state);
    }

    fn capabilities(&self) -> u64 {
        /// Enabling is done at once; drivers may wait this long.
        const TIMEOUT: u64 = 10;
        u64::from(self.config.queue_size - 1) | cap::CQR | TIMEOUT << cap::TO_SHIFT | cap::CSS_NVM
    }

    fn register(&self, state: &State, offset: u64) -> u64 {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        match offset {
            register::CAP => self.capabilities(),
            register::VS => pair(bits::VERSION, state.interrupt_mask),
            register::INTMC => pair(state.interrupt_mask, state.configuration),
            0x18 => pair(0, state.status),
            0x20 => pair(0, state.admin_queue_sizes),
            register::ASQ => state.admin_submission,
            register::ACQ => state.admin_completion,
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, data: &[u8]) {
        let mut state = lock(&self.state);
        let old = self.register(&state, offset & !7);
        let word = merge(old, data, offset & 7);
        let high = (word >> 32) as u32;
        match offset {
            register::INTMS => {
                state.interrupt_mask |= merge(0, data, 0) as u32;
                self.drive_pin(&state);
            }
            register::INTMC => {
                state.interrupt_mask &= !(merge(0, data, 0) as u32);
                self.drive_pin(&state);
            }
            register::CC => {
                drop(state);
                self.configure(high & cc::MASK);
            }
            register::AQA => state.admin_queue_sizes = high & 0x0fff_0fff,
            register::ASQ..register::ACQ => state.admin_submission = word & !(size::PAGE - 1),
            register::ACQ..register::END => state.admin_completion = word & !(size::PAGE - 1),
            // Status, and a subsystem reset that is not there, are not written.
            _ => {}
        }
    }

    /// The driver writes the configuration: enables, resets or shuts down.
    fn configure(&self, new: u32) {
        let old = std::mem::replace(&mut lock(&self.state).configuration, new);
        if new & cc::EN == 0 && old & cc::EN != 0 {
            self.reset();
        }
        if new & cc::EN != 0 && old & cc::EN == 0 {
            self.enable();
        }
        if new & cc::SHN_MASK != 0 && old & cc::SHN_MASK == 0 {
            self.shut_down();
        }
    }

    fn enable(&self) {
        let mut state = lock(&self.state);
        let sizes = state.admin_queue_sizes;
        let (submission, completion) = ((sizes & 0xfff) as u16 + 1, (sizes >> 16 & 0xfff) as u16 + 1);
        if state.configuration & cc::ZERO != 0 || submission < 2 || completion < 2 {
            state.status = csts::CFS;
            return;
        }
        let (submission_base, completion_base) = (state.admin_submission, state.admin_completion);
        state.submission.insert(0, SubmissionQueue::new(submission_base, submission, 0));
        let mut queue = CompletionQueue::new(completion_base, completion, true, 0);
        queue.users = 1;
        state.completion.insert(0, queue);
        state.status = csts::RDY;
    }

    /// A controller reset (§7.3.2): what is on its way ends first, so that no memory is written after it.
    fn reset(&self) {
        {
            let mut state = lock(&self.state);
            state.life += 1;
            state.status &= !csts::RDY;
            state.submission.clear();
        }
        self.disk.abort();
        let mut state = lock(&self.state);
        let kept = std::mem::take(&mut *state);
        *state = State {
            life: kept.life,
            configuration: kept.configuration,
            admin_queue_sizes: kept.admin_queue_sizes,
            admin_submission: kept.admin_submission,
            admin_completion: kept.admin_completion,
            errors: kept.errors,
            ..State::default()
        };
        self.function.clear_pending_messages();
        self.drive_pin(&state);
    }

    /// A shutdown is complete when everything is stable (§7.6.2).
    fn shut_down(&self) {
        let life = {
            let mut state = lock(&self.state);
            state.status = state.status & !csts::SHST_MASK | csts::SHST_OCCURRING;
            state.life
        };
        let own = self.own.clone();
        self.disk.submit(Request {
            operation: Operation::Flush,
            offset: 0,
            len: 0,
            buffers: Buffers::NONE,
            done: Box::new(move |_| {
                if let Some(nvme) = own.upgrade() {
                    let mut state = lock(&nvme.state);
                    if state.life == life {
                        state.status = state.status & !csts::SHST_MASK | csts::SHST_COMPLETE;
                    }
                }
            }),
        });
    }

    fn doorbell(&self, index: u64, value: u32) {
        let (queue, completion) = ((index / 2) as u16, index % 2 == 1);
        let value = value as u16;
        let mut state = lock(&self.state);
        let State { submission, completion: completions, .. } = &mut *state;
        if completion {
            let Some(queue) = completions.get_mut(&queue).filter(|queue| value < queue.size) else { return };
            queue.head = value;
            let posted = queue.write_waiting(&self.memory);
            let vector = (posted && queue.interrupts).then_some(queue.vector);
            self.interrupt(&state, vector);
            return;
        }
        let Some(found) = submission.get_mut(&queue).filter(|queue| value < queue.size) else { return };
        found.tail = value;
        drop(state);
        self.work(queue);
    }

    /// Carries out what is in a submission queue. One caller at a time; others leave it to that one.
    fn work(&self, id: u16) {
        let mut mine = None;
        loop {
            let (tag, command) = {
                let mut state = lock(&self.state);
                let life = state.life;
                let enabled = state.status & (csts::RDY | csts::CFS) == csts::RDY;
                let Some(queue) = state.submission.get_mut(&id) else { return };
                // Taken by another, or not the queue of this name any more that we had taken.
                if queue.busy && mine != Some(life) || mine.is_some_and(|mine| mine != life) {
                    return;
                }
                mine = Some(life);
                let may = enabled && self.function.bus_master();
                let fetched = if may { queue.fetch(&self.memory, self.config.io_slots) } else { Ok(None) };
                match fetched {
                    Ok(Some(command)) => {
                        queue.busy = true;
                        (Tag { life, queue: id, command: command.id() }, command)
                    }
                    Ok(None) => {
                        queue.busy = false;
                        return;
                    }
                    // A queue that cannot be read: nothing can go on (§9.5).
                    Err(_) => {
                        state.status |= csts::CFS;
                        return;
                    }
                }
            };
            if id == 0 { self.admin(tag, &command) } else { self.io(tag, &command) }
        }
    }

    /// Posts the end of a command.
    fn complete(&self, tag: Tag, status: Status, result: u32) {
        let mut state = lock(&self.state);
        if state.life != tag.life {
            return;
        }
        state.errors += u64::from(status != Status::SUCCESS);
        let State { submission, completion, .. } = &mut *state;
        let Some(queue) = submission.get_mut(&tag.queue) else { return };
        queue.in_flight = queue.in_flight.saturating_sub(1);
        let more = !queue.busy && queue.head != queue.tail;
        let entry = Completion {
            result,
            queue: tag.queue,
            queue_head: queue.head,
            command: tag.command,
            status: status.field(),
        };
        let Some(to) = completion.get_mut(&queue.completions) else { return };
        let posted = to.post(&self.memory, entry);
        let vector = (posted && to.interrupts).then_some(to.vector);
        self.interrupt(&state, vector);
        drop(state);
        if more {
            self.work(tag.queue);
        }
    }

    /// Interrupts for a vector, by whatever way the driver has chosen.
    fn interrupt(&self, state: &State, vector: Option<u16>) {
        if !self.function.sends_messages() {
            return self.drive_pin(state);
        }
        let Some(vector) = vector else { return };
        // With MSI there is one message, and the mask register holds (§3.1.3).
        let one = self.function.vectors() == 1;
        if !one || state.interrupt_mask & 1 == 0 {
            self.function.send(if one { 0 } else { vector });
        }
    }

    /// The pin follows the queues: asserted while one that interrupts has entries.
    fn drive_pin(&self, state: &State) {
        let wants = |queue: &CompletionQueue| {
            queue.interrupts
                && !queue.is_empty()
                && state.interrupt_mask & 1u32.checked_shl(queue.vector.into()).unwrap_or(0) == 0
        };
        let asserted = !self.function.sends_messages() && state.completion.values().any(wants);
        self.function.set_intx(asserted);
    }
}

impl PciDevice for Nvme {
    fn function(&self) -> &PciFunction {
        &self.function
    }

    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match bar {
            REGISTER_BAR if offset < register::END => {
                let word = self.register(&lock(&self.state), offset & !7);
                store_from(data, word, offset & 7);
            }
            MSIX_BAR => {
                self.function.msix_read(offset, data);
            }
            // Doorbells read as anything (§3.1.24).
            _ => {}
        }
    }

    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        match bar {
            REGISTER_BAR if offset < register::END && matches!(data.len(), 4 | 8) => {
                self.write_register(offset, data);
            }
            REGISTER_BAR if offset >= register::DOORBELLS && offset.is_multiple_of(4) && data.len() == 4 => {
                self.doorbell((offset - register::DOORBELLS) / 4, merge(0, data, 0) as u32);
            }
            MSIX_BAR => {
                self.function.msix_write(offset, data);
            }
            _ => {}
        }
    }
}

impl Persist for Nvme {
    type State = NvmeState;
    const VERSION: u32 = 1;

    fn save(&self) -> NvmeState {
        NvmeState { function: self.function.save(), controller: lock(&self.state).clone() }
    }

    fn restore(&self, state: NvmeState) -> Result<(), SnapshotError> {
        let controller = state.controller;
        let most = self.config.max_queues;
        let sound = controller.submission.iter().all(|(id, queue)| {
            *id <= most
                && queue.size >= 2
                && queue.head < queue.size
                && queue.tail < queue.size
                && controller.completion.contains_key(&queue.completions)
        }) && controller.completion.iter().all(|(id, queue)| {
            *id <= most && queue.size >= 2 && queue.head < queue.size && queue.tail < queue.size
        });
        if !sound {
            return Err(SnapshotError::Invalid("nvme: queues that cannot be".into()));
        }
        self.function.restore(&state.function, &[])?;
        let mut own = lock(&self.state);
        let life = own.life + 1;
        *own = State { life, ..controller };
        self.drive_pin(&own);
        Ok(())
    }
}
