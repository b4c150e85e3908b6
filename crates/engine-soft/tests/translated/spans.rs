//! Accesses that differ by constants, and repeated string instructions, where pages end, are missing or may not be stored to.

use iced_x86::code_asm::*;
use x86::paging::{fault, pte};

use crate::common::*;
use crate::world::*;

/// The border that the accesses are around.
const BORDER: u64 = DATA + PAGE;
/// Memory for the page behind it, where the two are not neighbours.
const ELSEWHERE: u64 = DATA + 5 * PAGE;
/// Often enough to have a body translated.
const TURNS: u32 = 8;

/// A page fault is noted (number of faults, error code, RIP, CR2, RCX), and its page is mapped for everything.
fn mapping_handler(world: &World) {
    world.mapping_handler(0, BORDER, |a| {
        a.inc(qword_ptr(NOTES))?;
        note_stack(a, &[(1, 8), (2, 16)])?;
        a.mov(rax, cr2)?;
        a.mov(qword_ptr(NOTES + 24), rax)?;
        a.mov(qword_ptr(NOTES + 32), rcx)
    });
}

/// Maps the page behind the border to memory that does not follow the page before it.
fn tear_apart(world: &World) {
    world.bench.set64(entry(BORDER), ELSEWHERE | ALL);
}

/// Where a linear address is in memory, once [`tear_apart`] was called.
fn physical(linear: u64) -> u64 {
    if linear < BORDER { linear } else { linear - BORDER + ELSEWHERE }
}

/// The block in front of a loop includes its first round, whose accesses are on both sides of the border.
#[test]
fn a_loop_behind_other_instructions_at_a_border() {
    each(&[0, 3], |world| {
        let end_of_loop = BORDER + 0x60;
        world.repeat(TURNS, |a| {
            let mut again = a.create_label();
            a.mov(rsi, BORDER - 8)?;
            a.mov(rdx, end_of_loop)?;
            a.xor(ecx, ecx)?;
            a.set_label(&mut again)?;
            a.mov(rax, qword_ptr(rsi))?;
            a.mov(rbx, qword_ptr(rsi + 8))?;
            a.inc(rcx)?;
            a.mov(qword_ptr(rsi + 16), rcx)?;
            a.add(rsi, 8)?;
            a.cmp(rsi, rdx)?;
            a.jne(again)
        });
        let state = world.start();
        world.run(&state);
        let rounds = (end_of_loop - (BORDER - 8)) / 8;
        assert_eq!(world.gpr(1), rounds);
        assert_eq!(world.bench.get64(end_of_loop + 8), rounds);
    });
}

#[test]
fn fields_on_both_sides_of_a_border() {
    each(&[0, 3], |world| {
        world.repeat(TURNS, |a| {
            a.mov(rax, qword_ptr(rbx))?;
            a.add(rax, qword_ptr(rbx + 8))?;
            a.mov(qword_ptr(rbx + 16), rax)?;
            a.add(rbx, 24)?;
            a.mov(rcx, qword_ptr(rbx - 8))?;
            a.mov(qword_ptr(rbx), rcx)?;
            a.sub(rbx, 24)
        });
        // First within a page, so that all is translated and both pages are known.
        for base in [DATA, BORDER + 0x100].into_iter().chain((BORDER - 40..=BORDER).step_by(8)) {
            world.bench.set64(physical(base), 5);
            world.bench.set64(physical(base + 8), 7);
            let mut state = world.start();
            tear_apart(world);
            state.regs.gpr[3] = base;
            world.run(&state);
            for field in [16, 24] {
                assert_eq!(world.bench.get64(physical(base + field)), 12, "{base:#x}");
            }
            assert_eq!(world.gpr(3), base);
        }
    });
}

/// The store of a span makes its page dirty, not the load before that looks up for both.
#[test]
fn a_page_is_clean_until_the_store() {
    /// A page that is missing between the two.
    const BETWEEN: u64 = DATA + 3 * PAGE;
    each(&[0, 3], |world| {
        world.mapping_handler(0, BETWEEN, |a| {
            a.mov(rax, qword_ptr(entry(BORDER)))?;
            a.mov(qword_ptr(NOTES), rax)
        });
        world.code(CODE, |a| {
            a.mov(rax, qword_ptr(rbx))?;
            a.mov(rdx, qword_ptr(rsi))?;
            a.mov(qword_ptr(rbx + 24), rax)?;
            end(a)
        });
        let mut state = world.start();
        (state.regs.gpr[3], state.regs.gpr[6]) = (BORDER, BETWEEN);
        for _ in 0..4 {
            world.bench.set64(entry(BORDER), BORDER | ALL);
            world.bench.set64(entry(BETWEEN), 0);
            world.run(&state);
            assert_eq!(world.note(0) & (pte::A | pte::D), pte::A, "when the page between was missed");
            assert_eq!(world.bench.get64(entry(BORDER)) & (pte::A | pte::D), pte::A | pte::D);
        }
    });
}

#[test]
fn the_access_that_faults_is_the_one_on_the_missing_page() {
    each(&[0, 3], |world| {
        mapping_handler(world);
        let user = if world.cpl == 3 { u64::from(fault::U) } else { 0 };
        let mut third = 0;
        world.repeat(TURNS, |a| {
            a.mov(rax, qword_ptr(rbx))?;
            a.mov(qword_ptr(rbx + 8), rax)?;
            // What is before the third access, in bytes of code: MOV EBP and the two above.
            third = CODE + 5 + 3 + 4;
            a.mov(qword_ptr(rbx + 16), rax)
        });
        let mut state = world.start();
        state.regs.gpr[3] = BORDER - 16;
        for _ in 0..3 {
            world.bench.set64(NOTES, 0);
            world.bench.set64(BORDER - 16, 0x1234);
            world.bench.set64(entry(BORDER), 0);
            world.run(&state);
            let expected = [1, u64::from(fault::W) | user, third, BORDER];
            assert_eq!(world.notes(4), expected, "faults, error code, RIP, CR2");
            assert_eq!(world.bench.get64(BORDER), 0x1234);
        }
    });
}

#[test]
fn loads_from_a_page_that_may_not_be_stored_to() {
    each(&[0, 3], |world| {
        mapping_handler(world);
        let user = if world.cpl == 3 { u64::from(fault::U) } else { 0 };
        world.repeat(TURNS, |a| {
            let mut reads_only = a.create_label();
            a.mov(rax, qword_ptr(rbx))?;
            a.add(rax, qword_ptr(rbx + 8))?;
            a.test(edi, edi)?;
            a.je(reads_only)?;
            a.mov(rcx, qword_ptr(rbx + 16))?;
            a.mov(qword_ptr(rbx + 24), rax)?;
            a.set_label(&mut reads_only)?;
            a.nop()
        });
        let mut state = world.start();
        // Stores of the kernel meet the protection too.
        state.control.cr0 |= x86::bits::cr0::WP;
        state.regs.gpr[3] = BORDER;
        for (stores, faults) in [(0, 0), (1, 1), (0, 0), (1, 1)] {
            world.bench.set64(entry(BORDER), BORDER | pte::P | pte::US);
            world.bench.set64(NOTES, 0);
            world.bench.set64(BORDER, 3);
            world.bench.set64(BORDER + 8, 4);
            state.regs.gpr[7] = stores;
            world.run(&state);
            assert_eq!(world.note(0), faults, "faults");
            let dirty = world.bench.get64(entry(BORDER)) & pte::D != 0;
            assert_eq!(dirty, stores != 0, "a page is dirty when it was stored to");
            if stores != 0 {
                let expected = u64::from(fault::P | fault::W) | user;
                assert_eq!(world.notes(4)[1], expected, "error code");
                assert_eq!(world.note(3), BORDER + 24, "CR2");
                assert_eq!(world.bench.get64(BORDER + 24), 7);
            }
        }
    });
}

#[test]
fn a_frame_across_a_border() {
    each(&[0, 3], |world| {
        let function = CODE + 0x400;
        world.code(function, |a| {
            a.push(rbp)?;
            a.push(r15)?;
            a.push(r12)?;
            a.sub(rsp, 24)?;
            a.mov(qword_ptr(rsp + 16), rdi)?;
            a.mov(rax, qword_ptr(rsp + 16))?;
            a.add(rsp, 24)?;
            a.pop(r12)?;
            a.pop(r15)?;
            a.pop(rbp)?;
            a.ret()
        });
        world.repeat(TURNS, |a| {
            a.lea(rdi, ptr(rdi + 1))?;
            a.call(function)
        });
        for stack in (BORDER - 16..BORDER + 96).step_by(8) {
            let mut state = world.start();
            tear_apart(world);
            (state.regs.gpr[4], state.regs.gpr[7]) = (stack, 0x100);
            (state.regs.gpr[12], state.regs.gpr[15]) = (12, 15);
            world.run(&state);
            let registers = [0, 7, 12, 15].map(|register| world.gpr(register));
            assert_eq!(registers, [0x108, 0x108, 12, 15], "RSP {stack:#x}");
        }
    });
}

/// Copies or fills across three pages, for each width and several places in their pages.
#[test]
fn repeated_moves_across_pages() {
    each(&[0, 3], |world| {
        let (from, to) = (DATA, DATA + 4 * PAGE);
        for (width, skew) in [(1, 1), (2, 3), (4, 2), (8, 5), (8, 0), (1, 4095), (2, 4095)] {
            let count = 2 * PAGE / width + 3;
            world.code(CODE, |a| {
                match width {
                    1 => a.rep().movsb()?,
                    2 => a.rep().movsw()?,
                    4 => a.rep().movsd()?,
                    _ => a.rep().movsq()?,
                }
                end(a)
            });
            for offset in 0..count * width + 16 {
                world.bench.write(from + offset, &[(offset % 251) as u8]);
            }
            world.bench.write(to + skew + count * width, &[0xee]);
            let mut state = world.start();
            (state.regs.gpr[1], state.regs.gpr[6], state.regs.gpr[7]) = (count, from + 1, to + skew);
            world.run(&state);
            let len = count * width;
            assert_eq!([1, 6, 7].map(|r| world.gpr(r)), [0, from + 1 + len, to + skew + len]);
            let bytes = world.bench.bytes(to + skew, len + 1);
            let wrong = (0..len).find(|i| bytes[*i as usize] != ((i + 1) % 251) as u8);
            assert_eq!(wrong, None, "width {width}, skew {skew}");
            assert_eq!(bytes[len as usize], 0xee, "nothing behind the end");
        }
    });
}

#[test]
fn a_repeated_store_stops_at_a_missing_page() {
    each(&[0, 3], |world| {
        mapping_handler(world);
        world.code(CODE, |a| {
            a.rep().stosw()?;
            end(a)
        });
        // The last element before the border reaches into it.
        let start = BORDER - 101;
        let mut state = world.start();
        (state.regs.gpr[0], state.regs.gpr[1], state.regs.gpr[7]) = (0x5a5a, 200, start);
        for _ in 0..3 {
            world.bench.set64(NOTES, 0);
            world.bench.set64(entry(BORDER), 0);
            world.run(&state);
            let notes = world.notes(5);
            assert_eq!(
                [notes[0], notes[2], notes[3], notes[4]],
                [1, CODE, BORDER, 150],
                "faults, RIP, CR2, RCX"
            );
            assert_eq!([1, 7].map(|r| world.gpr(r)), [0, start + 400]);
            assert!(world.bench.bytes(start, 400).iter().all(|byte| *byte == 0x5a));
        }
    });
}

/// A loop whose span is not in one page is linked to a translation without spans: it is not left at every turn.
#[test]
fn a_loop_across_a_border_stays_in_translated_code() {
    const TURNS: u32 = 10_000;
    let mut world = World::new(1, "on", 3, std::sync::Arc::new(NoDevices));
    world.code(CODE, |a| {
        let mut turn = a.create_label();
        a.mov(ebp, TURNS)?;
        a.set_label(&mut turn)?;
        a.mov(rax, qword_ptr(rsp + 8))?;
        a.add(rax, qword_ptr(rsp + 16))?;
        a.mov(qword_ptr(rsp + 24), rax)?;
        a.dec(ebp)?;
        a.jne(turn)?;
        end(a)
    });
    for stack in [BORDER - 40, BORDER - 16] {
        let mut state = world.start();
        state.regs.gpr[4] = stack;
        let before = world.bench.cpu().counters.target_misses;
        world.run(&state);
        let left = world.bench.cpu().counters.target_misses - before;
        assert!(left < 50, "RSP {stack:#x}: left {left} times");
    }
}

/// A push whose operand spans pages is executed as a whole by its handler: what it was to look up for the accesses after
/// it has not been looked up then.
#[test]
fn a_push_from_two_pages_before_other_accesses_of_the_stack() {
    each(&[0, 3], |world| {
        world.repeat(TURNS, |a| {
            a.push(qword_ptr(rbx))?;
            a.push(0x12)?;
            a.pop(rcx)?;
            a.pop(rdx)
        });
        for (base, value, below) in [(DATA, 5, 0), (BORDER - 4, 7, 0x100)] {
            world.bench.set64(base, value);
            let mut state = world.start();
            state.regs.gpr[3] = base;
            state.regs.gpr[4] -= below;
            world.run(&state);
            assert_eq!([1, 2].map(|r| world.gpr(r)), [0x12, value], "{base:#x}");
        }
    });
}
