//! A machine with descriptor tables, a way to end programs, and handlers of exceptions that tests write.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use engine::{Exit, GuestRegion, IoHandler, MpState, Vcpu, VcpuState};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use x86::Segment;
use x86::bits::{cr4, rflags};
use x86::paging::pte;

use crate::common::*;

/// What `soft.translate` can be: each test runs with all of them.
pub const ENGINES: [&str; 4] = ["off", "on", "always", "check"];
/// INT of this vector ends a program.
pub const END: u8 = 0x80;
/// The vector that tests use for interrupts.
pub const IRQ: u8 = 0x40;
/// Handlers, 100h bytes for each vector.
const HANDLERS: u64 = 0x30000;
/// Stack of handlers, where they come from user mode.
const HANDLER_STACK: u64 = 0x48000;
/// Where handlers and programs put what tests look at: words from here on.
pub const NOTES: u64 = 0x4a000;
/// Pages for code that tests move about.
pub const PAGES: u64 = 0x50000;
/// Data that tests may use.
pub const DATA: u64 = 0x70000;

pub const PAGE: u64 = 0x1000;
/// An entry of a page table that allows everything.
pub const ALL: u64 = pte::P | pte::RW | pte::US;

/// The entry of a page of the first two megabytes in the page tables of [`Bench::long_mode`].
pub fn entry(page: u64) -> u64 {
    PT + (page >> 12) * 8
}

pub struct World {
    pub bench: Bench,
    pub cpl: u16,
    pub name: &'static str,
}

/// Runs a test on each engine at each of these privilege levels.
pub fn each(levels: &[u16], test: impl Fn(&mut World)) {
    for name in ENGINES {
        for cpl in levels {
            println!("translate={name}, CPL {cpl}");
            test(&mut World::new(1, name, *cpl, Arc::new(NoDevices)));
        }
    }
}

pub type Assembled = Result<(), IcedError>;

impl World {
    pub fn new(vcpus: u32, name: &'static str, cpl: u16, io: Arc<dyn IoHandler>) -> World {
        World::on(region(), vcpus, name, cpl, io)
    }

    /// On memory that its devices know.
    pub fn on(
        region: Arc<GuestRegion>,
        vcpus: u32,
        name: &'static str,
        cpl: u16,
        io: Arc<dyn IoHandler>,
    ) -> World {
        let bench = Bench::with(vcpus, name, region, io);
        bench.long_mode(cpl);
        let descriptors = [0, 0xa09b, 0xc093, 0xc09b, 0xc0f3, 0xa0fb, 0xc0fb];
        for (index, attributes) in descriptors.into_iter().enumerate().skip(1) {
            bench.set64(GDT + 8 * index as u64, descriptor(0, 0xf_ffff, attributes));
        }
        bench.set64(TSS + 4, HANDLER_STACK);
        bench.set64(TSS + 36, HANDLER_STACK + 0x800);
        let world = World { bench, cpl, name };
        world.handler(END, |a| {
            let mut sleep = a.create_label();
            a.cli()?;
            a.set_label(&mut sleep)?;
            a.hlt()?;
            a.jmp(sleep)
        });
        world
    }

    /// Writes the handler of a vector.
    pub fn handler(&self, vector: u8, code: impl FnOnce(&mut CodeAssembler) -> Assembled) {
        self.handler_on(vector, 0, code);
    }

    /// Writes the handler of a vector, which runs on a stack of its own if that has a number.
    pub fn handler_on(&self, vector: u8, stack: u64, code: impl FnOnce(&mut CodeAssembler) -> Assembled) {
        let at = HANDLERS + 0x100 * u64::from(vector);
        self.bench.assemble(64, at, code);
        let low = at & 0xffff | 0x08 << 16 | stack << 32 | 0xee00 << 32 | (at >> 16 & 0xffff) << 48;
        self.bench.set64(IDT + 16 * u64::from(vector), low);
        self.bench.set64(IDT + 16 * u64::from(vector) + 8, at >> 32);
    }

    /// Writes a handler of page faults, on a stack of its own if that has a number, which maps a page for everything. Before it
    /// does, `notes` may use RAX; the error code is at RSP+8 then.
    pub fn mapping_handler(
        &self,
        stack: u64,
        page: u64,
        notes: impl FnOnce(&mut CodeAssembler) -> Assembled,
    ) {
        self.handler_on(14, stack, |a| {
            a.push(rax)?;
            notes(a)?;
            a.mov(rax, page | ALL)?;
            a.mov(qword_ptr(entry(page)), rax)?;
            a.invlpg(ptr(page))?;
            a.pop(rax)?;
            a.add(rsp, 8)?;
            a.iretq()
        });
    }

    /// A state that executes at [`CODE`], with the descriptor tables of this world and an x2APIC.
    pub fn start(&mut self) -> VcpuState {
        let mut state = self.bench.long_mode(self.cpl);
        if self.cpl == 3 {
            state.segments.cs = flat(0x2b, 0xa0fb);
            let data = flat(0x23, 0xc0f3);
            state.segments.ss = data;
            state.segments.ds = data;
            state.segments.es = data;
        }
        state.segments.tr =
            Segment { selector: 0x38, attributes: 0x8b, limit: 0x67, base: TSS, unusable: false };
        let allowed = self.bench.cpu().cr4_allowed();
        state.control.cr4 |= allowed & (cr4::PGE | cr4::DE);
        let base = state.msr(x86::msr::APIC_BASE).unwrap_or_default();
        state.set_msr(x86::msr::APIC_BASE, base | x86::msr::apic_base::EXTD);
        state.lapic.registers[0x20 / 16] = 0;
        state.lapic.registers[0xf0 / 16] = 0x1ff;
        state.regs.rflags = rflags::RESERVED_ONE;
        state
    }

    pub fn code(&self, at: u64, code: impl FnOnce(&mut CodeAssembler) -> Assembled) -> u64 {
        self.bench.assemble(64, at, code)
    }

    /// Writes a program that does something `turns` times (which may use all but RBP) and ends.
    pub fn repeat(&self, turns: u32, body: impl FnOnce(&mut CodeAssembler) -> Assembled) {
        self.code(CODE, |a| {
            let mut turn = a.create_label();
            a.mov(ebp, turns)?;
            a.set_label(&mut turn)?;
            body(a)?;
            a.dec(ebp)?;
            a.jne(turn)?;
            end(a)
        });
    }

    /// Runs the first vCPU from a state to the end of the program.
    pub fn run(&mut self, state: &VcpuState) {
        self.bench.load(state);
        self.go_on();
    }

    /// Runs all vCPUs from the states they have until all have ended.
    pub fn go_on(&mut self) {
        /// Nothing here takes a tenth of it; a test that does not end by itself fails then.
        const PATIENCE: Duration = Duration::from_secs(60);
        let kicks: Vec<_> = self.bench.vcpus.iter().map(|vcpu| vcpu.kicker()).collect();
        let (done, patient) = channel::<()>();
        let name = self.name;
        std::thread::scope(|scope| {
            let kicks = &kicks;
            scope.spawn(move || {
                if patient.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                    kicks.iter().for_each(|kick| kick.kick());
                }
            });
            let runs: Vec<_> = self
                .bench
                .vcpus
                .iter_mut()
                .enumerate()
                .map(|(id, vcpu)| {
                    scope.spawn(move || {
                        let exit = vcpu.run().expect("an exit");
                        if exit != Exit::Kicked {
                            // The others wait in HLT, or for what will not come.
                            let others = kicks.iter().enumerate().filter(|(other, _)| *other != id);
                            others.for_each(|(_, kick)| kick.kick());
                        }
                        (exit, vcpu.cpu().user.rip)
                    })
                })
                .collect();
            let exits: Vec<_> = runs.into_iter().map(|run| run.join().expect("a thread")).collect();
            drop(done);
            let ended = exits.iter().any(|(exit, _)| *exit == Exit::AllHalted);
            assert!(ended, "translate={name}: the program does not end: {exits:x?}");
        });
    }

    pub fn gpr(&mut self, register: usize) -> u64 {
        self.bench.cpu().user.gpr[register]
    }

    pub fn note(&self, index: u64) -> u64 {
        self.bench.get64(NOTES + 8 * index)
    }

    pub fn notes(&self, count: u64) -> Vec<u64> {
        (0..count).map(|index| self.note(index)).collect()
    }

    /// Makes the other vCPUs start from a state.
    pub fn load_all(&mut self, states: &[VcpuState]) {
        for (vcpu, state) in self.bench.vcpus.iter_mut().zip(states) {
            let state = VcpuState { mp_state: MpState::Running, ..state.clone() };
            vcpu.set_state(&state).expect("a state");
        }
    }
}

pub fn region() -> Arc<GuestRegion> {
    engine::memory::create_region("test", 0, RAM).expect("guest memory")
}

/// Notes what the stack of a handler holds: which note, and how far above RSP it is.
pub fn note_stack(a: &mut CodeAssembler, notes: &[(u64, u64)]) -> Assembled {
    for (note, from) in notes {
        a.mov(rax, qword_ptr(rsp + *from))?;
        a.mov(qword_ptr(NOTES + 8 * *note), rax)?;
    }
    Ok(())
}

/// Ends the program.
pub fn end(a: &mut CodeAssembler) -> Assembled {
    a.int(i32::from(END))
}

/// Ends an interrupt.
pub fn eoi(a: &mut CodeAssembler) -> Assembled {
    a.mov(ecx, 0x80bu32)?;
    a.xor(eax, eax)?;
    a.xor(edx, edx)?;
    a.wrmsr()
}

/// Sends an interrupt, by its ICR word, from a processor to itself.
pub fn send(a: &mut CodeAssembler, icr: u32) -> Assembled {
    a.mov(ecx, 0x830u32)?;
    a.mov(eax, icr)?;
    a.xor(edx, edx)?;
    a.wrmsr()
}
