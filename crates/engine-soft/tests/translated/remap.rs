//! Code whose linear address comes to mean another page: INVLPG, CR3, global pages, PCIDs.

use iced_x86::code_asm::*;
use x86::bits::cr4;
use x86::paging::pte;

use crate::common::*;
use crate::world::*;

/// The page whose mapping changes, and what it can be mapped to.
const WINDOW: u64 = PAGES;
const FRAMES: [u64; 4] = [0x60000, 0x62000, 0x64000, 0x66000];
/// Where in the window the function is.
const AT: u64 = 0x230;

/// How the function is reached.
#[derive(Clone, Copy, Debug)]
enum Reach {
    Call,
    CallRegister,
    CallMemory,
    /// PUSH of a return address, then a jump.
    Jump,
    /// By a function that lies in the page before and runs on into the window.
    RunOn,
}

const REACHES: [Reach; 5] = [Reach::Call, Reach::CallRegister, Reach::CallMemory, Reach::Jump, Reach::RunOn];

/// Puts into each frame a function, at its begin and at [`AT`], that adds a number of its own to RBX; the one at [`AT`] is
/// two blocks.
fn functions(world: &World) {
    for (index, frame) in FRAMES.into_iter().enumerate() {
        let value = 1u32 << (8 * index);
        let of = |at: u64| WINDOW + (at - frame);
        let put = |at: u64, a: &mut CodeAssembler| {
            let bytes = a.assemble(of(at)).expect("encodings");
            world.bench.write(at, &bytes);
        };
        let mut a = CodeAssembler::new(64).expect("an assembler");
        a.add(rbx, value as i32).expect("an instruction");
        a.ret().expect("an instruction");
        put(frame, &mut a);
        let mut a = CodeAssembler::new(64).expect("an assembler");
        let mut over = a.create_label();
        a.add(rbx, value as i32).expect("an instruction");
        a.jmp(over).expect("an instruction");
        a.ud2().expect("an instruction");
        a.set_label(&mut over).expect("a label");
        a.ret().expect("an instruction");
        put(frame + AT, &mut a);
    }
    // The page before the window ends with the begin of a function.
    world.code(WINDOW - 8, |a| {
        for _ in 0..8 {
            a.nop()?;
        }
        Ok(())
    });
}

fn reach(a: &mut CodeAssembler, how: Reach) -> Assembled {
    match how {
        Reach::Call => a.call(WINDOW + AT),
        Reach::CallRegister => {
            a.mov(rsi, WINDOW + AT)?;
            a.call(rsi)
        }
        Reach::CallMemory => {
            a.mov(qword_ptr(NOTES), (WINDOW + AT) as i32)?;
            a.call(qword_ptr(NOTES))
        }
        Reach::Jump => {
            let mut back = a.create_label();
            a.lea(rsi, ptr(back))?;
            a.push(rsi)?;
            a.jmp(WINDOW + AT)?;
            a.set_label(&mut back)
        }
        Reach::RunOn => a.call(WINDOW - 8),
    }
}

/// Sums over `turns` of all frames in turn.
fn sum(turns: u64) -> u64 {
    (0..FRAMES.len() as u64).map(|index| (1 << (8 * index)) * turns).sum()
}

const TURNS: u32 = 20;

#[test]
fn invlpg_after_a_page_table_entry_changed() {
    each(&[0], |world| {
        for how in REACHES {
            let mut state = world.start();
            functions(world);
            world.code(CODE, |a| {
                let mut turn = a.create_label();
                a.mov(ebp, TURNS)?;
                a.set_label(&mut turn)?;
                for frame in FRAMES {
                    a.mov(qword_ptr(entry(WINDOW)), (frame | ALL) as i32)?;
                    a.invlpg(ptr(WINDOW))?;
                    reach(a, how)?;
                }
                a.dec(ebp)?;
                a.jne(turn)?;
                end(a)
            });
            state.regs.gpr[3] = 0;
            world.run(&state);
            assert_eq!(world.gpr(3), sum(TURNS.into()), "{how:?}");
        }
    });
}

#[test]
fn an_instruction_across_pages_whose_second_page_changes() {
    each(&[0], |world| {
        let state = world.start();
        // `mov eax, …` with the last three bytes of the number, and the RET, in the next page.
        let at = WINDOW - 2;
        for (index, frame) in FRAMES.into_iter().enumerate() {
            world.bench.write(frame, &[index as u8 + 1, 0, 0, 0xc3]);
        }
        world.code(CODE, |a| {
            let mut turn = a.create_label();
            a.mov(ebp, TURNS)?;
            a.xor(ebx, ebx)?;
            a.set_label(&mut turn)?;
            for frame in FRAMES {
                a.mov(qword_ptr(entry(WINDOW)), (frame | ALL) as i32)?;
                a.invlpg(ptr(WINDOW))?;
                a.call(at)?;
                a.shr(eax, 8)?;
                a.add(ebx, eax)?;
            }
            a.dec(ebp)?;
            a.jne(turn)?;
            end(a)
        });
        world.bench.write(at, &[0xb8, 0]);
        world.run(&state);
        assert_eq!(world.gpr(3), u64::from(TURNS) * (1 + 2 + 3 + 4));
    });
}

/// Page tables of a second, third and fourth address space: all but the window as in the first.
const SPACES: [u64; 4] = [PML4, 0x8_0000, 0x8_4000, 0x8_8000];

/// Makes the address spaces; `global` is added to all pages but the window.
fn spaces(world: &World, global: u64) {
    for page in 0..512 {
        let at = PT + 8 * page;
        let window = page == WINDOW >> 12;
        world.bench.set64(at, page << 12 | ALL | if window { 0 } else { global });
    }
    for (index, space) in SPACES.into_iter().enumerate() {
        if index > 0 {
            let tables = world.bench.bytes(PML4, 0x4000);
            world.bench.write(space, &tables);
            for level in 0..3 {
                let next = space + 0x1000 * (level + 1);
                world.bench.set64(space + 0x1000 * level, next | ALL);
            }
        }
        world.bench.set64(space + 0x3000 + 8 * (WINDOW >> 12), FRAMES[index] | ALL);
    }
}

fn switch_spaces(world: &mut World, how: Reach, global: u64, pcid: bool) {
    let mut state = world.start();
    functions(world);
    spaces(world, global);
    state.control.cr4 |= if pcid { cr4::PCIDE } else { 0 };
    world.code(CODE, |a| {
        let mut turn = a.create_label();
        a.mov(ebp, TURNS)?;
        a.set_label(&mut turn)?;
        for (index, space) in SPACES.into_iter().enumerate() {
            let keep = if pcid { (1 << 63) | (index as u64 + 1) } else { 0 };
            a.mov(rax, space | keep)?;
            a.mov(cr3, rax)?;
            reach(a, how)?;
        }
        a.dec(ebp)?;
        a.jne(turn)?;
        end(a)
    });
    state.regs.gpr[3] = 0;
    world.run(&state);
    assert_eq!(world.gpr(3), sum(TURNS.into()), "{how:?}, global {global:#x}, PCIDs {pcid}");
}

#[test]
fn address_spaces_with_other_code_at_the_same_address() {
    each(&[0], |world| {
        for how in REACHES {
            for global in [0, pte::G] {
                switch_spaces(world, how, global, false);
            }
        }
    });
}

#[test]
fn address_spaces_with_pcids() {
    each(&[0], |world| {
        if world.bench.cpu().cr4_allowed() & cr4::PCIDE == 0 {
            return;
        }
        for how in REACHES {
            for global in [0, pte::G] {
                switch_spaces(world, how, global, true);
            }
        }
    });
}

#[test]
fn global_code_changes_with_invlpg_and_with_cr4() {
    each(&[0], |world| {
        for by_cr4 in [false, true] {
            let mut state = world.start();
            functions(world);
            world.code(CODE, |a| {
                let mut turn = a.create_label();
                a.mov(ebp, TURNS)?;
                a.set_label(&mut turn)?;
                for frame in FRAMES {
                    a.mov(qword_ptr(entry(WINDOW)), (frame | ALL | pte::G) as i32)?;
                    if by_cr4 {
                        a.mov(rax, cr4_register())?;
                        a.btc(rax, 7)?;
                        a.mov(cr4_register(), rax)?;
                        a.btc(rax, 7)?;
                        a.mov(cr4_register(), rax)?;
                    } else {
                        a.invlpg(ptr(WINDOW))?;
                    }
                    reach(a, Reach::Call)?;
                    a.mov(rax, cr3)?;
                    a.mov(cr3, rax)?;
                    reach(a, Reach::CallRegister)?;
                }
                a.dec(ebp)?;
                a.jne(turn)?;
                end(a)
            });
            state.regs.gpr[3] = 0;
            world.run(&state);
            assert_eq!(world.gpr(3), 2 * sum(TURNS.into()), "by CR4: {by_cr4}");
        }
    });
}

fn cr4_register() -> AsmRegisterCr {
    iced_x86::code_asm::cr4
}

#[test]
fn a_return_into_a_page_that_changed_meanwhile() {
    // The window's code calls a function outside that maps another frame over it and returns.
    each(&[0], |world| {
        let state = world.start();
        let changer = CODE + 0x800;
        for (index, frame) in FRAMES.into_iter().enumerate() {
            let mut a = CodeAssembler::new(64).expect("an assembler");
            a.call(changer).expect("an instruction");
            a.add(rbx, 1 << (8 * index)).expect("an instruction");
            a.ret().expect("an instruction");
            let bytes = a.assemble(WINDOW + AT).expect("encodings");
            world.bench.write(frame + AT, &bytes);
        }
        world.code(changer, |a| {
            a.mov(rdx, qword_ptr(r12 * 8 + NOTES + 64))?;
            a.mov(qword_ptr(entry(WINDOW)), rdx)?;
            a.invlpg(ptr(WINDOW))?;
            a.inc(r12d)?;
            a.and(r12d, 3)?;
            a.ret()
        });
        for (index, frame) in FRAMES.into_iter().enumerate() {
            world.bench.set64(NOTES + 64 + 8 * index as u64, frame | ALL);
        }
        world.bench.set64(entry(WINDOW), FRAMES[3] | ALL);
        world.code(CODE, |a| {
            let mut turn = a.create_label();
            a.mov(ebp, 4 * TURNS)?;
            a.xor(ebx, ebx)?;
            a.xor(r12d, r12d)?;
            a.set_label(&mut turn)?;
            a.call(WINDOW + AT)?;
            a.dec(ebp)?;
            a.jne(turn)?;
            end(a)
        });
        world.run(&state);
        assert_eq!(world.gpr(3), sum(TURNS.into()));
    });
}

#[test]
fn a_page_of_code_that_loses_its_rights() {
    // Code in the window asks the kernel to take a right away from its own page, and is back when the fault has restored it.
    each(&[3], |world| {
        const CALL: u8 = 0x81;
        let nx = pte::NX;
        for rights in [pte::P | pte::RW | pte::US | nx, pte::P | pte::RW, 0] {
            world.handler(CALL, |a| {
                let mut keep = a.create_label();
                a.push(rax)?;
                a.inc(r12)?;
                a.test(r12d, 3)?;
                a.jne(keep)?;
                a.mov(rax, WINDOW | rights)?;
                a.mov(qword_ptr(entry(WINDOW)), rax)?;
                a.invlpg(ptr(WINDOW))?;
                a.set_label(&mut keep)?;
                a.pop(rax)?;
                a.iretq()
            });
            world.handler(14, |a| {
                a.push(rax)?;
                a.inc(qword_ptr(NOTES))?;
                a.mov(rax, qword_ptr(rsp + 16))?;
                a.mov(qword_ptr(NOTES + 8), rax)?;
                a.mov(qword_ptr(entry(WINDOW)), (WINDOW | ALL) as i32)?;
                a.invlpg(ptr(WINDOW))?;
                a.pop(rax)?;
                a.add(rsp, 8)?;
                a.iretq()
            });
            let mut state = world.start();
            world.bench.set64(NOTES, 0);
            let mut after = 0;
            world.code(WINDOW, |a| {
                let mut turn = a.create_label();
                a.mov(ebp, 4 * TURNS)?; // 5
                a.set_label(&mut turn)?;
                a.inc(rbx)?; // 3
                a.int(i32::from(CALL))?; // 2
                a.dec(ebp)?;
                a.jne(turn)?;
                after = WINDOW + 10;
                end(a)
            });
            state.regs.rip = WINDOW;
            state.regs.gpr[3] = 0;
            state.regs.gpr[12] = 0;
            world.run(&state);
            assert_eq!(world.gpr(3), u64::from(4 * TURNS));
            assert_eq!(
                world.notes(2),
                [u64::from(TURNS), after],
                "rights {rights:#x}: faults, RIP of the last"
            );
        }
    });
}
