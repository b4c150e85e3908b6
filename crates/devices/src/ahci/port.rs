//! A port: its registers, the frames that come from its device, and what becomes of commands (§3.3, §5).
//!
//! Commands run elsewhere ([`super::job`]). A port knows which of its slots have one on its way, and which life of the port it was
//! started in. Clearing ST, COMRESET, SRST, an HBA reset and the failure of a queued command begin a new life: what is still on its
//! way then ends without a trace in registers or received frames. As its data may still move, the port shows CR, starts no command
//! and lets the device not come out of a reset until the last of them has ended.

use memory::GuestMemory;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::ata::bits::{CONTROL_SRST, status};
use super::bits::{SLOTS, cmd, fis, header, interrupt, port, received, sctl, serr, ssts, table};
use super::device::{Command, Device, DeviceState, Failure, Outcome, Plan, Protocol, Todo, Worker};
use super::job::{End, Job, Ticket};
use super::prdt::Prdt;

/// Status of a port that no device talks to (§3.3.8).
const NO_DEVICE: u8 = 0x7f;
/// Signature before a device has sent it.
const NO_SIGNATURE: u32 = u32::MAX;

/// Memory that the device may access at present: none without bus mastering.
pub(super) type Dma<'a> = Option<&'a GuestMemory>;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    command_list: u64,
    received_frames: u64,
    /// Latched bits.
    interrupt_status: u32,
    interrupt_enable: u32,
    /// Bits that software writes.
    command: u32,
    status: u8,
    error: u8,
    signature: u32,
    control: u32,
    link_error: u32,
    active: u32,
    issue: u32,
    /// The slot that was started last since ST was set.
    slot: Option<u8>,
    /// An error has stopped the processing of commands until ST is cleared.
    stopped: bool,
    /// SRST is set.
    software_reset: bool,
    /// The device has been reset and has not yet sent its signature.
    signature_due: bool,
    /// The command that ends when it does.
    signature_slot: Option<u8>,
}

/// Registers of a port and its device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortState {
    registers: Registers,
    device: Option<DeviceState>,
}

/// A port.
pub(super) struct Port {
    registers: Registers,
    device: Option<Device>,
    /// Slots whose command is on its way.
    running: u32,
    life: u64,
    /// Commands of earlier lives that are on their way.
    orphans: u32,
    /// Somebody is starting commands.
    pub dispatching: bool,
}

/// A command that is to be started.
pub(super) struct Start {
    pub slot: u8,
    pub life: u64,
    pub command: Command,
    pub plan: Plan,
    pub worker: Worker,
    pub header: u64,
    pub prdt: Prdt,
}

/// What has become of the next command.
pub(super) enum Fetched {
    /// There is none, or it has to wait.
    Nothing,
    /// It has ended.
    Ended,
    Start(Box<Start>),
}

impl Port {
    /// A port after power-up.
    pub fn new(device: Option<Device>) -> Self {
        let registers = Registers {
            command_list: 0,
            received_frames: 0,
            interrupt_status: 0,
            interrupt_enable: 0,
            command: 0,
            status: NO_DEVICE,
            error: 0,
            signature: NO_SIGNATURE,
            control: 0,
            link_error: 0,
            active: 0,
            issue: 0,
            slot: None,
            stopped: false,
            software_reset: false,
            signature_due: false,
            signature_slot: None,
        };
        let mut port = Port { registers, device, running: 0, life: 0, orphans: 0, dispatching: false };
        port.link_up(serr::X);
        port
    }

    pub fn device_mut(&mut self) -> Option<&mut Device> {
        self.device.as_mut()
    }

    /// Commands of earlier lives are on their way.
    pub fn has_orphans(&self) -> bool {
        self.orphans > 0
    }

    /// Whether a life is the present one.
    pub fn lives(&self, life: u64) -> bool {
        self.life == life
    }

    fn is(&self, bit: u32) -> bool {
        self.registers.command & bit != 0
    }

    fn link_is_up(&self) -> bool {
        self.device.is_some() && self.registers.control & sctl::DET == 0
    }

    fn interrupt_status(&self) -> u32 {
        let error = self.registers.link_error;
        let shows = |bit, interrupt| if error & bit != 0 { interrupt } else { 0 };
        self.registers.interrupt_status | shows(serr::X, interrupt::PCS) | shows(serr::N, interrupt::PRCS)
    }

    /// Whether it wants an interrupt.
    pub fn interrupts(&self) -> bool {
        self.interrupt_status() & self.registers.interrupt_enable != 0
    }

    /// Software reads a register.
    pub fn read(&self, offset: u32) -> u32 {
        let registers = &self.registers;
        match offset {
            port::CLB => registers.command_list as u32,
            port::CLBU => (registers.command_list >> 32) as u32,
            port::FB => registers.received_frames as u32,
            port::FBU => (registers.received_frames >> 32) as u32,
            port::IS => self.interrupt_status(),
            port::IE => registers.interrupt_enable,
            port::CMD => {
                let shows = |on: bool, bit| if on { bit } else { 0 };
                registers.command
                    | cmd::SUD
                    | cmd::POD
                    | u32::from(registers.slot.unwrap_or(0)) << cmd::CCS_SHIFT
                    | shows(self.is(cmd::FRE), cmd::FR)
                    | shows(self.is(cmd::ST) || self.has_orphans(), cmd::CR)
            }
            port::TFD => u32::from(registers.status) | u32::from(registers.error) << 8,
            port::SIG => registers.signature,
            port::SSTS => self.link_status(),
            port::SCTL => registers.control,
            port::SERR => registers.link_error,
            port::SACT => registers.active,
            port::CI => registers.issue,
            _ => 0,
        }
    }

    fn link_status(&self) -> u32 {
        match self.registers.control & sctl::DET {
            sctl::DET_OFF => ssts::DET_OFF,
            0 if self.device.is_some() => {
                let allowed = self.registers.control >> sctl::SPEED_SHIFT & 0xf;
                let speed = if (1..ssts::SPEED_GEN3).contains(&allowed) { allowed } else { ssts::SPEED_GEN3 };
                ssts::DET_READY | speed << ssts::SPEED_SHIFT | ssts::IPM_ACTIVE
            }
            _ => 0,
        }
    }

    /// Software writes a register. `value` is the register as it would be then, `ones` has only what was written: for registers
    /// whose bits are set or cleared by ones.
    pub fn write(&mut self, offset: u32, value: u32, ones: u32, dma: Dma<'_>) {
        let registers = &mut self.registers;
        let low = |old: u64, mask: u32| old >> 32 << 32 | u64::from(value & mask);
        let high = |old: u64| old & u64::from(u32::MAX) | u64::from(value) << 32;
        match offset {
            port::CLB => registers.command_list = low(registers.command_list, port::CLB_MASK),
            port::CLBU => registers.command_list = high(registers.command_list),
            port::FB => registers.received_frames = low(registers.received_frames, port::FB_MASK),
            port::FBU => registers.received_frames = high(registers.received_frames),
            port::IS => registers.interrupt_status &= !ones,
            port::IE => registers.interrupt_enable = value & interrupt::ENABLES,
            port::CMD => self.write_command(value),
            port::SCTL => self.write_control(value & sctl::WRITABLE),
            port::SERR => registers.link_error &= !ones,
            port::SACT if self.is(cmd::ST) => self.registers.active |= ones,
            port::CI if self.is(cmd::ST) => self.registers.issue |= ones,
            _ => {}
        }
        self.send_signature(dma);
    }

    fn write_command(&mut self, value: u32) {
        let ran = self.is(cmd::ST);
        self.registers.command = value & cmd::WRITABLE;
        if ran && !self.is(cmd::ST) {
            self.abandon();
            self.registers.issue = 0;
            self.registers.active = 0;
            self.registers.slot = None;
            self.registers.stopped = false;
            self.registers.signature_slot = None;
        }
        if value & cmd::CLO != 0 && !ran && self.link_is_up() {
            self.registers.status &= !(status::BSY | status::DRQ);
        }
    }

    fn write_control(&mut self, value: u32) {
        let detect = |control: u32| control & sctl::DET;
        let old = std::mem::replace(&mut self.registers.control, value);
        match (detect(old), detect(value)) {
            (old, new) if old == new => {}
            (_, 0) => self.link_up(serr::X | serr::N),
            // COMRESET, or no link at all.
            (_, sctl::DET_RESET | sctl::DET_OFF) => self.link_down(),
            // Other values are reserved and do nothing.
            _ => self.registers.control = value & !sctl::DET | detect(old),
        }
    }

    fn link_down(&mut self) {
        self.abandon();
        self.registers.status = NO_DEVICE;
        self.registers.error = 0;
        self.registers.signature = NO_SIGNATURE;
        self.registers.signature_due = false;
        self.registers.signature_slot = None;
        self.registers.software_reset = false;
        if let Some(device) = &mut self.device {
            device.hard_reset();
        }
    }

    /// The device is found again; it is busy until it sends its signature.
    fn link_up(&mut self, changes: u32) {
        if self.device.is_some() {
            self.registers.link_error |= changes;
            self.registers.status = status::BSY;
            self.registers.signature_due = true;
        }
    }

    /// An HBA reset: everything but the addresses of command list and received frames (§10.4.3).
    pub fn reset(&mut self) {
        self.link_down();
        let Registers { command_list, received_frames, .. } = self.registers;
        self.registers.interrupt_status = 0;
        self.registers.interrupt_enable = 0;
        self.registers.command = 0;
        self.registers.control = 0;
        self.registers.link_error = 0;
        self.registers.active = 0;
        self.registers.issue = 0;
        self.registers.slot = None;
        self.registers.stopped = false;
        self.registers.command_list = command_list;
        self.registers.received_frames = received_frames;
        self.link_up(serr::X);
    }

    /// Begins a new life.
    fn abandon(&mut self) {
        self.orphans += self.running.count_ones();
        self.running = 0;
        self.life += 1;
    }

    /// A command of an earlier life has ended.
    pub fn orphan_ended(&mut self, dma: Dma<'_>) {
        self.orphans = self.orphans.saturating_sub(1);
        if self.orphans == 0 && self.registers.status & status::BSY != 0 && !self.registers.signature_due {
            // The device has nothing to do any more.
            self.registers.status &= !(status::BSY | status::DRQ);
        }
        self.send_signature(dma);
    }

    /// Has the device end its reset, once it can and there is where to put the frame.
    pub fn send_signature(&mut self, dma: Dma<'_>) {
        let Some(device) = &self.device else { return };
        if !self.registers.signature_due || self.has_orphans() || !self.is(cmd::FRE) {
            return;
        }
        let outcome = device.signature();
        self.registers.signature_due = false;
        // Bits 7:0 are the count, the address follows (§3.3.9).
        self.registers.signature = (outcome.lba as u32) << 8 | u32::from(outcome.count as u8);
        self.registers_frame(outcome, false, dma);
        if let Some(slot) = self.registers.signature_slot.take() {
            self.registers.issue &= !(1 << slot);
        }
    }

    /// Memory cannot be accessed, or a frame not be exchanged: the port stops (§6.2.2).
    fn fault(&mut self, interrupt: u32) {
        self.registers.interrupt_status |= interrupt;
        self.registers.stopped = true;
    }

    /// Puts a frame where received frames go.
    fn receive(&mut self, offset: u64, frame: &[u8], dma: Dma<'_>) {
        let Some(memory) = dma.filter(|_| self.is(cmd::FRE)) else { return };
        // The base is aligned to the area's size, so this does not overflow.
        let address = GuestAddress(self.registers.received_frames | offset);
        if memory.write_slice(frame, address).is_err() {
            self.fault(interrupt::HBFS);
        }
    }

    fn show(&mut self, status: u8, error: u8) {
        self.registers.status = status;
        self.registers.error = error;
        if status & status::ERR != 0 {
            self.registers.interrupt_status |= interrupt::TFES;
            self.registers.stopped = true;
        }
    }

    /// The device sends its registers.
    fn registers_frame(&mut self, outcome: Outcome, interrupt: bool, dma: Dma<'_>) {
        self.receive(received::D2H, &outcome.to_fis(interrupt), dma);
        self.show(outcome.status, outcome.error);
        if interrupt {
            self.registers.interrupt_status |= interrupt::DHRS;
        }
    }

    /// The device announces a block of data by PIO (SATA 3.1 §10.5.11). `end` is its status once the block is through.
    fn pio_setup_frame(&mut self, outcome: Outcome, to_host: bool, end: u8, count: u16, dma: Dma<'_>) {
        let mut frame = outcome.to_fis(false);
        frame[0] = fis::PIO_SETUP;
        frame[1] = if to_host { fis::TO_HOST | fis::INTERRUPT } else { 0 };
        frame[2] = status::GOOD | status::DRQ;
        frame[15] = end;
        frame[16..18].copy_from_slice(&count.to_le_bytes());
        self.receive(received::PIO_SETUP, &frame, dma);
    }

    /// The device announces the data of a queued command (SATA 3.1 §10.5.9).
    fn dma_setup_frame(&mut self, slot: u8, to_host: bool, count: u64, dma: Dma<'_>) {
        let mut frame = [0; 28];
        frame[0] = fis::DMA_SETUP;
        frame[1] = if to_host { fis::TO_HOST } else { 0 };
        frame[4] = slot;
        frame[20..24].copy_from_slice(&u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes());
        self.receive(received::DMA_SETUP, &frame, dma);
    }

    /// Queued commands have ended (SATA 3.1 §10.5.7).
    fn set_device_bits_frame(&mut self, ended: u32, status: u8, error: u8, dma: Dma<'_>) {
        let mut frame = [0; 8];
        frame[0] = fis::SET_DEVICE_BITS;
        frame[1] = fis::INTERRUPT;
        frame[2] = status & status::SET_DEVICE_BITS;
        frame[3] = error;
        frame[4..8].copy_from_slice(&ended.to_le_bytes());
        self.receive(received::SET_DEVICE_BITS, &frame, dma);
        let kept = self.registers.status & !status::SET_DEVICE_BITS;
        self.show(kept | status & status::SET_DEVICE_BITS, error);
        self.registers.active &= !ended;
        self.registers.interrupt_status |= interrupt::SDBS;
    }

    fn may_fetch(&self) -> bool {
        let registers = &self.registers;
        let wanted = cmd::ST | cmd::FRE;
        registers.command & wanted == wanted
            && registers.issue != 0
            && !registers.stopped
            && !registers.signature_due
            && !self.has_orphans()
            && registers.status & (status::BSY | status::DRQ) == 0
            && self.link_is_up()
    }

    /// Takes the next command, in the order of slots (§5.3.2).
    pub fn fetch(&mut self, dma: Dma<'_>, now_ns: u64) -> Fetched {
        let Some(memory) = dma.filter(|_| self.may_fetch()) else { return Fetched::Nothing };
        let after = self.registers.slot.map_or(0, |slot| (slot + 1) % SLOTS);
        let ahead = self.registers.issue.rotate_right(after.into()).trailing_zeros();
        let slot = (after + ahead as u8) % SLOTS;
        let header = self.registers.command_list | (u64::from(slot) * header::BYTES);
        let Some((flags, table_address, frame, packet)) = read_command(memory, header) else {
            self.registers.slot = Some(slot);
            self.fault(interrupt::HBFS);
            return Fetched::Ended;
        };
        if flags & header::CFL < fis::REGISTER_DWORDS || frame[0] != fis::H2D {
            // The device refuses it.
            self.registers.slot = Some(slot);
            self.fault(interrupt::IFS);
            return Fetched::Ended;
        }
        if frame[1] & fis::COMMAND == 0 {
            self.registers.slot = Some(slot);
            self.control(slot, frame[15], flags & header::CLEAR_BUSY != 0, dma);
            return Fetched::Ended;
        }
        let command = Command::from_fis(&frame);
        if !command.queued() && self.running != 0 {
            // A disk would abort everything. Who mixes the two gets what was meant: one after the other.
            return Fetched::Nothing;
        }
        self.registers.slot = Some(slot);
        if self.registers.software_reset {
            self.end(slot, command.failed(super::ata::bits::error::ABRT), dma);
            return Fetched::Ended;
        }
        let Some(device) = &mut self.device else { return Fetched::Nothing };
        let plan = device.begin(&command, packet, now_ns);
        let worker = device.worker();
        if command.queued() {
            // A tag is a slot, and one that is in use cannot be given to another command.
            if plan.outcome.is_error() || command.tag() != slot || self.running & 1 << slot != 0 {
                let failed = command.failed(super::ata::bits::error::ABRT);
                let outcome = if plan.outcome.is_error() { plan.outcome } else { failed };
                self.accept(slot, dma);
                self.queue_failed(slot, outcome, dma);
                return Fetched::Ended;
            }
            self.accept(slot, dma);
            let (to_host, count) = match plan.todo {
                Todo::Access { write, len, .. } => (!write, len),
                Todo::Trim { list_bytes } => (false, list_bytes as u64),
                _ => (false, 0),
            };
            self.dma_setup_frame(slot, to_host, count, dma);
        } else {
            if matches!(plan.todo, Todo::Nothing) {
                self.end(slot, plan.outcome, dma);
                return Fetched::Ended;
            }
            if let (Protocol::PioOut(block), Todo::Access { len, .. }) = (plan.protocol, &plan.todo) {
                let first = u64::from(block).min(*len) as u16;
                self.pio_setup_frame(command.good(), false, status::BSY | status::GOOD, first, dma);
            }
            self.registers.status = status::BSY | status::GOOD;
            self.registers.error = 0;
        }
        self.running |= 1 << slot;
        let entries = (flags >> header::PRDTL_SHIFT) as u16;
        let prdt = Prdt::new(table_address | table::PRDT, entries);
        Fetched::Start(Box::new(Start { slot, life: self.life, command, plan, worker, header, prdt }))
    }

    /// A frame with device control instead of a command: SRST, or nothing (§10.4.1).
    fn control(&mut self, slot: u8, control: u8, clear_busy: bool, dma: Dma<'_>) {
        let set = control & CONTROL_SRST != 0;
        let was_set = std::mem::replace(&mut self.registers.software_reset, set);
        let issue = 1 << slot;
        if set || !was_set {
            if set && !was_set {
                self.abandon();
            }
            self.registers.issue &= !issue;
            return;
        }
        if let Some(device) = &mut self.device {
            device.soft_reset();
        }
        self.registers.signature_due = true;
        self.registers.status = if clear_busy { 0 } else { status::BSY };
        if clear_busy {
            self.registers.issue &= !issue;
        } else {
            self.registers.signature_slot = Some(slot);
        }
        self.send_signature(dma);
    }

    /// The device puts a command into its queue: the port can send the next one.
    fn accept(&mut self, slot: u8, dma: Dma<'_>) {
        let outcome = Outcome { status: status::GOOD, error: 0, count: 0, lba: 0, device: 0 };
        self.registers_frame(outcome, false, dma);
        self.registers.issue &= !(1 << slot);
    }

    /// A command that is not queued has ended.
    fn end(&mut self, slot: u8, outcome: Outcome, dma: Dma<'_>) {
        self.registers_frame(outcome, true, dma);
        if !outcome.is_error() {
            self.registers.issue &= !(1 << slot);
        }
    }

    /// A queued command has failed: it and all that are in the queue with it will never end (SATA 3.1 §13.6.3.3).
    fn queue_failed(&mut self, slot: u8, outcome: Outcome, dma: Dma<'_>) {
        if let Some(device) = &mut self.device {
            device.queue_failed(slot, outcome);
        }
        self.abandon();
        self.set_device_bits_frame(0, outcome.status, outcome.error, dma);
    }

    /// A command of this life has been done.
    pub fn ended(&mut self, job: &Job, end: End, dma: Dma<'_>) {
        let slot = job.ticket.slot;
        self.running &= !(1 << slot);
        if end.overflow {
            self.registers.interrupt_status |= interrupt::OFS;
        }
        if end.interrupt {
            self.registers.interrupt_status |= interrupt::DPS;
        }
        let queued = job.protocol == Protocol::Queued;
        if let (Some(memory), false) = (dma, queued) {
            let count = u32::try_from(end.moved).unwrap_or(u32::MAX);
            // It has been read from there, so it is memory.
            let _ = memory.write_obj(count.to_le(), GuestAddress(job.header | header::PRDBC));
        }
        let Some(device) = &mut self.device else { return };
        match &end.result {
            Ok(()) => {
                if let Some(write) = job.access {
                    device.moved(write, end.moved);
                }
            }
            Err(Failure::Memory) => {
                self.registers.status &= !(status::BSY | status::DRQ);
                return self.fault(interrupt::HBFS);
            }
            Err(failure) => {
                let outcome = device.failure(&job.command, failure);
                return match queued {
                    true => self.queue_failed(slot, outcome, dma),
                    false => self.end(slot, outcome, dma),
                };
            }
        }
        let outcome = job.outcome;
        match job.protocol {
            Protocol::Queued => self.set_device_bits_frame(1 << slot, outcome.status, outcome.error, dma),
            Protocol::PioIn(block) => {
                self.pio_setup_frame(outcome, true, outcome.status, last_block(end.moved, block), dma);
                self.show(outcome.status, outcome.error);
                self.registers.issue &= !(1 << slot);
                self.registers.interrupt_status |= interrupt::PSS;
            }
            Protocol::Packet(block) => {
                if end.moved > 0 {
                    let count = last_block(end.moved, block);
                    self.pio_setup_frame(outcome, true, status::BSY | status::GOOD, count, dma);
                    self.registers.interrupt_status |= interrupt::PSS;
                }
                self.end(slot, outcome, dma);
            }
            Protocol::Dma | Protocol::PioOut(_) => self.end(slot, outcome, dma),
        }
    }

    /// Registers for a snapshot. Commands on their way are shown as not yet started, so they are started again.
    pub fn save(&self, now_ns: u64) -> PortState {
        let mut registers = self.registers.clone();
        registers.issue |= self.running;
        if !registers.signature_due && registers.status & status::BSY != 0 {
            registers.status &= !(status::BSY | status::DRQ);
        }
        PortState { registers, device: self.device.as_ref().map(|device| device.save(now_ns)) }
    }

    /// What in a state cannot be of this port.
    pub fn problem(&self, state: &PortState) -> Option<String> {
        let registers = &state.registers;
        let in_range = |slot: Option<u8>| slot.is_none_or(|slot| slot < SLOTS);
        if !in_range(registers.slot) || !in_range(registers.signature_slot) {
            return Some("an AHCI command slot above 31".into());
        }
        match (&self.device, &state.device) {
            (None, None) => None,
            (Some(device), Some(state)) => device.check(state).err().map(|error| error.to_string()),
            _ => Some("an AHCI port whose device is another one".into()),
        }
    }

    /// Puts back a state that [`Port::problem`] has nothing against.
    pub fn restore(&mut self, state: PortState, now_ns: u64) {
        let mut registers = state.registers;
        registers.command_list &= u64::from(port::CLB_MASK) | u64::from(u32::MAX) << 32;
        registers.received_frames &= u64::from(port::FB_MASK) | u64::from(u32::MAX) << 32;
        registers.interrupt_status &= interrupt::LATCHED;
        registers.interrupt_enable &= interrupt::ENABLES;
        registers.command &= cmd::WRITABLE;
        registers.control &= sctl::WRITABLE;
        self.registers = registers;
        self.running = 0;
        self.orphans = 0;
        if let (Some(device), Some(state)) = (&mut self.device, state.device) {
            device.restore(state, now_ns);
        }
    }
}

impl Job {
    /// The command that a port starts.
    pub fn of(
        controller: &std::sync::Arc<super::controller::Controller>,
        port: usize,
        start: Start,
    ) -> std::sync::Arc<Self> {
        let ticket = Ticket { port, slot: start.slot, life: start.life };
        Job::new(controller, ticket, start.command, start.plan, start.worker, (start.header, start.prdt))
    }
}

/// Bytes of the last of blocks that many bytes come in.
fn last_block(bytes: u64, block: u16) -> u16 {
    match (bytes, u64::from(block)) {
        (0, _) => 0,
        (bytes, 0) => u16::try_from(bytes).unwrap_or(u16::MAX),
        (bytes, block) => ((bytes - 1) % block + 1) as u16,
    }
}

type Frame = [u8; table::CFIS_BYTES];
type AtapiPacket = [u8; table::ACMD_BYTES];

/// Reads a command header and its table: flags, address of the table, command frame, SCSI command.
fn read_command(memory: &GuestMemory, header: u64) -> Option<(u32, u64, Frame, AtapiPacket)> {
    let [flags, _, low, high] = read_dwords(memory, header)?;
    let table_address = (u64::from(low) | u64::from(high) << 32) & header::CTBA_MASK;
    let mut frame = [0; table::CFIS_BYTES];
    let mut packet = [0; table::ACMD_BYTES];
    memory.read_slice(&mut frame, GuestAddress(table_address)).ok()?;
    memory.read_slice(&mut packet, GuestAddress(table_address | table::ACMD)).ok()?;
    Some((flags, table_address, frame, packet))
}

fn read_dwords(memory: &GuestMemory, address: u64) -> Option<[u32; 4]> {
    let dwords: [u32; 4] = memory.read_obj(GuestAddress(address)).ok()?;
    Some(dwords.map(u32::from_le))
}
