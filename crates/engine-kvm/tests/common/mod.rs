//! A small machine for test guests: 64 KiB of memory, a board that writes down every access, and guests in flat
//! 32-bit protected mode with a descriptor table and an interrupt table.
//!
//! Tests run wherever `/dev/kvm` opens, also on a KVM that only emulates; those that need more ask
//! [`KvmEngine::probe`] and say so when they are skipped.

use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use engine::memory::create_region;
use engine::{Engine, Exit, Fitness, GuestRegion, IoHandler, Kick, Vcpu, VcpuId, VcpuState, Vm, VmConfig};
use engine_kvm::KvmEngine;
use iced_x86::code_asm::CodeAssembler;
use vm_memory::{Bytes, GuestMemoryRegion, MemoryRegionAddress};
use x86::Segment;
use x86::bits::{cr0, rflags};
use x86::cpuid::Topology;
use x86::cpuid::model::{FeatureList, Model, ModelOptions};
use x86::regs::Gpr;

/// Writing here ends the run of the vCPU that does it.
pub const DONE_PORT: u16 = 0xf4;
/// Writing here runs the test's own reaction.
pub const READY_PORT: u16 = 0xf5;

/// Guest-physical places.
pub const MEMORY_BYTES: u64 = 0x1_0000;
pub const GDT: u64 = 0x500;
pub const IDT: u64 = 0x800;
pub const CODE: u64 = 0x1000;
pub const AP_CODE: u64 = 0x2000;
pub const DATA: u64 = 0x3000;
pub const HANDLER: u64 = 0x4000;
pub const STACK: u64 = 0x8000;
/// Where nothing is.
pub const DEVICE: u64 = 0xd000_0000;

/// One access that reached the board.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    PortRead(u16, usize),
    PortWrite(u16, Vec<u8>),
    MmioRead(u64, usize),
    MmioWrite(u64, Vec<u8>),
}

type Reaction = Box<dyn Fn() + Send + Sync>;

/// The board.
#[derive(Default)]
pub struct Board {
    accesses: Mutex<Vec<Access>>,
    /// What ports read as, in order.
    pub inputs: Mutex<VecDeque<u8>>,
    kickers: Mutex<BTreeMap<VcpuId, Arc<dyn Kick>>>,
    reaction: OnceLock<Reaction>,
}

impl Board {
    pub fn accesses(&self) -> Vec<Access> {
        lock(&self.accesses).clone()
    }

    /// Values written to a port.
    pub fn written(&self, port: u16) -> Vec<u32> {
        self.accesses()
            .iter()
            .filter_map(|access| match access {
                Access::PortWrite(p, data) if *p == port => Some(number(data)),
                _ => None,
            })
            .collect()
    }

    /// What to do when the guest writes to [`READY_PORT`].
    pub fn when_ready(&self, reaction: impl Fn() + Send + Sync + 'static) {
        assert!(self.reaction.set(Box::new(reaction)).is_ok(), "set once");
    }

    fn note(&self, access: Access) {
        lock(&self.accesses).push(access);
    }

    fn fill(&self, data: &mut [u8]) {
        let mut inputs = lock(&self.inputs);
        data.fill_with(|| inputs.pop_front().unwrap_or(0xff));
    }
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no test thread panicked")
}

pub fn number(data: &[u8]) -> u32 {
    data.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

impl IoHandler for Board {
    fn port_read(&self, _: VcpuId, port: u16, data: &mut [u8]) {
        self.note(Access::PortRead(port, data.len()));
        self.fill(data);
    }

    fn port_write(&self, vcpu: VcpuId, port: u16, data: &[u8]) {
        self.note(Access::PortWrite(port, data.to_vec()));
        match port {
            DONE_PORT => {
                if let Some(kicker) = lock(&self.kickers).get(&vcpu) {
                    kicker.kick();
                }
            }
            READY_PORT => {
                if let Some(reaction) = self.reaction.get() {
                    reaction();
                }
            }
            _ => {}
        }
    }

    fn mmio_read(&self, _: VcpuId, gpa: u64, data: &mut [u8]) {
        self.note(Access::MmioRead(gpa, data.len()));
        self.fill(data);
    }

    fn mmio_write(&self, _: VcpuId, gpa: u64, data: &[u8]) {
        self.note(Access::MmioWrite(gpa, data.to_vec()));
    }
}

/// A VM with its board and memory (slot 0).
pub struct Machine {
    pub vm: Arc<dyn Vm>,
    pub board: Arc<Board>,
    pub region: Arc<GuestRegion>,
    model: Model,
}

/// Whether `/dev/kvm` opens; prints a notice if not.
fn kvm_opens() -> bool {
    let opens = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &opens {
        println!("skipped: /dev/kvm: {error}");
    }
    opens.is_ok()
}

/// Whether this KVM runs real kernels; prints a notice if not.
pub fn kvm_is_fit() -> bool {
    match KvmEngine::new().probe() {
        Fitness::Fit => true,
        Fitness::Unfit(why) => {
            println!("skipped: {why}");
            false
        }
    }
}

impl Machine {
    /// A machine with some vCPUs (one socket); `None` where there is no KVM.
    pub fn new(vcpus: u32) -> Option<Machine> {
        Machine::with(vcpus, true)
    }

    /// The same, strict about MSRs or not.
    pub fn with(vcpus: u32, strict_msr: bool) -> Option<Machine> {
        if !kvm_opens() {
            return None;
        }
        let engine = KvmEngine::new();
        let board = Arc::new(Board::default());
        let vm =
            engine.create_vm(VmConfig { vcpus, io: board.clone(), strict_msr, options: Vec::new() }).unwrap();
        let region = create_region("test", 0, MEMORY_BYTES).unwrap();
        vm.map_memory(0, region.clone(), true).unwrap();
        let options = ModelOptions {
            topology: Topology { sockets: 1, cores: vcpus, threads: 1 },
            x2apic: true,
            features: FeatureList::default(),
        };
        let model = Model::new(&engine.supported_cpuid().unwrap(), &options).unwrap();
        let machine = Machine { vm, board, region, model };
        // Null, code, data.
        for (n, descriptor) in [0u64, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff].into_iter().enumerate() {
            machine.write(GDT + 8 * n as u64, &descriptor.to_le_bytes());
        }
        Some(machine)
    }

    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.region.write_slice(bytes, MemoryRegionAddress(gpa)).unwrap();
    }

    pub fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.region.read_slice(&mut bytes, MemoryRegionAddress(gpa)).unwrap();
        bytes
    }

    /// All of memory, copied to another machine.
    pub fn copy_memory_to(&self, other: &Machine) {
        other.write(0, &self.read(0, self.region.len() as usize));
    }

    /// Assembles 32-bit code.
    pub fn assemble(&self, gpa: u64, code: impl FnOnce(&mut CodeAssembler)) {
        self.assemble_as(32, gpa, code);
    }

    pub fn assemble_as(&self, bits: u32, gpa: u64, code: impl FnOnce(&mut CodeAssembler)) {
        let mut assembler = CodeAssembler::new(bits).unwrap();
        code(&mut assembler);
        self.write(gpa, &assembler.assemble(gpa).unwrap());
    }

    /// Points an interrupt vector at [`HANDLER`].
    pub fn handle(&self, vector: u8) {
        let gate = (HANDLER & 0xffff) | 0x08 << 16 | 0x8e00 << 32 | (HANDLER >> 16) << 48;
        self.write(IDT + 8 * u64::from(vector), &gate.to_le_bytes());
    }

    /// Makes a vCPU as KVM resets it.
    pub fn fresh_vcpu(&self, id: VcpuId) -> Box<dyn Vcpu> {
        let vcpu = self.vm.create_vcpu(id, &self.model.table(id)).unwrap();
        lock(&self.board.kickers).insert(id, vcpu.kicker());
        vcpu
    }

    /// Makes vCPU 0, ready to run [`CODE`] in protected mode.
    pub fn vcpu(&self) -> Box<dyn Vcpu> {
        let mut vcpu = self.fresh_vcpu(0);
        let mut state = vcpu.state().unwrap();
        protected_mode(&mut state);
        vcpu.set_state(&state).unwrap();
        vcpu
    }
}

/// Flat 32-bit protected mode at [`CODE`], interrupts off.
pub fn protected_mode(state: &mut VcpuState) {
    let code = Segment { selector: 0x08, attributes: 0xc09b, limit: u32::MAX, base: 0, unusable: false };
    let data = Segment { selector: 0x10, attributes: 0xc093, ..code };
    let segments = &mut state.segments;
    segments.cs = code;
    for segment in [&mut segments.ds, &mut segments.es, &mut segments.ss, &mut segments.fs, &mut segments.gs]
    {
        *segment = data;
    }
    segments.gdt.base = GDT;
    segments.gdt.limit = 0x17;
    segments.idt.base = IDT;
    segments.idt.limit = 0x7ff;
    state.control.cr0 = cr0::PE | cr0::ET | cr0::NE;
    state.regs.rip = CODE;
    state.regs.rflags = rflags::RESERVED_ONE;
    state.regs.gpr[Gpr::Rsp as usize] = STACK;
}

/// Ends a run that hangs, so that the test fails instead of waiting for ever.
pub struct Deadline {
    _alive: Sender<()>,
}

impl Deadline {
    pub fn on(vcpu: &dyn Vcpu) -> Deadline {
        const LIMIT: Duration = Duration::from_secs(60);
        let kicker = vcpu.kicker();
        let (alive, watch) = mpsc::channel();
        std::thread::spawn(move || {
            if watch.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                eprintln!("the guest hangs");
                kicker.kick();
            }
        });
        Deadline { _alive: alive }
    }
}

/// Runs until the guest says it is done; what it wrote to [`DONE_PORT`].
pub fn run_to_done(machine: &Machine, vcpu: &mut dyn Vcpu) -> u32 {
    let _deadline = Deadline::on(vcpu);
    let before = machine.board.written(DONE_PORT).len();
    assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
    let written = machine.board.written(DONE_PORT);
    assert_eq!(written.len(), before + 1, "the guest never said it was done: {:?}", machine.board.accesses());
    written[before]
}
