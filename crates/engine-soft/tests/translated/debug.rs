//! A debugger inside the guest: single steps and breakpoints over code that was translated and linked before.

use std::cell::OnceCell;

use iced_x86::code_asm::*;
use iced_x86::{Decoder, DecoderOptions, FlowControl};
use x86::bits::{self, rflags};

use crate::common::*;
use crate::world::*;

/// Notes of #DB: how many, then RIP and DR6 of each.
fn debug_handler(world: &World, resume: bool) {
    world.handler(1, |a| {
        a.push(rax)?;
        a.push(rcx)?;
        a.mov(rcx, qword_ptr(NOTES))?;
        a.inc(qword_ptr(NOTES))?;
        a.shl(rcx, 4)?;
        a.mov(rax, qword_ptr(rsp + 16))?;
        a.mov(qword_ptr(rcx + NOTES + 16), rax)?;
        a.mov(rax, dr6)?;
        a.mov(qword_ptr(rcx + NOTES + 24), rax)?;
        a.mov(rax, bits::dr6::FIXED)?;
        a.mov(dr6, rax)?;
        if resume {
            a.or(qword_ptr(rsp + 32), rflags::RF as i32)?;
        }
        a.pop(rcx)?;
        a.pop(rax)?;
        a.iretq()
    });
}

/// RIP and DR6 of each #DB.
fn stops(world: &World) -> Vec<(u64, u64)> {
    let count = world.note(0);
    assert!(count < 500, "the notes are full");
    (0..count).map(|index| (world.note(2 + 2 * index), world.note(3 + 2 * index))).collect()
}

/// A program with every kind of branch: first without, then with TF, then without again.
fn stepped_program(world: &World) -> u64 {
    let function = CODE + 0x700;
    world.code(function, |a| {
        a.push(rbp)?;
        a.mov(rbp, rsp)?;
        a.add(eax, dword_ptr(DATA))?;
        a.leave()?;
        a.ret()
    });
    let body = CODE + 0x400;
    world.code(body, |a| {
        let (mut again, mut over) = (a.create_label(), a.create_label());
        a.mov(ecx, 3)?;
        a.set_label(&mut again)?;
        a.add(qword_ptr(DATA + 8), rcx)?;
        a.call(function)?;
        a.mov(rsi, function)?;
        a.call(rsi)?;
        a.cmp(eax, 7)?;
        a.je(over)?;
        a.nop()?;
        a.set_label(&mut over)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.mov(edi, DATA as u32 + 64)?;
        a.mov(ecx, 3)?;
        a.rep().stosd()?;
        a.xor(edx, edx)?;
        a.mov(ebx, 5)?;
        a.div(ebx)?;
        a.ret()
    });
    world.code(CODE, |a| {
        let (mut turn, mut clear) = (a.create_label(), a.create_label());
        a.mov(r13d, 6)?;
        a.set_label(&mut turn)?;
        a.cmp(r13d, 2)?;
        a.jne(clear)?;
        a.pushfq()?;
        a.or(qword_ptr(rsp), rflags::TF as i32)?;
        a.popfq()?;
        a.set_label(&mut clear)?;
        a.call(body)?;
        a.pushfq()?;
        a.and(qword_ptr(rsp), !(rflags::TF as i32))?;
        a.popfq()?;
        a.dec(r13d)?;
        a.jne(turn)?;
        end(a)
    });
    body
}

#[test]
fn single_steps_stop_after_each_instruction() {
    for cpl in [0, 3] {
        // The interpreter comes first.
        let expected = OnceCell::new();
        each(&[cpl], |world| {
            debug_handler(world, false);
            stepped_program(world);
            let mut state = world.start();
            state.regs.gpr[0] = 1;
            world.bench.set64(DATA, 3);
            world.run(&state);
            let gpr: Vec<u64> = (0..16).map(|index| world.gpr(index)).collect();
            let found = (stops(world), gpr);
            check_steps(&found.0);
            assert_eq!(&found, expected.get_or_init(|| found.clone()));
        });
    }
}

/// One stop for each instruction of one call of the body, and each iteration of the repeated one; all for BS.
fn check_steps(stops: &[(u64, u64)]) {
    // CALL, MOV, three times the loop (13 or 14 instructions with two functions of 5), 9 with STOSD's iterations, and what
    // clears TF.
    let in_function = stops.iter().filter(|(rip, _)| (CODE + 0x700..CODE + 0x800).contains(rip)).count();
    assert_eq!(in_function, 6 * 5, "steps in the function");
    assert!(stops.iter().all(|(_, status)| status & 0xf00f == bits::dr6::BS));
    let repeated = stops.windows(2).filter(|pair| pair[0].0 == pair[1].0).count();
    assert_eq!(repeated, 2, "the string instruction stops after each iteration");
}

/// A loop over a body that is translated and linked, with DR7 changed in the middle: for the first and last third of the
/// turns it is off.
fn with_breakpoint(
    world: &mut World,
    address: u64,
    enabled: u64,
    body: fn(&mut CodeAssembler) -> Assembled,
) -> Vec<(u64, u64)> {
    const THIRD: u32 = 10;
    debug_handler(world, true);
    world.code(FUNCTION, body);
    world.code(CODE, |a| {
        let (mut turn, mut no, mut off) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(rax, address)?;
        a.mov(dr0, rax)?;
        a.mov(ebp, 3 * THIRD)?;
        a.set_label(&mut turn)?;
        a.cmp(ebp, 2 * THIRD)?;
        a.jne(no)?;
        a.mov(rax, enabled | bits::dr7::FIXED)?;
        a.mov(dr7, rax)?;
        a.set_label(&mut no)?;
        a.cmp(ebp, THIRD)?;
        a.jne(off)?;
        a.mov(rax, bits::dr7::FIXED)?;
        a.mov(dr7, rax)?;
        a.set_label(&mut off)?;
        a.call(FUNCTION)?;
        a.dec(ebp)?;
        a.jne(turn)?;
        end(a)
    });
    world.bench.set64(NOTES, 0);
    let state = world.start();
    world.run(&state);
    let found = stops(world);
    assert_eq!(found.len() as u32 % THIRD, 0, "as many in each turn: {found:x?}");
    assert!(
        found.chunks(found.len() / THIRD as usize).all(|turn| turn == &found[..found.len() / THIRD as usize])
    );
    found[..found.len() / THIRD as usize].to_vec()
}

/// Where the function that [`with_breakpoint`] calls is.
const FUNCTION: u64 = CODE + 0x800;

/// Addresses of its instructions.
fn instructions(world: &World) -> Vec<u64> {
    let code = world.bench.bytes(FUNCTION, 0x80);
    let mut decoder = Decoder::with_ip(64, &code, FUNCTION, DecoderOptions::NONE);
    let mut found = Vec::new();
    loop {
        let instruction = decoder.decode();
        found.push(instruction.ip());
        if instruction.flow_control() == FlowControl::Return {
            return found;
        }
    }
}

/// A breakpoint of DR0: length and kind as in DR7.
fn dr7_of(kind: u64, len_bytes: u64) -> u64 {
    let len = match len_bytes {
        1 => 0,
        2 => 1,
        4 => 3,
        _ => 2,
    };
    2 | kind << 16 | len << 18
}

const EXECUTE: u64 = 0;
const WRITE: u64 = 1;
const IO: u64 = 2;
const READ_OR_WRITE: u64 = 3;

#[test]
fn breakpoints_on_execution() {
    each(&[0], |world| {
        fn body(a: &mut CodeAssembler) -> Assembled {
            let mut over = a.create_label();
            a.mov(eax, 1)?;
            a.add(eax, 2)?;
            a.jmp(over)?;
            a.nop()?;
            a.set_label(&mut over)?;
            a.mov(ecx, eax)?;
            a.ret()
        }
        // All but the NOP that is jumped over.
        world.code(FUNCTION, body);
        for (number, at) in instructions(world).into_iter().enumerate().filter(|(number, _)| *number != 3) {
            let found = with_breakpoint(world, at, dr7_of(EXECUTE, 1), body);
            assert_eq!(found, [(at, bits::dr6::FIXED | 1)], "instruction {number}");
        }
    });
}

#[test]
fn breakpoints_on_data() {
    each(&[0], |world| {
        fn body(a: &mut CodeAssembler) -> Assembled {
            a.mov(ecx, dword_ptr(DATA))?; // reads
            a.mov(dword_ptr(DATA + 2), ecx)?; // overlaps
            a.inc(byte_ptr(DATA + 3))?;
            a.mov(dword_ptr(DATA + 8), ecx)?; // beside
            a.mov(rsi, rsp)?;
            a.mov(esp, DATA as u32 + 8)?;
            a.push(rax)?;
            a.mov(rsp, rsi)?;
            a.ret()
        }
        world.code(FUNCTION, body);
        let at = instructions(world);
        // Traps: RIP is behind the instruction.
        let (read, store, add, push) = (at[1], at[2], at[3], at[7]);
        let stop = |rip| (rip, bits::dr6::FIXED | 1);
        let found = with_breakpoint(world, DATA, dr7_of(WRITE, 4), body);
        assert_eq!(found, [stop(store), stop(add), stop(push)]);
        let found = with_breakpoint(world, DATA, dr7_of(READ_OR_WRITE, 4), body);
        assert_eq!(found, [stop(read), stop(store), stop(add), stop(push)]);
        let found = with_breakpoint(world, DATA + 3, dr7_of(WRITE, 1), body);
        assert_eq!(found, [stop(store), stop(add), stop(push)]);
    });
}

#[test]
fn breakpoints_on_ports() {
    each(&[0], |world| {
        fn body(a: &mut CodeAssembler) -> Assembled {
            a.mov(dx, 0x5c0u32)?;
            a.mov(al, 1u32)?;
            a.out(dx, al)?;
            a.inc(edx)?;
            a.out(dx, al)?;
            a.in_(al, dx)?;
            a.ret()
        }
        world.code(FUNCTION, body);
        let at = instructions(world);
        let found = with_breakpoint(world, 0x5c1, dr7_of(IO, 1), body);
        assert_eq!(found, [(at[5], bits::dr6::FIXED | 1), (at[6], bits::dr6::FIXED | 1)]);
    });
}
