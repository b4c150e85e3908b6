//! Returns that are not those of the last call, and calls that are too many or whose stack is missing.

use iced_x86::code_asm::*;
use x86::paging::pte;

use crate::common::*;
use crate::world::*;

/// A stack with room for deep recursion: up to here from [`PAGES`].
const DEEP: u64 = 0x1f_0000;
/// A function in another page than its callers.
const FAR: u64 = CODE + 0x2200;
const NEAR: u64 = CODE + 0x600;
const TURNS: u32 = 20;

/// A loop of [`TURNS`] over a body, which may use all but RBP.
fn turns(world: &World, body: impl FnOnce(&mut CodeAssembler) -> Assembled) {
    world.code(CODE, |a| {
        let mut turn = a.create_label();
        a.mov(ebp, TURNS)?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut turn)?;
        body(a)?;
        a.dec(ebp)?;
        a.jne(turn)?;
        a.mov(r14, rsp)?;
        end(a)
    });
}

#[test]
fn recursion_deeper_than_what_is_remembered() {
    each(&[0, 3], |world| {
        for depth in [3u64, 4000, 5000, 20_000] {
            // Two functions in two pages that call each other.
            for (at, other) in [(NEAR, FAR), (FAR, NEAR)] {
                world.code(at, |a| {
                    let mut done = a.create_label();
                    a.dec(rdi)?;
                    a.je(done)?;
                    a.push(rdi)?;
                    a.call(other)?;
                    a.pop(rax)?;
                    a.add(rbx, rax)?;
                    a.set_label(&mut done)?;
                    a.ret()
                });
            }
            turns(world, |a| {
                a.mov(edi, depth as u32)?;
                a.call(NEAR)
            });
            let mut state = world.start();
            state.regs.gpr[4] = DEEP;
            world.run(&state);
            assert_eq!(world.gpr(3), u64::from(TURNS) * (depth * (depth - 1) / 2), "depth {depth}");
            assert_eq!(world.gpr(14), DEEP, "the stack is balanced");
        }
    });
}

#[test]
fn a_function_that_moves_its_return_address() {
    each(&[0, 3], |world| {
        for at in [NEAR, FAR] {
            world.code(at, |a| {
                a.mov(rax, qword_ptr(rsp))?;
                a.movzx(eax, byte_ptr(rax))?;
                a.add(rbx, rax)?;
                a.inc(qword_ptr(rsp))?;
                a.ret()
            });
            turns(world, |a| {
                a.call(at)?;
                // The argument, which is no instruction.
                a.db(&[0x0f])?;
                a.call(at)?;
                a.db(&[0x06])?;
                a.add(ebx, 0x100)
            });
            let state = world.start();
            world.run(&state);
            assert_eq!(world.gpr(3), u64::from(TURNS) * 0x115);
        }
    });
}

#[test]
fn a_jump_out_of_many_calls() {
    each(&[0, 3], |world| {
        world.code(NEAR, |a| {
            let mut deeper = a.create_label();
            a.dec(edi)?;
            a.jne(deeper)?;
            // As longjmp does.
            a.mov(rsp, r12)?;
            a.jmp(r13)?;
            a.set_label(&mut deeper)?;
            a.call(NEAR)?;
            a.ud2()
        });
        turns(world, |a| {
            let mut back = a.create_label();
            a.mov(edi, 9)?;
            a.mov(r12, rsp)?;
            a.lea(r13, ptr(back))?;
            a.call(NEAR)?;
            a.ud2()?;
            a.set_label(&mut back)?;
            a.inc(rbx)
        });
        let state = world.start();
        world.run(&state);
        assert_eq!(world.gpr(3), u64::from(TURNS));
    });
}

/// Thunks as kernels have them against speculation: each return is that of a call which is not the last.
#[test]
fn thunks_that_return_for_others() {
    each(&[0, 3], |world| {
        let (jump_thunk, return_thunk, target) = (FAR, FAR + 0x40, NEAR + 0x80);
        world.code(jump_thunk, |a| {
            let mut over = a.create_label();
            a.call(over)?;
            a.int3()?;
            a.set_label(&mut over)?;
            a.mov(qword_ptr(rsp), rax)?;
            a.ret()
        });
        world.code(return_thunk, |a| {
            let mut over = a.create_label();
            a.call(over)?;
            a.int3()?;
            a.set_label(&mut over)?;
            a.lea(rsp, ptr(rsp + 8))?;
            a.ret()
        });
        world.code(target, |a| {
            a.add(rbx, 1)?;
            a.jmp(return_thunk)
        });
        world.code(NEAR, |a| {
            a.mov(eax, target as u32)?;
            a.call(jump_thunk)?;
            a.add(rbx, 0x100)?;
            a.call(target)?;
            a.jmp(return_thunk)
        });
        turns(world, |a| {
            a.call(NEAR)?;
            a.add(rbx, 0x1_0000)
        });
        let state = world.start();
        world.run(&state);
        assert_eq!(world.gpr(3), u64::from(TURNS) * 0x1_0102);
        assert_eq!(world.gpr(14), STACK, "the stack is balanced");
    });
}

#[test]
fn two_stacks_that_take_turns() {
    each(&[0, 3], |world| {
        // Swaps stacks and returns on the other one.
        world.code(FAR, |a| {
            a.xchg(qword_ptr(NOTES), rsp)?;
            a.ret()
        });
        const OTHER: u64 = DATA + 0x800;
        world.code(NEAR, |a| {
            a.add(rbx, 1)?;
            a.call(FAR)?;
            a.add(rbx, 0x100)?;
            a.call(FAR)?;
            a.add(rbx, 0x1_0000)?;
            a.call(FAR)?;
            a.jmp(NEAR)
        });
        turns(world, |a| a.call(FAR));
        world.bench.set64(NOTES, OTHER);
        world.bench.set64(OTHER, NEAR);
        let state = world.start();
        world.run(&state);
        assert_eq!(world.gpr(3), 7 * 0x1_0101 - 0x1_0000, "20 turns are 7, 7 and 6");
    });
}

#[test]
fn returns_that_drop_arguments_and_calls_that_only_push() {
    each(&[0, 3], |world| {
        for at in [NEAR, FAR] {
            world.code(at, |a| {
                a.mov(rax, qword_ptr(rsp + 8))?;
                a.add(rax, qword_ptr(rsp + 16))?;
                a.add(rbx, rax)?;
                a.ret_1(16)
            });
            turns(world, |a| {
                let (mut next, mut back) = (a.create_label(), a.create_label());
                a.push(3)?;
                a.push(4)?;
                a.call(at)?;
                // The address of what follows.
                a.call(next)?;
                a.set_label(&mut next)?;
                a.pop(rax)?;
                // A return that is a jump, and a jump that is a call.
                a.lea(rcx, ptr(back))?;
                a.push(5)?;
                a.push(6)?;
                a.push(rcx)?;
                a.mov(rax, at)?;
                a.push(rax)?;
                a.ret()?;
                a.ud2()?;
                a.set_label(&mut back)?;
                a.inc(rbx)
            });
            let state = world.start();
            world.run(&state);
            assert_eq!(world.gpr(3), u64::from(TURNS) * (3 + 4 + 5 + 6 + 1));
            assert_eq!(world.gpr(14), STACK, "the stack is balanced");
        }
    });
}

#[test]
fn a_call_whose_stack_is_missing() {
    each(&[0, 3], |world| {
        // Pages of the stack: the lower one is absent, or read-only, until the handler of the fault maps it.
        const LOWER: u64 = 0x10_0000;
        let missing: [u64; 2] = [0, LOWER | pte::P | pte::US];
        // On a stack of its own, where the fault cannot be pushed.
        world.mapping_handler(1, LOWER, |a| {
            a.inc(qword_ptr(NOTES))?;
            note_stack(a, &[(1, 16), (2, 40)])
        });
        world.code(FAR, |a| {
            a.inc(rbx)?;
            a.ret()
        });
        type Call = fn(&mut CodeAssembler) -> Assembled;
        let calls: [Call; 4] = [
            |a| a.call(FAR),
            |a| a.call(rsi),
            |a| a.call(qword_ptr(NOTES + 64)),
            |a| {
                a.push(rsi)?;
                a.pop(rcx)?;
                a.inc(rbx)
            },
        ];
        for call in calls {
            for missing in missing {
                // At the border, and across it.
                for over in [0, 3] {
                    let at = world.code(CODE, |a| {
                        let mut turn = a.create_label();
                        a.mov(ebp, TURNS)?;
                        a.set_label(&mut turn)?;
                        a.call(FAR)?;
                        a.jmp(CODE + 0x100)
                    });
                    let again = at - 10;
                    world.code(CODE + 0x100, |a| {
                        a.mov(rsi, FAR)?;
                        call(a)?;
                        a.call(FAR)?;
                        a.dec(ebp)?;
                        a.jne(again)?;
                        end(a)
                    });
                    world.bench.set64(NOTES, 0);
                    world.bench.set64(NOTES + 64, FAR);
                    let mut state = world.start();
                    world.bench.set64(entry(LOWER), missing);
                    state.regs.gpr[4] = LOWER + PAGE + over;
                    state.regs.gpr[3] = 0;
                    world.run(&state);
                    assert_eq!(world.note(0), 1, "one fault");
                    assert_eq!(world.note(1), CODE + 5, "at the first call");
                    assert_eq!(world.note(2), LOWER + PAGE + over, "RSP as before");
                    assert_eq!(world.gpr(3), 3 * u64::from(TURNS));
                }
            }
        }
    });
}

#[test]
fn calls_in_user_code_and_in_the_handler_it_interrupts_itself_for() {
    each(&[3], |world| {
        // The handler calls functions, too, and looks at what it was called from.
        world.handler(0x81, |a| {
            a.call(FAR)?;
            a.call(FAR)?;
            a.iretq()
        });
        world.code(FAR, |a| {
            a.inc(rbx)?;
            a.ret()
        });
        world.code(NEAR, |a| {
            a.call(FAR)?;
            a.int(0x81)?;
            a.call(FAR)?;
            a.ret()
        });
        turns(world, |a| {
            a.call(NEAR)?;
            a.call(NEAR)
        });
        let state = world.start();
        world.run(&state);
        assert_eq!(world.gpr(3), u64::from(TURNS) * 8);
    });
}

#[test]
fn returns_to_where_no_code_is() {
    each(&[0, 3], |world| {
        // #GP at the return, RSP as it was, where the address is not canonical; else #PF there, after it.
        for vector in [13, 14] {
            world.handler_on(vector, 1, |a| {
                a.mov(r8d, i32::from(vector))?;
                a.mov(r9, qword_ptr(rsp + 8))?;
                a.mov(r10, qword_ptr(rsp + 32))?;
                end(a)
            });
        }
        type Leave = fn(&mut CodeAssembler) -> Assembled;
        let leaves: [(Leave, bool); 3] = [
            (
                |a| {
                    a.push(rax)?;
                    a.ret()
                },
                false,
            ),
            (
                |a| {
                    a.nop()?;
                    a.jmp(rax)
                },
                false,
            ),
            (
                |a| {
                    a.nop()?;
                    a.call(rax)
                },
                true,
            ),
        ];
        for (number, (leave, call)) in leaves.into_iter().enumerate() {
            for address in [0, 1, 1 << 63, 1 << 47, u64::MAX - 0xfff, (1 << 63) | 1, 0x7fff_ffff_f000, 8] {
                let canonical = (address as i64) << 16 >> 16 == address as i64;
                // Once as the first thing, once with calls before, and thrice in a row: each from what was translated.
                for before in [0, 1, 2, 2] {
                    world.code(FAR, |a| a.ret());
                    let at = world.code(CODE, |a| {
                        for _ in 0..before {
                            a.call(FAR)?;
                        }
                        a.jmp(NEAR)
                    });
                    assert!(at < NEAR);
                    world.code(NEAR, leave);
                    let mut state = world.start();
                    world.bench.set64(entry(0), 0);
                    state.regs.gpr[0] = address;
                    world.run(&state);
                    let pushed = match (number, canonical, call) {
                        (0, false, _) | (_, true, true) => 8,
                        _ => 0,
                    };
                    let expected = if canonical { [14, address] } else { [13, NEAR + 1] };
                    let found = [world.gpr(8), world.gpr(9), world.gpr(10)];
                    assert_eq!(
                        found,
                        [expected[0], expected[1], STACK - pushed],
                        "{number}, {address:x}, {before} calls before: vector, RIP, RSP"
                    );
                }
            }
        }
    });
}
