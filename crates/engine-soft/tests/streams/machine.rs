//! A machine with a small kernel in it: exceptions are recorded in memory and resumed after the instruction, or end the
//! program. Its memory and registers are compared with those of another one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use engine::{Exit, GuestRegion, IoHandler, Kick, Vcpu, VcpuState, Vm, VmConfig};
use engine_soft::vcpu::SoftVcpu;
use engine_soft::vm::SoftVm;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vm_memory::{Bytes, MemoryRegionAddress};
use x86::bits::{cr0, cr4, efer, rflags};
use x86::paging::pte;
use x86::{Segment, Vector};

use super::state::{DATA, DATA_BYTES, GS_BASE, PAGE, READ_ONLY, WRITABLE};

/// Bytes of RAM.
pub const RAM: usize = 0x4_0000;
const TABLES: u64 = 0x1000;
const KERNEL_GPA: u64 = 0x1_0000;
const CODE_GPA: u64 = 0x3_0000;
const DATA_GPA: u64 = 0x3_8000;
const COUNTER_GPA: u64 = 0x3_e000;

/// Linear address of the code, in user mode's reach.
pub const CODE: u64 = 0x4567_8000;
/// Bytes of code.
pub const CODE_BYTES: u64 = 3 * PAGE;
/// Linear address of a writable page: how many turns are left to loops, then places for jump targets.
pub const COUNTER: u64 = 0x6777_0000;
/// FS base.
pub const FS_BASE: u64 = 0x0012_3450;
/// Linear address of the kernel's memory, out of user mode's reach.
pub const KERNEL: u64 = 0x6123_0000;
const KERNEL_BYTES: u64 = 0x2_0000;
const GDT: u64 = KERNEL;
const IDT: u64 = KERNEL + 0x1000;
const TSS: u64 = KERNEL + 0x2000;
const HANDLERS: u64 = KERNEL + 0x3000;
const HANDLER_STACK: u64 = KERNEL + 0x5000;
/// Number of exceptions recorded.
pub const RECORDED: u64 = KERNEL + 0x5000;
const DEFAULT_MXCSR: u64 = KERNEL + 0x5010;
/// For each byte of code, two bytes: offset of the instruction after the one that begins there; 0 if none does.
const NEXT: u64 = KERNEL + 0x6000;
/// Records of exceptions.
pub const RECORDS: u64 = KERNEL + 0xc000;
/// log2 of a record's size.
const RECORD_SHIFT: u32 = 10;
/// Exceptions after which a program is ended.
const MAX_RECORDS: u32 = 64;
/// Words in a record: R15 … RAX, vector, error code, RIP, CS, RFLAGS, RSP, SS, then CR2, then an FXSAVE image at 256.
const RECORD_WORDS: usize = 22;
/// Stacks and variables of interrupts; nothing here is compared.
const INTERRUPTS: u64 = KERNEL + 0x1_c000;
const INTERRUPT_STACK: u64 = INTERRUPTS + 0x1000;
const NMI_STACK: u64 = INTERRUPTS + 0x2000;
/// Interrupts and NMIs so far.
pub const INTERRUPTED: u64 = INTERRUPTS + 0x3000;
/// Those that were not taken between two instructions or with interrupts disabled, and the last one's RIP.
pub const WRONG: u64 = INTERRUPTS + 0x3008;
/// Where the handlers of interrupts are.
const INTERRUPT_HANDLERS: u64 = HANDLERS + 0x800;
/// The vector of interrupts.
pub const INTERRUPT_VECTOR: u8 = 0x40;
/// The vector that ends a program.
pub const END_VECTOR: u8 = 0x80;

/// The EOI register of an x2APIC (SDM 3A table 10-6).
const X2APIC_EOI: u32 = 0x80b;

/// What a program runs as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    pub bits: u32,
    pub cpl: u16,
}

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

/// Physical memory under construction.
#[derive(Clone)]
pub struct Image {
    pub bytes: Vec<u8>,
    next_table: u64,
}

fn descriptor(attributes: u16) -> u64 {
    0xffff | 0xf_0000 << 32 | u64::from(attributes) << 40
}

impl Image {
    fn word(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.bytes[gpa as usize..][..8].try_into().expect("eight bytes"))
    }

    pub fn put(&mut self, gpa: u64, bytes: &[u8]) {
        self.bytes[gpa as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn set_word(&mut self, gpa: u64, value: u64) {
        self.put(gpa, &value.to_le_bytes());
    }

    fn map(&mut self, linear: u64, gpa: u64, rights: u64) {
        let mut table = TABLES;
        for shift in [39, 30, 21] {
            let entry = table + (linear >> shift & 0x1ff) * 8;
            if self.word(entry) & pte::P == 0 {
                self.next_table += PAGE;
                self.set_word(entry, self.next_table | pte::P | pte::RW | pte::US);
            }
            table = self.word(entry) & pte::ADDRESS;
        }
        self.set_word(table + (linear >> 12 & 0x1ff) * 8, gpa | pte::P | rights);
    }

    fn gate(&mut self, vector: u8, at: u64, attributes: u64, stack_number: u64) {
        let low =
            at & 0xffff | 0x08 << 16 | stack_number << 32 | attributes << 40 | (at >> 16 & 0xffff) << 48;
        self.kernel(IDT + 16 * u64::from(vector), &low.to_le_bytes());
        self.kernel(IDT + 16 * u64::from(vector) + 8, &(at >> 32).to_le_bytes());
    }

    fn kernel(&mut self, linear: u64, bytes: &[u8]) {
        self.put(linear - KERNEL + KERNEL_GPA, bytes);
    }

    /// Puts a program, of which `next` says where each instruction ends, and the turns its loops may take together.
    pub fn set_program(&mut self, at: u64, code: &[u8], next: &[(u64, u64)], turns: u32) {
        self.put(at - CODE + CODE_GPA, code);
        for (begin, end) in next {
            self.kernel(NEXT + 2 * (at - CODE + begin), &((at - CODE + end) as u16).to_le_bytes());
        }
        self.put(COUNTER_GPA, &turns.to_le_bytes());
    }

    pub fn data(&mut self) -> &mut [u8] {
        &mut self.bytes[DATA_GPA as usize..][..DATA_BYTES]
    }

    /// Memory without a program.
    pub fn new() -> Image {
        let mut image = Image { bytes: vec![0; RAM], next_table: TABLES };
        for page in (0..KERNEL_BYTES).step_by(PAGE as usize) {
            image.map(KERNEL + page, KERNEL_GPA + page, pte::RW);
        }
        for page in (0..CODE_BYTES).step_by(PAGE as usize) {
            image.map(CODE + page, CODE_GPA + page, pte::US);
        }
        for at in (0..DATA_BYTES as u64).step_by(PAGE as usize) {
            let linear = DATA + at;
            if WRITABLE.contains(&linear) {
                image.map(linear, DATA_GPA + at, pte::US | pte::RW | pte::NX);
            } else if READ_ONLY.contains(&linear) {
                image.map(linear, DATA_GPA + at, pte::US | pte::NX);
            }
        }
        image.map(COUNTER, COUNTER_GPA, pte::US | pte::RW | pte::NX);
        assert!(image.next_table < KERNEL_GPA, "the page tables fit");
        let descriptors = [0, 0xa09b, 0xc093, 0xc09b, 0xc0f3, 0xa0fb, 0xc0fb];
        for (index, attributes) in descriptors.into_iter().enumerate() {
            let value = if attributes == 0 { 0 } else { descriptor(attributes) };
            image.kernel(GDT + 8 * index as u64, &value.to_le_bytes());
        }
        image.kernel(TSS + 36, &HANDLER_STACK.to_le_bytes());
        image.kernel(TSS + 4, &HANDLER_STACK.to_le_bytes());
        // No I/O permission bitmap.
        image.kernel(TSS + 102, &0x68u16.to_le_bytes());
        image.kernel(DEFAULT_MXCSR, &0x1f80u32.to_le_bytes());
        image.kernel(HANDLERS, &handlers().expect("the handlers"));
        for vector in (0..32).chain([END_VECTOR]) {
            let attributes = if matches!(vector, 3 | 4 | END_VECTOR) { 0xee } else { 0x8e };
            image.gate(vector, stub(vector), attributes, 1);
        }
        let mut at = INTERRUPT_HANDLERS;
        for (vector, stack, stack_number) in
            [(INTERRUPT_VECTOR, INTERRUPT_STACK, 2), (Vector::Nmi as u8, NMI_STACK, 3)]
        {
            image.kernel(TSS + 28 + 8 * stack_number, &stack.to_le_bytes());
            image.gate(vector, at, 0x8e, stack_number);
            let code = interrupt_handler(at, vector == INTERRUPT_VECTOR).expect("a handler");
            image.kernel(at, &code);
            at += code.len() as u64;
        }
        image
    }
}

/// Address of a vector's entry.
fn stub(vector: u8) -> u64 {
    HANDLERS + 16 * u64::from(if vector == END_VECTOR { 32 } else { vector })
}

/// Bytes of the entries; what they have in common follows.
const STUB_BYTES: usize = 33 * 16;

fn handlers() -> Result<Vec<u8>, IcedError> {
    let mut code = Vec::new();
    for vector in (0..32).chain([END_VECTOR]) {
        let mut a = CodeAssembler::new(64)?;
        if !matches!(vector, 8 | 10..=14 | 17 | 21) {
            a.push(0)?;
        }
        a.push(i32::from(vector))?;
        a.jmp(HANDLERS + STUB_BYTES as u64)?;
        code.extend(a.assemble(HANDLERS + code.len() as u64)?);
        code.resize(code.len().next_multiple_of(16), 0xcc);
    }
    assert_eq!(code.len(), STUB_BYTES);
    let mut a = CodeAssembler::new(64)?;
    let (mut resume, mut end) = (a.create_label(), a.create_label());
    let mut no_simd = a.create_label();
    let saved = [rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
    for register in saved {
        a.push(register)?;
    }
    a.mov(rbx, qword_ptr(RECORDED))?;
    a.cmp(rbx, MAX_RECORDS as i32)?;
    a.jae(end)?;
    a.inc(qword_ptr(RECORDED))?;
    a.mov(rdi, rbx)?;
    a.shl(rdi, RECORD_SHIFT)?;
    a.mov(rax, RECORDS)?;
    a.add(rdi, rax)?;
    a.fxsave64(ptr(rdi + 256))?;
    a.mov(rax, cr2)?;
    a.mov(qword_ptr(rdi + 8 * RECORD_WORDS as i32), rax)?;
    a.mov(rsi, rsp)?;
    a.mov(ecx, RECORD_WORDS as u32)?;
    a.cld()?;
    a.rep().movsq()?;
    a.fnclex()?;
    a.mov(rax, qword_ptr(rsp + 15 * 8))?;
    a.cmp(rax, i32::from(END_VECTOR))?;
    a.je(end)?;
    a.cmp(rax, 19)?;
    a.jne(no_simd)?;
    a.ldmxcsr(dword_ptr(DEFAULT_MXCSR))?;
    a.set_label(&mut no_simd)?;
    a.and(qword_ptr(rsp + 19 * 8), !(rflags::TF | rflags::NT | rflags::AC) as i32)?;
    // Traps have their instruction behind them.
    a.cmp(rax, 1)?;
    a.je(resume)?;
    a.cmp(rax, 3)?;
    a.je(resume)?;
    a.cmp(rax, 4)?;
    a.je(resume)?;
    a.mov(rax, qword_ptr(rsp + 17 * 8))?;
    a.mov(rdx, CODE)?;
    a.sub(rax, rdx)?;
    a.cmp(rax, CODE_BYTES as i32)?;
    a.jae(end)?;
    a.movzx(ecx, word_ptr(rax * 2 + NEXT))?;
    a.test(ecx, ecx)?;
    a.je(end)?;
    a.add(rcx, rdx)?;
    a.mov(qword_ptr(rsp + 17 * 8), rcx)?;
    a.set_label(&mut resume)?;
    for register in saved.into_iter().rev() {
        a.pop(register)?;
    }
    a.add(rsp, 16)?;
    a.iretq()?;
    a.set_label(&mut end)?;
    a.cli()?;
    // An NMI may still come.
    let mut sleep = a.create_label();
    a.set_label(&mut sleep)?;
    a.hlt()?;
    a.jmp(sleep)?;
    code.extend(a.assemble(HANDLERS + STUB_BYTES as u64)?);
    assert!(code.len() < (INTERRUPT_HANDLERS - HANDLERS) as usize);
    Ok(code)
}

/// Counts, looks at the frame, and returns.
fn interrupt_handler(at: u64, maskable: bool) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let (mut fine, mut wrong) = (a.create_label(), a.create_label());
    a.push(rax)?;
    a.push(rcx)?;
    a.push(rdx)?;
    a.inc(qword_ptr(INTERRUPTED))?;
    if maskable {
        a.test(dword_ptr(rsp + 5 * 8), rflags::IF as u32)?;
        a.je(wrong)?;
    }
    // In the program's code, RIP has to be at an instruction.
    a.mov(rax, qword_ptr(rsp + 3 * 8))?;
    a.mov(rcx, CODE)?;
    a.sub(rax, rcx)?;
    a.cmp(rax, CODE_BYTES as i32)?;
    a.jae(fine)?;
    a.movzx(ecx, word_ptr(rax * 2 + NEXT))?;
    a.test(ecx, ecx)?;
    a.jne(fine)?;
    a.set_label(&mut wrong)?;
    a.inc(qword_ptr(WRONG))?;
    a.mov(rax, qword_ptr(rsp + 3 * 8))?;
    a.mov(qword_ptr(WRONG + 8), rax)?;
    a.set_label(&mut fine)?;
    if maskable {
        a.mov(ecx, X2APIC_EOI)?;
        a.xor(eax, eax)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
    }
    a.pop(rdx)?;
    a.pop(rcx)?;
    a.pop(rax)?;
    a.iretq()?;
    a.assemble(at)
}

fn flat(selector: u16, attributes: u16) -> Segment {
    Segment { selector, attributes, limit: u32::MAX, base: 0, unusable: false }
}

/// Stops a processor that does not stop by itself, so that a test fails rather than hangs.
pub struct Watchdog {
    running: Sender<bool>,
    expired: Arc<AtomicBool>,
}

impl Watchdog {
    const PATIENCE: Duration = Duration::from_secs(60);

    fn new(kick: Arc<dyn Kick>) -> Watchdog {
        let (running, receiver) = channel();
        let expired = Arc::new(AtomicBool::new(false));
        let told = expired.clone();
        // It ends when the sender is gone.
        std::thread::spawn(move || {
            let mut running = false;
            loop {
                match receiver.recv_timeout(Self::PATIENCE) {
                    Ok(starts) => running = starts,
                    Err(RecvTimeoutError::Timeout) if running => {
                        told.store(true, Ordering::Relaxed);
                        kick.kick();
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        });
        Watchdog { running, expired }
    }

    fn watch(&self, running: bool) {
        // Nobody listens only if the thread is gone, and then there is nothing to tell.
        let _ = self.running.send(running);
    }
}

/// Runs until the program ends, however often it is kicked.
pub fn run_to_end(vcpu: &mut SoftVcpu, watchdog: &Watchdog) -> Exit {
    watchdog.watch(true);
    loop {
        let exit = vcpu.run().expect("an exit");
        if exit != Exit::Kicked || watchdog.expired.load(Ordering::Relaxed) {
            watchdog.watch(false);
            return exit;
        }
    }
}

/// One of the machines that are compared.
pub struct Machine {
    pub vcpu: SoftVcpu,
    region: Arc<GuestRegion>,
    pub watchdog: Watchdog,
    pub vm: SoftVm,
}

impl Machine {
    pub fn new(translate: &str) -> Machine {
        let region = engine::memory::create_region("streams", 0, RAM as u64).expect("guest memory");
        let options = vec![("translate".to_owned(), translate.to_owned())];
        let config = VmConfig { vcpus: 1, io: Arc::new(NoDevices), strict_msr: true, options };
        let vm = SoftVm::new(config).expect("a machine");
        vm.map_memory(0, region.clone(), true).expect("memory mapped");
        let vcpu = vm.soft_vcpu(0, &engine_soft::cpuid::supported_cpuid()).expect("a processor");
        let watchdog = Watchdog::new(vcpu.kicker());
        Machine { vcpu, region, watchdog, vm }
    }

    /// The state in which programs start, with registers still to be filled.
    pub fn start(&mut self, mode: Mode) -> VcpuState {
        let mut state = VcpuState::reset(0);
        state.control.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET | cr0::MP | cr0::AM;
        state.control.cr3 = TABLES;
        state.control.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::PGE;
        let cpu = self.vcpu.cpu();
        state.control.cr4 |= cpu.cr4_allowed() & cr4::FSGSBASE;
        state.control.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        state.control.xcr0 = cpu.xcr0_allowed() & 7;
        let (code, data) = match (mode.cpl, mode.bits) {
            (0, 64) => (flat(0x08, 0xa09b), flat(0x10, 0xc093)),
            (0, _) => (flat(0x18, 0xc09b), flat(0x10, 0xc093)),
            (_, 64) => (flat(0x2b, 0xa0fb), flat(0x23, 0xc0f3)),
            (..) => (flat(0x33, 0xc0fb), flat(0x23, 0xc0f3)),
        };
        let segments = &mut state.segments;
        segments.cs = code;
        for segment in [&mut segments.ss, &mut segments.ds, &mut segments.es, &mut segments.fs] {
            *segment = data;
        }
        segments.fs.base = FS_BASE;
        segments.gs = Segment { base: if mode.bits == 64 { GS_BASE } else { 0 }, ..data };
        segments.gdt.base = GDT;
        segments.gdt.limit = 0xff;
        segments.idt.base = IDT;
        segments.idt.limit = 0xfff;
        segments.tr = Segment { selector: 0x38, attributes: 0x8b, limit: 0x67, base: TSS, unusable: false };
        state
    }

    pub fn load(&mut self, image: &Image, state: &VcpuState) {
        // Through the region, so that code that was there is known to be gone.
        self.region.write_slice(&image.bytes, MemoryRegionAddress(0)).expect("inside RAM");
        self.vcpu.set_state(state).expect("a state");
    }

    pub fn run(&mut self) -> Exit {
        run_to_end(&mut self.vcpu, &self.watchdog)
    }

    pub fn memory(&self) -> Vec<u8> {
        let mut bytes = vec![0; RAM];
        self.region.read_slice(&mut bytes, MemoryRegionAddress(0)).expect("inside RAM");
        bytes
    }
}

/// What kernel memory at a linear address holds in a dump of RAM.
pub fn kernel_word(memory: &[u8], linear: u64) -> u64 {
    let at = (linear - KERNEL + KERNEL_GPA) as usize;
    u64::from_le_bytes(memory[at..][..8].try_into().expect("eight bytes"))
}

/// Clears what interrupts leave behind: their own stacks and variables, and which pages were accessed and written.
pub fn forget_interrupts(memory: &mut [u8]) {
    memory[(INTERRUPTS - KERNEL + KERNEL_GPA) as usize..CODE_GPA as usize].fill(0);
    for entry in memory[..KERNEL_GPA as usize].chunks_mut(8) {
        entry[0] &= !(pte::A | pte::D) as u8;
    }
}

/// How many turns a program had left.
pub fn turns_left(memory: &[u8]) -> i32 {
    i32::from_le_bytes(memory[COUNTER_GPA as usize..][..4].try_into().expect("four bytes"))
}

/// Whether a place in RAM is in a page table.
pub fn is_table(gpa: u64) -> bool {
    gpa < KERNEL_GPA
}

/// Names a place in RAM.
pub fn place(gpa: u64) -> String {
    let linear = match gpa {
        KERNEL_GPA..CODE_GPA => {
            let linear = gpa - KERNEL_GPA + KERNEL;
            if linear >= RECORDS {
                let at = linear - RECORDS;
                return format!("record {} +{:#x}", at >> RECORD_SHIFT, at & ((1 << RECORD_SHIFT) - 1));
            }
            linear
        }
        CODE_GPA..DATA_GPA => gpa - CODE_GPA + CODE,
        DATA_GPA..COUNTER_GPA => gpa - DATA_GPA + DATA,
        COUNTER_GPA.. => gpa - COUNTER_GPA + COUNTER,
        _ => return format!("page tables at {gpa:#x}"),
    };
    format!("memory {linear:#x}")
}

/// A line for each recorded exception.
pub fn records(memory: &[u8]) -> Vec<String> {
    (0..kernel_word(memory, RECORDED))
        .map(|number| {
            let word = |index: u64| kernel_word(memory, RECORDS + (number << RECORD_SHIFT) + 8 * index);
            let gpr: Vec<u64> = (0..15).map(word).rev().collect();
            format!(
                "vector {} code {:#x} rip {:#x} rflags {:#x} rsp {:#x} cr2 {:#x} rax rcx rdx rbx rbp rsi rdi r8.. {gpr:x?}",
                word(15),
                word(16),
                word(17),
                word(19),
                word(20),
                word(22)
            )
        })
        .collect()
}
