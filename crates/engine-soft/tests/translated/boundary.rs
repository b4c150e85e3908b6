//! Code at the end of a page whose next page is absent or not executable, until the handler of the fault maps it.

use iced_x86::code_asm::*;
use x86::paging::{fault, pte};

use crate::common::*;
use crate::world::*;

/// The page that is missing.
const MISSING: u64 = PAGES + PAGE;

/// Counts page faults, notes of the last its error code, RIP, RSP, RFLAGS and CR2, and maps the page.
fn page_fault_handler(world: &World) {
    world.mapping_handler(0, MISSING, |a| {
        a.inc(qword_ptr(NOTES))?;
        note_stack(a, &[(1, 8), (2, 16), (3, 40), (4, 32)])?;
        a.mov(rax, cr2)?;
        a.mov(qword_ptr(NOTES + 40), rax)
    });
}

/// What the entry of the page is before the fault, and what the error code says then.
fn kinds(cpl: u16) -> [(u64, u64); 2] {
    let user = if cpl == 3 { u64::from(fault::U) } else { 0 };
    [(0, user | u64::from(fault::I)), (MISSING | ALL | pte::NX, user | u64::from(fault::I | fault::P))]
}

/// Runs code at `from` in the state, with the page missing each turn: `rip`, `rsp` and `cr2` are those of the fault.
fn faults(world: &mut World, entries: &[u64], from: u64, rip: u64, pushed: u64, expected_rax: u64) {
    page_fault_handler(world);
    let cpl = world.cpl;
    for (missing, error_code) in kinds(cpl) {
        let mut state = world.start();
        for round in 0..4 {
            world.bench.set64(NOTES, 0);
            for entry_address in entries {
                world.bench.set64(*entry_address, missing);
            }
            state.regs.rip = from;
            state.regs.gpr[0] = 0;
            state.regs.gpr[3] = MISSING + 0x40;
            state.regs.rflags |= x86::bits::rflags::CF | x86::bits::rflags::ZF;
            world.run(&state);
            let notes = world.notes(6);
            let address = MISSING.max(rip);
            assert_eq!(
                [notes[0], notes[1], notes[2], notes[3], notes[4] & 0x8d5, notes[5]],
                [1, error_code, rip, STACK - pushed, 0x41, address],
                "round {round}: faults, error code, RIP, RSP, flags, CR2"
            );
            assert_eq!(world.gpr(0), expected_rax, "round {round}");
        }
    }
}

#[test]
fn an_instruction_across_the_border() {
    each(&[0, 3], |world| {
        for before in 1..5 {
            let at = MISSING - before;
            world.code(at - 3, |a| {
                a.nop()?;
                a.nop()?;
                a.nop()?;
                a.mov(eax, 0x1234_5678)?;
                end(a)
            });
            faults(world, &[entry(MISSING)], at - 3, at, 0, 0x1234_5678);
        }
    });
}

#[test]
fn code_that_runs_into_the_next_page() {
    each(&[0, 3], |world| {
        world.code(MISSING - 8, |a| {
            a.mov(ecx, 3)?;
            a.mov(edx, ecx)?;
            a.nop()?;
            a.lea(eax, ptr(rcx + 4))?;
            end(a)
        });
        faults(world, &[entry(MISSING)], MISSING - 8, MISSING, 0, 7);
    });
}

#[test]
fn branches_into_the_next_page() {
    each(&[0, 3], |world| {
        let to = MISSING + 0x40;
        world.code(to, |a| {
            a.mov(eax, 9)?;
            end(a)
        });
        let from = MISSING - 0x100;
        type Branch = fn(&mut CodeAssembler) -> Assembled;
        let branches: [(Branch, u64); 8] = [
            (|a| a.jmp(MISSING + 0x40), 0),
            (|a| a.je(MISSING + 0x40), 0),
            (|a| a.jmp(rbx), 0),
            (|a| a.call(MISSING + 0x40), 8),
            (|a| a.call(rbx), 8),
            (
                |a| {
                    a.mov(qword_ptr(DATA), rbx)?;
                    a.jmp(qword_ptr(DATA))
                },
                0,
            ),
            (
                |a| {
                    a.push(rbx)?;
                    a.ret()
                },
                0,
            ),
            (
                |a| {
                    let mut over = a.create_label();
                    a.jne(over)?;
                    a.jc(MISSING + 0x40)?;
                    a.set_label(&mut over)?;
                    a.ud2()
                },
                0,
            ),
        ];
        for (branch, pushed) in branches {
            world.code(from, branch);
            faults(world, &[entry(MISSING)], from, to, pushed, 9);
        }
    });
}

#[test]
fn a_page_that_comes_and_goes_while_code_is_linked_to_it() {
    // In a loop: the page is there twice, then is taken away by the program itself.
    each(&[0], |world| {
        const TURNS: u32 = 12;
        page_fault_handler(world);
        let mut state = world.start();
        world.bench.set64(NOTES, 0);
        world.code(MISSING + 0x40, |a| {
            a.inc(ebx)?;
            a.ret()
        });
        world.code(CODE, |a| {
            let mut turn = a.create_label();
            a.mov(ebp, TURNS)?;
            a.xor(ebx, ebx)?;
            a.set_label(&mut turn)?;
            a.call(MISSING + 0x40)?;
            a.call(MISSING + 0x40)?;
            a.mov(qword_ptr(entry(MISSING)), 0)?;
            a.invlpg(ptr(MISSING))?;
            a.dec(ebp)?;
            a.jne(turn)?;
            end(a)
        });
        state.regs.rip = CODE;
        world.run(&state);
        assert_eq!(world.gpr(3), u64::from(2 * TURNS));
        assert_eq!(world.note(0), u64::from(TURNS - 1), "the first time it was there");
    });
}
