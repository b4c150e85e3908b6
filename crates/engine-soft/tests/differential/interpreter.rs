//! The subjects that are a whole processor, by its interpreter or its translator: a machine in long mode, its code and data
//! pages mapped for user mode.

use std::sync::Arc;

use engine::{GuestRegion, IoHandler, Vcpu, VcpuState, Vm, VmConfig};
use engine_soft::vcpu::SoftVcpu;
use engine_soft::vm::SoftVm;
use iced_x86::Mnemonic;
use vm_memory::{Bytes, GuestMemoryRegion, MemoryRegionAddress};
use x86::bits::{cr0, cr4, efer};
use x86::paging::pte;
use x86::{Segment, Vector};

use super::state::*;

/// Guest-physical memory: page tables from here on, then code, then data.
const TABLES: u64 = 0x1000;
const CODE_PAGES: u64 = 0x10_0000;
const DATA_PAGES: u64 = 0x20_0000;
const RAM_BYTES: u64 = 0x40_0000;
/// Iterations of one repeated instruction are done in at most so many steps.
const MAX_STEPS: usize = 1 << 20;

struct NoDevices;

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

pub struct InterpreterSubject {
    vcpu: SoftVcpu,
    region: Arc<GuestRegion>,
    start: VcpuState,
    bitness: u32,
    /// Executions by translation so far; `None` for the interpreter.
    translated: Option<usize>,
    _vm: SoftVm,
}

/// Page tables under construction.
struct Tables<'a> {
    region: &'a GuestRegion,
    next: u64,
}

impl Tables<'_> {
    fn word(&self, gpa: u64) -> u64 {
        self.region.read_obj(MemoryRegionAddress(gpa)).expect("a word of RAM")
    }

    fn set_word(&self, gpa: u64, value: u64) {
        self.region.write_obj(value, MemoryRegionAddress(gpa)).expect("a word of RAM");
    }

    /// Maps one 4 KiB page for user mode.
    fn map(&mut self, gva: u64, gpa: u64, writable: bool) {
        let mut table = TABLES;
        for shift in [39, 30, 21] {
            let entry = table + (gva >> shift & 0x1ff) * 8;
            if self.word(entry) & pte::P == 0 {
                self.next += PAGE;
                self.set_word(entry, self.next | pte::P | pte::RW | pte::US);
            }
            table = self.word(entry) & pte::ADDRESS;
        }
        let rights = pte::P | pte::US | if writable { pte::RW } else { 0 };
        self.set_word(table + (gva >> 12 & 0x1ff) * 8, gpa | rights);
    }
}

fn segments(bitness: u32) -> (Segment, Segment) {
    let flat =
        |selector, attributes| Segment { selector, attributes, limit: u32::MAX, base: 0, unusable: false };
    match bitness {
        64 => (flat(0x33, 0xa0fb), flat(0x2b, 0xc0f3)),
        32 => (flat(0x23, 0xc0fb), flat(0x2b, 0xc0f3)),
        _ => (
            Segment { base: CODE, limit: 0xffff, ..flat(0x07, 0x00fb) },
            Segment { base: DATA, ..flat(0x0f, 0xc0f3) },
        ),
    }
}

impl InterpreterSubject {
    /// The translator.
    pub fn translating(bitness: u32) -> InterpreterSubject {
        InterpreterSubject { translated: Some(0), ..InterpreterSubject::new(bitness) }
    }

    pub fn new(bitness: u32) -> InterpreterSubject {
        let region = engine::memory::create_region("differential", 0, RAM_BYTES).expect("guest memory");
        let mut tables = Tables { region: &region, next: TABLES };
        for page in 0..CODE_BYTES as u64 / PAGE {
            tables.map(CODE + page * PAGE, CODE_PAGES + page * PAGE, false);
        }
        for at in (0..DATA_BYTES as u64).step_by(PAGE as usize) {
            let gva = DATA + at;
            if WRITABLE.contains(&gva) || READ_ONLY.contains(&gva) {
                tables.map(gva, DATA_PAGES + at, WRITABLE.contains(&gva));
            }
        }
        region.write_slice(&[0xcc; CODE_BYTES], MemoryRegionAddress(CODE_PAGES)).expect("code pages");
        let vm = SoftVm::new(VmConfig {
            vcpus: 1,
            io: Arc::new(NoDevices),
            strict_msr: true,
            options: Vec::new(),
        })
        .expect("a machine");
        vm.map_memory(0, region.clone(), true).expect("memory mapped");
        let cpuid = engine_soft::cpuid::supported_cpuid();
        let mut vcpu = vm.soft_vcpu(0, &cpuid).expect("a processor");
        let mut start = VcpuState::reset(0);
        start.control.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET | cr0::MP | cr0::AM;
        start.control.cr3 = TABLES;
        start.control.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::PGE;
        start.control.cr4 |= vcpu.cpu().cr4_allowed() & cr4::FSGSBASE;
        start.control.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        start.control.xcr0 = vcpu.cpu().xcr0_allowed() & 7;
        let (code, data) = segments(bitness);
        start.segments.cs = code;
        start.segments.ss = data;
        start.segments.ds = data;
        start.segments.es = data;
        start.segments.fs = Segment { selector: 0, base: 0, ..data };
        start.segments.gs =
            Segment { selector: 0, base: if bitness == 64 { GS_BASE } else { data.base }, ..data };
        start.segments.gdt.limit = 0;
        start.segments.idt.limit = 0;
        // Too short to have an I/O permission bitmap.
        start.segments.tr.limit = 0x66;
        vcpu.set_state(&start).expect("a state in user mode");
        InterpreterSubject { vcpu, region, start, bitness, translated: None, _vm: vm }
    }

    fn data(&self) -> *mut u8 {
        let mapping = self.region.get_mmap();
        mapping.as_ptr().wrapping_add(DATA_PAGES as usize)
    }
}

impl Subject for InterpreterSubject {
    fn name(&self) -> &'static str {
        if self.translated.is_some() { "translator" } else { "interpreter" }
    }

    fn undefined_like_host(&self) -> bool {
        false
    }

    fn step(&mut self, case: &Case<'_>, memory: &mut Memory) -> Option<Outcome> {
        assert_eq!(case.bitness, self.bitness);
        assert!(DATA_PAGES + DATA_BYTES as u64 <= self.region.len());
        let data = self.data();
        // SAFETY: the data pages lie inside the region, and nothing else uses them now.
        unsafe { std::ptr::copy_nonoverlapping(memory.0.as_ptr(), data, DATA_BYTES) };
        let mut code = [0xcc; 32];
        code[..case.bytes.len()].copy_from_slice(case.bytes);
        // Through the region, so that the interpreter hears of the new code.
        self.region
            .write_slice(&code, MemoryRegionAddress(CODE_PAGES + CODE_ENTRY))
            .expect("the instruction's bytes");
        let (start, before) = (&self.start, case.state);
        let cpu = self.vcpu.cpu();
        let expected_segments = [
            start.segments.es,
            start.segments.cs,
            start.segments.ss,
            start.segments.ds,
            start.segments.fs,
            start.segments.gs,
        ];
        if cpu.segments != expected_segments {
            cpu.segments = expected_segments;
            cpu.update_mode();
        }
        cpu.user.gpr = before.gpr;
        cpu.user.rip = before.rip;
        cpu.set_rflags(before.rflags);
        cpu.user.mxcsr = before.mxcsr();
        cpu.user.vector = before.vector;
        cpu.user.x87.0 = before.x87;
        let mut result = match &mut self.translated {
            None => cpu.step(),
            Some(executions) => {
                *executions += 1;
                // An unmasked SIMD exception is the interpreter's.
                cpu.step_translated(*executions).unwrap_or_else(|| cpu.step())
            }
        };
        let mut steps = 1;
        while case.instruction.is_string_instruction() && result.is_ok() && cpu.user.rip == before.rip {
            result = cpu.step();
            steps += 1;
            assert!(steps < MAX_STEPS, "a repeated instruction does not end");
        }
        let end = match result {
            Ok(()) => End::Done,
            // There is no IDT; the fault says which entry was looked for. The host's exception is a trap.
            Err(exception)
                if matches!(case.instruction.mnemonic(), Mnemonic::Int3 | Mnemonic::Into)
                    && exception.error_code & 2 != 0 =>
            {
                cpu.user.rip = case.instruction.next_ip();
                End::Fault { vector: (exception.error_code >> 3) as u8, error_code: 0, address: 0 }
            }
            Err(exception) => End::Fault {
                vector: exception.vector as u8,
                error_code: exception.error_code,
                address: if exception.vector == Vector::PageFault { exception.payload } else { 0 },
            },
        };
        let mut state = State {
            x87: cpu.user.x87.0,
            vector: cpu.user.vector,
            gpr: cpu.user.gpr,
            rip: cpu.user.rip,
            rflags: cpu.rflags(),
        };
        state.set_mxcsr(cpu.user.mxcsr);
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(data, memory.0.as_mut_ptr(), DATA_BYTES) };
        Some(Outcome { end, state })
    }
}
