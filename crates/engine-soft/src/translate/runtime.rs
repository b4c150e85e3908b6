//! The routines that translated code shares: the way in, the ways out, and the call of Rust code for what a block
//! cannot do itself. They are generated once a code memory, for each of the two kinds of code:
//!
//! - *user* code (CPL 3) runs with the guest's vector registers and MXCSR in the host's, loaded on the way in and saved
//!   on the way out, so that it uses them freely;
//! - *system* code loads them when it comes to an instruction that uses them, which is rare.
//!
//! Both load the x87 state when it is used. What has been loaded is in the host's registers until the code is left.
//!
//! Registers while translated code runs: see [`super::registers`]; RSP is a stack of its own, on which guest calls and returns
//! are paired so that the host's processor predicts them; GS is the vCPU's area. Nothing of Rust is in a register that is
//! not saved here.

use super::asm::{Address, Alu, Asm, Reg, Rm, Width, cond};
use super::registers::{T0, T1, home};
use crate::area::{gpr_offset, run_offset, user_offset};
use crate::cpu::Cpu;

/// Registers that a Rust function expects back.
const CALLEE_SAVED: [Reg; 6] = [Reg::RBX, Reg::RBP, Reg::R12, Reg::R13, Reg::R14, Reg::R15];

/// The two kinds of code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Without vector registers.
    System = 0,
    /// With vector registers.
    User = 1,
}

/// Addresses of one kind's routines.
#[derive(Clone, Copy, Debug)]
pub struct Routines {
    /// `extern "C" fn(code: u64)`: continues at translated code that expects the flags in memory.
    pub enter: u64,
    /// Interrupts the code for the site whose number is in [`T1`]; flags are in memory.
    pub slow: u64,
    /// Leaves: RIP is the page plus [`T1`]; flags are in memory.
    pub exit: u64,
    /// Leaves through the link whose number is in [`T1`], which says where it leads; flags are in memory.
    pub exit_link: u64,
    /// The same with the flags in the host's register.
    pub exit_link_host_flags: u64,
    /// Leaves: RIP is in [`T0`]; flags are in memory.
    pub exit_to: u64,
    /// To be called: loads the x87 state. [`T0`], [`T1`] and flags are lost.
    pub load_x87: u64,
    /// To be called: loads the vector registers. Flags are lost.
    pub load_vectors: u64,
}

/// EAX for XSAVE and XRSTOR of x87 state alone.
const X87_COMPONENT: u32 = 1;

/// Words of a pair on the stack of translated code.
pub const PAIR_BYTES: i32 = 16;

/// Called for a site: returns where the code goes on, or 0 to leave.
pub type SlowPath = extern "C" fn(cpu: *mut Cpu, site: u32) -> u64;

/// Generates the routines of one kind at the assembler's place.
pub fn generate(asm: &mut Asm, kind: Kind, slow_path: SlowPath) -> Routines {
    let (reload, leave, save_and_leave) = (asm.label(), asm.label(), asm.label());
    let save_and_leave_rip = asm.label();

    let enter = asm.address();
    for register in CALLEE_SAVED {
        asm.push(register);
    }
    // Calls from here want the stack aligned.
    asm.lea(Width::W64, Reg::RSP, Address::base(Reg::RSP, -8));
    asm.store(Width::W64, Rm::Area(run_offset!(host_stack)), Reg::RSP);
    asm.load(Width::W64, Reg::RSP, Rm::Area(run_offset!(shadow_stack)));
    asm.store(Width::W64, Rm::Area(run_offset!(resume)), Reg::RDI);
    asm.bind(reload);
    if kind == Kind::User {
        load_vectors(asm);
    } else {
        if_live(asm, run_offset!(vectors_live), load_vectors);
    }
    if_live(asm, run_offset!(x87_live), |asm| {
        load_component_number(asm);
        load_x87(asm);
    });
    load_flags(asm);
    for guest in 0..16 {
        if let Some(register) = home(guest) {
            asm.load(Width::W64, register, Rm::Area(gpr_offset(guest)));
        }
    }
    asm.jmp_rm(Rm::Area(run_offset!(resume)));

    let slow = asm.address();
    save_registers(asm, kind);
    asm.store(Width::W64, Rm::Area(run_offset!(shadow_stack)), Reg::RSP);
    asm.load(Width::W64, Reg::RSP, Rm::Area(run_offset!(host_stack)));
    asm.load(Width::W64, Reg::RDI, Rm::Area(run_offset!(cpu)));
    asm.load(Width::W32, Reg::RSI, Rm::Reg(T1));
    asm.mov_imm64(Reg::RAX, slow_path as usize as u64);
    asm.call_rm(Rm::Reg(Reg::RAX));
    asm.load(Width::W64, Reg::RSP, Rm::Area(run_offset!(shadow_stack)));
    asm.store(Width::W64, Rm::Area(run_offset!(resume)), Reg::RAX);
    asm.alu_imm(Alu::Cmp, Width::W64, Rm::Reg(Reg::RAX), 0);
    asm.jcc(cond::NE, reload);
    asm.bind(leave);
    asm.load(Width::W64, Reg::RSP, Rm::Area(run_offset!(host_stack)));
    asm.lea(Width::W64, Reg::RSP, Address::base(Reg::RSP, 8));
    for register in CALLEE_SAVED.iter().rev() {
        asm.pop(*register);
    }
    asm.ret();

    let exit_link_host_flags = asm.address();
    save_flags_by(asm, T0);
    let exit_link = asm.address();
    asm.store(Width::W32, Rm::Area(run_offset!(link)), T1);
    asm.jmp(save_and_leave);
    let exit = asm.address();
    asm.mov(T0, T1);
    asm.alu(Alu::Add, Width::W64, T0, Rm::Area(run_offset!(page)));
    asm.jmp(save_and_leave_rip);
    let exit_to = asm.address();
    asm.bind(save_and_leave_rip);
    asm.store(Width::W64, Rm::Area(user_offset!(rip)), T0);
    asm.bind(save_and_leave);
    save_registers(asm, kind);
    asm.store(Width::W64, Rm::Area(run_offset!(shadow_stack)), Reg::RSP);
    asm.jmp(leave);

    let load_x87_routine = asm.address();
    asm.mov(T0, Reg::RAX);
    asm.mov(T1, Reg::RDX);
    load_component_number(asm);
    load_x87(asm);
    asm.mov(Reg::RAX, T0);
    asm.mov(Reg::RDX, T1);
    asm.store_imm(Width::W32, Rm::Area(run_offset!(x87_live)), 1);
    asm.ret();
    let load_vectors_routine = asm.address();
    load_vectors(asm);
    asm.store_imm(Width::W32, Rm::Area(run_offset!(vectors_live)), 1);
    asm.ret();

    Routines {
        enter,
        slow,
        exit,
        exit_link,
        exit_link_host_flags,
        exit_to,
        load_x87: load_x87_routine,
        load_vectors: load_vectors_routine,
    }
}

/// What `emit` writes is executed if a word of the area is not zero.
fn if_live(asm: &mut Asm, word: i32, emit: impl FnOnce(&mut Asm)) {
    let skip = asm.label();
    asm.alu_imm(Alu::Cmp, Width::W32, Rm::Area(word), 0);
    asm.jcc(cond::E, skip);
    emit(asm);
    asm.bind(skip);
}

fn load_vectors(asm: &mut Asm) {
    for register in 0..16 {
        asm.load_ymm(register, user_offset!(vector) + 32 * i32::from(register));
    }
    asm.load_mxcsr(user_offset!(mxcsr));
}

fn save_vectors(asm: &mut Asm) {
    for register in 0..16 {
        asm.store_ymm(register, user_offset!(vector) + 32 * i32::from(register));
    }
    asm.store_mxcsr(user_offset!(mxcsr));
    asm.load_mxcsr(run_offset!(host_mxcsr));
    asm.vzeroupper();
}

fn load_component_number(asm: &mut Asm) {
    asm.mov_imm32(Reg::RAX, X87_COMPONENT);
    asm.mov_imm32(Reg::RDX, 0);
}

/// The header says that the image holds x87 state, whatever the last XSAVE thought of it.
fn load_x87(asm: &mut Asm) {
    asm.store_imm(Width::W64, Rm::Area(user_offset!(x87_header)), X87_COMPONENT as i32);
    asm.xrstor(user_offset!(x87));
}

/// Everything that is in registers, but the flags, to the area; then what Rust code expects of the vector unit.
fn save_registers(asm: &mut Asm, kind: Kind) {
    for guest in 0..16 {
        if let Some(register) = home(guest) {
            asm.store(Width::W64, Rm::Area(gpr_offset(guest)), register);
        }
    }
    if kind == Kind::User {
        save_vectors(asm);
    } else {
        if_live(asm, run_offset!(vectors_live), save_vectors);
    }
    if_live(asm, run_offset!(x87_live), |asm| {
        load_component_number(asm);
        asm.xsave(user_offset!(x87));
        asm.fninit();
    });
}

/// Packed flags in memory to the host's flags; RAX is lost.
fn load_flags(asm: &mut Asm) {
    asm.movzx16(Reg::RAX, Rm::Area(user_offset!(status)));
    asm.add_al(0x7f);
    asm.sahf();
}

/// The guest's flags from the host's register to memory. [`T1`] is lost, the host's flags are not.
pub fn save_flags(asm: &mut Asm) {
    save_flags_by(asm, T1);
}

/// The same; another register is lost.
fn save_flags_by(asm: &mut Asm, scratch: Reg) {
    asm.mov(scratch, Reg::RAX);
    asm.lahf();
    asm.seto_al();
    asm.store(Width::W16, Rm::Area(user_offset!(status)), Reg::RAX);
    asm.mov(Reg::RAX, scratch);
}

/// The guest's flags from memory to the host's register. [`T1`] is lost.
pub fn restore_flags(asm: &mut Asm) {
    asm.mov(T1, Reg::RAX);
    load_flags(asm);
    asm.mov(Reg::RAX, T1);
}
