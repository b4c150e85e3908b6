//! A machine for tests that look at a processor from inside: RAM from address zero, vCPUs that are stepped or run.
#![allow(dead_code)]

use std::sync::Arc;

use engine::{GuestRegion, IoHandler, Vcpu, VcpuState, Vm, VmConfig};
use engine_soft::cpu::Cpu;
use engine_soft::vcpu::SoftVcpu;
use engine_soft::vm::SoftVm;
use iced_x86::code_asm::CodeAssembler;
use vm_memory::{Bytes, MemoryRegionAddress};
use x86::Segment;
use x86::bits::{cr0, cr4, efer};
use x86::cpuid::CpuidTable;
use x86::paging::pte;

/// Bytes of RAM.
pub const RAM: u64 = 16 << 20;
/// Page tables of [`Bench::long_mode`]: the top one, then one of each further level.
pub const PML4: u64 = 0x1000;
/// See [`PML4`].
pub const PDPT: u64 = 0x2000;
/// See [`PML4`].
pub const PD: u64 = 0x3000;
/// See [`PML4`]; maps the first 2 MiB to themselves.
pub const PT: u64 = 0x4000;
/// Where tests put code.
pub const CODE: u64 = 0x10000;
/// Where tests put a GDT.
pub const GDT: u64 = 0x6000;
/// Where tests put an IDT.
pub const IDT: u64 = 0x7000;
/// Where tests put a TSS.
pub const TSS: u64 = 0x8000;
/// Top of the stack.
pub const STACK: u64 = 0x20000;

pub struct NoDevices;

impl IoHandler for NoDevices {
    fn port_read(&self, _: u32, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&self, _: u32, _: u16, _: &[u8]) {}
    fn mmio_read(&self, _: u32, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u32, _: u64, _: &[u8]) {}
}

/// The machine.
pub struct Bench {
    pub vcpus: Vec<SoftVcpu>,
    pub region: Arc<GuestRegion>,
    pub vm: SoftVm,
}

/// A flat segment with these access rights.
pub fn flat(selector: u16, attributes: u16) -> Segment {
    Segment { selector, attributes, limit: u32::MAX, base: 0, unusable: false }
}

/// The eight bytes of a code or data descriptor.
pub fn descriptor(base: u32, limit: u32, attributes: u16) -> u64 {
    let (base, limit) = (u64::from(base), u64::from(limit));
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | u64::from(attributes & 0xf0ff) << 40
        | (limit & 0xf_0000) << 32
        | (base >> 24) << 56
}

impl Bench {
    pub fn new(vcpus: u32) -> Bench {
        Bench::showing(vcpus, true, |_| ())
    }

    /// A machine whose processors show something else, or are lenient about MSRs.
    pub fn showing(vcpus: u32, strict_msr: bool, change: impl FnOnce(&mut CpuidTable)) -> Bench {
        let region = engine::memory::create_region("test", 0, RAM).expect("guest memory");
        let config = VmConfig { vcpus, io: Arc::new(NoDevices), strict_msr, options: Vec::new() };
        Bench::build(config, region, change)
    }

    /// With devices, and `soft.translate` as given.
    pub fn with(vcpus: u32, translate: &str, region: Arc<GuestRegion>, io: Arc<dyn IoHandler>) -> Bench {
        let options = vec![("translate".to_owned(), translate.to_owned())];
        Bench::build(VmConfig { vcpus, io, strict_msr: true, options }, region, |_| ())
    }

    fn build(config: VmConfig, region: Arc<GuestRegion>, change: impl FnOnce(&mut CpuidTable)) -> Bench {
        let vcpus = config.vcpus;
        let vm = SoftVm::new(config).expect("a machine");
        vm.map_memory(0, region.clone(), true).expect("memory mapped");
        let mut cpuid = engine_soft::cpuid::supported_cpuid();
        change(&mut cpuid);
        let vcpus = (0..vcpus)
            .map(|id| {
                cpuid.update(1, |r| r.ebx = r.ebx & 0xff_ffff | id << 24);
                vm.soft_vcpu(id, &cpuid).expect("a processor")
            })
            .collect();
        Bench { vcpus, region, vm }
    }

    pub fn cpu(&mut self) -> &mut Cpu {
        self.vcpus[0].cpu()
    }

    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.region.write_slice(bytes, MemoryRegionAddress(gpa)).expect("inside RAM");
    }

    pub fn bytes(&self, gpa: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.region.read_slice(&mut bytes, MemoryRegionAddress(gpa)).expect("inside RAM");
        bytes
    }

    pub fn set64(&self, gpa: u64, value: u64) {
        self.write(gpa, &value.to_le_bytes());
    }

    pub fn set32(&self, gpa: u64, value: u32) {
        self.write(gpa, &value.to_le_bytes());
    }

    pub fn get64(&self, gpa: u64) -> u64 {
        self.region.read_obj(MemoryRegionAddress(gpa)).expect("inside RAM")
    }

    pub fn get32(&self, gpa: u64) -> u32 {
        self.region.read_obj(MemoryRegionAddress(gpa)).expect("inside RAM")
    }

    /// Assembles at an address.
    pub fn assemble(
        &self,
        bits: u32,
        at: u64,
        code: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
    ) -> u64 {
        let mut assembler = CodeAssembler::new(bits).expect("an assembler");
        code(&mut assembler).expect("instructions");
        let bytes = assembler.assemble(at).expect("encodings");
        self.write(at, &bytes);
        at + bytes.len() as u64
    }

    /// Identity page tables for the first 2 MiB, and a state in 64-bit mode at `cpl` that executes at [`CODE`].
    pub fn long_mode(&self, cpl: u16) -> VcpuState {
        let all = pte::P | pte::RW | pte::US;
        self.set64(PML4, PDPT | all);
        self.set64(PDPT, PD | all);
        self.set64(PD, PT | all);
        for page in 0..512 {
            self.set64(PT + 8 * page, page << 12 | all);
        }
        let mut state = VcpuState::reset(0);
        state.mp_state = engine::MpState::Running;
        state.control.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET;
        state.control.cr3 = PML4;
        state.control.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
        state.control.efer = efer::LME | efer::LMA | efer::NXE;
        let dpl = cpl << 5;
        state.segments.cs = flat(0x08 | cpl, 0xa09b | dpl);
        let data = flat(0x10 | cpl, 0xc093 | dpl);
        state.segments.ss = data;
        state.segments.ds = data;
        state.segments.es = data;
        state.segments.gdt.base = GDT;
        state.segments.gdt.limit = 0xff;
        state.segments.idt.base = IDT;
        state.segments.idt.limit = 0xfff;
        state.regs.rip = CODE;
        state.regs.gpr[4] = STACK;
        state
    }

    /// A flat 32-bit protected-mode state without paging.
    pub fn protected_mode(&self) -> VcpuState {
        let mut state = VcpuState::reset(0);
        state.control.cr0 = cr0::PE | cr0::NE | cr0::ET;
        state.segments.cs = flat(0x08, 0xc09b);
        let data = flat(0x10, 0xc093);
        state.segments.ss = data;
        state.segments.ds = data;
        state.segments.es = data;
        state.segments.gdt.base = GDT;
        state.segments.gdt.limit = 0xff;
        state.segments.idt.base = IDT;
        state.segments.idt.limit = 0x7ff;
        state.regs.rip = CODE;
        state.regs.gpr[4] = STACK;
        self.set64(GDT + 0x08, descriptor(0, 0xf_ffff, 0xc09b));
        self.set64(GDT + 0x10, descriptor(0, 0xf_ffff, 0xc093));
        self.set64(GDT + 0x18, descriptor(0, 0xf_ffff, 0xc0fb));
        self.set64(GDT + 0x20, descriptor(0, 0xf_ffff, 0xc0f3));
        state
    }

    pub fn load(&mut self, state: &VcpuState) {
        self.vcpus[0].set_state(state).expect("a state");
    }
}
